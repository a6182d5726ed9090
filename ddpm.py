"""One dense DDPM from nothing: images in, noise schedule, loss, training loop, EMA, samplers (2006.11239).

    python ddpm.py --dataset digits                     # draws its own data, trains, writes runs/ddpm_digits/
    python ddpm.py --dataset mnist --data-dir data      # downloads MNIST to data/ when it is not there

lth_diffusion.py and the studies train through the same functions, with hooks for masks.
"""
import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import shlex
import tarfile
import tempfile
import time
import urllib.request

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from unet import PRESETS, UNet

# ---------------------------------------------------------------------------------------------------
# Images in

DATASETS = {  # name -> ((channels, height, width), number of classes)
    "digits": ((1, 28, 28), 10), "mnist": ((1, 28, 28), 10), "fashion": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100),
}
CACHE = os.path.join("runs", "cache")  # takes what must be written when the data folder is read-only
MAX_IMAGES = 100_000  # in one file: above every official count, and the bound on what is ever allocated
KRIZ = "https://www.cs.toronto.edu/~kriz/"
MIRRORS = {  # tried in this order; a file name is appended
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
    "cifar10": (KRIZ,), "cifar100": (KRIZ,),
}
IDX_MD5 = {  # (data set, split) -> md5 of the image file and of the label file
    ("mnist", "train"): ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432"),
    ("mnist", "test"): ("9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    ("fashion", "train"): ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
    ("fashion", "test"): ("bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
}
CIFAR = {  # archive, its md5, folder in it, label bytes of a record (the last one counts), files of a split
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin", 1,
                {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary", 2,
                 {"train": ["train.bin"], "test": ["test.bin"]}),
}


def load_images(dataset, root, split="train"):
    """One split of a data set -> (images uint8 [N, C, H, W], labels int64 [N]), on the CPU.

    Files already under `root` are used as they are, without the network; missing ones are downloaded
    (digits: drawn) into it, or into runs/cache/ when it cannot be written.
    Raises ValueError for an unknown name, OSError (one line, with the way out) for a bad or missing file.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: choose from train, test")
    root = os.path.expanduser(os.fspath(root))
    read = _read_digits if dataset == "digits" else _read_cifar if dataset in CIFAR else _read_mnist
    images, labels = read(dataset, root, split)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def to_float(images):
    """uint8 in 0..255 -> float32 in [-1, 1], any shape: the range the diffusion works in."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float wants uint8 images, not {images.dtype}")
    return images.float() / 127.5 - 1


def as_input(images):
    """What is trained on: uint8 images as floats in [-1, 1]; latents, which are floats, as they are."""
    return to_float(images) if images.dtype == torch.uint8 else images


def to_uint8(x):
    """Floats in [-1, 1], any shape -> uint8, rounded and clamped: the exact inverse of to_float."""
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 wants floats in [-1, 1], not {x.dtype}")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=10, scale=2):
    """Write uint8 [N, 1 or 3, H, W] as a PNG; a pixel is a scale x scale square, grey lines between."""
    columns, grey = min(columns, len(images)), 96
    tiles = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)  # [N, C, h, w]
    tiles = F.pad(tiles, (1, 0, 1, 0, 0, 0, 0, -len(tiles) % columns), value=grey)  # [n, C, h, w]
    grid = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    grid = F.pad(grid, (0, 0, 0, 1, 0, 1), value=grey)  # [rows * h + 1, columns * w + 1, C]
    Image.fromarray(grid.squeeze(2).numpy()).save(path)


# --- digits: drawn, so that the first command runs anywhere

DRAWING = 2  # raised when draw_digits changes: its name in the cache
DIGITS = {"train": (10_000, 1), "test": (2_000, 2)}  # split -> (number of images, seed)
FINE = 3  # drawn on a canvas this many times finer, then averaged down: smooth edges without aliasing


@functools.lru_cache(maxsize=None)
def _glyph(digit, stroke):
    """One upright digit centred on the fine canvas, `stroke` fine pixels fatter all round -> PIL image."""
    size = 28 * FINE
    canvas, font = Image.new("L", (size, size)), ImageFont.load_default(size=0.98 * size)
    left, top, right, bottom = font.getbbox(str(digit))
    corner = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, str(digit), fill=255, font=font, stroke_width=stroke)
    return canvas


