"""Your own images (--images): a folder of PNG and JPEG files at any depth, or an .npz file.

    own = read("photos", 32)       # own.train, own.test: uint8 [N, C, 32, 32]

Each image is cropped to its central square and resized with antialiasing. A tenth is held out, by
a hash of the path below the folder (.npz: of the index): the same ones when files are added.
Labels are the first subfolder, or the array `labels`; there may be none.
"""
import functools
import hashlib
import os
import re
import unicodedata
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from support import cli, runs

ENDS = ".png", ".jpg", ".jpeg"
FORMATS = "PNG", "JPEG", "WEBP"  # whatever the name says; Pillow runs a program to open others
GREY = "1", "L", "LA", "I", "I;16", "I;16B"  # modes of files without colour
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # no classes
SMALLEST, LARGEST, USUAL = 8, 256, 64  # pixels: of --image-size, and the most without it
FEWEST = 20  # images
MEASURABLE = 5  # held-out images that val_loss and precision need
SHOWN = 3  # unreadable files that are named
SLOW = 3.0  # seconds: what takes longer is cached
# What an image's side must be a multiple of, for a preset's levels and patch
MULTIPLE = {"tiny": 4, "mnist": 4, "cifar-small": 8, "cifar": 8, "paper": 8}
READING = 1  # raised when the same files would give other pixels
progress = functools.partial(tqdm, unit="image", leave=False, delay=2, disable=None)


class Own(NamedTuple):
    """Images uint8 [N, C, H, W], labels int64 [N] or None, classes: their names, on the CPU."""
    train: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor
    truth: torch.Tensor
    classes: list

    @property
    def colour(self):
        return self.train.shape[1] == 3


# --------------------------------------------------------------------------- what the flags say

def settle(args):
    """Complete --images, --image-size and the data set's name; return the defaults of the rest.

    Mistake that names the flag for a size that does not fit and for images that cannot be used.
    """
    args.images = os.path.abspath(args.images)
    if args.image_size is not None:
        check_size(args.image_size, args.preset or "tiny")
    listing.cache_clear()  # files may have come since the last command line
    if args.image_size is None:
        side, grey, n = measure(args.images)
        rough = args.preset or usual(side, grey, n)["preset"]
        args.image_size = nearest(min(side, USUAL), rough)
    own = of(args)
    args.dataset = name_of(args.images)
    found = usual(args.image_size, not own.colour, len(own.train))
    check_size(args.image_size, args.preset or found["preset"])
    return found | dict(samples=min(found["samples"], len(own.test), len(own.train)))


def usual(size, grey, n):
    """What n images of this size are trained with, unless flags say otherwise: small ones so that
    two CPU cores train a network in a minute or two, others as CIFAR-10 is."""
    few = n < 5000
    if size <= 32 and few:
        # 300 drawn shapes in colour come out better than by a wider network in the same seconds
        return cli.DEFAULTS["digits"] | dict(lr=6e-3, steps=800 if grey else 1000)
    if size <= 32 and grey:
        return cli.DEFAULTS["mnist"]
    return cli.DEFAULTS["cifar10"] | (dict(steps=2000) if few else {})


def nearest(size, preset):
    """The multiple that the preset needs which is nearest to size."""
    step = MULTIPLE.get(preset, 8)
    return min(max(step * round(size / step), SMALLEST), LARGEST)


def check_size(size, preset):
    """Refuse an --image-size that the preset cannot work at."""
    step, near = MULTIPLE.get(preset, 8), nearest(size, preset)
    if size % step or not SMALLEST <= size <= LARGEST:
        cli.refuse("image-size", f"{size} is not a multiple of {step} from {SMALLEST} to "
                   f"{LARGEST}, which --preset {preset} needs; the nearest is {near}")


