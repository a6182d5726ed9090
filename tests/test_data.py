"""support/data.py: good files, every kind of bad, wrong or unreadable file, servers that misbehave.

A shorter file of the right layout is accepted: IDX of as many items as its header says, CIFAR of
any whole number of records. Anything else ends in one OSError of one line that names the file.
"""
import errno
import gzip
import hashlib
import io
import os
import random
import shutil
import struct
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from support import cli, data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = Path(os.environ.get("LTH_DATA") or SHARED).resolve()
NAMES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
         "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Each test has its own folder, runs/cache and home cache, and no network."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cwd" / "home"))
    for dataset in data.MIRRORS:
        monkeypatch.setitem(data.MIRRORS, dataset, ("http://127.0.0.1:9/",))


def one_line(call, *words):
    """call() must raise an OSError of one line in which all the words occur."""
    with pytest.raises(OSError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text
    return text


# --- IDX files

def idx(array):
    """The bytes of an IDX file, not yet compressed."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def start_of_md5(content):
    return hashlib.md5(content).hexdigest()[:8]


def write_mnist(root, dataset="fashion", split="test", n=7, images=None, labels=None):
    """A small valid pair of files -> (images, labels, paths); images, labels: bytes of another."""
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (n, 28, 28), np.uint8)
    y = rng.integers(0, 10, n).astype(np.uint8)
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in NAMES[split]]
    paths[0].write_bytes(gzip.compress(idx(x)) if images is None else images)
    paths[1].write_bytes(gzip.compress(idx(y)) if labels is None else labels)
    return x, y, paths


needs_mnist = pytest.mark.skipif(not (DATA / "mnist" / NAMES["train"][0]).exists(),
                                 reason=f"no MNIST under {DATA}")


@needs_mnist
def test_real_mnist(capsys):
    images, labels = data.load_images("mnist", DATA)
    assert images.shape == (60000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    mean = images.float().mean().item() / 255
    assert abs(mean - 0.1307) < 1e-4  # the mean everybody normalises by
    images, labels = data.load_images("mnist", str(DATA), split="test")
    assert len(images) == len(labels) == 10000
    assert labels.bincount().tolist()[:3] == [980, 1135, 1032]
    assert capsys.readouterr().out == ""  # official: no note


@needs_mnist
@pytest.mark.parametrize("split", ["train", "test"])
def test_md5_of_real_mnist(tmp_path, split):
    for name, part in zip(NAMES[split], ("images", "labels")):
        packed = (DATA / "mnist" / name).read_bytes()
        starts = start_of_md5(packed), start_of_md5(gzip.decompress(packed))
        assert data.OFFICIAL[f"mnist {split} {part}"] == starts
    (tmp_path / "fashion").symlink_to(DATA / "mnist")
    one_line(lambda: data.load_images("fashion", tmp_path, split),
             f"holds mnist {split} images, not fashion {split} images")


IMAGES, LABELS = idx(np.zeros((7, 28, 28), np.uint8)), idx(np.zeros(7, np.uint8))
WHOLE = gzip.compress(IMAGES)
BAD_IMAGES = {
    "empty file": b"",
    "a web page": b"<!DOCTYPE html><html>404</html>",
    "gzip of nothing": gzip.compress(b""),
    "truncated gzip": WHOLE[:len(WHOLE) // 2],
    "no gzip trailer": WHOLE[:-8],
    "wrong checksum": WHOLE[:-8] + bytes(4) + WHOLE[-4:],
    "garbage after gzip": WHOLE + b"garbage",
    "truncated inside": gzip.compress(IMAGES[:-1]),
    "too long inside": gzip.compress(IMAGES + b"\0"),
    "header cut": gzip.compress(IMAGES[:10]),
    "labels as images": gzip.compress(LABELS),
    "wrong magic": gzip.compress(b"\0\0\x0d\x03" + IMAGES[4:]),
    "not 28x28": gzip.compress(struct.pack(">4I", 0x803, 7, 56, 14) + IMAGES[16:]),
    "no images": gzip.compress(struct.pack(">4I", 0x803, 0, 28, 28)),
    "terabytes promised": gzip.compress(struct.pack(">4I", 0x803, 2**32 - 1, 28, 28) + IMAGES[16:]),
    "terabytes in each": gzip.compress(struct.pack(">4I", 0x803, 7, 2**31, 2**31) + IMAGES[16:]),
    "a bomb": gzip.compress(struct.pack(">4I", 0x803, 7, 28, 28) + bytes(30_000_000)),
}
BAD_LABELS = {
    "empty file": b"",
    "images as labels": WHOLE,
    "label 10": gzip.compress(idx(np.array([0, 1, 2, 10, 4, 5, 6], np.uint8))),
    "one label short": gzip.compress(idx(np.zeros(6, np.uint8))),
    "one label more": gzip.compress(idx(np.zeros(8, np.uint8))),
    "shorter than its header": gzip.compress(LABELS[:-1]),
    "terabytes promised": gzip.compress(struct.pack(">2I", 0x801, 2**32 - 1)),
}


@pytest.mark.parametrize("bad, case", [*((0, case) for case in BAD_IMAGES),
                                       *((1, case) for case in BAD_LABELS)])
def test_bad_idx_file(tmp_path, bad, case):
    content = {"labels": BAD_LABELS[case]} if bad else {"images": BAD_IMAGES[case]}
    paths = write_mnist(tmp_path, **content)[2]
    one_line(lambda: data.load_images("fashion", tmp_path, "test"), paths[bad],
             "delete it and run again")


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "mnist" / NAMES["train"][0]).mkdir(parents=True)
    (tmp_path / "mnist" / NAMES["train"][1]).write_bytes(gzip.compress(LABELS))
    one_line(lambda: data.load_images("mnist", tmp_path), NAMES["train"][0])


# --- which file it is: by its md5

@pytest.fixture
def official(monkeypatch):
    """Small files in place of the official ones: {"mnist train images": bytes, ...}, unpacked."""
    files = {}
    for i, what in enumerate(list(data.OFFICIAL)[:8]):
        n = 5 if "train" in what else 4
        array = np.full((n, 28, 28) if "images" in what else n, i, np.uint8)
        files[what] = idx(array)
        packed = gzip.compress(files[what], mtime=0)
        monkeypatch.setitem(data.OFFICIAL, what, (start_of_md5(packed), start_of_md5(files[what])))
    return files


FORMS = {"as downloaded": lambda content: gzip.compress(content, mtime=0),
         "packed anew": lambda content: gzip.compress(content, 1, mtime=9),
         "unpacked": lambda content: content}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dataset, split, at, there", [
    ("mnist", "test", 0, "fashion test images"), ("fashion", "train", 1, "mnist train labels"),
    ("mnist", "test", 0, "mnist train images"), ("fashion", "train", 1, "fashion test labels"),
    ("mnist", "test", 0, "mnist test labels"), ("fashion", "train", 1, "fashion train images")])
def test_official_file_in_the_place_of_another(tmp_path, capsys, official, form, dataset, split,
                                               at, there):
    wanted = [f"{dataset} {split} {part}" for part in ("images", "labels")]
    contents = [FORMS[form](official[what]) for what in wanted]
    paths = write_mnist(tmp_path, dataset, split, images=contents[0], labels=contents[1])[2]
    images = data.load_images(dataset, tmp_path, split)[0]
    assert (images == official[wanted[0]][-1]).all() and capsys.readouterr().out == ""
    paths[at].write_bytes(FORMS[form](official[there]))
    said = one_line(lambda: data.load_images(dataset, tmp_path, split),
                    f"{paths[at]} holds {there}, not {wanted[at]}", "move it away")
    assert "delete" not in said


@pytest.mark.parametrize("there", ["cifar100 binary version", "cifar10 Python version"])
def test_other_archive(tmp_path, monkeypatch, there):
    path = tmp_path / ARCHIVE["cifar10"]
    path.write_bytes(b"another archive")
    monkeypatch.setitem(data.OFFICIAL, there, (start_of_md5(b"another archive"),))
    one_line(lambda: data.load_images("cifar10", tmp_path), path,
             f"holds {there}, not cifar10 binary version: move it away")


def test_official_file_is_never_to_blame(tmp_path, official):
    """Seven images of somebody's own beside the official labels."""
    labels = FORMS["as downloaded"](official["fashion test labels"])
    paths = write_mnist(tmp_path, labels=labels)[2]
    said = one_line(lambda: data.load_images("fashion", tmp_path, "test"), "4 labels for 7 images")
    assert said.startswith(str(paths[0])) and str(paths[1]) not in said


# --- where files lie

@pytest.mark.parametrize("name", ["{}", "{}.gz"])
@pytest.mark.parametrize("dotted, split", [(False, "train"), (False, "test"), (True, "test")])
@pytest.mark.parametrize("dataset, folder", [
    ("mnist", "mnist"), ("mnist", "MNIST/raw"), ("mnist", ""), ("fashion", "fashion"),
    ("fashion", "FashionMNIST/raw"), ("fashion", "")])
def test_layouts_of_mnist(tmp_path, capsys, dataset, folder, name, dotted, split):
    x, y, paths = write_mnist(tmp_path / "data", folder, split)
    for path, content in zip(paths, (idx(x), idx(y))):
        path.unlink()
        if dotted:  # some archives have a folder of the other name beside it
            path.with_suffix("").mkdir()
        new = name.format(path.stem.replace("s-idx", "s.idx") if dotted else path.stem)
        content = gzip.compress(content) if new.endswith(".gz") else content
        (path.parent / new).write_bytes(content)
    before = sorted((tmp_path / "data").rglob("*"))
    for _ in range(2):
        images, labels = data.load_images(dataset, tmp_path / "data", split)
        assert np.array_equal(images.numpy(), x[:, None]) and labels.tolist() == y.tolist()
        images[0] = 0  # writable: the tensor owns its memory
    assert sorted((tmp_path / "data").rglob("*")) == before
    said = capsys.readouterr().out.splitlines()  # once for each file
    assert len(said) == 2 and all("is not the official file of" in line for line in said)


def test_md5_tells_which_files_lie_in_the_data_folder(tmp_path, official, capsys):
    def write(dataset, folder):
        content = [gzip.compress(official[f"{dataset} test {x}"]) for x in ("images", "labels")]
        write_mnist(tmp_path, folder, images=content[0], labels=content[1])
    write("mnist", "")
    assert len(data.load_images("mnist", tmp_path, "test")[0]) == 4
    one_line(lambda: data.load_images("fashion", tmp_path, "test"), "could not download")
    assert "holds mnist test images and mnist test labels: passed over" in capsys.readouterr().out
    write("fashion", "FashionMNIST/raw")
    assert len(data.load_images("fashion", tmp_path, "test")[0]) == 4


def test_images_and_labels_come_from_one_folder(tmp_path):
    write_mnist(tmp_path, "mnist")[2][1].unlink()
    y = write_mnist(tmp_path, "MNIST/raw", n=5)[1]
    assert data.load_images("mnist", tmp_path, "test")[1].tolist() == y.tolist()


@pytest.mark.parametrize("dataset, found", [
    ("cifar10", "cifar-10-batches-py"), ("cifar10", "cifar-10-python.tar.gz"),
    ("cifar10", "cifar10/cifar-10-batches-py"), ("cifar100", "cifar-100-python"),
    ("cifar100", "cifar-100-python.tar.gz")])
@pytest.mark.parametrize("itself", [False, True])
def test_python_version_of_cifar_is_named(tmp_path, dataset, found, itself):
    (tmp_path / found).mkdir(parents=True)
    one_line(lambda: data.load_images(dataset, tmp_path / (found if itself else "")),
             f"{tmp_path / found} is the Python version; the binary version is needed: "
             f"{ARCHIVE[dataset]}", "curl -L")
    assert not list((tmp_path / found).iterdir())


def test_root_is_expanded(tmp_path, monkeypatch):
    write_mnist(tmp_path / "sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path / "sets"))
    for root in ("~/sets", "$SETS", Path("$HOME/sets")):
        assert len(data.load_images("fashion", root, "test")[0]) == 7


# --- what the operating system refuses

def refusing(start, number, function=open):
    """open() or os.stat() that fails with this errno for paths that begin so."""
    def refuse(path, *args, **options):
        if str(path).startswith(str(start)):
            raise OSError(number, os.strerror(number), path)
        return function(path, *args, **options)
    return refuse


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EISDIR])
@pytest.mark.parametrize("dataset", ["fashion", "cifar10", "cifar100"])
def test_file_that_is_refused_is_kept(tmp_path, monkeypatch, dataset, number):
    files = cifar_files("cifar10")[0]
    path = {"fashion": lambda: write_mnist(tmp_path)[2][1],
            "cifar10": lambda: write_folder(tmp_path, "cifar10", files) / "test_batch.bin",
            "cifar100": lambda: write_archive(tmp_path, "cifar100", [])}[dataset]()
    monkeypatch.setattr(data, "open", refusing(path, number), raising=False)
    said = one_line(lambda: data.load_images(dataset, tmp_path, "test"), path,
                    f"cannot be read: {os.strerror(number)}", "--data-dir")
    assert "delete" not in said and "download" not in said and path.exists()


