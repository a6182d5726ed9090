"""The data part of ddpm.py: good files, every kind of bad file, downloads from a server that misbehaves.

Sizes: a shorter file of the right layout is accepted (any count from 1 to ddpm.MAX_IMAGES: IDX as its header
says, CIFAR any whole number of records); anything else ends in one OSError of one line that names the file.
"""
import gzip
import hashlib
import io
import os
import random
import struct
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm

DATA = Path(os.environ.get("LTH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data").resolve()
NAMES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
         "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Each test runs in its own folder and with its own runs/cache, and without the network."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for dataset in ddpm.MIRRORS:
        monkeypatch.setitem(ddpm.MIRRORS, dataset, ("http://127.0.0.1:9/",))


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


def write_mnist(root, dataset="fashion", split="test", n=7, images=None, labels=None):
    """A small valid pair of files; `images`, `labels` replace the bytes of one -> (images, labels, paths)."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8)
    folder = root / dataset
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in NAMES[split]]
    paths[0].write_bytes(gzip.compress(idx(x)) if images is None else images)
    paths[1].write_bytes(gzip.compress(idx(y)) if labels is None else labels)
    return x, y, paths


@pytest.mark.skipif(not (DATA / "mnist" / NAMES["train"][0]).exists(), reason=f"no MNIST under {DATA}")
def test_real_mnist():
    images, labels = ddpm.load_images("mnist", DATA)
    assert images.shape == (60000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert abs(images.float().mean().item() / 255 - 0.1307) < 1e-4  # the mean everybody normalises by
    images, labels = ddpm.load_images("mnist", str(DATA), split="test")
    assert len(images) == len(labels) == 10000 and labels.bincount().tolist()[:3] == [980, 1135, 1032]


@pytest.mark.skipif(not (DATA / "mnist" / NAMES["train"][0]).exists(), reason=f"no MNIST under {DATA}")
@pytest.mark.parametrize("split", ["train", "test"])
def test_md5_of_real_mnist(split):
    for name, md5 in zip(NAMES[split], ddpm.IDX_MD5["mnist", split]):
        assert hashlib.md5((DATA / "mnist" / name).read_bytes()).hexdigest() == md5


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("dataset", ["mnist", "fashion"])
def test_small_idx(tmp_path, dataset, split):
    x, y, paths = write_mnist(tmp_path, dataset, split)
    images, labels = ddpm.load_images(dataset, tmp_path, split)
    assert np.array_equal(images.numpy(), x[:, None]) and labels.tolist() == y.tolist()
    images[0] = 0  # writable: the tensor owns its memory
    assert sorted(os.listdir(tmp_path / dataset)) == sorted(path.name for path in paths)


IMAGES, LABELS = idx(np.zeros((7, 28, 28), np.uint8)), idx(np.zeros(7, np.uint8))
WHOLE = gzip.compress(IMAGES)
BAD_IMAGES = {
    "empty file": b"",
    "not gzip": IMAGES,
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


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_file(tmp_path, case):
    _, _, paths = write_mnist(tmp_path, images=BAD_IMAGES[case])
    one_line(lambda: ddpm.load_images("fashion", tmp_path, "test"), paths[0], "delete it and run again")


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_label_file(tmp_path, case):
    _, _, paths = write_mnist(tmp_path, labels=BAD_LABELS[case])
    one_line(lambda: ddpm.load_images("fashion", tmp_path, "test"), paths[1], "delete it and run again")


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "mnist" / NAMES["train"][0]).mkdir(parents=True)
    (tmp_path / "mnist" / NAMES["train"][1]).write_bytes(gzip.compress(LABELS))
    one_line(lambda: ddpm.load_images("mnist", tmp_path), NAMES["train"][0])


# --- CIFAR

FOLDER = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
ARCHIVE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def cifar_files(dataset, n=3):
    """Official file names -> bytes of n records each, and file names -> (images, fine labels)."""
    rng = np.random.default_rng(4)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"] if dataset == "cifar10" \
        else ["train.bin", "test.bin"]
    files, arrays = {}, {}
    for name in names:
        y = rng.integers(0, 10 if dataset == "cifar10" else 100, n).astype(np.uint8)
        x = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        head = [y[:, None]] if dataset == "cifar10" else [y[:, None] // 5, y[:, None]]  # coarse, then fine
        files[name] = np.concatenate(head + [x.reshape(n, -1)], 1).tobytes()
        arrays[name] = x, y
    return files, arrays


def write_folder(root, dataset, files):
    folder = root / FOLDER[dataset]
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def member(name, data=b"", **fields):
    """A tar member, fields of its header replaced."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_archive(root, dataset, members, cut=None):
    path = root / ARCHIVE[dataset]
    path.write_bytes(gzip.compress(tar_bytes(members), 1)[:cut])
    return path


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, dataset, split, packed):
    files, arrays = cifar_files(dataset)
    if packed:
        names = [member(f"{FOLDER[dataset]}/{name}", data) for name, data in files.items()]
        write_archive(tmp_path, dataset, [member(FOLDER[dataset], type=tarfile.DIRTYPE), *names,
                                          member(f"{FOLDER[dataset]}/readme.html", b"<html>")])
    else:
        write_folder(tmp_path, dataset, files)
    before = sorted(os.listdir(tmp_path))
    images, labels = ddpm.load_images(dataset, tmp_path, split)
    chosen = [name for name in files if name.startswith("test") == (split == "test")]
    assert np.array_equal(images.numpy(), np.concatenate([arrays[name][0] for name in chosen]))
    assert np.array_equal(labels.numpy(), np.concatenate([arrays[name][1] for name in chosen]))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert sorted(os.listdir(tmp_path)) == before  # nothing was unpacked


