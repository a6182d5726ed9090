"""The command line of metrics.py: how far one set of images is from another.

A set is a folder of PNG or JPEG files (any depth, one size), an .npz file (uint8 [N, H, W, C] or
[N, H, W], key images or its only array) or a data set: mnist, or mnist:test for its test images.
"""
import os
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from support import charts, cli, data, draw, own, quality, runs

SUFFIXES = ".png", ".jpg", ".jpeg"
# Modes of Pillow, and what they are read as; 16 bits and floats would lose what they say.
MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB"}
ENOUGH = quality.ENOUGH
FEWEST = 20  # images that a classifier is trained on
MOST = 10_000  # images of each side behind KID, precision and recall, whose cost grows with n^2
HEADER = "images", "n", "FID", "KID", "+-", "precision", "recall", "classes"
KINDS = f"a folder of images, an .npz file, or a data set ({', '.join(cli.DATASETS)})"


class Images(NamedTuple):
    """One side. dataset, split: where it is a data set, else None. images: uint8 [N, C, H, W]."""
    name: str
    images: torch.Tensor
    dataset: str = None
    split: str = None

    def __str__(self):
        n, channels, height, width = self.images.shape
        what = {"train": ", training", "test": ", test"}.get(self.split, ",")
        return f"{self.name}{what} images: {n:,} of {channels} x {height} x {width}"


class Extractor(NamedTuple):
    """What features are taken from. classes: whether its logits are classes of such images."""
    name: str
    model: torch.nn.Module
    classes: bool


class Measured(NamedTuple):
    """Of one side: (mu, sigma); features [n, D] for KID, precision, recall; shares of classes."""
    moments: tuple
    feats: torch.Tensor
    shares: torch.Tensor = None


