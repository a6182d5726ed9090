"""metrics.py REAL FAKE: what it reads, whose features it takes, what it prints and refuses."""
import os
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import metrics
from support import classifier, data, measure, quality, runs

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def digits(n, seed=5):
    """Drawn digits uint8 [n, 1, 28, 28], numpy."""
    return data.draw_digits(n, seed)[0]


def save(folder, images, ending="png"):
    """The folder, with an image file for each of images uint8 [N, C, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(image).save(folder / f"{i:03d}.{ending}")
    return folder


def noise(n, channels, size, seed=0):
    shape = n, channels, size, size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def printed(capsys, *argv):
    metrics.main(list(map(str, argv)))
    return capsys.readouterr().out


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        metrics.main(list(map(str, argv)))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    return said


def row(said, first):
    """{column: text} of the printed row that begins with a name."""
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("images "))
    line = next(line for line in lines[start + 2:] if line.startswith(first))
    return dict(zip(measure.HEADER[1:], line[len(first):].split()))


# ----------------------------------------------------------------------------------- reading

def test_a_folder_of_any_depth(tmp_path):
    """Sorted by path; neither hidden files nor other kinds; PNG and JPEG as Pillow decodes them."""
    images = noise(3, 3, 9)
    save(tmp_path / "b", images[:1])
    save(tmp_path / "a" / "deep er", images[1:2])
    save(tmp_path / "c", images[2:], "JPEG")
    for name in ("notes.txt", ".hidden.png", "b/._000.png"):
        (tmp_path / name).write_text("no image")
    found = measure.read_folder(str(tmp_path))
    assert found.dtype == torch.uint8 and found.shape == (3, 3, 9, 9)
    assert np.array_equal(found[:2], images[[1, 0]])
    jpeg = np.array(Image.open(tmp_path / "c" / "000.JPEG")).transpose(2, 0, 1)
    assert np.array_equal(found[2], jpeg)


@pytest.mark.parametrize("mode, kept", [("1", "L"), ("L", "L"), ("P", "RGB"), ("RGBA", "RGB"), ("LA", "L"), ("CMYK", "RGB")])
def test_modes(tmp_path, mode, kept):
    image = Image.fromarray(noise(1, 3, 8)[0].transpose(1, 2, 0)).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = np.atleast_3d(np.array(Image.open(path).convert(kept))).transpose(2, 0, 1)
    assert np.array_equal(measure.read_image(str(path)), expected)


def test_grey_images_among_colour_have_three_equal_channels(tmp_path):
    grey, colour = noise(1, 1, 6), noise(1, 3, 6)
    save(tmp_path / "a", grey)
    assert measure.read_folder(str(tmp_path)).shape == (1, 1, 6, 6)
    save(tmp_path / "b", colour)
    found = measure.read_folder(str(tmp_path))
    assert np.array_equal(found[0], grey[0].repeat(3, 0)) and np.array_equal(found[1], colour[0])


def test_the_grid_of_drawn_samples_is_no_sample(tmp_path):
    save(tmp_path, noise(2, 1, 8))
    Image.new("L", (40, 20)).save(tmp_path / "samples.png")
    with pytest.raises(OSError, match="one size"):
        measure.read_folder(str(tmp_path))
    (tmp_path / "drawn.json").write_text("{}")
    assert len(measure.read_folder(str(tmp_path))) == 2


@pytest.mark.parametrize("keys", [["images"], ["images", "labels"], ["arr_0"]])
def test_npz(tmp_path, keys):
    images = noise(4, 3, 8)
    arrays = dict.fromkeys(keys, np.zeros(4)) | {keys[0]: images.transpose(0, 2, 3, 1)}
    np.savez(tmp_path / "a.npz", **arrays)
    assert np.array_equal(measure.read_npz(str(tmp_path / "a.npz")), images)


def test_npz_without_channels_and_compressed(tmp_path):
    images = noise(4, 1, 8)
    np.savez_compressed(tmp_path / "A.NPZ.npz", images[:, 0])
    assert np.array_equal(measure.read_npz(str(tmp_path / "A.NPZ.npz")), images)


def test_data_sets_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("digits")  # the data set's name comes first
    test = measure.read("digits:test", "data")
    assert (test.dataset, test.split, test.images.shape) == ("digits", "test", (2000, 1, 28, 28))
    train = measure.read("digits", "data")
    assert train.split == "train" and len(train.images) == 10_000
    with pytest.raises(OSError, match="no images"):
        measure.read("./digits", "data")


# ----------------------------------------------------------------------------------- bad input

def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def write_bad(kind, path):
    """A folder or file that cannot be measured -> what the message must name."""
    fine = path / "000.png"
    if kind in ("one image", "two sizes", "text", "cut", "transparent", "16 bits"):
        save(path, digits(1))
    if kind == "empty":
        path.mkdir()
    if kind == "two sizes":
        save(path / "b", noise(1, 1, 27))
        return "000.png is 28 x 28", "b/000.png 27 x 27"
    if kind == "text":
        (path / "100.png").write_text("no image")
        return "100.png is no PNG or JPEG",
    if kind == "cut":
        blob = fine.read_bytes()
        (path / "100.png").write_bytes(blob[:len(blob) // 2])
        return "100.png cannot be read",
    if kind == "transparent":
        Image.new("RGBA", (28, 28)).save(path / "100.png")
        return "100.png", "transparent"
    if kind == "16 bits":
        Image.fromarray(np.zeros((28, 28), np.uint16)).save(path / "100.png")
        return "100.png", "I;16"
    return {"missing": ("does not exist",), "empty": ("no images",), "one image": ("1 image", "two or more")}[kind]


@pytest.mark.parametrize("kind", ["missing", "empty", "one image", "two sizes", "text", "cut", "transparent",
                                  "16 bits"])
def test_bad_folders_end_in_one_line(tmp_path, capsys, kind):
    path = tmp_path / "my folder"
    named = write_bad(kind, path)
    for sides in (("digits:test", path), (path, "digits:test")):
        said = refusal(capsys, *sides)
        assert str(path) in said and all(text in said for text in named)


@pytest.mark.parametrize("arrays, named", [
    (dict(images=np.zeros((5, 28, 28))), "float64"), (dict(images=np.zeros((5, 3, 28, 28), np.uint8)), "[N, H, W, C]"),
    (dict(images=np.zeros((0, 28, 28), np.uint8)), "[0, 28, 28"), (dict(mu=np.zeros(3), sigma=np.eye(3)), "mu, sigma"),
    ({}, "nothing"), (dict(images=np.array([{}])), "Python objects"), (dict(images=np.zeros(5, np.uint8)), "[5]"),
])
def test_bad_arrays_end_in_one_line(tmp_path, capsys, arrays, named):
    path = npz(tmp_path / "a b.npz", **arrays)
    said = refusal(capsys, "digits:test", path)
    assert str(path) in said and named in said


def test_other_bad_arguments(tmp_path, capsys):
    (tmp_path / "a.npz").write_text("text")
    (tmp_path / "a.pt").write_text("text")
    assert "a.npz" in refusal(capsys, "digits", tmp_path / "a.npz")
    assert "neither a folder nor an .npz" in refusal(capsys, "digits", tmp_path / "a.pt")
    assert "digits:val" in refusal(capsys, "digits:val", "digits")
    assert "FAKE" in refusal(capsys, "digits")
    assert "--extractor" in refusal(capsys, "digits", "digits", "--extractor", "vgg")
    assert "--inception" in refusal(capsys, "digits", "digits", "--extractor", "digits", "--inception", "x")


# ----------------------------------------------------------------------------------- whose features

@pytest.mark.parametrize("names, shape, chosen", [
    (("digits", None), (1, 28, 28), "digits"), ((None, "mnist"), (1, 28, 28), "mnist"),
    ((None, None), (1, 28, 28), "mnist"), (("fashion", None), (1, 28, 28), None), ((None, None), (3, 28, 28), None),
    ((None, None), (1, 27, 28), None), (("digits", "mnist"), (1, 28, 28), "digits")])
def test_the_classifier_that_fits(monkeypatch, names, shape, chosen):
    monkeypatch.setattr(measure, "committed", lambda: ["digits", "mnist"])
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    assert measure.fitting([measure.Images("x", images, name) for name in names]) == chosen


def test_sides_of_two_sizes_fit_no_classifier():
    sides = [measure.Images("x", torch.zeros(2, 1, size, size, dtype=torch.uint8)) for size in (28, 32)]
    assert measure.fitting(sides) is None


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder with an empty cache and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    return tmp_path


def test_without_a_classifier_that_fits_it_says_what_to_pass(elsewhere, capsys):
    for name, size in ("a", 32), ("b", 40):
        save(elsewhere / name, noise(3, 3, size))
    said = refusal(capsys, "a", "b")
    assert "--extractor inception" in said and "--inception PATH" in said
    said = refusal(capsys, "a", "b", "--extractor", "cifar10")
    assert "--extractor" in said and "3 x 40 x 40" in said and "any size" in said
    said = refusal(capsys, "a", "b", "--extractor", "mnist")
    assert "classifier of mnist takes images of 1 x 28 x 28" in said


def test_images_of_ones_own_are_measured_by_a_classifier_trained_on_them(elsewhere, monkeypatch, capsys):
    """Of a size that no committed classifier takes; few, oblong or named ones are refused with the way out."""
    train = classifier.train
    monkeypatch.setattr(classifier, "train", lambda *a, **k: train(*a, **dict(steps=100) | k))
    bars = np.array([[(i // k + s) % 2 for i in range(20)] for k in (1, 2, 4) for s in (0, 1)] * 5)
    real = np.broadcast_to(200 * bars[:, None, :, None], (30, 1, 20, 20)).astype(np.uint8) + noise(30, 1, 20) // 8
    save(elsewhere / "real", real)
    save(elsewhere / "near", real[::-1][:25])
    save(elsewhere / "far", noise(25, 1, 20))
    found = []
    for other in "near", "far":
        metrics.main(["real", other])
        said = capsys.readouterr().out
        assert "a classifier trained on real to tell rotations" in said
        found.append(float(row(said, other)["FID"]))
    assert found[0] < found[1]
    save(elsewhere / "few", noise(5, 1, 20))
    assert "20 square images or more" in refusal(capsys, "few", "far")


def test_inception_without_a_checkpoint_is_refused_with_the_way_to_get_it(elsewhere, monkeypatch, capsys):
    monkeypatch.delenv("LTH_DATA", raising=False)  # it would be looked for there
    for flags in (["--extractor", "inception"], ["--inception", "nowhere.pth"]):
        said = refusal(capsys, save(elsewhere / "a", noise(3, 3, 40)), "a", *flags)
        assert "curl -L --create-dirs -o" in said and metrics.INCEPTION_URL + metrics.INCEPTION_FILE in said
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / metrics.INCEPTION_FILE).write_text("not the checkpoint")
    assert "is cut short or another file" in refusal(capsys, "a", "a")  # found, so it is the default


def test_a_classifier_without_a_file_is_trained_on_its_data_set(elsewhere, monkeypatch, capsys):
    images, labels = data.draw_digits(200, 0)
    split = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    monkeypatch.setattr(data, "load_images", lambda *_: split)
    asked = []
    monkeypatch.setattr(metrics, "load_classifier", lambda name, *given: asked.append((name, len(given)))
                        or classifier.load("digits"))
    said = printed(capsys, "fashion", "fashion", "--extractor", "fashion")
    assert asked == [("fashion", 2)] and "features: classifier of fashion" in said
    assert "--extractor fashion" in refusal(capsys, "fashion", "fashion")


# ----------------------------------------------------------------------------------- scores

def test_a_set_against_itself(tmp_path, capsys):
    """In a folder whose name has spaces, and as an array: FID near 0, all covered."""
    images = digits(260)
    folder, array = save(tmp_path / "my digits", images), npz(tmp_path / "a.npz", images=images[:, 0])
    said = printed(capsys, folder, array)
    found = row(said, str(array))
    assert 0 <= float(found["FID"]) < 1e-6 and found["precision"] == found["recall"] == "1"
    assert found["n"] == "260" and float(found["classes"]) == 0 and abs(float(found["KID"])) < 0.2
    assert "my digits, images: 260 of 1 x 28 x 28" in said and "classifier of mnist" in said
    assert "singular" not in said and "blank" not in said


def test_scores_are_those_of_the_functions(tmp_path, capsys):
    """Against a data set: FID of all training images, and the real-data reference of the main job."""
    fake = np.concatenate([digits(200), noise(60, 1, 28)])
    said = printed(capsys, "digits", save(tmp_path / "fake", fake))
    model = metrics.load_classifier("digits")
    (train, _), (test, _) = (data.load_images("digits", "data", split) for split in ("train", "test"))
    feats, logits = metrics.features(model, torch.from_numpy(fake), logits=True)
    reference = metrics.statistics(metrics.features(model, train))
    real = metrics.features(model, metrics.random_draw(train, 260))
    found, pair = row(said, str(tmp_path / "fake")), metrics.precision_recall(real, feats)
    expected = metrics.fid(feats, reference), *pair
    shown = [float(found[name]) for name in ("FID", "precision", "recall")]
    assert shown == pytest.approx(expected, rel=1e-3)
    value, error = metrics.kid(feats, real, subset_size=130)
    assert float(found["KID"]) == pytest.approx(value, abs=5 * error + 0.01 * abs(value))  # other subsets
    held_out, expected = row(said, "test images"), quality.real_reference(metrics, model, reference, train, test, 260)
    for name in ("fid", "precision", "recall"):
        assert float(held_out[name.upper() if name == "fid" else name]) == pytest.approx(expected[name], rel=1e-3)
    classes = [metrics.features(model, x, logits=True)[1].argmax(1) for x in (train, torch.from_numpy(fake))]
    shares = [torch.bincount(c, minlength=10) / len(c) for c in classes]
    assert float(found["classes"]) == pytest.approx(float((shares[0] - shares[1]).abs().sum() / 2), abs=1e-4)
    assert held_out["n"] == "260" and "mean of 5 draws" in said


def test_few_images(tmp_path, capsys):
    """What they do to FID is said; precision and recall are blank, KID too below four."""
    array = npz(tmp_path / "a.npz", images=digits(64)[:, 0])
    said = printed(capsys, "digits:test", array)
    found = row(said, str(array))
    assert found["precision"] == found["recall"] == "-" and found["KID"] != "-"
    assert "64 images have a singular covariance in 64 features" in said and "biased upwards" in said
    assert "blank below 250 images" in said and "test images:" not in said.split("features:")[1]
    array = npz(tmp_path / "b.npz", images=digits(3)[:, 0])
    found = row(printed(capsys, array, "digits:test"), "digits:test")
    assert found["KID"] == "-" and float(found["FID"]) > 0


class Pooled(nn.Module):
    """Six features of an image of any size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 6)

    def forward(self, x):
        pooled = nn.functional.adaptive_avg_pool2d(x.expand(-1, 3, -1, -1).float() / 255, 2)
        feats = self.layer(pooled.flatten(1))
        return feats, feats