BAD_RECORDS = {"empty": lambda data: b"", "one byte short": lambda data: data[:-1],
               "one byte more": lambda data: data + b"\0", "label 10": lambda data: b"\x0a" + data[1:]}


@pytest.mark.parametrize("case", BAD_RECORDS)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_cifar_records(tmp_path, case, packed):
    files, _ = cifar_files("cifar10")
    files["data_batch_4.bin"] = BAD_RECORDS[case](files["data_batch_4.bin"])
    folder = "cifar-10-batches-bin"
    if packed:
        members = [member(f"{folder}/{name}", data) for name, data in files.items()]
        where = write_archive(tmp_path, "cifar10", members)
    else:
        where = write_folder(tmp_path, "cifar10", files) / "data_batch_4.bin"
    one_line(lambda: ddpm.load_images("cifar10", tmp_path), where, "data_batch_4.bin", "delete it")


def test_cifar_fine_label_and_missing_file(tmp_path):
    files, _ = cifar_files("cifar100")
    files["test.bin"] = b"\xff\x63" + files["test.bin"][2:]  # the coarse label is not read, fine 99 is legal
    folder = write_folder(tmp_path, "cifar100", files)
    assert ddpm.load_images("cifar100", tmp_path, "test")[1][0] == 99
    (folder / "test.bin").write_bytes(b"\x00\x64" + files["test.bin"][2:])
    one_line(lambda: ddpm.load_images("cifar100", tmp_path, "test"), folder / "test.bin", "label 100")
    (folder / "test.bin").unlink()
    one_line(lambda: ddpm.load_images("cifar100", tmp_path, "test"), folder / "test.bin", "missing")


def bad_archives():
    """Case -> (members, where the file is cut)."""
    files, _ = cifar_files("cifar10")
    good = [member(f"cifar-10-batches-bin/{name}", data) for name, data in files.items()]
    name = good[2][0].name
    link = {"size": 0, "linkname": "/etc/passwd"}
    return {
        "missing member": (good[:2] + good[3:], None),
        "symbolic link": (good[:2] + [member(name, type=tarfile.SYMTYPE, **link)] + good[3:], None),
        "hard link": (good[:2] + [member(name, type=tarfile.LNKTYPE, **link)] + good[3:], None),
        "link to another member": (good[:2] + [member(name, type=tarfile.SYMTYPE, size=0,
                                                      linkname="data_batch_2.bin")] + good[3:], None),
        "device": (good[:2] + [member(name, type=tarfile.CHRTYPE)] + good[3:], None),
        "folder": (good[:2] + [member(name, type=tarfile.DIRTYPE)] + good[3:], None),
        "twice": (good + [good[2]], None),
        "outside in its place": (good[:2] + [member("../" + name, good[2][1])] + good[3:], None),
        "absolute in its place": (good[:2] + [member("/" + name, good[2][1])] + good[3:], None),
        "cut": (good, 20_000),
        "cut in the checksum": (good, -3),
        "empty": (good, 0),
    }


@pytest.mark.parametrize("case", bad_archives())
def test_bad_archive(tmp_path, case):
    path = write_archive(tmp_path, "cifar10", *bad_archives()[case])
    one_line(lambda: ddpm.load_images("cifar10", tmp_path), path, "delete it and run again")