def main(argv, metrics):
    """Print the scores of FAKE against REAL. metrics: the module of that name."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with cli.one_line(parser):
        if args.inception and args.extractor not in (None, "inception"):
            cli.refuse("inception", f"has no meaning beside --extractor {args.extractor}")
        with cli.memory_for("reading images", "give fewer images"):
            sides = [read(text, args.data_dir) for text in (args.real, args.fake)]
        for side in sides:
            if len(side.images) < 2:
                raise cli.Mistake(f"{side.name} holds 1 image: FID needs a covariance, so two or "
                                  "more")
        extractor = choose(args, sides, metrics)
        print(f"real: {sides[0]}\nfake: {sides[1]}\nfeatures: {extractor.name}", flush=True)
        with cli.memory_for("measuring", "give fewer images"):
            rows, notes = compare(*sides, extractor, args.data_dir, metrics)
        print("\n".join(["", charts.text_table(HEADER, rows), "", *notes]))


def make_parser():
    """The flags of metrics.py."""
    parser = cli.Parser(prog="metrics.py", description="FID, KID, precision and recall of images "
                        f"FAKE against images REAL. Each is {KINDS}: training images, or test "
                        "images as in mnist:test.")
    parser.add_argument("real", metavar="REAL", type=cli.path)
    parser.add_argument("fake", metavar="FAKE", type=cli.path)
    parser.add_argument("--extractor", choices=["inception", *cli.DATASETS],
                        help="whose features: Inception's, or those of the classifier of a data "
                             "set (default: the classifier in results/classifiers that fits, else "
                             "Inception, if its checkpoint is there)")
    parser.add_argument("--inception", metavar="PATH", type=cli.path,
                        help="the FID checkpoint, if not in the data folder")
    cli.add_data_flags(parser)
    return parser


# --------------------------------------------------------------------------- reading images

def read(text, data_dir):
    """The Images that an argument names; a data set's name comes before a folder's. OSError or
    Mistake, in one line."""
    name, colon, split = text.partition(":")
    if name in cli.DATASETS and not (colon and os.path.exists(text)):
        if split not in ("", "test", "train"):
            raise cli.Mistake(f"{text}: choose {name} (training images) or {name}:test")
        split = split or "train"
        return Images(text, data.load_images(name, data_dir, split)[0], name, split)
    if os.path.isdir(text):
        return Images(text, read_folder(text))
    if not os.path.lexists(text):
        raise OSError(f"{text} does not exist: give {KINDS}")
    if not text.lower().endswith(".npz"):
        raise OSError(f"{text} is neither a folder nor an .npz file: give {KINDS}")
    return Images(text, read_npz(text))


def image_files(folder):
    """Paths of the images below a folder, sorted; hidden files are left out, and so is the grid
    that `ddpm.py --from` adds to its images."""
    def fail(error):
        raise OSError(f"{error.filename} cannot be read: {runs.reason(error)}")
    paths = []
    for place, _, files in os.walk(folder, onerror=fail):
        grid = {"samples.png"} if draw.RECORD in files else set()
        paths += [os.path.join(place, name) for name in files
                  if name.lower().endswith(SUFFIXES) and name[0] != "." and name not in grid]
    return sorted(paths)


def read_folder(folder):
    """uint8 [N, C, H, W] of the images below a folder; where one has colour, C = 3 for all.
    OSError, in one line, for one that cannot be read, or for two of different sizes."""
    paths, pixels = image_files(folder), []
    if not paths:
        raise OSError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    for path in tqdm(paths, "reading images", leave=False, delay=2, disable=None):
        pixels.append(read_image(path))
        first, last = pixels[0].shape, pixels[-1].shape
        if first[1:] != last[1:]:
            raise OSError(f"{paths[0]} is {first[2]} x {first[1]} pixels, {path} {last[2]} x "
                          f"{last[1]}: images of one folder must have one size (width x height)")
    channels = max(len(image) for image in pixels)
    images = torch.empty(len(pixels), channels, *pixels[0].shape[1:], dtype=torch.uint8)
    for place, image in zip(images, pixels):
        place.copy_(torch.from_numpy(image))  # grey ones fill all channels
    return images


def read_image(path):
    """uint8 [1 or 3, H, W] of an image file, neither cropped nor resized."""
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise ValueError(f"mode {image.mode}, not 8 bits a channel")
            if "A" in image.mode and image.getchannel("A").getextrema()[0] < 255:
                raise ValueError("it is transparent in places: lay it on a background")
            pixels = np.array(image.convert(MODES[image.mode]))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is no PNG or JPEG file, whatever its name") from error
    except Exception as error:  # Pillow raises a dozen kinds for bad files
        raise OSError(f"{path} cannot be read as an image: {runs.reason(error)}") from error
    return np.atleast_3d(pixels).transpose(2, 0, 1).copy()


def read_npz(path):
    """uint8 [N, C, H, W] of an .npz file; OSError, in one line, for anything else in it."""
    images, _ = own.read_npz(path)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


# --------------------------------------------------------------------------- whose features

def choose(args, sides, metrics):
    """The Extractor of --extractor, or the first that fits. Mistake, in one line, if none does."""
    device, _ = cli.pick_device(args.device)
    name = args.extractor or ("inception" if args.inception else fitting(sides))
    if name is None and not has_inception(args.data_dir, metrics):
        return trained_on(sides, metrics, device)
    if name in (None, "inception"):
        model = metrics.load_inception(args.inception, args.data_dir)
        return Extractor("Inception, 2,048 an image", model.to(device), False)
    for side in sides:
        if (wanted := cli.DATASETS[name][0]) != tuple(side.images.shape[1:]):
            size = " x ".join(map(str, wanted))
            cli.refuse("extractor", f"the classifier of {name} takes images of {size}, not "
                       f"{side}; Inception takes any size")
    chosen = "" if args.extractor else ", which fits; --extractor takes another"
    given = [] if name in committed() else data.load_images(name, args.data_dir)
    model = metrics.load_classifier(name, *given).to(device)
    return Extractor(f"classifier of {name}, 64 an image{chosen}", model, True)


def committed():
    """The data sets whose classifiers lie in results/classifiers, in the order of cli.DATASETS."""
    folder = os.path.join(runs.HERE, "results", "classifiers")
    return [name for name in cli.DATASETS if os.path.exists(os.path.join(folder, f"{name}.pt"))]


def fitting(sides):
    """The data set whose classifier fits both sides, or None. Where a data set is named it is that
    one's or none: clothes have no place among digits. MNIST comes before the drawn digits."""
    shapes = {tuple(side.images.shape[1:]) for side in sides}
    named = [side.dataset for side in sides if side.dataset]
    fits = [name for name in committed() if shapes == {cli.DATASETS[name][0]}]
    fits = [name for name in fits if name in named] if named else fits[::-1]
    return fits[0] if fits else None