def test_folder_that_may_not_be_searched(tmp_path, monkeypatch):
    """Its files seem to be missing, but are not downloaded again."""
    folder, stat = write_mnist(tmp_path)[2][0].parent, os.stat
    monkeypatch.setattr(os, "stat", refusing(f"{folder}/", errno.EACCES, stat))
    said = one_line(lambda: data.load_images("fashion", tmp_path, "test"), folder,
                    "cannot be read: Permission denied")
    assert "delete" not in said and "curl" not in said
    home = os.path.abspath("home")  # of another user, in a container: no reason to stop
    monkeypatch.setattr(os, "stat", refusing(home, errno.EACCES, stat))
    one_line(lambda: data.load_images("mnist", tmp_path, "test"), "could not download")


# --- CIFAR

FOLDER = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
ARCHIVE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def cifar_files(dataset, n=3):
    """Official file names -> bytes of n records each, and file names -> (images, fine labels)."""
    rng = np.random.default_rng(4)
    names = ["train.bin", "test.bin"]
    if dataset == "cifar10":
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files, arrays = {}, {}
    for name in names:
        y = rng.integers(0, 10 if dataset == "cifar10" else 100, n).astype(np.uint8)
        x = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        coarse = [] if dataset == "cifar10" else [y[:, None] // 5]
        head = [*coarse, y[:, None]]
        files[name] = np.concatenate(head + [x.reshape(n, -1)], 1).tobytes()
        arrays[name] = x, y
    return files, arrays


def write_folder(root, dataset, files):
    folder = root / FOLDER[dataset]
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in files.items():
        (folder / name).write_bytes(blob)
    return folder


def member(name, blob=b"", **fields):
    """A tar member, fields of its header replaced."""
    info = tarfile.TarInfo(name)
    info.size = len(blob)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, blob


def members(dataset, files):
    return [member(f"{FOLDER[dataset]}/{name}", blob) for name, blob in files.items()]


def tar_bytes(pairs):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, blob in pairs:
            tar.addfile(info, io.BytesIO(blob))
    return buffer.getvalue()


def write_archive(root, dataset, pairs, cut=None):
    path = root / ARCHIVE[dataset]
    path.write_bytes(gzip.compress(tar_bytes(pairs), 1)[:cut])
    return path


@pytest.mark.parametrize("place", ["", "cifar", "itself"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, dataset, split, packed, place):
    files, arrays = cifar_files(dataset)
    where = root = tmp_path / "data"
    where = where / place.replace("cifar", dataset).replace("itself", "")
    if packed:
        where.mkdir(parents=True)
        write_archive(where, dataset, [member(FOLDER[dataset], type=tarfile.DIRTYPE),
                                       *members(dataset, files),
                                       member(f"{FOLDER[dataset]}/readme.html", b"<html>")])
    else:
        folder = write_folder(where, dataset, files)
        root = folder if place == "itself" else root
    before = sorted(root.rglob("*"))
    images, labels = data.load_images(dataset, root, split)
    chosen = [arrays[name] for name in files if name.startswith("test") == (split == "test")]
    assert np.array_equal(images.numpy(), np.concatenate([x for x, _ in chosen]))
    assert np.array_equal(labels.numpy(), np.concatenate([y for _, y in chosen]))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert sorted(root.rglob("*")) == before  # nothing was unpacked


BAD_RECORDS = {"empty": lambda blob: b"", "one byte short": lambda blob: blob[:-1],
               "one byte more": lambda blob: blob + b"\0",
               "label 10": lambda blob: b"\x0a" + blob[1:]}


@pytest.mark.parametrize("case", BAD_RECORDS)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_cifar_records(tmp_path, case, packed):
    files, _ = cifar_files("cifar10")
    files["data_batch_4.bin"] = BAD_RECORDS[case](files["data_batch_4.bin"])
    if packed:
        where = write_archive(tmp_path, "cifar10", members("cifar10", files))
    else:
        where = write_folder(tmp_path, "cifar10", files) / "data_batch_4.bin"
    one_line(lambda: data.load_images("cifar10", tmp_path), where, "data_batch_4.bin", "delete it")
    if not packed:  # as advised: what is left is no data set, and the archive is needed again
        where.unlink()
        one_line(lambda: data.load_images("cifar10", tmp_path), ARCHIVE["cifar10"], "curl -L")


def test_cifar_fine_label(tmp_path):
    files, _ = cifar_files("cifar100")
    rest = files["test.bin"][2:]
    files["test.bin"] = b"\xff\x63" + rest  # the coarse label is not read, fine 99 is legal
    folder = write_folder(tmp_path, "cifar100", files)
    assert data.load_images("cifar100", tmp_path, "test")[1][0] == 99
    (folder / "test.bin").write_bytes(b"\x00\x64" + rest)
    one_line(lambda: data.load_images("cifar100", tmp_path, "test"), folder / "test.bin",
             "a label above 99")


def bad_archives():
    """Case -> (members, where the file is cut)."""
    good = members("cifar10", cifar_files("cifar10")[0])
    name, content = good[2][0].name, good[2][1]
    link = {"size": 0, "linkname": "/etc/passwd"}
    other = {"size": 0, "linkname": "data_batch_2.bin"}
    instead = {
        "symbolic link": [member(name, type=tarfile.SYMTYPE, **link)],
        "hard link": [member(name, type=tarfile.LNKTYPE, **link)],
        "link to another member": [member(name, type=tarfile.SYMTYPE, **other)],
        "device": [member(name, type=tarfile.CHRTYPE)],
        "folder": [member(name, type=tarfile.DIRTYPE)],
        "outside": [member("../" + name, content)],
        "absolute": [member("/" + name, content)],
        "twice": [good[2]] * 2,
        "missing": [],
    }
    bad = {case: (good[:2] + new + good[3:], None) for case, new in instead.items()}
    return bad | {"cut": (good, 20_000), "cut in the checksum": (good, -3), "empty": (good, 0)}


@pytest.mark.parametrize("case", bad_archives())
def test_bad_archive(tmp_path, case):
    path = write_archive(tmp_path, "cifar10", *bad_archives()[case])
    one_line(lambda: data.load_images("cifar10", tmp_path), path, "delete it and run again")


def test_outside_members_are_left_alone(tmp_path):
    """Beside a complete set, members that would land elsewhere are skipped: none is unpacked."""
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    write_archive(root, "cifar10", [
        member("../evil", b"x"), member(f"{tmp_path}/evil", b"x"),
        *members("cifar10", cifar_files("cifar10")[0]),
        member("evil", type=tarfile.SYMTYPE, linkname=str(tmp_path))])
    assert len(data.load_images("cifar10", root)[0]) == 15
    assert not list(tmp_path.rglob("*evil*"))


def test_tar_bombs(tmp_path):
    path = tmp_path / ARCHIVE["cifar10"]
    with gzip.open(path, "wb", 1) as file:  # zeros without end, promised by one member
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.size = 2**40
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(260):
            file.write(bytes(1_000_000))
    start = time.time()
    one_line(lambda: data.load_images("cifar10", tmp_path), path, "unexpected end of data")
    assert time.time() - start < 10
    # the same promise with nothing behind it
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(5000)))
    one_line(lambda: data.load_images("cifar10", tmp_path), path)