def check_measurable(args):
    """Refuse images of which too few are held out to measure anything."""
    n = len(of(args).test)
    if n < MEASURABLE:
        cli.refuse("images", f"only {n} of the images in {args.images} are held out (a tenth is), "
                   f"and quality is measured on at least {MEASURABLE}: add images")


def name_of(path):
    """What the images are called in tables and charts: the folder's name, or the file's.

    Never that of a data set that this code knows, which would bring its classifier and its flips.
    """
    name = os.path.basename(path)
    name = name[:-4] if name.lower().endswith(".npz") else name
    name = name.encode("utf-8", "replace").decode()[:60]
    name = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name)
    taken = name in cli.DATASETS or name.startswith("cifar")
    return f"own_{name}" if taken else name or "images"


def folder_of(name):
    """The name as a folder's: letters, digits and - _ . alone."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "images"


def of(args):
    """The images that --images and --image-size name, read once per process."""
    return read(args.images, args.image_size)


def says(args, model, accuracy):
    """What the extractor of these images was trained on, for the line about the data. accuracy:
    of support.classifier."""
    own = of(args)
    some = own.test[:1000], None if own.truth is None else own.truth[:1000]  # seconds, not minutes
    right = f"{100 * accuracy(model, *some):.0f} % right on held-out images"
    n = len(own.test)
    few = f"; measured with as many samples as are held out, {n}: noisy" if n < 100 else ""
    _, channels, size, _ = own.train.shape
    shape = f"{size} x {size} pixels, {'colour' if channels == 3 else 'grey'}"
    task = f"trained on their {len(own.classes)} classes"
    if own.labels is None:
        task = "trained to tell by which of 4 rotations an image was turned, as there are no labels"
        right += " (chance: 25 %)"
    return f"{shape}; its features are {task}: {right}{few}"


# --------------------------------------------------------------------------- which files

@functools.lru_cache(maxsize=4)
def listing(path):
    """(relative paths of the images of a folder, () for an .npz file; a name for all that they
    hold, by paths, sizes and times). Mistake where there is nothing to read."""
    names = ()
    if os.path.isdir(path):
        names = tuple(sorted(find(path), key=digest_of))
        if not names:
            cli.refuse("images", f"{path} holds no PNG or JPEG files")
    elif not os.path.exists(path):
        cli.refuse("images", f"{path} is not there")
    elif not path.lower().endswith(".npz"):
        cli.refuse("images", f"{path} is neither a folder nor an .npz file")
    known = hashlib.sha256(f"{READING} {os.path.realpath(path)}".encode("utf-8", "surrogateescape"))
    for name in names or [""]:
        try:
            found = os.stat(os.path.join(path, name) if name else path)
            facts = found.st_size, found.st_mtime_ns
        except OSError:  # a broken link
            facts = None
        known.update(f"\0{name}\0{facts}".encode("utf-8", "surrogateescape"))
    return names, known.hexdigest()[:16]


def find(folder):
    """Relative paths, with forward slashes, of the PNG and JPEG files at any depth; links are
    followed, each folder once and none upwards; hidden files and folders are not looked at."""
    found, seen, root = [], set(), os.path.realpath(folder)

    def add(path):
        found.append(os.path.relpath(path, folder).replace(os.sep, "/"))

    def failed(error):  # a subfolder that may not be read is reported with the files
        add(error.filename)
    for here, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        real = os.path.realpath(here)
        above = root.startswith(real.rstrip(os.sep) + os.sep)
        if real in seen or above:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(ENDS) and not name.startswith("."):
                add(os.path.join(here, name))
    return found


def digest_of(name):
    """SHA-256 of a relative path, the same on systems that spell accents in another way."""
    text = unicodedata.normalize("NFC", str(name))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def held_out(name):
    """Whether the image of this path, or index, is among the tenth that is held out."""
    return int.from_bytes(digest_of(name)[:8], "big") % 10 == 0


def class_names(names):
    """The class of each path: its first folder that is no split's; None where some have none, or
    where they are no classes of images: one alone, or one for every few images."""
    found = []
    for name in names:
        folders = [part for part in name.split("/")[:-1] if part.lower() not in SPLITS]
        if not folders:
            return None
        found.append(folders[0])
    return found if 2 <= len(set(found)) <= len(found) / 5 else None


# --------------------------------------------------------------------------- pixels

def open_image(path):
    """A Pillow image whose pixels have not been read yet."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise OSError("not a plain file" if os.path.lexists(path) else "not there")
    return Image.open(path, formats=FORMATS)