def test_outside_members_are_left_alone(tmp_path):
    """Beside a complete set, members that would land elsewhere are skipped: nothing is ever unpacked."""
    files, _ = cifar_files("cifar10")
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    good = [member(f"cifar-10-batches-bin/{name}", data) for name, data in files.items()]
    write_archive(root, "cifar10", [member("../evil", b"x"), member(f"{tmp_path}/evil", b"x"), *good,
                                    member("evil", type=tarfile.SYMTYPE, linkname=str(tmp_path))])
    assert len(ddpm.load_images("cifar10", root)[0]) == 15
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
    one_line(lambda: ddpm.load_images("cifar10", tmp_path), path, "unpacks to more than")
    assert time.time() - start < 10
    # the same promise with nothing behind it
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(5000)))
    one_line(lambda: ddpm.load_images("cifar10", tmp_path), path)


def test_sparse_member(tmp_path):
    """A GNU sparse member says 'so many zeros' in 512 bytes: refused, however well the length would fit."""
    info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[148:156], header[483:495] = b"S", b" " * 8, b"%011o\0" % (3073 * 1000)
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / ARCHIVE["cifar10"]
    path.write_bytes(gzip.compress(bytes(header) + bytes(2048)))
    with tarfile.open(path) as tar:
        assert tar.getmembers()[0].issparse() and tar.getmembers()[0].size == 3073 * 1000
    one_line(lambda: ddpm.load_images("cifar10", tmp_path, "test"), path, "not a plain file")


# --- fuzz