def test_sparse_member(tmp_path):
    """A GNU sparse member promises any number of zeros in 512 bytes: refused at any length."""
    info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[148:156], header[483:495] = b"S", b" " * 8, b"%011o\0" % (3073 * 1000)
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / ARCHIVE["cifar10"]
    path.write_bytes(gzip.compress(bytes(header) + bytes(2048)))
    with tarfile.open(path) as tar:
        assert tar.getmembers()[0].issparse() and tar.getmembers()[0].size == 3073 * 1000
    one_line(lambda: data.load_images("cifar10", tmp_path, "test"), path, "not one plain file each")


# --- fuzz

def mutate(blob, rng):
    """A few random edits: bytes changed, a stretch cut, doubled or replaced, the end cut off."""
    blob = bytearray(blob)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(blob) + 1) for _ in range(2))
        if rng.random() < 0.5:  # headers are where it hurts
            i, j = i % 600, min(i % 600 + rng.randint(1, 8), len(blob))
        filled = bytes([rng.choice((0, 1, 0x7f, 0x80, 0xff))]) * (j - i)
        new = rng.choice((rng.randbytes(j - i), b"", blob[i:j] * 2, filled, None))
        blob[i:j if new is not None else None] = new or b""
        blob = blob or bytearray(1)
    return bytes(blob)


