"""
python metrics.py --check-inception           # FID of CIFAR-10's test images against its training images
python metrics.py --check-inception --inception PATH --data-dir DIR --device cuda
python metrics.py --train-classifier mnist    # makes results/classifiers/mnist.pt anew

What a model is worth and what it costs: Inception, FID, IS, KID, precision and recall, a domain classifier,
CKA, multiply-accumulates, seconds, bytes, and the verdict over seeds.
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import math
import os
import sys
import time
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.linalg import lapack
from torch import nn
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join("runs", "cache")
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
INCEPTION_SHA = "6726825d"


# ---------------------------------------------------------------------------------------------------------
# files: every failure is one OSError line that names the file and the way out

def write_atomically(path, write):
    """Call write(temporary path), then rename, so that nobody reads half a file. OSError when that fails."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_torch(path, way_out, sha=""):
    """What torch.save put at path, tensors and plain containers only. OSError naming path and way_out."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise OSError(f"cannot read {path} ({error.strerror}): {way_out}") from error
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(sha):
        raise OSError(f"{path} is cut short or another file (SHA-256 {digest[:8]}.., not {sha}..): {way_out}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # runs no code in a pickle
    except Exception as error:  # torch raises half a dozen unrelated classes for a bad file
        raise OSError(f"{path} is damaged or holds more than plain weights ({type(error).__name__}): "
                      f"{way_out}") from error


def load_strictly(model, state, path, way_out):
    """Copy state into model, every key or none. OSError naming path when keys or shapes differ."""
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise OSError(f"{path} does not fit {type(model).__name__} ({reason}...): {way_out}") from error
    return model


def weights_hash(model):
    """First 8 hex digits of SHA-256 over the state's bytes in key order: the extractor's name in tables."""
    digest = hashlib.sha256()
    for _, value in sorted(model.state_dict().items()):
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:8]


def images_hash(images):
    """First 8 hex digits of SHA-256 over shape and pixels of images uint8 [N, C, H, W]."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.cpu().contiguous().numpy())
    return digest.hexdigest()[:8]


# ---------------------------------------------------------------------------------------------------------
# Inception, the variant that FID is defined with