def trained_on(sides, metrics, device):
    """An Extractor trained on REAL, where none is there that fits: it learns by which of four
    rotations an image was turned. Mistake where that cannot be."""
    real, fake = sides
    sizes = {tuple(side.images.shape[1:]) for side in sides}
    what = ("and no Inception checkpoint is here, which takes any size: give --extractor "
            "inception, which fetches it, or --inception PATH")
    if len(sizes) > 1:
        raise cli.Mistake(f"{real} and {fake}: a classifier needs one size, {what}")
    if real.dataset or fake.dataset:
        name = real.dataset or fake.dataset
        raise cli.Mistake(f"no classifier of {name} is in results/classifiers, {what}; "
                          f"or --extractor {name} trains one")
    if len(real.images) < FEWEST or real.images.shape[2] != real.images.shape[3]:
        raise cli.Mistake(f"{real}: a classifier is trained on {FEWEST} square images or more, "
                          f"{what}")
    model = metrics.load_classifier("own_rotations", real.images).to(device)
    return Extractor(f"a classifier trained on {real.name} to tell rotations, 64 an image; "
                     "compare with figures of the same REAL only", model, False)


def has_inception(data_dir, metrics):
    """Whether its checkpoint is where metrics.load_inception finds it without a download."""
    folders = [data_dir, *runs.cache_folders()]
    return any(os.path.exists(os.path.join(folder, metrics.INCEPTION_FILE)) for folder in folders)


# --------------------------------------------------------------------------- scores

def compare(real, fake, extractor, data_dir, metrics):
    """(rows under HEADER, notes): FAKE, and as many test images where REAL is a data set."""
    m = min(len(real.images), len(fake.images), MOST)
    of_real, of_fake = (measure(side, extractor, m, metrics) for side in (real, fake))
    rows = [[fake.name, len(fake.images), *scores(of_real, of_fake, metrics)]]
    notes = remarks([real, fake], m, of_real.feats.shape[1])
    if real.split == "train":
        test, _ = data.load_images(real.dataset, data_dir, "test")
        n = min(len(test), len(fake.images))
        draws = min(quality.REAL_DRAWS, len(test) // n)
        found = []
        for part in metrics.random_draw(test, draws * n).split(n):
            some = measure(Images("test", part), extractor, m, metrics)
            found.append(scores(of_real, some, metrics))
        means = [None if None in column else np.mean(column) for column in zip(*found)]
        rows.append(["test images", n, *means])
        notes.append("test images: the real-data reference, held-out images (mean of "
                     f"{draws} draw{'s' * (draws > 1)}); a perfect sampler would score as they do")
    if of_fake.shares is not None:
        notes.append("classes: the share of images that would have to change their predicted "
                     "class for both sides to have equal shares")
    return rows, notes


def measure(side, extractor, m, metrics):
    """The Measured of a side; m: how many features to keep, drawn at random."""
    model, images, draw_some = extractor.model, side.images, metrics.random_draw
    if side.dataset and not extractor.classes:  # 60,000 images take Inception long: cached
        key = side.dataset + ("-test" if side.split == "test" else "")
        moments = quality.reference_statistics(metrics, model, images, key)
        return Measured(moments, metrics.features(model, draw_some(images, m)))
    feats, logits = metrics.features(model, images, logits=True)
    shares = None
    if extractor.classes:
        counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
        shares = counts / len(logits)
    return Measured(metrics.statistics(feats), draw_some(feats, m), shares)


def scores(real, fake, metrics):
    """FID, KID, its standard error, precision, recall, distance of classes; None: left blank."""
    distance = metrics.frechet_distance(*fake.moments, *real.moments)
    n = min(len(real.feats), len(fake.feats))
    sets, kid, pair, classes = (real.feats[:n], fake.feats[:n]), (None, None), (None, None), None
    if n >= 4:  # two subsets of two
        kid = metrics.kid(*sets[::-1], subset_size=min(1000, n // 2))
    if n >= ENOUGH:
        pair = metrics.precision_recall(*sets)
    if real.shares is not None:
        classes = (real.shares - fake.shares).abs().sum().item() / 2
    return [distance, *kid, *pair, classes]


def remarks(sides, m, d):
    """What the numbers of images do to the scores. m: of each side behind KID; d: features."""
    notes = [f"FID: all images of both sides. KID, precision, recall: {m:,} of each, at random"]
    for side in sides:
        if len(side.images) <= d:
            notes.append(f"{side.name}: {len(side.images):,} images have a singular covariance in "
                         f"{d:,} features, and FID is biased upwards: give several times {d:,}, or "
                         "compare with FIDs of as many images alone")
    if m < ENOUGH:
        notes.append(f"precision and recall are blank below {ENOUGH} images, where uniform noise "
                     "can score a precision near 1")
    return notes