def test_fuzz(tmp_path):
    """Mutated bytes, before and after compression, end in OSError of one line or in legal data."""
    rng, outcomes = random.Random(0), {"good": 0, "refused": 0}
    x, y, paths = write_mnist(tmp_path, n=2)
    tar = tar_bytes(members("cifar100", cifar_files("cifar100", n=1)[0]))

    def check(dataset):
        try:
            images, targets = data.load_images(dataset, tmp_path, "test")
            assert images.shape == (len(targets), *cli.DATASETS[dataset][0]) and len(targets)
            assert 0 <= targets.min() and targets.max() < cli.DATASETS[dataset][1]
            outcomes["good"] += 1
        except OSError as error:
            assert "\n" not in str(error) and "delete it and run again" in str(error)
            outcomes["refused"] += 1

    for path, good, dataset in ((paths[0], idx(x), "fashion"), (paths[1], idx(y), "fashion"),
                                (tmp_path / ARCHIVE["cifar100"], tar, "cifar100")):
        for i in range(1000):  # two in three change what is compressed, one the compressed file
            inner, outer = (mutate, lambda x, _: x)[::1 if i % 3 else -1]
            path.write_bytes(outer(gzip.compress(inner(good, rng), 1), rng))
            check(dataset)
        path.write_bytes(gzip.compress(good))
    assert sum(outcomes.values()) == 3000 and outcomes["good"] > 60 and outcomes["refused"] > 1500