def draw_digits(n, seed):
    """n digits in Pillow's built-in font, white on black -> (uint8 [n, 1, 28, 28], labels uint8 [n]), numpy.

    Random class, position, size, rotation, shear, stroke width and blur, all from `seed`.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n).astype(np.uint8)  # unbalanced, as no sampler balances its classes either
    strokes = rng.integers(1, 3, n)                              # in fine pixels
    angles, shears = rng.uniform(-0.06, 0.06, n), rng.uniform(-0.06, 0.06, n)  # radians; x by y
    widths, heights = rng.uniform(0.95, 1.05, n), rng.uniform(0.95, 1.05, n)
    shifts = rng.uniform(-0.6, 0.6, (n, 2)) * FINE               # in pixels of the result -> in fine pixels
    blurs = rng.uniform(0.1, 0.4, n) * FINE
    images, centre = np.empty((n, 1, 28, 28), np.uint8), np.full(2, 14 * FINE)
    for i in tqdm(range(n), desc="drawing digits", unit="image", leave=False, disable=None):
        cos, sin = math.cos(angles[i]), math.sin(angles[i])
        forward = np.array([[cos, -sin], [sin, cos]]) @ [[widths[i], shears[i]], [0, heights[i]]]
        back = np.linalg.inv(forward)  # Pillow asks where in the source each target pixel comes from
        offset = centre - back @ (centre + shifts[i])
        matrix = (*back[0], offset[0], *back[1], offset[1])
        fine = _glyph(int(labels[i]), int(strokes[i]))
        fine = fine.transform(fine.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        images[i, 0] = np.asarray(fine.filter(ImageFilter.GaussianBlur(float(blurs[i]))).reduce(FINE))
    return images, labels


def _read_digits(dataset, root, split):
    """The digits of a split from their cache, or drawn and cached (3 to 7 s for the 10,000 of train)."""
    n, seed = DIGITS[split]
    folders = [os.path.join(root, dataset), os.path.join(CACHE, dataset)]
    for folder in folders:
        with contextlib.suppress(Exception):  # only a cache: whatever is wrong with it, draw anew
            with np.load(os.path.join(folder, f"{split}-{DRAWING}.npz"), allow_pickle=False) as file:
                images, labels = file["images"], file["labels"]
            if (images.shape, labels.shape) == ((n, 1, 28, 28), (n,)) and labels.max() < 10 \
                    and images.dtype == labels.dtype == np.uint8:
                return images, labels
    images, labels = draw_digits(n, seed)
    try:
        with atomic(os.path.join(writable(folders), f"{split}-{DRAWING}.npz")) as temporary:
            with open(temporary, "wb") as file:
                np.savez(file, images=images, labels=labels)
    except OSError as error:  # a pity, but no reason to stop: the next run draws them again
        print(f"digits are not cached: {_reason(error)}")
    return images, labels


# --- files: found, or fetched

@contextlib.contextmanager
def atomic(path):
    """A temporary name beside `path`, whose folder is made: renamed to it when the block ends well, else
    removed, so that nobody ever reads half a file. OSError when the disk will not take it."""
    temporary = f"{path}.{os.getpid()}.part"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's own class for a write that failed
        raise OSError(f"{path} could not be written, is the disk full? ({str(error).splitlines()[0]})")
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def writable(folders, flag="--data-dir"):
    """The first folder that can be made and written to. OSError, naming the flag, when there is none."""
    for folder in folders:
        parent = folder
        while not os.path.exists(parent):
            parent = os.path.dirname(parent) or "."
        with contextlib.suppress(OSError):
            if os.stat(parent).st_mode & 0o222:  # nobody may write: meant so, though the superuser could
                os.makedirs(folder, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):  # bits say nothing of read-only mounts: try it
                    return folder
    raise OSError(f"cannot write to {' nor to '.join(folders)}: choose another {flag}")


def _reason(error):
    """What went wrong, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


@contextlib.contextmanager
def _reading(path):
    """Turn whatever reading a damaged file raises into one OSError that names it and the way out."""
    try:
        yield
    except Exception as error:  # gzip, zlib, tarfile and numpy have a dozen ways to trip over bad bytes
        raise OSError(f"{path}: {_reason(error)}; delete it and run again to download it anew") from error


def _find(dataset, name, md5, folders):
    """Path of file `name`: from the first folder that has it, else downloaded to the first that takes it."""
    for folder in folders:
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    path = os.path.join(writable(folders), name)
    return download([mirror + name for mirror in MIRRORS[dataset]], path, md5)


def download(urls, path, digest, timeout=20, max_bytes=250_000_000, algorithm="md5"):
    """Fetch the first of `urls` that serves the file whose md5 begins with `digest` to `path` -> path.

    timeout: seconds without an answer. `path` appears only once it is complete and right.
    Raises one OSError, with the command to fetch it by hand, when no url does.
    """
    failures = []
    for url in urls:
        print(f"downloading {url}")
        try:
            with atomic(path) as temporary:
                _transfer(url, temporary, digest, timeout, max_bytes, algorithm)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url}: {_reason(error)}")
    folder, name = os.path.split(path)
    raise OSError(f"could not download {name} to {folder or '.'} ({'; '.join(failures)}); fetch it by hand: "
                  f"curl -L --create-dirs -o {shlex.quote(path)} {shlex.quote(urls[0])}")


