"""--images: folders and .npz files, good and bad; what is held out; defaults; whole runs; resuming."""
import csv
import io
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ddpm
import lth_diffusion as lth
from support import classifier, cli, data, own, report, runs

SMALL = "--rounds 1 --steps 6 --batch 4 --nfe 4 --controls random --preset tiny".split()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Each test has its own working folder and caches."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    own.listing.cache_clear()
    own.read_once.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """Runs of seconds, without pictures."""
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=8, mults=(1,), patch=4))
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    monkeypatch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
    train = classifier.train
    monkeypatch.setattr(classifier, "train", lambda *a, **k: train(*a, **dict(steps=5, batch=16) | k))


def shape(rng, mode="L", size=16):
    """(kind, Pillow image) of a circle, square or triangle, at random."""
    kind, fine = rng.choice(["circle", "square", "triangle"]), 4 * size
    shade = rng.randrange(140, 256)
    fill = shade if mode == "L" else (shade, rng.randrange(256), 40)
    image = Image.new(mode, (fine, fine))
    r = rng.uniform(0.22, 0.36) * fine
    x, y = (rng.uniform(r, fine - r) for _ in range(2))
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    else:
        pen.regular_polygon((x, y, r), 4 if kind == "square" else 3, 0, fill)
    return kind, image.resize((size, size), Image.Resampling.LANCZOS)