def plain(image):
    """Mode L or RGB: 16 bits scaled to 8, transparency laid over white."""
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        deep = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(deep.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        back = Image.new("RGBA", image.size, "white")
        back.alpha_composite(image.convert("RGBA"))
        image = back
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def square(image, size):
    """The central square of a Pillow image as uint8 [size, size], or [size, size, 3] with colour.

    Upright by its EXIF tag; resized by Lanczos with antialiasing (Pillow's). OSError and others
    for a damaged file.
    """
    image.draft(None, (2 * size, 2 * size))  # a JPEG much larger is decoded at a part of its size
    image = plain(ImageOps.exif_transpose(image))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    grey = pixels.ndim == 3 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0] if grey else pixels


def each(path, names, label, work):
    """({name: work(image)} of the files that can be read, [(name, why not)] of the others)."""
    done, bad = {}, []
    with warnings.catch_warnings():  # of huge images and odd tags: they are read all the same
        warnings.simplefilter("ignore")
        for name in progress(names, label):
            try:
                with open_image(os.path.join(path, name)) as image:
                    done[name] = work(image)
            except MemoryError:
                raise
            except Exception as error:  # Pillow raises a dozen kinds for a damaged file
                why = type(error).__name__ if str(path) in str(error) else runs.reason(error)
                bad.append((name, "not an image" if why.startswith("Unidentified") else why))
    return done, bad


def measure(path):
    """(median of the shorter sides in pixels, whether every image is grey, how many images)."""
    names, key = listing(path)
    if not names:
        images, _ = given_npz(path)
        same = all((part == part[..., :1]).all() for part in np.array_split(images, 20))
        return min(images.shape[1:3]), same, len(images)
    coloured = []

    def look(image):
        size = min(image.size)
        if not coloured and image.mode not in GREY and square(image, 32).ndim == 3:
            coloured.append(True)  # one is enough; the others are not decoded
        return size

    def compute():
        sizes, bad = each(path, names, "looking at images", look)
        if not sizes:
            nothing(path, bad)
        return [float(np.median([*sizes.values()])), not coloured, len(sizes)]
    return tuple(runs.cached(f"images-{key}-sizes.pt", compute, least=SLOW))


def nothing(path, bad):
    """Refuse a folder in which no file can be read."""
    cli.refuse("images", f"none of the {len(bad)} PNG and JPEG files in {path} can be read: "
               f"{named(bad)}")


def named(bad):
    """The first few unreadable files, with the reasons."""
    shown = [f"{name} ({' '.join(why.split())[:80]})" for name, why in bad[:SHOWN]]
    return ", ".join(shown) + (", .." if len(bad) > SHOWN else "")


def read(path, size):
    """Own: the images at `path`, size x size pixels, from the cache where reading took long.

    Unreadable files are left out, counted and named in one line. Mistake for too few images.
    """
    return read_once(path, size, *listing(path))


@functools.lru_cache(maxsize=2)
def read_once(path, size, names, key):
    """read(), once per process and state of the files."""
    found = runs.cached(f"images-{key}-{size}.pt",
                        lambda: decode_folder(path, size, names) if names else
                        decode_npz(path, size), least=SLOW)
    bad = found.pop("bad")
    if bad and os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print(f"note: {len(bad)} of {len(names)} files in {path} cannot be read and are left out: "
              f"{named(bad)}", flush=True)
    own = Own(**found)
    n = len(own.train) + len(own.test)
    if n < FEWEST:
        cli.refuse("images", f"{n} image{'s' * (n != 1)} in {path}: at least {FEWEST} are needed")
    if not (len(own.train) and len(own.test)):
        cli.refuse("images", f"none of the {n} images in {path} is held out (a tenth is, by a hash "
                   "of the paths): add images")
    return own