def mutate(data, rng):
    """A few random edits: bytes changed, a stretch cut out, doubled or replaced, the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        if rng.random() < 0.5:  # headers are where it hurts
            i, j = i % 600, min(i % 600 + rng.randint(1, 8), len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[i:j] = rng.randbytes(j - i)
        elif kind == 1:
            del data[i:j]
        elif kind == 2:
            data[i:i] = data[i:j]
        elif kind == 3:
            data[i:j] = bytes([rng.choice((0, 1, 0x7f, 0x80, 0xff))]) * (j - i)
        else:
            del data[max(i, 1):]
        data = data or bytearray(1)
    return bytes(data)


def test_fuzz(tmp_path):
    """Mutated bytes, before and after compression, end in an OSError of one line or in legal data."""
    rng, outcomes = random.Random(0), {"good": 0, "refused": 0}
    x, y, paths = write_mnist(tmp_path, n=2)
    files, _ = cifar_files("cifar100", n=1)
    folder = FOLDER["cifar100"]
    tar = tar_bytes([member(f"{folder}/{name}", data) for name, data in files.items()])

    def check(dataset):
        try:
            images, targets = ddpm.load_images(dataset, tmp_path, "test")
            assert images.shape == (len(targets), *ddpm.DATASETS[dataset][0]) and len(targets)
            assert 0 <= targets.min() and targets.max() < ddpm.DATASETS[dataset][1]
            outcomes["good"] += 1
        except OSError as error:
            assert "\n" not in str(error) and "delete it and run again" in str(error)
            outcomes["refused"] += 1

    for path, good, dataset in ((paths[0], idx(x), "fashion"), (paths[1], idx(y), "fashion"),
                                (tmp_path / ARCHIVE["cifar100"], tar, "cifar100")):
        for i in range(1000):  # two in three change what is compressed, one the compressed file
            bad = gzip.compress(mutate(good, rng), 1) if i % 3 else mutate(gzip.compress(good, 1), rng)
            path.write_bytes(bad)
            check(dataset)
        path.write_bytes(gzip.compress(good))
    assert sum(outcomes.values()) == 3000 and outcomes["good"] > 60 and outcomes["refused"] > 1500


# --- downloads, from a server of our own

GOOD = gzip.compress(bytes(range(256)) * 500)
MD5 = hashlib.md5(GOOD).hexdigest()


@pytest.fixture
def server():
    """A local server: .url, .seen (paths asked for), .files (name -> bytes); the path says how it acts."""
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
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield type("Server", (), {"url": url, "seen": seen, "files": files})
    release.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("kind", ["good", "nolength"])
def test_download(server, tmp_path, kind):
    path = tmp_path / "file.gz"
    assert ddpm.download([f"{server.url}/{kind}/file.gz"], str(path), MD5) == str(path)
    assert path.read_bytes() == GOOD
    assert sorted(os.listdir(tmp_path)) == ["cwd", "file.gz"]


@pytest.mark.parametrize("kind, why", [("page", "web page"), ("half", "broke off"), ("wrong", "wrong md5"),
                                       ("missing", "404"), ("silent", "timed out")])
def test_bad_download(server, tmp_path, kind, why):
    path, url = tmp_path / "file.gz", f"{server.url}/{kind}/file.gz"
    one_line(lambda: ddpm.download([url], str(path), MD5, timeout=0.3), "file.gz", tmp_path, why,
             f"curl -L --create-dirs -o {path} {url}")
    assert os.listdir(tmp_path) == ["cwd"]  # no half file, no temporary one
    good = f"{server.url}/good/file.gz"
    ddpm.download([url, good], str(path), MD5, timeout=0.3)  # the next mirror has it
    assert path.read_bytes() == GOOD


def test_download_is_bounded_and_mirrors_may_be_down(server, tmp_path):
    path, good = tmp_path / "my file.gz", f"{server.url}/good/file.gz"
    one_line(lambda: ddpm.download([good], str(path), MD5, max_bytes=100), "longer than 100", f"'{path}'")
    down = "http://127.0.0.1:9/file.gz"
    one_line(lambda: ddpm.download([down, down], str(path), MD5), "refused", down)
    ddpm.download([down, good], str(path), MD5)
    assert path.read_bytes() == GOOD and sorted(os.listdir(tmp_path)) == ["cwd", "my file.gz"]


@pytest.mark.parametrize("writable", [True, False])
def test_missing_files_are_fetched_once(server, tmp_path, monkeypatch, writable):
    """Into the data folder, or into runs/cache when that is read-only; a second load asks nobody."""
    for name, data in zip(NAMES["test"], (IMAGES, LABELS)):
        server.files[name] = gzip.compress(data)
    monkeypatch.setitem(ddpm.IDX_MD5, ("mnist", "test"),
                        [hashlib.md5(server.files[name]).hexdigest() for name in NAMES["test"]])
    monkeypatch.setitem(ddpm.MIRRORS, "mnist", (f"{server.url}/missing/", f"{server.url}/files/"))
    root = tmp_path / "data"
    root.mkdir()
    root.chmod(0o755 if writable else 0o555)
    assert len(ddpm.load_images("mnist", root, "test")[0]) == 7
    folder = root / "mnist" if writable else Path("runs/cache/mnist")
    assert sorted(os.listdir(folder)) == sorted(NAMES["test"]) and (writable or not os.listdir(root))
    assert len(server.seen) == 4  # two files, each asked of a mirror that lacks it first
    assert len(ddpm.load_images("mnist", root, "test")[0]) == 7 and len(server.seen) == 4
    root.chmod(0o755)


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    Path("runs").write_text("a file where a folder should be")
    one_line(lambda: ddpm.load_images("mnist", tmp_path / "file"), "cannot write", "--data-dir")


def test_unreachable_mirrors_name_the_way_out(tmp_path):
    for dataset, name in (("mnist", NAMES["train"][0]), ("cifar10", ARCHIVE["cifar10"])):
        one_line(lambda: ddpm.load_images(dataset, tmp_path), name, tmp_path, "curl -L")


# --- digits

def test_drawn_digits():
    images, labels = ddpm.draw_digits(200, seed=5)
    again, same = ddpm.draw_digits(200, seed=5)
    assert np.array_equal(images, again) and np.array_equal(labels, same)
    assert images.shape == (200, 1, 28, 28) and images.dtype == np.uint8
    assert np.bincount(labels, minlength=10).min() > 5  # of 20 expected: at random, not dealt out evenly
    other, others = ddpm.draw_digits(200, seed=6)
    assert not np.array_equal(labels, others) and not np.array_equal(images, other)
    assert images.min() == 0 and images.max() == 255 and 25 < images.mean() < 75  # white on black, as MNIST
    assert len(np.unique(images)) > 100                                            # smooth edges
    border = np.concatenate([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
    assert (border.max(-1) < 100).mean() > 0.98                                    # the frame holds them
    assert len({x.tobytes() for x in images}) == 200
    rows = (images > 60).any(-1).sum(-1)
    assert rows.min() >= 14 and 18 < rows.mean() < 25                              # and they fill it


def test_digits_can_be_told_apart():
    """The nearest of ten class means finds most labels: legible, though not all alike."""
    images, labels = ddpm.draw_digits(400, seed=1)
    others, targets = ddpm.draw_digits(400, seed=2)
    means = np.stack([images[labels == k].mean((0, 1)) for k in range(10)]).reshape(10, -1)
    distance = ((others.reshape(400, 1, -1) - means) ** 2).sum(-1)
    assert (distance.argmin(1) == targets).mean() > 0.8


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(ddpm, "DIGITS", {"train": (50, 1), "test": (20, 2)})


def test_digits_cache(tmp_path, few_digits, monkeypatch):
    images, labels = ddpm.load_images("digits", tmp_path)
    assert images.shape == (50, 1, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    test = ddpm.load_images("digits", tmp_path, "test")[0]
    assert len(test) == 20 and not torch.equal(test, images[:20])
    path = tmp_path / "digits" / f"train-{ddpm.DRAWING}.npz"
    assert sorted(os.listdir(tmp_path / "digits")) == [
        f"{split}-{ddpm.DRAWING}.npz" for split in ("test", "train")]
    whole, draw = path.read_bytes(), ddpm.draw_digits
    monkeypatch.setattr(ddpm, "draw_digits", None)  # the cache alone must do
    assert torch.equal(ddpm.load_images("digits", tmp_path)[0], images)
    monkeypatch.setattr(ddpm, "draw_digits", draw)
    for bad in (b"", whole[:1000], whole[:5000] + b"\xff" + whole[5001:], b"<html>", whole[:-10]):
        path.write_bytes(bad)
        again = ddpm.load_images("digits", tmp_path)
        assert torch.equal(again[0], images) and torch.equal(again[1], labels) and path.read_bytes() == whole


def test_digits_of_a_full_set():
    assert ddpm.DIGITS["train"][0] == 10_000 and ddpm.DIGITS["test"][0] == 2_000
    assert ddpm.DIGITS["train"][1] != ddpm.DIGITS["test"][1]


def test_digits_without_a_writable_folder(tmp_path, few_digits, capsys):
    root = tmp_path / "data"
    root.mkdir()
    root.chmod(0o555)  # respected even by the superuser
    images = ddpm.load_images("digits", root)[0]
    assert os.listdir(root) == [] and os.listdir("runs/cache/digits") == [
        f"train-{ddpm.DRAWING}.npz"]
    assert torch.equal(ddpm.load_images("digits", root)[0], images)
    root.chmod(0o755)
    (tmp_path / "file").write_text("")
    os.remove(f"runs/cache/digits/train-{ddpm.DRAWING}.npz")
    os.rmdir("runs/cache/digits")
    Path("runs/cache/digits").write_text("")
    assert torch.equal(ddpm.load_images("digits", tmp_path / "file")[0], images)  # drawn, though not kept
    assert "not cached" in capsys.readouterr().out


# --- the rest

def test_wrong_arguments_list_the_choices(tmp_path):
    for arguments, words in ((("svhn", tmp_path), ddpm.DATASETS),
                             (("mnist", tmp_path, "val"), ("train", "test"))):
        with pytest.raises(ValueError) as caught:
            ddpm.load_images(*arguments)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_ranges():
    levels = torch.arange(256, dtype=torch.uint8)
    x = ddpm.to_float(levels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1
    assert torch.equal(ddpm.to_uint8(x), levels) and torch.equal(ddpm.to_uint8(x.double()), levels)
    assert ddpm.to_uint8(torch.tensor([-9.0, -1.0, 0.999, 9.0])).tolist() == [0, 0, 255, 255]
    for call in (lambda: ddpm.to_float(x), lambda: ddpm.to_uint8(levels)):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_save_grid(tmp_path, channels, mode):
    images = torch.arange(5 * channels * 4 * 6).reshape(5, channels, 4, 6).to(torch.uint8)
    path = tmp_path / "new" / "grid.png"
    path.parent.mkdir()
    ddpm.save_grid(images, path, columns=3, scale=2)
    picture = Image.open(path)
    assert picture.mode == mode and picture.size == (3 * 13 + 1, 2 * 9 + 1)
    pixels = np.asarray(picture).reshape(19, 40, channels)
    tile = images[4].permute(1, 2, 0).numpy()  # the last one: second row, second column
    assert np.array_equal(pixels[10:18:2, 14:26:2], tile) and np.array_equal(pixels[11:18:2, 15:26:2], tile)
    for grey in (pixels[[0, 9, 18]], pixels[:, ::13], pixels[10:, 27:]):
        assert (grey == 96).all()