def write_shapes(folder, n=80, mode="L", size=16, by_class=False, first=0):
    """n PNG files; in a subfolder per class, or all in one folder."""
    rng = random.Random(first)
    for i in range(first, first + n):
        kind, image = shape(rng, mode, size)
        path = folder / kind / f"{i}.png" if by_class else folder / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def noise(height, width, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def refusal(capsys, *argv, main=lth.main):
    """stderr's last line of a command line that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def flags(*argv):
    return lth.parse_args([str(word) for word in argv])[0]


def mistake(call):
    """The one line of the Mistake that call() raises."""
    with pytest.raises(cli.Mistake) as caught:
        call()
    assert "\n" not in str(caught.value) and "argument --image" in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- reading

def test_a_folder_with_classes(tmp_path):
    folder = write_shapes(tmp_path / "my shapes", 120, by_class=True)
    args = flags("--images", folder)
    images, labels = data.load(args)
    test, truth = data.load(args, "test")
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 16, 16) == test.shape[1:]
    assert len(images) + len(test) == 120 and 5 <= len(test) <= 24
    assert own.of(args).classes == ["circle", "square", "triangle"]
    where = {np.asarray(Image.open(p)).tobytes(): p.parent.name for p in folder.glob("*/*.png")}
    for pictures, numbers in (images, labels), (test, truth):
        for picture, number in zip(pictures, numbers):  # pixels as in the file, with their class
            assert where[picture.numpy().tobytes()] == own.of(args).classes[number]
    assert args.dataset == "my shapes" and args.out == "runs/my_shapes" and args.image_size == 16
    assert args.images == str(folder) and len(set(truth[:12].tolist())) > 1  # not class by class
    assert torch.allclose(data.shares_of(labels).sum(), torch.tensor(1.0))


def test_what_is_held_out_stays_so_when_files_are_added(tmp_path):
    folder = write_shapes(tmp_path / "a", 100)
    before = own.read(str(folder), 16)
    write_shapes(folder, 60, first=100)
    own.listing.cache_clear()
    after = own.read(str(folder), 16)
    for old, new in (before.train, after.train), (before.test, after.test):
        assert {x.numpy().tobytes() for x in old} < {x.numpy().tobytes() for x in new}
    names = [f"sub/{i}.png" for i in range(5000)]
    assert 400 < sum(map(own.held_out, names)) < 600
    assert own.held_out("e\u0301.png") == own.held_out("\xe9.png")  # macOS and Linux
    assert own.find(str(folder)) and all("\\" not in name for name in own.find(str(folder)))


def test_links_loops_hidden_files_and_odd_names(tmp_path):
    folder = write_shapes(tmp_path / "inside" / "a", 3)
    write_shapes(tmp_path / "inside" / "other", 2)
    write_shapes(tmp_path / "elsewhere", 2)
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to("..")  # siblings are not images of this folder
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "\xfcn\xef c\xf6d\xe9").mkdir()
    noise(9, 9).save(folder / "\xfcn\xef c\xf6d\xe9" / "\u65e5\u672c.JPG")
    noise(9, 9).save(folder / ".hidden.png")
    found = sorted(own.find(str(folder)))
    assert found == ["0.png", "1.png", "2.png", "linked/0.png", "linked/1.png",
                     "\xfcn\xef c\xf6d\xe9/\u65e5\u672c.JPG"]


@pytest.mark.skipif(sys.platform == "win32", reason="names are bytes on Unix alone")
def test_a_name_that_is_no_text(tmp_path):
    folder = write_shapes(tmp_path / "a", 100)
    shutil.copy(folder / "0.png", os.path.join(os.fsencode(folder), b"raw\xff.png"))
    found = own.read(str(folder), 16)
    assert len(found.train) + len(found.test) == 101


def test_central_square_and_antialiasing():
    wide = np.zeros((10, 90), np.uint8)
    wide[:, 40:50] = 200
    wide[:, :40] = np.random.default_rng(0).integers(0, 256, (10, 40))
    assert (own.square(Image.fromarray(wide), 10) == 200).all()
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))  # to a picker of pixels 0 or 255
    small = own.square(Image.fromarray(stripes), 8)
    assert small.shape == (8, 8) and abs(small[:, 1:-1].astype(int) - 128).max() <= 12
    assert own.square(noise(8, 8), 32).shape == (32, 32, 3)


def test_modes_of_files(tmp_path):
    """16 bits are scaled, not cut off; transparency is white; grey stays grey in any mode."""
    def through(image, ending="png", **options):
        file = io.BytesIO()
        image.save(file, ending, **options)
        return own.square(Image.open(file), 8)

    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert np.array_equal(through(Image.fromarray(deep)), (deep / 257).round().astype(np.uint8))
    clear = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    assert (through(clear) == 255).all() and through(clear).ndim == 2
    half = through(Image.new("RGBA", (8, 8), (0, 100, 200, 51)))
    assert half.shape == (8, 8, 3) and half[0, 0].tolist() == [204, 224, 244]
    colour, grey = noise(8, 8), noise(8, 8, "L")
    assert np.array_equal(through(colour), np.asarray(colour))
    for mode in ("RGB", "LA", "P"):
        assert np.array_equal(through(grey.convert(mode)), np.asarray(grey)), mode
    assert set(np.unique(through(noise(8, 8, "1")))) == {0, 255}
    palette = noise(8, 8, "P")
    assert np.array_equal(through(palette), np.asarray(palette.convert("RGB")))
    red = through(Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK"), "jpeg")
    assert red.shape == (8, 8, 3) and red[0, 0, 0] > 230 and red[0, 0, 1] < 40


def test_photographs_stand_upright_and_large_ones_are_read_at_a_part_of_their_size():
    rows = np.repeat(np.arange(256, dtype=np.uint8), 4)[:, None].repeat(1024, 1)  # dark at the top
    file, turned = io.BytesIO(), Image.fromarray(rows).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it
    turned.save(file, "jpeg", quality=95, exif=exif)
    image = Image.open(file)
    found = own.square(image, 16).astype(int)
    whole = np.asarray(Image.fromarray(rows).resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    assert image.size < (200, 200) and abs(found - whole).max() <= 3


def test_unreadable_files_are_named_and_counted(tmp_path, capsys):
    folder = write_shapes(tmp_path / "a", 100)
    whole = (folder / "3.png").read_bytes()
    (folder / "bad1.png").write_text("text")
    (folder / "bad2.png").write_bytes(whole[:len(whole) // 2])
    (folder / "bad3.png").write_bytes(b"")
    (folder / "bad4.png").symlink_to("nowhere")
    (folder / "bad5.png").symlink_to("bad5.png")
    noise(400, 400).save(folder / "bad6.jpg")
    (folder / "bad6.jpg").write_bytes((folder / "bad6.jpg").read_bytes()[:3000])
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "bad7.png")  # which nobody writes to
    args = flags("--images", folder)
    said = capsys.readouterr().out
    count = 7 if hasattr(os, "mkfifo") else 6
    assert said.count("\n") == 1 and f"{count} of {100 + count} files" in said and "bad" in said
    assert len(own.of(args).train) + len(own.of(args).test) == 100 and not own.of(args).colour


def test_one_colour_file_makes_all_colour_and_sizes_may_differ(tmp_path):
    folder = write_shapes(tmp_path / "a", 100, size=20)
    noise(30, 50).save(folder / "colour.png")
    noise(8, 5000, "L").save(folder / "wide.png")
    args = flags("--images", folder)
    assert own.of(args).train.shape[1:] == (3, 20, 20) and args.preset == "tiny"


# ------------------------------------------------------------------------------------------- bad input

def test_folders_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("x")
    write_shapes(tmp_path / "one", 1)
    write_shapes(tmp_path / "few", 21)
    (tmp_path / "texts").mkdir()
    for i in range(5):
        (tmp_path / "texts" / f"{i}.png").write_text("x")
    for name, words in dict(none="no PNG or JPEG", one="at least 20", absent="not there",
                            texts="none of the 5").items():
        for main in lth.main, ddpm.main:
            said = refusal(capsys, "--images", tmp_path / name, main=main)
            assert words in said and "--images" in said and str(tmp_path / name) in said
    assert "held out" in refusal(capsys, "--images", tmp_path / "few")
    assert "neither" in refusal(capsys, "--images", tmp_path / "none" / "a.txt")
    assert not os.path.exists("runs")


@pytest.mark.parametrize("arrays, words", [
    (dict(images=np.zeros((30, 8, 8))), "float64"), (dict(x=np.zeros((30, 8), np.uint8)), "[30, 8]"),
    (dict(images=np.array([{}], object)), "Python objects"),
    (dict(images=np.zeros((30, 3, 8, 8), np.uint8)), "[30, 3, 8, 8]"),
    (dict(images=np.zeros((0, 8, 8), np.uint8)), "[0, 8, 8, 1]"),
    (dict(a=np.zeros((30, 8, 8), np.uint8), b=np.zeros(3)), "a, b"), ({}, "nothing"),
    (dict(images=np.zeros((30, 8, 8), np.uint8), labels=np.zeros(30)), "labels"),
    (dict(images=np.zeros((30, 8, 8), np.uint8), labels=np.zeros(29, int)), "labels"),
    (dict(images=np.zeros((3, 8, 8), np.uint8)), "at least 20")])
def test_npz_files_that_cannot_be_used(tmp_path, arrays, words):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    said = mistake(lambda: own.read(str(path), 8))
    assert words in said and str(path) in said


def test_damaged_npz_files(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8))
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[:1000], whole[:900] + b"\0\1\2\3" + whole[904:]):
        path.write_bytes(content)
        own.listing.cache_clear()
        assert str(path) in mistake(lambda: own.read(str(path), 8))


def test_flags_that_do_not_go_together(tmp_path, capsys):
    folder = write_shapes(tmp_path / "a", 100)
    for main in lth.main, ddpm.main:
        said = refusal(capsys, "--images", folder, "--dataset", "digits", main=main)
        assert "--images" in said and "--dataset" in said
        assert "--image-size" in refusal(capsys, "--image-size", 16, main=main)
        for size, words in ((7, "nearest is 8"), (1000, "nearest is 256"), (30, "--image-size"),
                            (0, "--image-size")):
            assert words in refusal(capsys, "--images", folder, "--image-size", size, main=main)
        said = refusal(capsys, "--images", folder, "--image-size", 20, "--preset", "cifar", main=main)
        assert "--image-size" in said and "multiple of 8" in said
    assert flags().dataset == "digits" and flags().images is None


# ------------------------------------------------------------------------------------------- defaults

def test_multiples_are_those_of_the_presets():
    assert own.MULTIPLE == {name: one.get("patch", 1) * 2 ** (len(one["mults"]) - 1)
                            for name, one in lth.PRESETS.items()}


@pytest.mark.parametrize("size, mode, extra, expected", [
    (28, "L", (), (28, "tiny")), (30, "L", (), (32, "tiny")), (5, "L", (), (8, "tiny")),
    (33, "RGB", (), (32, "tiny")), (40, "RGB", (), (40, "cifar-small")), (90, "RGB", (), (64, "cifar-small")),
    (28, "RGB", (), (28, "tiny")),
    (28, "L", ("--preset", "cifar"), (32, "cifar")), (90, "L", ("--image-size", "32"), (32, "tiny"))])
def test_sizes_and_presets(tmp_path, size, mode, extra, expected):
    args = flags("--images", write_shapes(tmp_path / "a", 100, mode, size), *extra)
    assert (args.image_size, args.preset) == expected
    held = own.of(args).test
    assert args.samples == len(held) < 60 and held.shape[1:] == ((3 if mode == "RGB" else 1),
                                                                 *[expected[0]] * 2)


def test_more_images_and_larger_ones_are_trained_for_longer():
    kinds = (28, True, 300), (28, False, 300), (64, False, 300), (64, False, 50_000)
    presets = [own.usual(*kind)["preset"] for kind in kinds]
    steps = [own.usual(*kind)["steps"] for kind in kinds]
    assert presets == ["tiny", "tiny", "cifar-small", "cifar-small"] and steps == sorted(set(steps))
    assert own.usual(28, True, 60_000) == cli.DEFAULTS["mnist"]
    assert own.usual(32, False, 50_000) == cli.DEFAULTS["cifar10"]


def test_a_large_npz_gets_a_size_that_its_preset_takes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5700, 10, 10, 3), np.uint8)
    np.savez(tmp_path / "large.npz", pixels)
    args = flags("--images", tmp_path / "large.npz")
    assert (args.preset, args.image_size) == ("cifar-small", 8) and args.dataset == "large"


def test_names_of_known_data_sets_are_not_taken(tmp_path):
    for name, shown in dict(mnist="own_mnist", cifar_mine="own_cifar_mine", digits="own_digits").items():
        args = flags("--images", write_shapes(tmp_path / name, 100))
        assert args.dataset == shown and args.out == f"runs/{shown}"
        assert not cli.training_options(args)["flip"]
    assert own.name_of("/") == "images" and own.folder_of("a b:*c") == "a_b_c"
    assert own.folder_of("...") == "images" and "\n" not in own.name_of("/x/a\nb")


def test_folders_named_like_splits_are_no_classes():
    assert own.class_names(["train/a/1.png", "test/b/2.png"] * 10) == ["a", "b"] * 10
    assert own.class_names(["train/1.png", "test/2.png"] * 10) is None
    assert own.class_names(["a/1.png", "2.png"] * 10) is None
    assert own.class_names([f"{i}/1.png" for i in range(20)]) is None  # a folder per image


# ------------------------------------------------------------------------------------------- .npz, cache

def test_npz_files(tmp_path):
    rng = np.random.default_rng(0)
    pixels, names = rng.integers(0, 256, (100, 8, 8, 3), np.uint8), np.array(["b", "a"])[np.arange(100) % 2]
    np.savez(tmp_path / "x.npz", images=pixels, labels=names)
    found = own.read(str(tmp_path / "x.npz"), 8)
    held = [i for i in range(100) if own.held_out(i)]
    order = {pixels[i].transpose(2, 0, 1).tobytes(): i for i in range(100)}
    assert sorted(order[x.numpy().tobytes()] for x in found.test) == held
    for picture, number in zip(found.train, found.labels):
        assert found.classes[number] == names[order[picture.numpy().tobytes()]]
    np.savez(tmp_path / "x.npz", pixels[:, :, :6, 0])  # one array, grey, not square
    own.listing.cache_clear()
    again = own.read(str(tmp_path / "x.npz"), 8)
    assert again.train.shape[1:] == (1, 8, 8) and again.labels is None and len(again.test) == len(held)


def test_what_takes_long_is_cached_until_a_file_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own, "SLOW", 0.0)
    folder = write_shapes(tmp_path / "a", 100)
    (folder / "bad.png").write_text("text")
    first = own.of(flags("--images", folder))
    own.read_once.cache_clear()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(own, "square", None)  # reading again would fail
        again = own.of(flags("--images", folder))
        assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test)
        assert "bad.png" in capsys.readouterr().out
    Image.new("L", (16, 16), 77).save(folder / "1.png")
    changed = own.of(flags("--images", folder))
    assert any((x == 77).all() for x in torch.cat([changed.train, changed.test]))
    assert not any((x == 77).all() for x in torch.cat([first.train, first.test]))


def test_quick_reading_leaves_no_cache(tmp_path):
    flags("--images", write_shapes(tmp_path / "a", 100))
    assert not os.path.exists("runs") and not os.path.exists(tmp_path / "home")


# ------------------------------------------------------------------------------------------- rotations

def test_turning_by_hand():
    x = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2).repeat(4, 1, 1, 1)
    turned = classifier.turn(x, torch.arange(4)).flatten(1).tolist()
    assert turned == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]


@pytest.mark.parametrize("size", [8, 28, 48])
def test_without_labels_it_learns_rotations(size):
    """On images with an upper side; on noise it cannot, and its accuracy says so."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (240, 1, size, size), generator=generator, dtype=torch.uint8)
    images[:, :, :size // 4] += 150
    model = classifier.train(images[:200], None, steps=40, batch=32)
    feats, logits = model(images[:3])
    assert feats.shape == (3, 64) and logits.shape == (3, 4)
    assert classifier.accuracy(model, images[200:]) > 0.9
    plain = torch.full((40, 1, size, size), 9, dtype=torch.uint8)
    assert classifier.accuracy(model, plain) == pytest.approx(0.25)


def test_accuracy_with_labels():
    class Model(torch.nn.Linear):
        def forward(self, x):
            return x, torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 3)
    x = torch.tensor([0, 1, 2, 2], dtype=torch.uint8).view(4, 1, 1, 1)
    assert classifier.accuracy(Model(1, 1), x, torch.tensor([0, 1, 1, 2])) == 0.75


def test_the_same_images_with_other_labels_get_another_classifier(monkeypatch):
    seen, train = [], classifier.train
    monkeypatch.setattr(classifier, "train", lambda x, y, **k: seen.append(y) or train(x, y, steps=2))
    x = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    for y in (torch.arange(8) % 2, torch.arange(8) % 4, None, torch.arange(8) % 2):
        classifier.load("same", x, y)
    assert len(seen) == 3


# ------------------------------------------------------------------------------------------- runs

def rows(out):
    with open(os.path.join(out, "results.csv")) as file:
        return list(csv.DictReader(file))


def test_a_run_without_labels_and_its_resuming(quick, tmp_path, capsys):
    """Classes are blank, rotations are announced; changed images are refused; a moved folder is not."""
    folder = write_shapes(tmp_path / "my shapes", 100, size=8)
    lth.main(["--images", str(folder), *SMALL])
    said = capsys.readouterr().out
    assert "4 rotations" in said and "no labels" in said and "held-out" in said and "8 x 8" in said
    out = "runs/my_shapes"
    first = rows(out)
    assert all(row["classes_domain"] == "" and row["fid_domain"] for row in first) and len(first) == 3
    config = runs.read_config(out)
    assert config["args"]["dataset"] == "my shapes" and config["args"]["image_size"] == 8
    monkey = tmp_path / "moved"
    shutil.move(folder, monkey)
    lth.main(["--images", str(monkey), *SMALL, "--out", out, "--seeds", "1"])  # adds a seed
    assert rows(out)[:3] == first and len(rows(out)) == 6
    assert runs.read_config(out)["args"]["dataset"] == "my shapes"
    capsys.readouterr()
    held = next(path for path in monkey.iterdir() if own.held_out(path.name))
    trained = next(path for path in monkey.iterdir() if not own.held_out(path.name))
    for path in held, trained:
        before = path.read_bytes()
        Image.new("L", (8, 8), 9).save(path)
        said = refusal(capsys, "--images", monkey, *SMALL, "--out", out)
        assert "data_hash" in said and out in said
        path.write_bytes(before)
    assert "--dataset" in refusal(capsys, "--dataset", "mnist", *SMALL, "--out", out)
    assert "--image-size" in refusal(capsys, "--images", monkey, "--image-size", 16, *SMALL,
                                     "--samples", config["args"]["samples"], "--out", out)
    assert rows(out)[:3] == first


def test_a_run_with_classes_in_colour(quick, tmp_path, capsys):
    folder = write_shapes(tmp_path / "shapes", 120, "RGB", 12, by_class=True)
    lth.main(["--images", str(folder), *SMALL])
    assert "3 classes" in capsys.readouterr().out
    assert all(0 <= float(row["classes_domain"]) <= 1 for row in rows("runs/shapes"))


def test_ddpm_and_its_resuming(quick, tmp_path, capsys):
    folder = write_shapes(tmp_path / "shapes", 100, "RGB", 8)
    argv = ["--images", str(folder), "--steps", "3", "--nfe", "4", "--samples", "4", "--preset", "tiny"]
    ddpm.main(argv)
    assert os.path.exists("runs/ddpm_shapes/samples.png")
    ddpm.main([*argv[:-4], "--samples", "6", *argv[-2:]])
    trained = next(path for path in folder.iterdir() if not own.held_out(path.name))
    trained.unlink()
    assert "data_hash" in refusal(capsys, *argv, main=ddpm.main)


def test_a_run_of_a_known_data_set_keeps_its_flags():
    """What a folder of an older run, without the new flags, is compared with."""
    args = vars(flags("--dataset", "mnist"))
    assert args.pop("images") is None and args.pop("image_size") is None
    assert args["dataset"] == "mnist" and args["samples"] == 2000 and args["out"] == "runs/mnist"


@pytest.mark.parametrize("argv, gpu, expected", [
    ("", False, ("cifar-small", 8000, 32)), ("", True, ("cifar", 4000, 64)),
    ("--device cpu", True, ("cifar-small", 8000, 32)), ("--preset cifar", False, ("cifar", 4000, 64)),
    ("--preset cifar-small", True, ("cifar-small", 8000, 32)), ("--steps 7", True, ("cifar", 7, 64)),
    ("--preset paper", False, ("paper", 4000, 64))])
def test_cifar_is_learned_by_a_network_that_suits_the_machine(monkeypatch, argv, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = flags("--dataset", "cifar10", *argv.split())
    assert (args.preset, args.steps, args.batch) == expected
    assert args.prediction == ("eps" if args.preset == "paper" else "v")