def _transfer(url, path, digest, timeout, max_bytes, algorithm):
    """Copy url to path with a progress bar. Raises OSError unless it is whole and has this digest."""
    found, size, start = hashlib.new(algorithm, usedforsecurity=False), 0, b""
    with urllib.request.urlopen(url, timeout=timeout) as answer, open(path, "wb") as file:
        total = answer.length
        with tqdm(total=total, desc=os.path.basename(url), unit="B", unit_scale=True, disable=None) as bar:
            while chunk := answer.read(1 << 16):
                size, start = size + len(chunk), start or chunk
                if size > max_bytes:
                    raise OSError(f"longer than {max_bytes} bytes")
                file.write(chunk)
                found.update(chunk)
                bar.update(len(chunk))
    if total is not None and size != total:
        raise OSError(f"broke off after {size} of {total} bytes")
    if not found.hexdigest().startswith(digest):
        what = "a web page, not the file" if start.lstrip()[:1] == b"<" else f"wrong {algorithm}"
        raise OSError(f"{what} ({found.hexdigest()}, expected {digest})")


# --- file formats, read with every length checked before anything is believed

def _read_idx(path, shape):
    """A gzipped IDX file of uint8 items of `shape` (() for labels) -> numpy [N, *shape]. Raises OSError."""
    with _reading(path), gzip.open(path) as file:
        header = file.read(8 + 4 * len(shape))
        n, *sizes = np.frombuffer(header[4:].ljust(4 + 4 * len(shape), b"\0"), ">u4").tolist()
        if header[:4] != bytes((0, 0, 8, 1 + len(shape))) or tuple(sizes) != shape:  # 8: unsigned bytes
            raise ValueError(f"not an IDX file of {'x'.join(map(str, shape)) or 'single'} bytes")
        if not 0 < n <= MAX_IMAGES:
            raise ValueError(f"its header counts {n} items, not 1 to {MAX_IMAGES}")
        size = n * math.prod(shape)
        data = file.read(size + 1)  # the one byte more reaches the end, where gzip compares its checksum
        if len(data) != size:
            raise ValueError(f"{'fewer' if len(data) < size else 'more'} than the {n} items of its header")
        return np.frombuffer(bytearray(data), np.uint8).reshape(n, *shape)


def _read_mnist(dataset, root, split):
    """MNIST or Fashion-MNIST from their IDX files -> numpy (images [N, 1, 28, 28], labels [N])."""
    prefix, md5 = {"train": "train", "test": "t10k"}[split], IDX_MD5[dataset, split]
    folders = [os.path.join(root, dataset), os.path.join(CACHE, dataset)]
    image_path = _find(dataset, f"{prefix}-images-idx3-ubyte.gz", md5[0], folders)
    label_path = _find(dataset, f"{prefix}-labels-idx1-ubyte.gz", md5[1], folders)
    images, labels = _read_idx(image_path, (28, 28)), _read_idx(label_path, ())
    with _reading(label_path):
        if len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for the {len(images)} images of {image_path}")
        if labels.max() > 9:
            raise ValueError(f"label {labels.max()} is not 0 to 9")
    return images[:, None], labels


def _read_archive(path, names, max_bytes):
    """Members `names` of a .tar.gz -> list of their bytes; others are skipped, none is written to disk.

    Raises ValueError for a link, a second copy or a missing one, and when it unpacks to more than max_bytes.
    """
    with gzip.open(path) as file:
        data = file.read(max_bytes + 1)  # all of it or a bomb: at its end gzip compares its checksum
    if len(data) > max_bytes:
        raise ValueError(f"it unpacks to more than {max_bytes} bytes")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.name in names:
                if member.name in found or not member.isreg() or member.issparse():
                    raise ValueError(f"{member.name} in it is there twice or not a plain file")
                found[member.name] = tar.extractfile(member).read()
    if len(found) < len(names):
        raise ValueError(f"{', '.join(name for name in names if name not in found)} is missing in it")
    return [found[name] for name in names]


def _read_cifar(dataset, root, split):
    """CIFAR from its extracted folder or its archive -> numpy (images [N, 3, 32, 32], labels [N])."""
    archive, md5, inside, label_bytes, files = CIFAR[dataset]
    record, names = label_bytes + 3 * 32 * 32, files[split]  # labels, 1024 red, 1024 green, 1024 blue bytes
    folders, blobs = [root, os.path.join(root, dataset), os.path.join(CACHE, dataset)], []
    folder = next((f for f in (os.path.join(f, inside) for f in folders) if os.path.isdir(f)), None)
    if folder is None:
        paths = [_find(dataset, archive, md5, folders)] * len(names)
        with _reading(paths[0]):
            blobs = _read_archive(paths[0], [f"{inside}/{name}" for name in names], 250_000_000)
    else:
        paths = [os.path.join(folder, name) for name in names]
        for path in paths:
            if not os.path.exists(path):
                raise OSError(f"{path} is missing; delete {folder} and run again to download it anew")
            with _reading(path), open(path, "rb") as file:
                blobs.append(file.read(MAX_IMAGES * record + 1))  # one more is no multiple: refused below
    for path, name, blob in zip(paths, names, blobs):
        with _reading(path):
            if len(blob) == 0 or len(blob) % record:
                raise ValueError(f"{name} has {len(blob)} bytes, not a multiple of {record}")
            highest, classes = max(blob[label_bytes - 1::record]), DATASETS[dataset][1]
            if highest >= classes:
                raise ValueError(f"{name} has label {highest}, not 0 to {classes - 1}")
    records = np.frombuffer(b"".join(blobs), np.uint8).reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32).copy(), records[:, label_bytes - 1]