# --- downloads, from a server of our own

GOOD = gzip.compress(bytes(range(256)) * 500)
MD5 = hashlib.md5(GOOD).hexdigest()


@pytest.fixture
def server():
    """A local server: .url, .seen (paths asked for), .files (name -> bytes); paths choose acts."""
    release, seen, files = threading.Event(), [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            kind = self.path.split("/")[1]
            if kind == "silent":
                return release.wait(20)
            if kind == "missing":
                return self.send_error(404)
            body = {"page": b"<html>please log in</html>", "wrong": GOOD[:-1] + b"x",
                    "files": files.get(os.path.basename(self.path))}.get(kind, GOOD)
            self.send_response(200)
            if kind != "nolength":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if kind == "half" else body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield type("Server", (), {"url": url, "seen": seen, "files": files})
    release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("kind", ["good", "nolength"])
def test_download(server, tmp_path, kind):
    path = tmp_path / "file.gz"
    assert data.download([f"{server.url}/{kind}/file.gz"], str(path), MD5) == str(path)
    assert path.read_bytes() == GOOD
    assert sorted(os.listdir(tmp_path)) == ["cwd", "file.gz"]


@pytest.mark.parametrize("kind, why", [
    ("page", "web page"), ("half", "broke off"), ("wrong", "wrong md5"), ("missing", "404"),
    ("silent", "timed out"), ("good", "longer than 100"), ("down", "refused")])
def test_bad_download(server, tmp_path, kind, why):
    path, url = tmp_path / "new" / "my file.gz", f"{server.url}/{kind}/file.gz"
    url = "http://127.0.0.1:9/file.gz" if kind == "down" else url
    limits = dict(max_bytes=100) if kind == "good" else dict(timeout=0.3)
    one_line(lambda: data.download([url], str(path), MD5, **limits), path, why,
             f"curl -L --create-dirs -o '{path}' {url}")
    assert os.listdir(tmp_path) == ["cwd"]  # no folder either
    good = f"{server.url}/good/file.gz"
    data.download([url, good], str(path), MD5, timeout=0.3)  # the next mirror has it
    assert path.read_bytes() == GOOD and os.listdir(tmp_path / "new") == ["my file.gz"]


def test_full_disk_ends_a_download(server, tmp_path, monkeypatch):
    """No other mirror is tried, nor fetching by hand advised: the file would not fit either."""
    monkeypatch.setattr(data, "open", refusing(tmp_path, errno.ENOSPC), raising=False)
    url = f"{server.url}/good/file.gz"
    said = one_line(lambda: data.download([url, url], str(tmp_path / "file.gz"), MD5),
                    "file.gz could not be written: the disk is full")
    assert len(server.seen) == 1 and "curl" not in said and os.listdir(tmp_path) == ["cwd"]


@pytest.mark.parametrize("writable", [True, False])
def test_missing_files_are_fetched_once(server, tmp_path, monkeypatch, writable):
    """To the data folder, or to runs/cache when that is read-only; a second load asks nobody."""
    for name, part, content in zip(NAMES["test"], ("images", "labels"), (IMAGES, LABELS)):
        server.files[name] = gzip.compress(content)
        starts = start_of_md5(server.files[name]), start_of_md5(content)
        monkeypatch.setitem(data.OFFICIAL, f"mnist test {part}", starts)
    mirrors = f"{server.url}/missing/", f"{server.url}/files/"
    monkeypatch.setitem(data.MIRRORS, "mnist", mirrors)
    root = tmp_path / "data"
    root.mkdir()
    root.chmod(0o755 if writable else 0o555)
    assert len(data.load_images("mnist", root, "test")[0]) == 7
    folder = root / "mnist" if writable else Path("runs/cache/mnist")
    assert sorted(os.listdir(folder)) == sorted(NAMES["test"])
    assert os.listdir(root) == (["mnist"] if writable else [])
    assert len(server.seen) == 4  # two files, each asked of a mirror that lacks it first
    assert len(data.load_images("mnist", root, "test")[0]) == 7 and len(server.seen) == 4
    root.chmod(0o755)


def test_nowhere_to_write(tmp_path):
    for path in (tmp_path / "file", Path("runs"), Path("home")):
        path.write_text("a file where a folder should be")
    one_line(lambda: data.load_images("mnist", tmp_path / "file"), "cannot write", "--data-dir")


@pytest.mark.parametrize("dataset, name", [("mnist", NAMES["train"][0]),
                                           ("cifar10", ARCHIVE["cifar10"])])
def test_unreachable_mirrors(tmp_path, dataset, name):
    one_line(lambda: data.load_images(dataset, tmp_path), name, tmp_path, "curl -L")
    assert os.listdir(tmp_path) == ["cwd"] and os.listdir() == []  # no empty folders


# --- digits

def test_drawn_digits():
    images, labels = data.draw_digits(200, seed=5)
    again, same = data.draw_digits(200, seed=5)
    assert np.array_equal(images, again) and np.array_equal(labels, same)
    assert images.shape == (200, 1, 28, 28) and images.dtype == np.uint8
    assert np.bincount(labels, minlength=10).min() > 5  # of 20: at random, not dealt out evenly
    other, others = data.draw_digits(200, seed=6)
    assert not np.array_equal(labels, others) and not np.array_equal(images, other)
    assert images.min() == 0 and images.max() == 255  # white on black, as MNIST
    assert 25 < images.mean() < 75 and len(np.unique(images)) > 100  # smooth edges
    border = [images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]]
    assert (np.concatenate(border, -1).max(-1) < 100).mean() > 0.98  # the frame holds them
    assert len({x.tobytes() for x in images}) == 200
    rows = (images > 60).any(-1).sum(-1)
    assert rows.min() >= 14 and 18 < rows.mean() < 25  # and they fill it


