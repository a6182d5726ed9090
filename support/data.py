"""Data sets: drawn, found or downloaded; every length in a file is checked before it is used.

    images, labels = load_images("mnist", "data")    # uint8 [60000, 1, 28, 28], int64 [60000]
"""
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import shlex
import tarfile
import urllib.request

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from support import cli
from support.runs import atomic, cache_folders, cached, images_hash, reason, writable

KRIZ = "https://www.cs.toronto.edu/~kriz/"
MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
    "cifar10": (KRIZ,), "cifar100": (KRIZ,),
}
OFFICIAL = {  # how md5s begin: as downloaded, unpacked
    "mnist train images": ("f68b3c2d", "6bbc9ace"),
    "mnist train labels": ("d53e105e", "a25bea73"),
    "mnist test images": ("9fb629c4", "2646ac64"),
    "mnist test labels": ("ec29112d", "27ae3e4e"),
    "fashion train images": ("8d4fb7e6", "f4a8712d"),
    "fashion train labels": ("25c81989", "9018921c"),
    "fashion test images": ("bef4ecab", "8181f547"),
    "fashion test labels": ("bb300cfd", "15d48437"),
    "cifar10 binary version": ("c32a1d4a",),
    "cifar10 Python version": ("c58f3010",),
    "cifar100 binary version": ("03b5dce0",),
    "cifar100 Python version": ("eb9058c3",),
}
TORCHVISION = {"mnist": "MNIST/raw", "fashion": "FashionMNIST/raw"}
CIFAR = {  # folder, label bytes (the last one counts), files
    "cifar10": ("cifar-10-batches-bin", 1, {
        "train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}),
    "cifar100": ("cifar-100-binary", 2, {"train": ["train.bin"], "test": ["test.bin"]}),
}
MAX_BYTES = 250_000_000  # of a file


def load_images(dataset, root, split="train"):
    """One split of a data set -> (images uint8 [N, C, H, W], labels int64 [N]), on the CPU.

    Files below `root` (~ and $VARIABLES are expanded) are read in place; missing ones are
    downloaded (digits: drawn) to it, or to a cache where it is read-only.
    Mistake for an unknown name; OSError, in one line, for a missing, wrong or damaged file.
    """
    for name, choices in (dataset, cli.DATASETS), (split, ("train", "test")):
        if name not in choices:
            raise cli.Mistake(f"unknown {name!r}: choose from {', '.join(choices)}")
    read = _read_digits if dataset == "digits" else _read_cifar if dataset in CIFAR else _read_mnist
    images, labels = read(dataset, cli.path(os.fspath(root)) or ".", split)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def load(args, split="train"):
    """load_images of the flags --images or --dataset; labels are None where images have none."""
    if getattr(args, "images", None) is None:
        return load_images(args.dataset, args.data_dir, split)
    from support import own
    found = own.of(args)
    return (found.train, found.labels) if split == "train" else (found.test, found.truth)


def splits(args):
    """load() of the training images and of the held-out ones."""
    return load(args), load(args, "test")


def unlabelled(args):
    """Whether the images of a run have no labels."""
    return getattr(args, "images", None) is not None and load(args)[1] is None


def hash_of(args, images, test):
    """The name of the data in config.json: of the training images; of your own, of all."""
    if getattr(args, "images", None) is None:
        return images_hash(images)
    return f"{images_hash(images)}-{images_hash(test)}"


def shares_of(labels):
    """The share of each class, float32 [K]; None without labels."""
    return None if labels is None else torch.bincount(labels) / len(labels)


# --------------------------------------------------------------------------- digits, drawn

DRAWING = 2  # raised when draw_digits changes
DIGITS = {"train": (10_000, 1), "test": (2_000, 2)}  # images, seed
FINE = 3  # times finer, then averaged


@functools.lru_cache(maxsize=None)
def _glyph(digit, stroke):
    """One upright digit, centred, `stroke` fine pixels bolder -> PIL image."""
    size = 28 * FINE
    canvas, font = Image.new("L", (size, size)), ImageFont.load_default(0.98 * size)
    left, top, right, bottom = font.getbbox(str(digit))
    corner = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, str(digit), 255, font, stroke_width=stroke)
    return canvas


def draw_digits(n, seed):
    """n digits, white on black -> (images uint8 [n, 1, 28, 28], labels uint8 [n]), numpy.

    In Pillow's font; class, position, size, rotation, shear, stroke width and blur are random.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n).astype(np.uint8)
    strokes = rng.integers(1, 3, n)  # fine pixels
    angles, shears = rng.uniform(-0.06, 0.06, (2, n))  # radians; x by y
    widths, heights = rng.uniform(0.95, 1.05, (2, n))
    shifts = rng.uniform(-0.6, 0.6, (n, 2)) * FINE
    blurs = rng.uniform(0.1, 0.4, n) * FINE
    images, centre = np.empty((n, 1, 28, 28), np.uint8), 14 * FINE
    for i in tqdm(range(n), desc="drawing digits", leave=False, disable=None):
        cos, sin = math.cos(angles[i]), math.sin(angles[i])
        scale = [[widths[i], shears[i]], [0, heights[i]]]
        forward = np.array([[cos, -sin], [sin, cos]]) @ scale
        back = np.linalg.inv(forward)  # Pillow maps target to source
        offset = centre - back @ (centre + shifts[i])
        matrix = (*back[0], offset[0], *back[1], offset[1])
        fine = _glyph(int(labels[i]), int(strokes[i])).transform(
            (28 * FINE, 28 * FINE), Image.AFFINE, matrix, Image.BILINEAR)
        blur = ImageFilter.GaussianBlur(float(blurs[i]))
        images[i, 0] = np.asarray(fine.filter(blur).reduce(FINE))
    return images, labels


def _read_digits(dataset, root, split):
    """The digits of a split, from a cache or drawn (3 to 7 s for the 10,000 of train)."""
    n, seed = DIGITS[split]
    name, places = f"{split}-n{n}-seed{seed}-{DRAWING}.pt", _places(dataset, root, dataset)
    drawn = cached(name, lambda: [*map(torch.from_numpy, draw_digits(n, seed))], places)
    return [array.numpy() for array in drawn]


# --------------------------------------------------------------------------- files

def _places(dataset, root, *names):
    """Folders where files are looked for, and downloaded to the first that can be written to."""
    caches = [os.path.join(folder, dataset) for folder in cache_folders()]
    return [os.path.join(root, name) for name in names] + caches


def _find(folders, names, there=os.path.isfile):
    """Path of the first of these names, folder by folder, that is there; or None."""
    paths = (os.path.join(folder, name) for folder in folders for name in names)
    return next(filter(there, paths), None)


@contextlib.contextmanager
def _reading(path, known=None):
    """Turn any failure to read a file into one OSError that names it and what to do.

    Only a file of bad content may be deleted: not an official one (known), nor one that the
    operating system refuses, which is an OSError with an errno.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # bad bytes raise a dozen kinds
        advice = "delete it and run again to download it anew"
        if known or getattr(error, "errno", None) is not None:
            advice = "check it, or choose another --data-dir"
        raise OSError(f"{path} cannot be read: {reason(error)}; {advice}") from error


def _identify(data):
    """The key of OFFICIAL whose md5 these bytes have, or None."""
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return next((key for key, starts in OFFICIAL.items() if md5.startswith(starts)), None)


def _load(path):
    """(bytes of a file, unpacked where gzipped; their key in OFFICIAL, or None)."""
    with _reading(path), open(path, "rb") as file:
        data = file.read(MAX_BYTES)
    known = _identify(data)
    if data[:2] == b"\x1f\x8b":  # whatever its name
        with _reading(path, known), gzip.open(io.BytesIO(data)) as file:
            data = file.read(MAX_BYTES)
        known = known or _identify(data)
    return data, known


@functools.lru_cache(maxsize=None)  # one note a file
def _check(path, known, wanted):
    """OSError for an official file in another one's place; a note for an unknown file."""
    if known is None:
        print(f"note: {path} is not the official file of {wanted}")
    elif known != wanted:
        raise OSError(f"{path} holds {known}, not {wanted}: move it away and run again")


def _fetch(dataset, name, wanted, folders):
    """Path of a file, downloaded to the first of `folders` that can be written to."""
    for folder in folders[:-len(cache_folders())]:  # one without x seems empty
        with _reading(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(os.path.join(folder, "."))
    path = os.path.join(writable(folders), name)
    if not os.path.isfile(path):
        urls = [mirror + name for mirror in MIRRORS[dataset]]
        download(urls, path, OFFICIAL[wanted][0])
    return path


def download(urls, path, digest, timeout=20, max_bytes=MAX_BYTES, algorithm="md5"):
    """Fetch to `path` the first of `urls` that serves the file whose digest begins so -> path.

    timeout: seconds without an answer. Nothing is written, and no folder made, until all bytes
    are there and right. One OSError, with the command to fetch it by hand, when no url has it.
    """
    failures = []
    for url in urls:
        print(f"downloading {url}")
        try:
            data = _transfer(url, digest, timeout, max_bytes, algorithm)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url}: {reason(error)}")
            continue
        with atomic(path) as temporary, open(temporary, "wb") as file:
            file.write(data)
        return path
    command = f"curl -L --create-dirs -o {shlex.quote(path)} {shlex.quote(urls[0])}"
    why = "; ".join(failures)
    raise OSError(f"could not download {path} ({why}); fetch it by hand: {command}")


def _transfer(url, digest, timeout, max_bytes, algorithm):
    """The bytes at url, with a progress bar. OSError unless they are whole and have this digest."""
    data = bytearray()
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        total = answer.length
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := answer.read(1 << 16):
                data += chunk
                bar.update(len(chunk))
                if len(data) > max_bytes:
                    raise OSError(f"longer than {max_bytes} bytes")
    if len(data) != (total or len(data)):
        raise OSError(f"broke off after {len(data)} of {total} bytes")
    found = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if not found.startswith(digest):
        what = "a web page" if data.lstrip()[:1] == b"<" else f"wrong {algorithm}"
        raise OSError(f"{what} ({found}, expected {digest})")
    return data


def _parse_idx(data, shape):
    """Bytes of an IDX file of uint8 items of `shape` (() for labels) -> numpy [N, *shape]."""
    n = int.from_bytes(data[4:8], "big")
    head = np.array([0x801 + len(shape), n, *shape], ">u4").tobytes()
    if not data.startswith(head):
        raise ValueError(f"not an IDX file of {'images' if shape else 'labels'}")
    items = bytearray(data[len(head):])
    if n == 0 or len(items) != n * math.prod(shape):
        raise ValueError(f"{len(items)} bytes for {n} items")
    return np.frombuffer(items, np.uint8).reshape(n, *shape)


def _read_mnist(dataset, root, split):
    """MNIST or Fashion-MNIST from IDX files -> numpy (images [N, 1, 28, 28], labels [N])."""
    stem = {"train": "train", "test": "t10k"}[split]
    files = {f"{dataset} {split} {part}": [  # some copies have a dot
        f"{stem}-{part}{mark}{kind}-ubyte{gz}" for mark in "-." for gz in (".gz", "")]
        for part, kind in (("images", "idx3"), ("labels", "idx1"))}
    places = _places(dataset, root, dataset, TORCHVISION[dataset], "")
    pairs = [[_find([place], names) for names in files.values()] for place in places]
    for paths in [*filter(all, pairs), None]:  # both from one folder
        paths = paths or [_fetch(dataset, names[0], what, places)
                          for what, names in files.items()]
        loaded = [_load(path) for path in paths]
        others = [known for _, known in loaded if known and dataset not in known]
        if paths != pairs[2] or not others:
            break
        # only the data folder itself names no data set: the other one may lie there
        print(f"note: {root} holds {' and '.join(others)}: passed over")
    arrays = []
    for path, (data, known), what, shape in zip(paths, loaded, files, ((28, 28), ())):
        _check(path, known, what)
        with _reading(path, known):
            arrays.append(_parse_idx(data, shape))
    images, labels = arrays
    with _reading(paths[0] if known else paths[1]):  # never the official one
        if len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images")
        if labels.max() > 9:
            raise ValueError("a label above 9")
    return images[:, None], labels


def _find_archive(dataset, root, places):
    """Path of a CIFAR archive. OSError that names a Python version found in its place."""
    n, wanted = cli.DATASETS[dataset][1], f"{dataset} binary version"
    ends = "binary.tar.gz", "python.tar.gz", "python", "batches-py"
    archive, *python = [f"cifar-{n}-{end}" for end in ends]
    try:
        return _find(places, [archive]) or _fetch(dataset, archive, wanted, places)
    except OSError as error:
        above = os.path.dirname(os.path.abspath(root))  # root may be it
        if path := _find([*places, above], python, os.path.exists):
            raise OSError(f"{path} is the Python version; the binary version is needed: "
                          f"{archive} ({error})") from error
        raise


def _read_members(data, names):
    """Members `names` of a tar file's bytes -> list of bytes; nothing is written to disk."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = [m for m in tar if m.name in names and m.isreg() and not m.issparse()]
        members.sort(key=lambda m: m.name)
        if [m.name for m in members] != names:
            raise ValueError(f"not one plain file each: {', '.join(names)}")
        return [tar.extractfile(m).read() for m in members]


def _read_cifar(dataset, root, split):
    """CIFAR, extracted or from its archive -> numpy (images [N, 3, 32, 32], labels [N])."""
    inside, label_bytes, splits = CIFAR[dataset]
    places, names = _places(dataset, root, "", dataset), splits[split]
    for folder in [os.path.join(place, name) for place in places for name in (inside, "")]:
        if all(_find([folder], [name]) for name in sum(splits.values(), [])):
            paths = [os.path.join(folder, name) for name in names]
            blobs, known = [_load(path)[0] for path in paths], None
            break
    else:
        path = _find_archive(dataset, root, places)
        data, known = _load(path)
        _check(path, known, f"{dataset} binary version")
        with _reading(path, known):
            blobs = _read_members(data, [f"{inside}/{name}" for name in names])
        paths = [f"{path} ({name})" for name in names]
    size, classes = label_bytes + 3 * 32 * 32, cli.DATASETS[dataset][1]
    for path, blob in zip(paths, blobs):
        with _reading(path, known):
            if not blob or len(blob) % size:
                raise ValueError(f"{len(blob)} bytes, not a multiple of {size}")
            if max(blob[label_bytes - 1::size]) >= classes:
                raise ValueError(f"a label above {classes - 1}")
    # a record: labels, then 1024 red, 1024 green and 1024 blue bytes
    records = np.frombuffer(b"".join(blobs), np.uint8).reshape(-1, size)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32).copy(), records[:, label_bytes - 1]