# ---------------------------------------------------------------------------------------------- diffusion

class Diffusion:
    """The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 0 being one step of noise.

    schedule: "linear" = betas from 1e-4 to 0.02 (2006.11239, section 4), "cosine" = 2102.09672, section 3.2,
    "sigma" = the noise levels of a score-based model, log-uniform from 0.01 to 50 (2011.13456, appendix C),
    in a million steps, as good as continuous; its input is scaled to unit variance. prediction: what the
    network says, "eps" or "v" = sqrt(abar) eps - sqrt(1 - abar) x_0 (2202.00512, appendix D).
    The tables betas, alphas_bar and posterior_variance are float64 (T,), on the CPU.
    Raises ValueError for an unknown schedule or prediction or a T too short for it.
    """

    def __init__(self, T=1000, schedule="linear", prediction="eps"):
        if prediction not in ("eps", "v"):
            raise ValueError(f"prediction={prediction!r}: choose eps or v")
        T = 1_000_000 if schedule == "sigma" else T
        if schedule == "linear":  # scaled so that a shorter chain destroys as much signal
            self.betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
        elif schedule == "cosine":
            angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
            self.betas = (1 - (angle[1:].cos() / angle[:-1].cos()) ** 2).clamp(max=0.999)
        elif schedule == "sigma":
            log_sigma = torch.linspace(math.log(0.01), math.log(50), T, dtype=torch.float64)
            abar = 1 / (1 + torch.exp(2 * log_sigma))
            self.betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        else:
            raise ValueError(f"schedule={schedule!r}: choose linear, cosine or sigma")
        if not bool((self.betas < 1).all()):
            raise ValueError(f"T={T} is too short for the {schedule} schedule: some beta is 1 or more")
        self.T, self.prediction = T, prediction
        self.alphas_bar = torch.cumprod(1 - self.betas, dim=0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])
        self.posterior_variance = self.betas * (1 - before) / (1 - self.alphas_bar)
        self._tables = {}

    def _gather(self, t, like):
        """sqrt(abar_t) and sqrt(1 - abar_t) as (B, 1, 1, 1) in like's dtype; tables are kept by device."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            both = torch.stack([self.alphas_bar.sqrt(), (1 - self.alphas_bar).sqrt()])  # (2, T)
            self._tables[key] = both.to(like.dtype).to(like.device)
        return self._tables[key][:, t].reshape(2, -1, *[1] * (like.dim() - 1))  # (2, B, 1, 1, 1)

    def q_sample(self, x0, t, noise):
        """x_t for x0 (B, C, H, W) in [-1, 1], t (B,) int64 and noise like x0 (2006.11239, eq. 4)."""
        signal, sigma = self._gather(t, x0)
        return signal * x0 + sigma * noise

    def clock(self, t):
        """What the network is told of t: 0 to 1000, however many steps there are."""
        return t if self.T <= 1000 else t / (self.T / 1000)

    def predict(self, model, x_t, t):
        """The noise eps (B, C, H, W) that the network sees in x_t."""
        out = model(x_t, self.clock(t)).to(x_t.dtype)
        if self.prediction == "eps":
            return out
        signal, sigma = self._gather(t, x_t)
        return signal * out + sigma * x_t

    def loss(self, model, x0, t, noise):
        """The simple loss, mean squared error on eps, as a scalar (2006.11239, eq. 14); or that on v."""
        target = noise
        if self.prediction == "v":
            signal, sigma = self._gather(t, x0)
            target = signal * noise - sigma * x0
        return F.mse_loss(model(self.q_sample(x0, t, noise), self.clock(t)).float(), target)


# ----------------------------------------------------------------------------------------------- samplers
# One step each, from noise level abar_from to abar_to (floats; 1.0 = clean), so that they can be checked on
# any grid, continuous time included. x0 and eps are two names for one prediction: x = sqrt(abar) x0 + sigma
# eps.

def predict_x0(x, eps, abar, clip):
    """(x0, eps) implied by the predicted eps. With clip, x0 is cut to [-1, 1] and eps follows from it again,
    so that the two stay consistent; the authors of DDIM (2010.02502) leave eps as it was."""
    x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    return x0, eps


def ddim_step(x, eps, abar_from, abar_to, eta=0.0, noise=None, clip=False):
    """2010.02502, eq. 12 and 16; eta = 0 is deterministic, eta = 1 the ancestral step."""
    x0, eps = predict_x0(x, eps, abar_from, clip)
    sigma = eta * math.sqrt((1 - abar_to) / (1 - abar_from) * (1 - abar_from / abar_to))
    x = math.sqrt(abar_to) * x0 + math.sqrt(max(1 - abar_to - sigma ** 2, 0.0)) * eps
    return x + sigma * noise if sigma > 0 else x


def ddpm_step(x, eps, abar_from, abar_to, noise=None, clip=False):
    """2006.11239, eq. 6-7: the posterior q(x_s | x_t, x0) at the predicted x0, with the small variance."""
    x0, _ = predict_x0(x, eps, abar_from, clip)
    alpha = abar_from / abar_to
    mean = (math.sqrt(abar_to) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - abar_to) * x) / (1 - abar_from)
    variance = (1 - abar_to) / (1 - abar_from) * (1 - alpha)
    return mean + math.sqrt(variance) * noise if variance > 0 else mean


def dpm_step(x, x0, abar_from, abar_to, x0_before=None, abar_before=None):
    """DPM-Solver++(2M), 2211.01095, algorithm 2: exact in the linear part, x0 extrapolated in log-SNR.

    x0_before, abar_before: the prediction one step earlier and its level; without them, or at the last step
    (abar_to = 1, where the log-SNR is infinite), the first-order step, which is DDIM with eta = 0.
    """
    def half_log_snr(abar):
        return 0.5 * math.log(abar / (1 - abar))

    if abar_to >= 1:
        return x0
    h = half_log_snr(abar_to) - half_log_snr(abar_from)
    if x0_before is not None:
        r = (half_log_snr(abar_from) - half_log_snr(abar_before)) / h
        x0 = (1 + 0.5 / r) * x0 - 0.5 / r * x0_before
    return math.sqrt((1 - abar_to) / (1 - abar_from)) * x - math.sqrt(abar_to) * math.expm1(-h) * x0


@torch.no_grad()
def sample(model, diffusion, x_T, method="ddpm", steps=50, eta=0.0, clip=True, generator=None):
    """Images (N, C, H, W) from noise x_T, in x_T's dtype; `model` is any callable (x, t (N,)) -> eps (or v).

    method: "ddpm" (ancestral), "ddim" (eta) or "dpm" (DPM-Solver++ 2M). steps: network evaluations, at
    t = i * (T // steps), descending; the last step goes to abar = 1. generator: for the noise of stochastic
    samplers. Raises ValueError for an unknown method or more steps than T.
    """
    if method not in ("ddpm", "ddim", "dpm"):
        raise ValueError(f"method={method!r}: choose ddpm, ddim or dpm")
    if not 1 <= steps <= diffusion.T:
        raise ValueError(f"steps={steps} must lie between 1 and T={diffusion.T}")
    stride, abar = diffusion.T // steps, diffusion.alphas_bar.tolist()
    x, before = x_T, (None, None)
    for i in reversed(range(steps)):
        abar_from, abar_to = abar[i * stride], abar[(i - 1) * stride] if i else 1.0
        t = torch.full((len(x),), i * stride, dtype=torch.int64, device=x.device)
        eps = diffusion.predict(model, x, t)
        if method == "dpm":
            x0, _ = predict_x0(x, eps, abar_from, clip)
            x = dpm_step(x, x0, abar_from, abar_to, *before)
            before = (x0, abar_from)
            continue
        noise = None
        if i and (method == "ddpm" or eta > 0):
            where = generator.device if generator is not None else x.device
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=where).to(x.device)
        x = (ddpm_step(x, eps, abar_from, abar_to, noise, clip) if method == "ddpm" else
             ddim_step(x, eps, abar_from, abar_to, eta, noise, clip))
    return x


# ----------------------------------------------------------------------------------------------- training

def ranks():
    """(this process's rank, how many processes train together): (0, 1) unless torchrun started several."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


class EMA:
    """Exponential moving average of a model's weights, `.model`: the network that is sampled.

    decay: 0.9999 in 2006.11239. With warmup the decay of update n is min(decay, (1 + n) / (10 + n)), so that
    a short run does not sample its own initialisation. A weight that is always 0 stays exactly 0 in the
    average.
    """

    def __init__(self, model, decay, warmup=False):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(step, steps, lr, schedule, warmup):
    """The rate at `step` of `steps`: linear warm-up, then "constant", "linear" or "cosine" decay to 0."""
    done = step / steps
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return lr * min(1.0, (step + 1) / max(warmup, 1)) * decay[schedule]


def make_optimizer(name, parameters, lr, beta2=0.999):
    """"adam" (2006.11239) or "sgd" (momentum 0.9, as in most lottery-ticket work)."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, beta2), fused=True)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)


def batch_at(images, step, seed, batch, flip, T, generator, rank=0, world=1):
    """Batch, t and noise of one step, as a pure function of (seed, step): runs resume, arms share their data
    and ranks agree without any generator's state being kept; this rank's share of it. Dropout, which draws
    from torch's global generator, is seeded along. images: uint8 or latents (N, C, H, W), on the device."""
    torch.manual_seed(-1 - seed * 1_000_003 - step - 4_100_000_000 * rank)
    generator.manual_seed(seed * 1_000_003 + step)
    device = images.device
    index = torch.randint(len(images), (batch,), generator=generator, device=device)
    x0 = as_input(images[index])  # (B, C, H, W) in [-1, 1]
    if flip:
        left = torch.rand(batch, generator=generator, device=device) < 0.5
        x0 = torch.where(left[:, None, None, None], x0.flip(3), x0)
    # One t in each of `batch` equal parts of 0..T-1: every t is equally likely, the mean over t is steadier.
    t = torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)
    t = (t * T / batch).long().clamp(max=T - 1)  # float32 may round up to T
    noise = torch.randn(x0.shape, generator=generator, device=device)
    return x0[rank::world], t[rank::world], noise[rank::world]


class LossLog:
    """Mean loss of every window of steps, and the guard against a loss that is no longer a number.

    The device is waited for at window ends only, so that a GPU is never stalled by the log.
    """

    def __init__(self, every, label, device):
        self.every, self.label, self.means = every, label, []
        self.sum, self.count = torch.zeros((), device=device), 0

    def add(self, step, loss, last):
        self.sum, self.count = self.sum + loss.detach(), self.count + 1
        if (step + 1) % self.every == 0 or last:
            self.means.append((step + 1, self.mean(step)))
            self.sum, self.count = torch.zeros_like(self.sum), 0

    def mean(self, step):
        """Mean loss of the window so far; FloatingPointError when it is not finite."""
        mean = self.sum.item() / max(self.count, 1)
        if not math.isfinite(mean):
            raise FloatingPointError(f"{self.label}: the loss became {mean} by step {step + 1}; "
                                     "try a lower --lr")
        return mean


def check_finite(model, step, label):
    """FloatingPointError, naming the run, when a weight is not a finite number."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise FloatingPointError(f"{label}: a weight is not finite after step {step}; try a lower --lr")


def capture(step, model, ema, opt, log):
    """What training goes on from after `step` steps; FloatingPointError rather than a ruined state."""
    log.mean(step - 1)
    check_finite(model, step, log.label)
    return dict(step=step, model=model.state_dict(), ema=ema.model.state_dict(), ema_updates=ema.updates,
                optimizer=opt.state_dict(), losses=list(log.means), window=(log.sum.item(), log.count))


def restore(state, model, ema, opt, log):
    """Undo capture, to the bit; return the step to go on with."""
    model.load_state_dict(state["model"])
    ema.model.load_state_dict(state["ema"])
    opt.load_state_dict(state["optimizer"])
    ema.updates, log.means = state["ema_updates"], list(state["losses"])
    log.sum, log.count = torch.full_like(log.sum, state["window"][0]), state["window"][1]
    return state["step"]


def train(model, diffusion, images, *, steps, start=0, batch=128, lr=2e-4, lr_schedule="constant", warmup=100,
          optimizer="adam", beta2=0.999, clip=1.0, ema_decay=0.9999, flip=False, seed=0, precision="fp32",
          label="train", after_backward=None, after_step=None, state=None, checkpoint=None):
    """Train `model` in place on steps start .. steps-1 of one schedule; return (EMA, [(step, mean loss)]).

    images: uint8 (N, C, H, W) on the model's device. after_backward(step, model) sees the gradients before
    they are clipped and may return True to leave out this step's update; after_step(step, model, optimizer,
    ema) runs after the update, before the average follows.
    checkpoint(get_state) may call get_state() after any step; such a state, passed as `state`, goes on from
    there to the bit. Under torchrun every rank trains on, and logs, its share of the same batch. Raises
    FloatingPointError for a loss that is not finite, before such a state is handed out.
    """
    device = images.device
    model.to(memory_format=torch.channels_last).train()
    opt, ema = make_optimizer(optimizer, model.parameters(), lr, beta2), EMA(model, ema_decay, warmup=True)
    log, generator = LossLog(max(1, steps // 100), label, device), torch.Generator(device)
    if state is not None:
        start = restore(state, model, ema, opt, log)
    rank, world = ranks()
    network = DistributedDataParallel(model) if world > 1 else model  # averages gradients over the ranks
    bar = tqdm(range(start, steps), desc=label, unit="step", mininterval=0.5, leave=False,
               disable=True if rank else None)
    for step in bar:
        x0, t, noise = batch_at(images, step, seed, batch, flip, diffusion.T, generator, rank, world)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, lr, lr_schedule, warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion.loss(network, x0.contiguous(memory_format=torch.channels_last), t, noise)
        loss.backward()
        if after_backward is None or not after_backward(step, model):
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
        opt.zero_grad()
        if after_step is not None:
            after_step(step, model, opt, ema)
        ema.update(model)
        log.add(step, loss, last=step + 1 == steps)
        if log.count == 0:
            bar.set_postfix(loss=f"{log.means[-1][1]:.4f}")
        if checkpoint is not None:
            checkpoint(lambda: capture(step + 1, model, ema, opt, log))
    check_finite(model, steps, label)
    return ema, log.means


# ----------------------------------------------------------------------------- command line, device, defaults

# What each data set is trained with unless flags say otherwise: sized for two CPU cores, but for `--preset
# paper`. In the few steps of digits a short memory of Adam halves fid_domain, 11.9 to 4.9, and the ancestral
# sampler takes off a sixth of it, 19.0 to 16.2 (one seed, n=250). MNIST: studies/budget.py.
USUAL = dict(batch=32, lr=4e-3, beta2=0.999, ema=0.995, sampler="ddim", samples=1000)
DEFAULTS = {
    "digits": dict(preset="tiny", steps=560, batch=32, lr=9e-3, beta2=0.95, ema=0.99, sampler="ddpm",
                   samples=250),
    "mnist": dict(preset="mnist", steps=2000) | USUAL | dict(beta2=0.95, sampler="ddpm"),
    "fashion": dict(preset="mnist", steps=2000) | USUAL,
    "cifar10": dict(preset="cifar", steps=4000) | USUAL | dict(batch=64, lr=1e-3, ema=0.999),
    "cifar100": dict(preset="cifar", steps=4000) | USUAL | dict(batch=64, lr=1e-3, ema=0.999),
}


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage before it; takes flags by their whole names only."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (flags: --help)\n")


@contextlib.contextmanager
def one_line(parser, out=None):
    """Whatever a user can mend ends in one line and an exit code: 2 for a mistake, 1 for a run that diverged
    or did not fit, 130 for Ctrl-C. out: the folder that keeps what is done, for a run that can go on."""
    kept = f" What was done before is kept in {out}." if out else ""
    try:
        yield
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{error}.{kept}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped.{kept}{' The same command goes on from here.' if out else ''}\n")
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0][:160]
        if "No working C++ compiler" in first:
            parser.error("argument --compile: no working C++ compiler is here; install one, or leave it out")
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        parser.exit(1, f"out of memory ({first}): lower --batch, or choose a smaller --preset.{kept}\n")


def add_training_flags(parser):
    """The flags that say what is trained, on what and how long; None stands for the data set's default."""
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="digits", help="default: digits, which it draws itself")
    add("--preset", choices=list(PRESETS), help="which U-Net (default: by data set)")
    add("--steps", type=positive_int, help="training steps of a dense run")
    add("--batch", type=positive_int, help="images a step")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine",
        help="after the warm-up (default: cosine)")
    add("--optimizer", choices=["adam", "sgd"], default="adam", help="default: adam")
    add("--beta2", type=fraction, help="decay of Adam's second moment")
    add("--ema", type=fraction, help="decay of the averaged weights that are sampled")
    add("--schedule", choices=["linear", "cosine", "sigma"], default="linear",
        help="of the noise; sigma: log-uniform levels, as score-based models have them (default: linear)")
    add("--prediction", choices=["eps", "v"], default="eps", help="what the network says (default: eps)")
    add("--samples", type=positive_int, metavar="N", help="images to draw for every measurement")
    add("--sampler", choices=["ddpm", "ddim", "dpm"], help="default: ddim; digits, mnist: ddpm")
    add("--nfe", type=evaluations, default=50, help="network evaluations a sample (default: 50)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 where the hardware has units for it")
    add("--compile", action="store_true", help="sample through torch.compile: a minute once, for many "
        "samples; training is not, see README")
    add("--data-dir", default=os.environ.get("LTH_DATA", "data"), help="default: $LTH_DATA or data")
    add("--out", help="folder of the results (default: runs/...)")