@contextlib.contextmanager
def full_precision():
    """No gradients, and no TF32, which GPUs otherwise convolve with: it moves features by 1 in 1,000."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with TensorFlow's eps, ReLU. Stride 2 goes with no padding."""

    def __init__(self, channels, out, kernel, stride=1, pad=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if stride == 1 and pad else 0
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel chains of convolutions and one pool branch, concatenated over channels.

    chains: lists of (name, out, kernel[, stride]), where '..a' and '..b' fork from the step before them.
    pool: 'avg' or 'max' (then branch_pool makes pool_out channels of it) or 'down' (stride 2, no more).
    """

    def __init__(self, channels, chains, pool, pool_out=0):
        super().__init__()
        self.pool, self.chains = pool, [[step[0] for step in chain] for chain in chains]
        for chain in chains:
            width = channels
            for name, out, *rest in chain:
                self.add_module("branch" + name, ConvNorm(width, out, *rest))
                width = width if name[-1] == "a" else out  # '..b' reads what '..a' read
        if pool_out:
            self.branch_pool = ConvNorm(channels, pool_out, 1)

    def forward(self, x):
        outs = []
        for chain in self.chains:
            y = x
            for name in chain:
                layer = getattr(self, "branch" + name)
                if name[-1] == "a":
                    outs.append(layer(y))
                else:
                    y = layer(y)
            outs.append(y)
        if self.pool == "down":
            return torch.cat(outs + [F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "max":
            x = F.max_pool2d(x, 3, 1, 1)
        else:  # TensorFlow leaves the padding out of the mean
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat(outs + [self.branch_pool(x)], 1)


def mixed_35(channels, pool_out):  # 35x35
    return Mixed(channels, [[("1x1", 64, 1)], [("5x5_1", 48, 1), ("5x5_2", 64, 5)],
                            [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3)]], "avg", pool_out)


def mixed_17(c):  # 17x17, 7x7 kernels split into a row and a column
    row, col = (1, 7), (7, 1)
    return Mixed(768, [[("1x1", 192, 1)], [("7x7_1", c, 1), ("7x7_2", c, row), ("7x7_3", 192, col)],
                       [("7x7dbl_1", c, 1), ("7x7dbl_2", c, col), ("7x7dbl_3", c, row), ("7x7dbl_4", c, col),
                        ("7x7dbl_5", 192, row)]], "avg", 192)


def mixed_8(channels, pool):  # 8x8, forked 3x3 kernels
    row, col = (1, 3), (3, 1)
    return Mixed(channels, [[("1x1", 320, 1)],
                            [("3x3_1", 384, 1), ("3x3_2a", 384, row), ("3x3_2b", 384, col)],
                            [("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3), ("3x3dbl_3a", 384, row),
                             ("3x3dbl_3b", 384, col)]], pool, 192)


class InceptionV3(nn.Module):
    """Inception v3 as FID uses it: forward(x uint8 [N, 3|1, H, W]) -> (pool [N, 2048], logits [N, 1008]).

    Module names are torchvision's, so that the FID checkpoint loads strictly: 566 keys, 23,850,960
    parameters. What differs from torchvision's network: 1008 outputs, average pools that leave padding out, a
    max pool in Mixed_7c. Always in eval mode, without gradients. ValueError for anything but uint8 images.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_35(192, 32), mixed_35(256, 64), mixed_35(288, 64)
        self.Mixed_6a = Mixed(288, [[("3x3", 384, 3, 2)], [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3),
                                                           ("3x3dbl_3", 96, 3, 2)]], "down")
        self.Mixed_6b, self.Mixed_6c = mixed_17(128), mixed_17(160)
        self.Mixed_6d, self.Mixed_6e = mixed_17(160), mixed_17(192)
        self.Mixed_7a = Mixed(768, [[("3x3_1", 192, 1), ("3x3_2", 320, 3, 2)],
                                    [("7x7x3_1", 192, 1), ("7x7x3_2", 192, (1, 7)), ("7x7x3_3", 192, (7, 1)),
                                     ("7x7x3_4", 192, 3, 2)]], "down")
        self.Mixed_7b, self.Mixed_7c = mixed_8(1280, "avg"), mixed_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # batch statistics would make a figure depend on its batch

    @full_precision()
    def forward(self, x):
        x = check_images(x).float() / 255
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        # The convention of pytorch-fid: torch's bilinear resize without antialiasing, then [0, 1] -> [-1, 1].
        # TensorFlow's original resize and antialiased ones give other figures; do not mix them.
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6a(x)  # (N, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))  # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        pool = x.mean((2, 3))  # (N, 2048)
        return pool, self.fc(pool)