def decode_folder(path, size, names):
    """The fields of Own, and "bad", of a folder."""
    pixels, bad = each(path, names, "reading images", lambda image: square(image, size))
    if not pixels:
        nothing(path, bad)
    found = split([*pixels], [*pixels.values()], class_names(pixels))
    return found | dict(bad=[list(one) for one in bad])


def decode_npz(path, size):
    """The fields of Own, and "bad", of an .npz file."""
    images, labels = given_npz(path)
    order = sorted(range(len(images)), key=digest_of)  # so that the first few are of all kinds
    pixels = []
    for i in progress(order, "reading images"):
        image = Image.fromarray(images[i, ..., 0] if images.shape[3] == 1 else images[i])
        pixels.append(square(image, size))
    classes = None
    if labels is not None and 2 <= len(set(labels.tolist())) <= len(labels) / 5:
        classes = labels[order].tolist()
    return split(order, pixels, classes) | dict(bad=[])


def split(names, pixels, classes):
    """{field of Own: value} from arrays [H, W] or [H, W, 3] and a class each, or None."""
    out, size = np.array([held_out(name) for name in names]), len(pixels[0])
    channels = 3 if any(one.ndim == 3 for one in pixels) else 1
    parts, labels, known = [], [None, None], sorted(set(classes or []))
    for chosen in (np.flatnonzero(~out), np.flatnonzero(out)):
        part = np.empty((len(chosen), channels, size, size), np.uint8)
        for row, i in zip(part, chosen):
            row[:] = pixels[i] if pixels[i].ndim == 2 else pixels[i].transpose(2, 0, 1)
            pixels[i] = None  # large sets need the memory
        parts.append(torch.from_numpy(part))
    if classes:
        number = {name: i for i, name in enumerate(known)}
        numbers = np.array([number[name] for name in classes])
        labels = [torch.from_numpy(numbers[where]) for where in (~out, out)]
    return dict(train=parts[0], test=parts[1], labels=labels[0], truth=labels[1],
                classes=[str(name) for name in known])


def read_npz(path):
    """(images uint8 [N, H, W, 1 or 3], labels [N] or None) of an .npz file; OSError otherwise."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not, or not whole, what numpy.savez writes")
        with np.load(path, allow_pickle=False) as file:
            others = [name for name in file.files if name != "labels"]
            chosen = [name for name in ("images", "arr_0") if name in others][:1] or others
            if len(chosen) != 1:
                raise ValueError(f"it holds {', '.join(others) or 'nothing'}: name the array of "
                                 "images `images`")
            images = file[chosen[0]]
            labels = file["labels"] if "labels" in file.files else None
    except MemoryError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each have their own
        why = "it holds Python objects" if "allow_pickle" in str(error) else runs.reason(error)
        raise OSError(f"{path} cannot be read: {why}") from error
    images = images[..., None] if images.ndim == 3 else images
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.size
    if not fits or images.shape[3] not in (1, 3):
        raise OSError(f"{path} holds {images.dtype} {list(images.shape)}: images must be uint8 "
                      "[N, H, W, C] or [N, H, W], with C = 1 or 3")
    return images, labels


def given_npz(path):
    """read_npz of --images: Mistake for anything else in the file, its labels too."""
    try:
        images, labels = read_npz(path)
    except OSError as error:
        cli.refuse("images", error)
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU"):
        cli.refuse("images", f"{path} must hold labels as {len(images)} whole numbers or names, "
                   f"not {labels.dtype} {list(labels.shape)}")
    return images, labels