def test_inception_takes_sides_of_other_sizes_and_caches_a_data_set(elsewhere, monkeypatch, capsys):
    torch.manual_seed(0)
    model, asked = Pooled(), []
    monkeypatch.setattr(metrics, "load_inception", lambda path, root: asked.append((path, root)) or model)
    save(elsewhere / "big", noise(20, 3, 40))
    said = printed(capsys, "digits:test", "big", "--extractor", "inception", "--data-dir", "here")
    test, _ = data.load_images("digits", "data", "test")
    expected = metrics.fid(metrics.features(model, measure.read_folder("big")), metrics.features(model, test))
    found = row(said, "big")
    assert float(found["FID"]) == pytest.approx(expected, rel=1e-3) and found["classes"] == "-"
    assert asked == [(None, "here")] and "classes:" not in said
    kept = [name for folder in runs.cache_folders() if os.path.isdir(folder) for name in os.listdir(folder)]
    assert any(name.startswith("statistics-digits-test-n2000-") for name in kept)
    assert row(printed(capsys, "digits:test", "big", "--inception", "x"), "big") == found


def test_as_a_program(tmp_path):
    for name, seed in ("a", 0), ("b", 1):
        npz(tmp_path / f"{name}.npz", images=digits(20, seed)[:, 0])
    command = [sys.executable, "metrics.py", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and float(row(done.stdout, str(tmp_path / "b.npz"))["FID"]) > 1, done.stderr