def check_images(x):
    """x itself when it is uint8 [N, 1|3, H, W]; ValueError otherwise, for floats were never 8-bit images."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 [N, 1|3, H, W], not {x.dtype} {list(x.shape)}")
    return x


def load_inception(path=None, root=None, cache=CACHE):
    """InceptionV3 with the FID checkpoint: at path, else in root, else in cache, else downloaded to either.

    root: $LTH_DATA or data unless named. The file's SHA-256 must begin 6726825d. Raises OSError with one line
    saying how to get it by hand.
    """
    root = root or os.environ.get("LTH_DATA", "data")
    if path is not None and os.path.isdir(path):
        path = os.path.join(path, INCEPTION_FILE)
    places = [os.path.join(folder, INCEPTION_FILE) for folder in (root, cache)]
    way_out = f"get it with  curl -L --create-dirs -o {path or places[0]} {INCEPTION_URL}"
    if path is None:
        path = next((place for place in places if os.path.exists(place)), None)
        path = path or download_inception(places, way_out)
    return load_strictly(InceptionV3(), read_torch(path, way_out, INCEPTION_SHA), path, way_out)


def download_inception(places, way_out):
    """Fetch the checkpoint to the first of places that can be written; that path. OSError otherwise."""
    def fetch(temporary):
        with open(temporary, "wb") as file, urllib.request.urlopen(INCEPTION_URL, timeout=30) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=INCEPTION_FILE, disable=None) as bar:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        read_torch(temporary, "the download went wrong", INCEPTION_SHA)

    path = next((place for place in places if writable(os.path.dirname(place))), None)
    if path is None:
        raise OSError(f"{INCEPTION_FILE} is neither in {os.path.dirname(places[0])} nor in "
                      f"{os.path.dirname(places[1])}, and neither folder can be written: {way_out}")
    try:
        write_atomically(path, fetch)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{INCEPTION_FILE} is not in {os.path.dirname(path)} and could not be downloaded "
                      f"({error}): {way_out}") from error
    return path


def writable(folder):
    """Whether files can be made in folder, which is created where it is missing."""
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError:
        return False
    return os.access(folder or ".", os.W_OK)


# ---------------------------------------------------------------------------------------------------------
# features and their statistics

def features(model, images, batch=64, device=None, logits=False):
    """Features float32 [N, D], on the CPU, of images uint8 [N, C, H, W]; with logits=True (features, logits).

    model: any module whose forward gives that pair, run in eval mode; device: the model's own unless named.
    """
    if len(check_images(images)) == 0:
        raise ValueError("features of no images at all")
    device = torch.device(device) if device else next(model.parameters()).device
    model = model.to(device).eval()
    outs = []
    with full_precision():
        for start in tqdm(range(0, len(images), batch), desc="features", leave=False, delay=5, mininterval=1, disable=None):
            outs.append([out.float().cpu() for out in model(images[start:start + batch].to(device))])
    pair = tuple(torch.cat(parts) for parts in zip(*outs))  # (N, D), (N, K)
    return pair if logits else pair[0]


def statistics(feats):
    """Mean [D] and covariance [D, D] over the features as variables (n - 1), float64. feats [N >= 2, D]."""
    feats = torch.as_tensor(feats)
    if feats.dim() != 2 or len(feats) < 2:
        raise ValueError(f"statistics need features [N >= 2, D], not {list(feats.shape)}")
    mu = feats.mean(0, dtype=torch.float64)  # (D,)
    sigma = mu.new_zeros(len(mu), len(mu))  # (D, D)
    for rows in feats.split(4096):  # float64 for a slice at a time: 50,000 x 2048 doubles are 0.8 GB
        rows = rows.double() - mu
        sigma += rows.T @ rows
    return mu, sigma / (len(feats) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two Gaussians (1706.08500), float64.

    mu [D], sigma [D, D], numpy or torch. ValueError for mismatched shapes or non-finite numbers.
    """
    moments = [torch.as_tensor(v).detach().cpu().double() for v in (mu1, sigma1, mu2, sigma2)]
    shapes, d = [tuple(v.shape) for v in moments], moments[0].numel()
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(f"frechet_distance needs mu [D], sigma [D, D] twice, not {shapes}")
    mu1, sigma1, mu2, sigma2 = moments
    if not all(torch.isfinite(v).all() for v in moments):
        raise ValueError("the statistics hold NaN or infinity: the features they come from are broken")
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_sqrt(sigma1, sigma2)
    return max(distance.item(), 0.0)  # rounding leaves -1e-12 where the truth is 0


def trace_sqrt(sigma1, sigma2):
    """tr sqrt(S1 S2) of two covariances float64 [D, D], by symmetric eigenvalues: never complex.

    With S1 = L L^T, S1 S2 has the eigenvalues of the symmetric L^T S2 L, whose roots are added up.
    """
    one, other = low_rank_factor(sigma1), low_rank_factor(sigma2)
    if other.shape[1] < one.shape[1]:  # the trace is symmetric in the two: take the smaller problem
        one, sigma2 = other, sigma1
    return torch.linalg.eigvalsh(one.T @ sigma2 @ one).clamp(min=0).sqrt().sum()