def fill_defaults(args):
    """Replace every None that DEFAULTS knows by the data set's value."""
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def checked(kind, fits, what):
    """A type of flag for argparse: kind(text), where there is such a thing and it fits."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return convert


positive_int = checked(int, lambda n: n >= 1, "a positive whole number")
positive_float = checked(float, lambda x: 0 < x < math.inf, "a positive number")
fraction = checked(float, lambda x: 0 <= x < 1, "in [0, 1)")
# Beyond, the seeds of masks and of batches would meet.
seed_number = checked(int, lambda n: 0 <= n <= 999, "a whole number from 0 to 999")
# At 600 the chain would begin at t = 599, not at noise.
evaluations = checked(int, lambda n: 1 <= n <= 1000 and 1000 // n * n >= 950,
                      "a number that the chain's 1000 steps can be spread over: choose a divisor of 1000")


def pick_device(name):
    """(torch.device, reason). Raises ValueError when the device asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        kind = next(kind for kind, is_there in there.items() if is_there)
        found = torch.cuda.get_device_name() if kind == "cuda" else f"{torch.get_num_threads()} threads"
        return torch.device(kind), f"the best that is here: {found}"
    if not there.get(name.split(":")[0]):
        found = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise ValueError(f"--device {name}: not here; this machine has {found}")
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:  # cuda:9 of two
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name), "as asked"