def test_digits_stay_the_same():
    """Results rest on them: another drawing needs another DRAWING."""
    assert data.DIGITS == {"train": (10_000, 1), "test": (2_000, 2)}
    images, labels = data.draw_digits(20, seed=1)
    assert data.DRAWING == 2 and labels[:8].tolist() == [4, 5, 7, 9, 0, 1, 8, 9]
    # Pillow's versions may differ in a pixel
    assert images.mean((1, 2, 3))[:3] == pytest.approx([47.135, 51.861, 38.457], rel=0.01)


def test_digits_can_be_told_apart():
    """The nearest of ten class means finds most labels: legible, though not all alike."""
    images, labels = data.draw_digits(400, seed=1)
    others, targets = data.draw_digits(400, seed=2)
    means = np.stack([images[labels == k].mean((0, 1)) for k in range(10)]).reshape(10, -1)
    distance = ((others.reshape(400, 1, -1) - means) ** 2).sum(-1)
    assert (distance.argmin(1) == targets).mean() > 0.8


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(data, "DIGITS", {"train": (50, 1), "test": (20, 2)})


def test_digits_cache(tmp_path, few_digits, monkeypatch, capsys):
    images, labels = data.load_images("digits", tmp_path)
    assert images.shape == (50, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    test = data.load_images("digits", tmp_path, "test")[0]
    assert len(test) == 20 and not torch.equal(test, images[:20])
    path = next((tmp_path / "digits").glob("train*"))
    assert len(os.listdir(tmp_path / "digits")) == 2 and str(data.DRAWING) in path.stem
    whole, draw = path.read_bytes(), data.draw_digits
    monkeypatch.setattr(data, "draw_digits", None)  # the cache alone must do
    assert torch.equal(data.load_images("digits", tmp_path)[0], images)
    monkeypatch.setattr(data, "draw_digits", draw)
    assert capsys.readouterr().out == ""
    flipped = whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:]
    for bad in (b"", whole[:1000], flipped, b"<html>", whole[:-10]):
        path.write_bytes(bad)
        again = data.load_images("digits", tmp_path)
        assert torch.equal(again[0], images) and torch.equal(again[1], labels)
        assert "is not used" in capsys.readouterr().out
    monkeypatch.setattr(data, "draw_digits", None)
    assert torch.equal(data.load_images("digits", tmp_path)[0], images)  # and kept anew


def test_digits_without_a_writable_folder(tmp_path, few_digits, capsys):
    root = tmp_path / "data"
    root.mkdir()
    root.chmod(0o555)  # respected even by the superuser
    images = data.load_images("digits", root)[0]
    assert os.listdir(root) == [] and len(os.listdir("runs/cache/digits")) == 1
    assert torch.equal(data.load_images("digits", root)[0], images)
    root.chmod(0o755)
    for path in (tmp_path / "file", Path("home")):
        path.write_text("a file where a folder should be")
    shutil.rmtree("runs")
    Path("runs").write_text("")
    assert torch.equal(data.load_images("digits", tmp_path / "file")[0], images)  # drawn anew
    assert "not cached" in capsys.readouterr().out


# --- the rest

@pytest.mark.parametrize("dataset, split, words", [("svhn", "train", cli.DATASETS),
                                                   ("mnist", "val", ("train", "test"))])
def test_wrong_arguments_list_the_choices(tmp_path, dataset, split, words):
    with pytest.raises(cli.Mistake) as caught:
        data.load_images(dataset, tmp_path, split)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