def low_rank_factor(sigma):
    """L [D, rank] with L L^T = sigma, a covariance float64 [D, D], by Cholesky with pivots.

    With fewer images than features sigma is singular, and plain Cholesky fails. Pivots that are mere rounding
    must go: an error of 1e-16 in an eigenvalue of zero is 1e-8 in its root, 2,048 times over.
    """
    lower, order, rank, _ = lapack.dpstrf(sigma.numpy(), lower=1)
    factor = np.empty((len(sigma), rank))
    factor[order - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(factor)


def fid(feats, reference):
    """frechet_distance of feats [N, D] from reference, a pair (mu, sigma) or features [M, D]."""
    if not isinstance(reference, (tuple, list)):
        reference = statistics(reference)
    return frechet_distance(*statistics(feats), *reference)


def fid_jackknife(feats, reference, groups=20, seed=0):
    """Standard error of fid(feats [N, D], reference) over draws of N images: delete-a-group jackknife.

    Leaves out each of `groups` random groups in turn. Bias falls as 1/N and is common to all of these values,
    so it drops out; a bootstrap repeats images and adds the bias once more. Where feats come from the
    reference's own distribution it says up to sqrt(2) too much: FID has no slope at its minimum.
    ValueError unless 2 <= groups <= N / 2.
    """
    feats = torch.as_tensor(feats)
    if not 2 <= groups <= len(feats) // 2:
        raise ValueError(f"groups={groups} of {len(feats)} features cannot be had: from 2 to half as many")
    if not isinstance(reference, (tuple, list)):
        reference = statistics(reference)
    # At random, since files have an order: neighbours in MNIST share a writer.
    member = torch.randperm(len(feats), generator=torch.Generator().manual_seed(seed)) % groups
    values = np.array([fid(feats[member != group], reference) for group in range(groups)])
    return float(math.sqrt((groups - 1) * values.var()))


def inception_score(probs, splits=10):
    """exp of the mean KL(p(y|x) || p(y)), its mean and standard deviation over splits (1606.03498).

    probs [N, K], rows that sum to 1 (softmax of logits). ValueError for anything else or N < splits.
    """
    probs = torch.as_tensor(probs).detach().cpu().double()
    if probs.dim() != 2 or not 1 <= splits <= len(probs):
        raise ValueError(f"splits={splits} of probs [N >= splits, K] cannot be had from {list(probs.shape)}")
    if not (probs.min() >= 0 and (probs.sum(1) - 1).abs().max() < 1e-3):  # written so that NaN fails too
        raise ValueError("the rows of probs must be probabilities that sum to 1: softmax of the logits")
    scores = []
    for i in range(splits):
        p = probs[i * len(probs) // splits:(i + 1) * len(probs) // splits]  # (n, K)
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(feats_x, feats_y, subsets=100, subset_size=1000, seed=0):
    """Unbiased squared MMD, kernel (x.y / D + 1)^3 (1801.01401): mean over random subsets, standard error.

    feats [N, D] and [M, D]. Subsets overlap where subsets * subset_size > N: the standard error is then that
    of the drawing, not of the images. ValueError when a set holds fewer than subset_size.
    """
    x, y = same_width(feats_x, feats_y)
    n = subset_size
    if not 2 <= n <= min(len(x), len(y)):
        raise ValueError(f"subset_size={n} is more than the {len(x)} or {len(y)} features: make it smaller")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a = x[torch.randperm(len(x), generator=generator)[:n]].double()  # (n, D)
        b = y[torch.randperm(len(y), generator=generator)[:n]].double()
        aa, bb, ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))  # (n, n)
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1))
        values.append((within - 2 * ab.mean()).item())
    error = np.std(values, ddof=1) / math.sqrt(subsets) if subsets > 1 else math.nan
    return float(np.mean(values)), float(error)


def precision_recall(real, fake, k=3, chunk=1024):
    """Improved precision and recall (1904.06991): the share of fake features [M, D] inside a ball of the real
    ones [N, D], and of real inside a ball of the fake. A ball reaches the k-th neighbour of its own set.
    """
    real, fake = same_width(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k} neighbours need more features than that, not {len(real)} and {len(fake)}")
    return covered(fake, real, k, chunk), covered(real, fake, k, chunk)