def pick_precision(name, device):
    """("fp32" or "bf16", reason). auto takes bf16 where the hardware multiplies matrices in it."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "tensor cores have it") if has else ("fp32", "this GPU has no bf16 units")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has = [unit for unit in ("amx_bf16", "avx512_bf16") if capabilities.get(unit)]
        return ("bf16", f"this CPU has {has[0]}") if has else ("fp32", "this CPU has no bf16 units")
    return "fp32", f"{device.type} is trained in fp32 here"


SAMPLER_SEED = 900_000  # of a stochastic sampler's noise: no seed that x_T is drawn from


def denoiser(model, precision, compile=False):
    """`model` as a callable for sampling and validation: eval mode, autocast where precision is bf16, through
    torch.compile if asked, for batches of any size, since the last one of a figure is often smaller."""
    model.eval()
    if compile or precision == "bf16":
        model = copy.deepcopy(model).requires_grad_(False)  # all alike, so that one compilation does for all
    if precision == "bf16":  # cast once: without gradients autocast would cast at every evaluation
        for layer in model.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.bfloat16()
    network = torch.compile(model, dynamic=True) if compile else model

    @torch.inference_mode()
    def predict(x, t):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return network(x.clone(memory_format=torch.channels_last), t)  # one stride
    return predict


def draw_samples(model, diffusion, x_T, precision="fp32", sampler="ddim", steps=50, batch=128,
                 label="sample", decode=None, compile=False):
    """uint8 images (N, C, H, W) on the CPU from noise x_T (N, C, H, W), batch by batch, shared out among the
    ranks; stochastic samplers seed their noise by the batch, so that every model meets the same on any number
    of ranks. decode: what makes uint8 images of latents, which have no range to be clipped to."""
    predict, done = denoiser(model, precision, compile), {}
    device, (rank, world) = next(model.parameters()).device, ranks()
    parts = list(enumerate(x_T.split(batch)))
    for number, part in tqdm(parts[rank::world], desc=label, unit="batch", leave=False,
                             disable=True if rank else None):
        generator = torch.Generator().manual_seed(SAMPLER_SEED + number)
        x = sample(predict, diffusion, part.to(device), sampler, steps, clip=decode is None,
                   generator=generator)
        done[number] = (decode or to_uint8)(x).cpu()
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, done)
        done = {number: images for share in shares for number, images in share.items()}
    return torch.cat([done[number] for number, _ in parts])


def main(argv=None):
    """The command line: train one dense DDPM, write its weights and a grid of samples."""
    parser = Parser(description="Train one dense DDPM and draw a grid of samples.")
    add_training_flags(parser)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.set_defaults(samples=100)
    args = parser.parse_args(argv)
    fill_defaults(args)
    args.out = args.out or f"runs/ddpm_{args.dataset}"
    with one_line(parser):
        train_one(args)


def train_one(args):
    """Train, sample, save: what the command line does."""
    writable([args.out], "--out")
    device, why = pick_device(args.device)
    precision, why_precision = pick_precision(args.precision, device)
    images, _ = load_images(args.dataset, args.data_dir)
    torch.manual_seed(args.seed)
    model = UNet(images.shape[1], image_size=images.shape[-1], **PRESETS[args.preset]).to(device)
    diffusion = Diffusion(schedule=args.schedule, prediction=args.prediction)
    print(f"{args.dataset}: {len(images):,} images {tuple(images.shape[1:])} | U-Net {args.preset}: "
          f"{sum(p.numel() for p in model.parameters()):,} parameters\n"
          f"{device} ({why}), {precision} ({why_precision})")
    start = time.monotonic()
    ema, losses = train(model, diffusion, images.to(device), steps=args.steps, batch=args.batch, lr=args.lr,
                        lr_schedule=args.lr_schedule, optimizer=args.optimizer, beta2=args.beta2,
                        ema_decay=args.ema, flip=args.dataset.startswith("cifar"), seed=args.seed,
                        precision=precision, warmup=max(1, args.steps // 20))
    trained = time.monotonic()
    x_T = torch.randn(args.samples, *images.shape[1:], generator=torch.Generator().manual_seed(args.seed))
    drawn = draw_samples(ema.model, diffusion, x_T, precision, args.sampler, args.nfe, compile=args.compile)
    save_grid(drawn, f"{args.out}/samples.png")
    with atomic(f"{args.out}/model.pt") as temporary:
        torch.save(dict(config=model.config, model=model.state_dict(), ema=ema.model.state_dict()), temporary)
    print(f"trained {args.steps} steps in {trained - start:.0f} s, loss {losses[-1][1]:.4f}; drew "
          f"{len(drawn)} images in {time.monotonic() - trained:.0f} s: {args.out}/samples.png, "
          f"{args.out}/model.pt")


if __name__ == "__main__":
    main()