def covered(points, centres, k, chunk):
    """The share of points [M, D] that lie in at least one k-neighbour ball of centres [N, D]."""
    # The first of the k + 1 smallest distances is a centre's own, zero.
    radii = torch.cat([squared_distances(part, centres).kthvalue(k + 1, dim=1).values
                       for part in centres.split(chunk)])  # (N,)
    inside = [(squared_distances(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def squared_distances(x, y):
    """|x_i - y_j|^2 as float64 [N, M]; in float32 this expansion loses the near neighbours that matter."""
    x, y = x.double(), y.double()
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def same_width(x, y):
    """Both as finite CPU tensors [., D]; ValueError otherwise."""
    x, y = (torch.as_tensor(v).detach().cpu() for v in (x, y))
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], not {list(x.shape)} and {list(y.shape)}")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("the features hold NaN or infinity")
    return x, y


def reference_statistics(model, images, dataset, split="train", cache=CACHE, **options):
    """(mu, sigma) of features(model, images, **options), made once per (dataset, split, images, extractor),
    kept in cache. OSError naming the file when it is damaged or cannot be written.
    """
    key = f"{dataset}-{split}-n{len(images)}-{images_hash(images)}-{weights_hash(model)}"
    path = os.path.join(cache, f"statistics-{key}.pt")
    if not os.path.exists(path):
        pair = statistics(features(model, images, **options))
        write_atomically(path, lambda temporary: torch.save(list(pair), temporary))
    return tuple(read_torch(path, "delete it, it is made anew"))


def floor(model, train_images, test_images, n, dataset, split="test", cache=CACHE, **options):
    """FID of n test images against all training images: what a perfect sampler would score at this n.

    Images uint8 [N, C, H, W]; kept in cache/floor.json, once per (dataset, split, n, images, extractor).
    ValueError when there are fewer than n test images: a floor at another n is another number.
    """
    if not 2 <= n <= len(test_images):
        raise ValueError(f"a floor at n={n} needs that many {split} images; {dataset} has {len(test_images)}")
    path = os.path.join(cache, "floor.json")
    # A fixed random draw, since files have an order: the two halves of MNIST's test images differ in writers,
    # and the first 5,000 score five times the FID of 5,000 at random.
    draw = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(0))[:n]
    test_images = test_images[draw]
    key = (f"{dataset}-{split}-n{n}-{images_hash(test_images)}-train-n{len(train_images)}-"
           f"{images_hash(train_images)}-{weights_hash(model)}")
    known = read_json(path)
    if key not in known:
        reference = reference_statistics(model, train_images, dataset, "train", cache, **options)
        value = fid(features(model, test_images, **options), reference)
        known = {**read_json(path), key: value}  # read again: other runs may have written meanwhile
        write_atomically(path, lambda temporary: write_text(temporary, json.dumps(known, indent=1)))
    return known[key]


def read_json(path):
    """The dict in a JSON file, {} where there is none. OSError naming a damaged file."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise OSError(f"{path} is damaged ({error}): delete it, it is made anew") from error


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")


# ---------------------------------------------------------------------------------------------------------
# the domain classifier: features that know digits, where Inception knows dogs

class DomainClassifier(nn.Module):
    """Small CNN used like InceptionV3: forward(x uint8 [N, C, H, W]) -> (features [N, 64], logits [N, K]).

    For 25 to 32 pixels a side, of which three strides of 2 leave 4x4. About 108,000 parameters.
    """

    def __init__(self, channels=1, classes=10, width=64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 24, 5, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),  # (N, 24, 14, 14)
            nn.Conv2d(24, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),  # (N, 48, 7, 7)
            nn.Conv2d(48, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),  # (N, 1024)
            nn.Linear(1024, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())  # normed: no dead features
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        feats = self.body(check_images(x).float() / 127.5 - 1)  # (N, 64)
        return feats, self.head(feats)


def train_classifier(images, labels, seed=0, steps=1000, batch=128, lr=3e-3, device="cpu"):
    """DomainClassifier trained on images uint8 [N, C, H, W], labels int64 [N]; in eval mode, on the CPU.

    The weights end up rounded to float16, so that a model just trained equals the one loaded from its file.
    """
    if len(check_images(images)) != len(labels) or len(images) < 2:
        raise ValueError(f"as many labels as images, please, not {len(labels)} and {len(images)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = DomainClassifier(images.shape[1], int(labels.max()) + 1).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in tqdm(range(steps), desc="domain classifier", leave=False, delay=5, mininterval=1, disable=None):
        pick = torch.randint(len(images), (batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        x = torch.roll(images[pick], shift, (2, 3)).to(device)  # up to 2 pixels, the batch together
        loss = F.cross_entropy(model(x)[1], labels[pick].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.cpu().half().float().eval()


def accuracy(model, images, labels, **options):
    """The share of images uint8 [N, C, H, W] whose largest logit is their label."""
    return (features(model, images, logits=True, **options)[1].argmax(1) == labels).double().mean().item()


def save_classifier(model, path):
    """Write the weights as float16, about 220 kB. OSError when path cannot be written."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_classifier(dataset, images=None, labels=None, cache=CACHE, **options):
    """The DomainClassifier of a data set: results/classifiers/{dataset}.pt beside this file, else the one in
    cache, else train_classifier(images uint8 [N, C, H, W], labels int64 [N], **options), kept in cache.

    Print weights_hash(model) beside its figures: they compare where hashes agree. OSError naming a damaged
    file; ValueError when there is neither a file nor images.
    """
    committed = os.path.join(HERE, "results", "classifiers", f"{dataset}.pt")
    path, way_out = committed, f"restore it with  git checkout -- {committed}"
    if not os.path.exists(committed):
        if images is None or labels is None:
            raise ValueError(f"no {committed}: pass the training images and labels of {dataset}")
        # The options are in the name lest a trial of 5 steps be taken for the real one later.
        how = "".join(f"-{k}{v}" for k, v in sorted(options.items()) if k != "device")
        path = os.path.join(cache, f"classifier-{dataset}-{images_hash(images)}{how}.pt")
        way_out = "delete it, it is made anew"
        if not os.path.exists(path):
            save_classifier(train_classifier(images, labels, **options), path)
    state = read_torch(path, way_out)
    try:
        shapes = state["body.0.weight"].shape[1], len(state["head.bias"]), state["head.weight"].shape[1]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise OSError(f"{path} holds no domain classifier: {way_out}") from error
    return load_strictly(DomainClassifier(*shapes), state, path, way_out).eval()


# ---------------------------------------------------------------------------------------------------------
# costs: multiply-accumulates, seconds, bytes

def count_macs(model, x, t=None, masks=None):
    """Multiply-accumulates of model(x, t), or of model(x) without t: dict layer -> (dense_macs, live_macs).

    Counts Conv2d and Linear for the whole batch x; live = live weights x output positions, masks being a dict
    'layer.weight' -> bool tensor. A module with a method product_macs(input) -> int adds 'layer.products':
    products of activations with activations (attention), which no mask makes fewer. Biases, norms and
    nonlinearities are not counted. Twice the sum is what torch.utils.flop_counter says.
    """
    macs, masks = {}, masks or {}

    def add(name, dense, live):
        before = macs.get(name, (0, 0))  # a layer called twice counts twice
        macs[name] = before[0] + dense, before[1] + live

    def count(name, module, inputs, out):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            width = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
            positions = out.numel() // width  # each uses every weight once
            mask = masks.get(f"{name}.weight")
            weights = module.weight.numel()
            add(name, weights * positions, (weights if mask is None else int(mask.sum())) * positions)
        if callable(getattr(module, "product_macs", None)):
            products = int(module.product_macs(inputs[0]))
            add(f"{name}.products".lstrip("."), products, products)

    hooks = [module.register_forward_hook(functools.partial(count, name))
             for name, module in model.named_modules()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(x) if t is None else model.eval()(x, t)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return macs


def synchronise(device):
    """Wait until the device has done what it was given; clocks read before that say nothing."""
    kind = torch.device(device).type
    if kind in ("cuda", "mps"):
        getattr(torch, kind).synchronize()


def seconds_per_1000(fn, n, repeats=3, warmup=1, device="cpu"):
    """Median seconds, scaled to 1,000 images, of fn(), which makes n of them; warmup calls go unmeasured."""
    if n < 1 or repeats < 1:
        raise ValueError(f"n and repeats must be at least 1, not {n} and {repeats}")
    times = []
    for i in range(warmup + repeats):
        synchronise(device)
        start = time.perf_counter()
        fn()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[warmup:])) * 1000 / n


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` then peak.bytes (None where it cannot be had) and peak.kind.

    CUDA: the most the allocator held in the block. CPU: the most resident memory of the whole process, with
    libraries and freed memory it keeps; on Linux the mark is reset as the block begins, elsewhere it is the
    most since the process began, and .kind says so. Blocks do not nest: the inner resets the outer's mark.
    """

    def __init__(self, device="cpu"):
        self.device, self.bytes, self.kind = torch.device(device), None, "unknown"

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.kind = "cuda allocated"
        elif self.device.type == "cpu":
            self.kind = "resident"
            try:
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")  # 5 resets the peak, proc(5)
            except OSError:
                self.kind = "resident since the process began"
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            self.bytes = resident_peak()


def resident_peak():
    """Bytes of the process's largest resident size; None where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but for macOS


# ---------------------------------------------------------------------------------------------------------
# similarity of weights

def cka(weights_a, weights_b, kernel="rbf"):
    """Centred kernel alignment (1905.00414) of two weight tensors [n >= 4 output channels, ...], row i with
    row i: 1 for equal ones, about 0 for independent ones, NaN where all rows of one are alike (pruned away).

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the unbiased HSIC; the biased one reads 0.9 on independent
    weights. kernel: 'linear', or 'rbf' with the median squared distance as 2 sigma^2.
    """
    # (n, rest) each
    a, b = (torch.as_tensor(w).detach().cpu().double().flatten(1) for w in (weights_a, weights_b))
    if len(a) != len(b) or len(a) < 4 or kernel not in ("linear", "rbf"):
        raise ValueError(f"cka needs equally many rows, at least 4, and kernel 'linear' or 'rbf'; "
                         f"not {len(a)}, {len(b)} and {kernel!r}")
    k, l = (u_centred(w @ w.T if kernel == "linear" else rbf(w)) for w in (a, b))  # (n, n)
    norm = ((k * k).sum() * (l * l).sum()).sqrt().item()  # HSIC's factor 1 / (n (n - 3)) cancels
    return (k * l).sum().item() / norm if norm > 0 else math.nan


def rbf(w):
    """The Gaussian kernel of the rows of w [n, D], with the median squared distance as 2 sigma^2."""
    distances = squared_distances(w, w)
    n = len(w)
    median = distances[~torch.eye(n, dtype=torch.bool)].median()
    return torch.exp(-distances / median) if median > 0 else torch.ones_like(distances)


def u_centred(k):
    """Kernel [n, n] with its diagonal and every row sum made zero: products of such are the unbiased HSIC."""
    n = len(k)
    k = k - torch.diag(k.diagonal())
    rows = k.sum(1) / (n - 2)
    k = k - rows[:, None] - rows + rows.sum() / (n - 1)
    return k - torch.diag(k.diagonal())


# ---------------------------------------------------------------------------------------------------------
# the verdict over seeds

@dataclasses.dataclass(frozen=True)
class Verdict:
    """What n seeds say of one sparsity; str(verdict) is the sentence to print.

    tests: dict comparison -> one-sided p; p: the largest of them; p_holm: p adjusted across sparsities.
    effects: dict arm -> (mean of ticket - arm, low, high), an interval of level 1 - 2 alpha, which ends below
    zero where the one-sided p is below alpha. winning: True, False, or None for no verdict, and why.
    """
    n: int
    metric: str
    margin: float
    alpha: float
    tests: dict
    effects: dict
    p: float | None = None
    p_holm: float | None = None
    why: str = ""

    @property
    def winning(self):
        p = self.p if self.p_holm is None else self.p_holm
        return None if p is None else p < self.alpha

    def __str__(self):
        if self.winning is None:
            return f"n={self.n}, no verdict{self.why}"
        effects = ", ".join(f"ticket - {other} {mean:+.4g} [{low:+.4g}, {high:+.4g}]"
                            for other, (mean, low, high) in self.effects.items())
        holm_note = "" if self.p_holm is None else f", Holm {self.p_holm:.3g}"
        failed = [f"{test} (p={p:.3g})" for test, p in self.tests.items() if not p < self.alpha]
        return (f"{'winning' if self.winning else 'not shown to win'}: n={self.n} seeds, {self.metric}, "
                f"p={self.p:.3g}{holm_note}; {effects} at {100 - 200 * self.alpha:.0f} %"
                + (f"; not shown: {', '.join(failed)}" if failed else ""))


def verdict(table, margin=0.10, alpha=0.05, metric="fid_domain"):
    """Is the ticket winning? An intersection-union test over seeds, paired by seed; metric: lower is better.

    table: dict 'dense', 'ticket', 'reinit', 'random' -> dict seed -> value (or a sequence in order of seeds).
    Winning = ticket < (1 + margin) dense, ticket < reinit and ticket < random, each by a one-sided paired t
    test at alpha; the conjunction's p is the largest, with no correction among the three. Below 3 common
    seeds, or with a value that is not finite, there is no verdict. ValueError for a missing arm.
    """
    missing = {"dense", "ticket", "reinit", "random"} - set(table)
    if missing:
        raise ValueError(f"verdict needs the arms {sorted(missing)} too; the table has {sorted(table)}")
    arms = {arm: dict(values) if hasattr(values, "items") else dict(enumerate(values))
            for arm, values in table.items() if arm in ("dense", "ticket", "reinit", "random")}
    seeds = sorted(set.intersection(*(set(values) for values in arms.values())))
    arms = {arm: np.array([values[seed] for seed in seeds], float) for arm, values in arms.items()}  # (n,)
    broken = [arm for arm, values in arms.items() if not np.isfinite(values).all()]
    if len(seeds) < 3 or broken:  # to leave a diverged run out would flatter its arm
        why = f": {', '.join(broken)} not finite" if broken else ""
        return Verdict(len(seeds), metric, margin, alpha, {}, {}, why=why)
    dense, ticket, reinit, random = (arms[arm] for arm in ("dense", "ticket", "reinit", "random"))
    tests = {f"within {100 * margin:g} % of dense": below_zero(ticket - (1 + margin) * dense),
             "better than reinit": below_zero(ticket - reinit),
             "better than random": below_zero(ticket - random)}
    effects = {name: interval(ticket - other, 1 - 2 * alpha)
               for name, other in (("dense", dense), ("reinit", reinit), ("random", random))}
    return Verdict(len(seeds), metric, margin, alpha, tests, effects, p=max(tests.values()))


def verdicts(tables, **options):
    """dict sparsity -> table (see verdict) to dict sparsity -> Verdict, with Holm's p across sparsities."""
    found = {sparsity: verdict(table, **options) for sparsity, table in tables.items()}
    tested = [sparsity for sparsity, one in found.items() if one.p is not None]
    for sparsity, p in zip(tested, holm([found[sparsity].p for sparsity in tested])):
        found[sparsity] = dataclasses.replace(found[sparsity], p_holm=p)
    return found


def below_zero(differences):
    """One-sided p of a t test that the mean of differences [n >= 2] is below zero."""
    if np.ptp(differences) == 0:  # no spread, no t: the sign decides
        return 0.0 if differences[0] < 0 else 1.0
    return float(stats.ttest_1samp(differences, 0.0, alternative="less").pvalue)


def interval(values, level=0.95):
    """(mean, low, high) of values [n >= 2]: Student's confidence interval of the mean."""
    values = np.asarray(values, float)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def holm(pvalues):
    """Holm's step-down adjustment of a list of p-values, in the same order, each to compare with alpha."""
    adjusted, running = [0.0] * len(pvalues), 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = running
    return adjusted


# ---------------------------------------------------------------------------------------------------------

def main(argv=None):
    """The command line; returns the exit status, 2 with one line on stderr when something is wrong."""
    parser = argparse.ArgumentParser(description="checks of the yardsticks themselves")
    add = parser.add_argument
    add("--check-inception", action="store_true", help="FID of CIFAR-10's test against its training images")
    add("--train-classifier", metavar="DATASET", help="train and save results/classifiers/DATASET.pt")
    add("--inception", metavar="PATH", help=f"where {INCEPTION_FILE} is, if not in the data folder")
    add("--data-dir", default=os.environ.get("LTH_DATA", "data"), help="default: $LTH_DATA or data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not (args.check_inception or args.train_classifier):
        parser.error("nothing to do: --check-inception or --train-classifier DATASET")
    try:
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}: this machine has no CUDA device that torch can use")
        from ddpm import load_images  # here alone: the yardsticks need no data to be imported
        if args.train_classifier:
            path = os.path.join(HERE, "results", "classifiers", f"{args.train_classifier}.pt")
            model = train_classifier(*load_images(args.train_classifier, args.data_dir), device=args.device)
            save_classifier(model, path)
            right = accuracy(model, *load_images(args.train_classifier, args.data_dir, "test"))
            print(f"{path}: {weights_hash(model)}, test accuracy {right:.4f}")
        if args.check_inception:
            model = load_inception(args.inception, args.data_dir).to(args.device)
            train, test = (load_images("cifar10", args.data_dir, split)[0] for split in ("train", "test"))
            value = fid(features(model, test), reference_statistics(model, train, "cifar10"))
            print(f"CIFAR-10 FID, n={len(test):,} test against {len(train):,} training images: {value:.4f} "
                  "(about 3.15 is often quoted)")
    except (OSError, ValueError) as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
