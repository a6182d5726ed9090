"""What a model is worth and what it costs: Inception, FID, IS, KID, precision and recall, a domain
classifier, CKA, multiply-accumulates, seconds, bytes, and the verdict over seeds.

    python metrics.py --check-inception [--inception PATH --data-dir DIR]    # FID of CIFAR-10's test
    python metrics.py --train-classifier mnist                   # makes results/classifiers/mnist.pt anew
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import timeit

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.linalg import lapack
from torch import nn
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join("runs", "cache")
REMAKE = "delete it, it is made anew"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
INCEPTION_SHA = "6726825d"
FLOOR_DRAWS = 5
progress = functools.partial(tqdm, leave=False, delay=5, mininterval=1, disable=None)


# --- files: every failure is one OSError line that names the file and the way out --------------------------

@contextlib.contextmanager
def atomic(path):
    """A temporary name, renamed to path when the block ends well, else removed: nobody reads half a file.
    As in ddpm.py, which this file does without: it can be taken alone, but for downloads."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        yield temporary
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's own class for a write that failed
        raise OSError(f"{path} could not be written, is the disk full? ({str(error).splitlines()[0]})")
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def read_file(path, way_out, sha="", make=None):
    """What torch.save (weights only: no code in a pickle is run) or json.dump left at path, or with make
    the network make(state) filled with that state. OSError in one line: path, what is wrong, way_out.
    """
    what = "cannot be read"
    try:
        with open(path, "rb") as file:
            data = file.read()
        what = "is cut short or another file"
        if not hashlib.sha256(data).hexdigest().startswith(sha):
            raise ValueError(f"its SHA-256 does not begin {sha}")
        what = "is damaged or holds more than plain weights"
        is_json = str(path).endswith(".json")
        found = json.loads(data) if is_json else torch.load(io.BytesIO(data), "cpu", weights_only=True)
        if make:
            what, state, found = "does not fit", found, make(found).eval()
            found.load_state_dict(state, strict=True)
        return found
    except Exception as error:  # torch raises half a dozen unrelated classes for a bad file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise OSError(f"{path} {what} ({reason}): {way_out}") from error


def weights_hash(model):
    """First 8 hex digits of SHA-256 over the state's bytes in key order: the extractor's name in tables."""
    values = [value.cpu().numpy().tobytes() for _, value in sorted(model.state_dict().items())]
    return hashlib.sha256(b"".join(values)).hexdigest()[:8]


def images_hash(images):
    """First 8 hex digits of SHA-256 over shape and pixels of images uint8 [N, C, H, W]."""
    data = str(tuple(images.shape)).encode() + images.cpu().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:8]


# --- Inception, the variant that FID is defined with -------------------------------------------------------

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

    def __init__(self, channels, out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel chains of convolutions and one pool branch, concatenated over channels.
    chains: (name, (out, kernel[, stride]), ...); kernel 'fork' ends a chain with 1x3 and 3x1 side by side.
    pool: 'avg' or 'max' (then branch_pool makes pool_out channels of it) or 'down' (stride 2, no more).
    """

    def __init__(self, channels, chains, pool, pool_out=0):
        super().__init__()
        self.pool, self.chains = pool, []
        for prefix, *steps in chains:
            width, names = channels, []
            for i, (out, kernel, *stride) in enumerate(steps, 1):
                name = f"branch{prefix}_{i}" if len(steps) > 1 else f"branch{prefix}"
                kernels = {name + "a": (1, 3), name + "b": (3, 1)} if kernel == "fork" else {name: kernel}
                for name, kernel in kernels.items():
                    self.add_module(name, ConvNorm(width, out, kernel, *stride))
                width, names = out, [*names, list(kernels)]
            self.chains.append(names)
        if pool_out:
            self.branch_pool = ConvNorm(channels, pool_out, 1)

    def forward(self, x):
        """x (N, channels, H, W) -> (N, sum of the chains' ends and of the pool, H', W')."""
        outs = []
        for chain in self.chains:
            ends = [x]
            for names in chain:
                ends = [getattr(self, name)(ends[0]) for name in names]
            outs += ends
        if self.pool == "down":
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        # TensorFlow leaves the padding out of the mean: count_include_pad=False
        pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, False, False)
        return torch.cat([*outs, self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """Inception v3 as FID uses it: forward(x uint8 [N, 3|1, H, W]) -> (pool [N, 2048], logits [N, 1008]).
    torchvision's names, so that the FID checkpoint loads strictly (566 keys, 23,850,960 parameters), but 1008
    outputs, average pools that leave padding out, a max pool in Mixed_7c. Always in eval mode, no gradients.
    """

    def __init__(self):  # in the order in which forward goes through
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)  # (N, 32, 149, 149)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)  # (N, 64, 147, 147), then a max pool
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)  # (N, 80, 73, 73)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, 1, "valid")  # (N, 192, 71, 71), then a max pool
        chains = [("1x1", (64, 1)), ("5x5", (48, 1), (64, 5)), ("3x3dbl", (64, 1), (96, 3), (96, 3))]
        for name, width, pool_out in ("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64):  # (N, 288, 35, 35)
            self.add_module(f"Mixed_{name}", Mixed(width, chains, "avg", pool_out))
        self.Mixed_6a = Mixed(288, [("3x3", (384, 3, 2)), ("3x3dbl", (64, 1), (96, 3), (96, 3, 2))], "down")
        row, col = (1, 7), (7, 1)
        for name, c in ("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192):  # (N, 768, 17, 17)
            self.add_module(f"Mixed_{name}", Mixed(768, [
                ("1x1", (192, 1)), ("7x7", (c, 1), (c, row), (192, col)),
                ("7x7dbl", (c, 1), (c, col), (c, row), (c, col), (192, row))], "avg", 192))
        self.Mixed_7a = Mixed(768, [("3x3", (192, 1), (320, 3, 2)),
                                    ("7x7x3", (192, 1), (192, row), (192, col), (192, 3, 2))], "down")
        for name, width, pool in ("7b", 1280, "avg"), ("7c", 2048, "max"):  # (N, 2048, 8, 8)
            self.add_module(f"Mixed_{name}", Mixed(width, [
                ("1x1", (320, 1)), ("3x3", (384, 1), (384, "fork")),
                ("3x3dbl", (448, 1), (384, 3), (384, "fork"))], pool, 192))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # batch statistics would make a figure depend on its batch

    @full_precision()
    def forward(self, x):
        """x uint8 (N, 3 or 1, H, W) -> (pool (N, 2048), logits (N, 1008)). ValueError for other images."""
        x = check_images(x).expand(-1, 3, -1, -1).float() / 255
        # pytorch-fid's convention: bilinear, no antialiasing, then [-1, 1]. Other resizes give other figures.
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for block in list(self.children())[:-1]:  # all but fc
            x = block(x)
            if block in (self.Conv2d_2b_3x3, self.Conv2d_4a_3x3):
                x = F.max_pool2d(x, 3, 2)
        pool = x.mean((2, 3))  # (N, 2048)
        return pool, self.fc(pool)


def check_images(x):
    """x itself when it is uint8 [N, 1|3, H, W]; ValueError otherwise, for floats were never 8-bit images."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 [N, 1|3, H, W], not {x.dtype} {list(x.shape)}")
    return x


def load_inception(path=None, root=None, cache=CACHE):
    """InceptionV3 with the FID checkpoint (SHA-256 6726825d...): at path, else in root ($LTH_DATA or data
    unless named), else in cache, else downloaded to either. OSError with one line on how to get it by hand.
    """
    folders = root or os.environ.get("LTH_DATA", "data"), cache
    places = [os.path.join(folder, INCEPTION_FILE) for folder in folders]
    way_out = f"get it with  curl -L --create-dirs -o {places[0]} {INCEPTION_URL}"
    path = path or next(filter(os.path.exists, places), None)
    if path is None:
        from ddpm import download, writable  # here alone
        path = download([INCEPTION_URL], os.path.join(writable(folders), INCEPTION_FILE), INCEPTION_SHA,
                        algorithm="sha256")
    return read_file(path, way_out, INCEPTION_SHA, lambda state: InceptionV3())


# --- features, weights and their statistics ----------------------------------------------------------------

def features(model, images, batch=64, logits=False):
    """Features float32 [N, D], on the CPU, of images uint8 [N, C, H, W]; or (features, logits [N, K])."""
    device, model = next(model.parameters()).device, model.eval()
    with full_precision():
        outs = [[out.float().cpu() for out in model(part.to(device))]
                for part in progress(check_images(images).split(batch), "features")]
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
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two Gaussians (1706.08500), float64, never complex.
    mu [D], sigma [D, D], numpy or torch. ValueError for mismatched shapes or non-finite numbers.
    """
    moments = [torch.as_tensor(v).detach().cpu().double() for v in (mu1, sigma1, mu2, sigma2)]
    shapes, d = [tuple(v.shape) for v in moments], moments[0].numel()
    if shapes != [(d,), (d, d), (d,), (d, d)] or not all(v.isfinite().all() for v in moments):
        raise ValueError(f"frechet_distance needs finite mu [D], sigma [D, D] twice, no NaN, not {shapes}")
    mu1, sigma1, mu2, sigma2 = moments
    # With S1 = L L^T, S1 S2 has the eigenvalues of the symmetric L^T S2 L; S1 and S2 may trade places.
    factor, sigma = min((low_rank_factor(sigma1), sigma2), (low_rank_factor(sigma2), sigma1),
                        key=lambda pair: pair[0].shape[1])
    roots = torch.linalg.eigvalsh(factor.T @ sigma @ factor).clamp(min=0).sqrt()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    return max(distance.item(), 0.0)  # rounding leaves -1e-12 where the truth is 0


def low_rank_factor(sigma):
    """L [D, rank] with L L^T = sigma, a covariance float64 [D, D], by Cholesky with pivots. Those of mere
    rounding must go: 1e-16 in an eigenvalue of zero (n < D) is 1e-8 in its root, 2,048 times over.
    """
    lower, order, rank, _ = lapack.dpstrf(sigma.numpy(), lower=1)
    factor = np.empty((len(sigma), rank))
    factor[order - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(factor)


def fid(feats, reference):
    """frechet_distance of feats [N, D] from reference, a pair (mu, sigma) or features [M, D]."""
    reference = reference if isinstance(reference, (tuple, list)) else statistics(reference)
    return frechet_distance(*statistics(feats), *reference)


def inception_score(probs, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) of probs [N, K] (1606.03498): its mean and deviation over splits."""
    probs = torch.as_tensor(probs).detach().cpu().double()
    if not (probs.dim() == 2 and 1 <= splits <= len(probs)  # written so that NaN fails too
            and probs.min() >= 0 and (probs.sum(1) - 1).abs().max() < 1e-3):
        raise ValueError(f"probs must be the softmax of logits [N >= {splits}, K], not {list(probs.shape)}")
    scores = []
    for i in range(splits):
        p = probs[i * len(probs) // splits:(i + 1) * len(probs) // splits]  # (n, K)
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(feats_x, feats_y, subsets=100, subset_size=1000, seed=0):
    """Unbiased squared MMD of feats [N, D], [M, D], kernel (x.y / D + 1)^3 (1801.01401): mean over random
    subsets and its standard error, that of the drawing alone where subsets * subset_size > N. ValueError when
    a set holds fewer than subset_size.
    """
    sets, n = same_width(feats_x, feats_y), subset_size
    if not 2 <= n <= min(map(len, sets)):
        raise ValueError(f"subset_size={n} is more than the {list(map(len, sets))} features: make it smaller")
    generator, values = torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        a, b = (x[torch.randperm(len(x), generator=generator)[:n]].double() for x in sets)  # (n, D)
        aa, bb, ab = ((u @ v.T / a.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))  # (n, n)
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

    def covered(points, centres):  # the first of the k + 1 smallest distances is a centre's own, zero
        radii = torch.cat([squared_distances(part, centres).kthvalue(k + 1, dim=1).values
                           for part in centres.split(chunk)])  # (len(centres),)
        inside = [(squared_distances(part, centres) <= radii).any(1) for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


def squared_distances(x, y):
    """|x_i - y_j|^2 as float64 [N, M]; in float32 this expansion loses the near neighbours that matter."""
    x, y = x.double(), y.double()
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def same_width(x, y):
    """Both as finite CPU tensors [., D]; ValueError otherwise."""
    x, y = (torch.as_tensor(v).detach().cpu() for v in (x, y))
    if not (x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1] and torch.cat([x, y]).isfinite().all()):
        raise ValueError(f"features must be finite [N, D], [M, D], not {list(x.shape)}, {list(y.shape)}")
    return x, y


def cka(weights_a, weights_b):
    """Centred kernel alignment (1905.00414) of two weight tensors [n >= 4 output channels, ...], row i with
    row i: 1 for equal ones, about 0 for independent ones, NaN where all rows of one are alike (pruned away).
    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), unbiased (the biased HSIC gives 0.9 on independent weights), of
    Gaussian kernels with the median squared distance as 2 sigma^2. ValueError for other shapes.
    """
    a, b = (torch.as_tensor(w).detach().cpu().double().flatten(1) for w in (weights_a, weights_b))  # (n, D)
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"cka: {len(a)}, {len(b)} rows, not equally many >= 4")

    def gram(w):
        distances = squared_distances(w, w)
        median = distances[~torch.eye(len(w), dtype=torch.bool)].median()
        return torch.exp(-distances / median) if median > 0 else torch.ones_like(distances)

    k, l = u_centred(gram(a)), u_centred(gram(b))  # (n, n)
    norm = ((k * k).sum() * (l * l).sum()).sqrt().item()  # HSIC's factor 1 / (n (n - 3)) cancels
    return (k * l).sum().item() / norm if norm > 0 else math.nan


def u_centred(k):
    """Kernel [n, n] with its diagonal and every row sum made zero: products of such are the unbiased HSIC."""
    k = k - torch.diag(k.diagonal())
    rows = k.sum(1) / (len(k) - 2)
    k = k - rows[:, None] - rows + rows.sum() / (len(k) - 1)
    return k - torch.diag(k.diagonal())


def reference_statistics(model, images, dataset, cache=CACHE):
    """(mu, sigma) of features(model, training images), cached by data set, images and extractor."""
    key = f"{dataset}-train-n{len(images)}-{images_hash(images)}-{weights_hash(model)}"
    path = os.path.join(cache, f"statistics-{key}.pt")
    if not os.path.exists(path):
        pair = statistics(features(model, images))
        with atomic(path) as temporary:
            torch.save(list(pair), temporary)
    return tuple(read_file(path, REMAKE))


def quality(model, images, real, reference, extract=None):
    """The quality columns of images uint8 [N, C, H, W] in a model's features: dict fid, precision, recall, in
    Inception's also kid, kid_error, inception_score. reference: (mu, sigma) of the training images, for FID;
    real: features [M, D] for the rest. Precision and recall stand beside a FID because it can fall while
    images get worse. extract: features(), or what does the same on several machines.
    """
    feats, logits = (extract or features)(model, images, logits=True)
    precision, recall = precision_recall(real, feats)
    columns = dict(fid=fid(feats, reference), precision=precision, recall=recall)
    if not isinstance(model, InceptionV3):
        return columns
    value, error = kid(feats, real, subset_size=min(1000, min(len(feats), len(real)) // 2))
    logits = logits - model.fc.bias.cpu()  # left out in 1606.03498's code, and by torch-fidelity
    score, _ = inception_score(logits.softmax(1), min(10, len(logits)))
    return columns | dict(kid=value, kid_error=error, inception_score=score)


def floor(model, train_images, test_images, n, dataset, cache=CACHE):
    """quality() of n test images uint8 [., C, H, W], a mean over up to FLOOR_DRAWS disjoint draws: what a
    perfect sampler scores. FID is against all training images, the rest against n of them. Cached by data
    set, n, images and extractor. ValueError when there are fewer than n test images.
    """
    if not 2 <= n <= len(test_images):
        raise ValueError(f"a floor at n={n} needs that many test images; {dataset} has {len(test_images)}")
    draws = min(FLOOR_DRAWS, len(test_images) // n)
    test_images, some = random_draw(test_images, n * draws), random_draw(train_images, n)
    key = (f"{dataset}-n{n}-{images_hash(test_images)}-train-n{len(train_images)}-"
           f"{images_hash(train_images)}-{weights_hash(model)}")
    path = os.path.join(cache, "floors.json")
    known = read_file(path, REMAKE) if os.path.exists(path) else {}
    if key not in known:  # what another run writes meanwhile is lost, and made anew when it is asked for
        reference = reference_statistics(model, train_images, dataset, cache)
        real = features(model, some)
        found = [quality(model, draw, real, reference) for draw in test_images.split(n)]
        known[key] = {name: float(np.mean([columns[name] for columns in found])) for name in found[0]}
        with atomic(path) as temporary:
            write_text(temporary, json.dumps(known, indent=1))
    return known[key]


def random_draw(images, n):
    """n of the images, always the same ones and at random, since files have an order: the two halves of
    MNIST's test images differ in writers, and the first 5,000 score five times the FID of a random 5,000."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]]


# --- the domain classifier: features that know digits, where Inception knows dogs --------------------------

class DomainClassifier(nn.Module):
    """Small CNN for 25 to 32 pixels a side: x uint8 [N, C, H, W] -> (features [N, 64], logits [N, K])."""

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
    """DomainClassifier trained on images uint8 [N, C, H, W], labels int64 [N]; in eval mode, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = DomainClassifier(images.shape[1], int(labels.max()) + 1).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in progress(range(steps), "domain classifier"):
        pick = torch.randint(len(images), (batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        x = torch.roll(images[pick], shift, (2, 3)).to(device)  # up to 2 pixels, the batch together
        loss = F.cross_entropy(model(x)[1], labels[pick].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.cpu().half().float().eval()  # rounded, so that it equals the one loaded from its file


def save_classifier(model, path):
    """Write the weights as float16, about 220 kB. OSError when path cannot be written."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_classifier(dataset, images=None, labels=None, cache=CACHE, **options):
    """DomainClassifier of a data set: results/classifiers/{dataset}.pt beside this file, else one in cache,
    else train_classifier(images, labels, **options), kept there. Print weights_hash(model) with its figures:
    they compare where hashes agree. OSError naming a damaged file; ValueError for neither file nor images.
    """
    path = os.path.join(HERE, "results", "classifiers", f"{dataset}.pt")
    way_out = f"restore it with  git checkout -- {path}"
    if not os.path.exists(path):
        if images is None or labels is None:
            raise ValueError(f"no {path}: pass the training images and labels of {dataset}")
        # The options are in the name lest a trial of 5 steps be taken for the real one later.
        how = "".join(f"-{k}{v}" for k, v in sorted(options.items()) if k != "device")
        path, way_out = os.path.join(cache, f"classifier-{dataset}-{images_hash(images)}{how}.pt"), REMAKE
        if not os.path.exists(path):
            save_classifier(train_classifier(images, labels, **options), path)
    return read_file(path, way_out, make=lambda state: DomainClassifier(
        state["body.0.weight"].shape[1], len(state["head.bias"]), state["head.weight"].shape[1]))


# --- costs: multiply-accumulates, seconds, bytes -----------------------------------------------------------

def count_macs(model, x, t=None, masks=None):
    """Multiply-accumulates of model(x, t), or model(x), for the whole batch x: dict layer -> (dense, live).
    Conv2d and Linear; live by masks, a dict 'layer.weight' -> bool tensor. A module with product_macs(input)
    -> int adds 'layer.products': activations times activations (attention), which no mask makes fewer. Biases
    and norms count nothing. Twice the sum is what torch.utils.flop_counter says.
    """
    dense, live, masks, training = collections.Counter(), collections.Counter(), masks or {}, model.training

    def count(name, layer, inputs, out):
        """Add up one call of a layer; one that is called twice counts twice."""
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weights, mask = layer.weight.numel(), masks.get(f"{name}.weight")
            positions = out.numel() // len(layer.weight)  # each uses every weight once
            dense[name] += weights * positions
            live[name] += (weights if mask is None else int(mask.sum())) * positions
        if hasattr(layer, "product_macs"):
            for total in (dense, live):
                total[f"{name}.products".lstrip(".")] += int(layer.product_macs(inputs[0]))

    hooks = [layer.register_forward_hook(functools.partial(count, name))
             for name, layer in model.named_modules()]
    try:
        with torch.no_grad():
            model.eval()(*(x,) if t is None else (x, t))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: (dense[name], live[name]) for name in dense}


def seconds_in_turns(works, n, warmup=1, device="cpu"):
    """Seconds [n, len(works)] of calling each of works, functions, in turn, n times after the warm-up: what
    slows the machine for a while slows all of them, so that the ratios of a row can be trusted."""
    wait = getattr(torch, torch.device(device).type).synchronize
    return np.array([[timeit.timeit(lambda: (work(), wait()), setup=wait, number=1) for work in works]
                     for _ in range(warmup + n)])[warmup:]


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` then peak.bytes (None where it cannot be had) and peak.kind.
    CUDA: the most the allocator held in the block. CPU (Linux): the most resident memory of the process in
    the block, or ever where its mark cannot be reset (see .kind). Do not nest: the inner resets the mark.
    """

    def __init__(self, device="cpu"):
        self.device, self.bytes, self.kind = torch.device(device), None, "unknown"

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.kind = "cuda allocated"
        elif self.device.type == "cpu":
            self.kind = "resident since the process began"
            with contextlib.suppress(OSError):
                write_text("/proc/self/clear_refs", "5")  # 5 resets the peak, proc(5)
                self.kind = "resident"
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
                self.bytes = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


# --- the verdict over seeds --------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Verdict:
    """What n seeds say of one sparsity; str(verdict) is the sentence to print. tests: dict comparison ->
    one-sided p; p: the largest; p_holm: p adjusted across sparsities. effects: dict arm -> (mean of ticket -
    arm, low, high) at level 1 - 2 alpha. winning: True, False, or None for no verdict, and why.
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
        failed = ", ".join(f"{test} (p={p:.3g})" for test, p in self.tests.items() if not p < self.alpha)
        return (f"{'winning' if self.winning else 'not shown to win'}: n={self.n} seeds, {self.metric}, "
                f"p={self.p:.3g}{'' if self.p_holm is None else f', Holm {self.p_holm:.3g}'}; {effects} "
                f"at {100 - 200 * self.alpha:.0f} %{failed and '; not shown: ' + failed}")


def verdict(table, margin=0.10, alpha=0.05, metric="fid_domain"):
    """Is the ticket winning? An intersection-union test over seeds, paired by seed; metric: lower is better.
    table: dict 'dense', 'ticket', 'reinit', 'random' -> dict seed -> value (or values in order of seeds), or
    ValueError. Winning = ticket < (1 + margin) dense, < reinit, < random, each by a one-sided paired t test
    at alpha; p is the largest of them. No verdict below 3 common seeds or with a value that is not finite.
    """
    names = "dense", "ticket", "reinit", "random"
    if missing := set(names) - set(table):
        raise ValueError(f"verdict needs the arms {sorted(missing)} too; the table has {sorted(table)}")
    arms = [dict(table[name] if hasattr(table[name], "items") else enumerate(table[name])) for name in names]
    seeds = sorted(set.intersection(*map(set, arms)))
    values = np.array([[arm[seed] for seed in seeds] for arm in arms], float)  # (4, n)
    broken = ", ".join(name for name, row in zip(names, values) if not np.isfinite(row).all())
    if len(seeds) < 3 or broken:  # to leave a diverged run out would flatter its arm
        return Verdict(len(seeds), metric, margin, alpha, {}, {}, why=broken and f": {broken} not finite")
    dense, ticket, reinit, random = values
    tests = {f"within {100 * margin:g} % of dense": t_test(ticket - (1 + margin) * dense, alpha)[0],
             "better than reinit": t_test(ticket - reinit, alpha)[0],
             "better than random": t_test(ticket - random, alpha)[0]}
    effects = {name: t_test(ticket - row, alpha)[1] for name, row in zip(names, values) if name != "ticket"}
    return Verdict(len(seeds), metric, margin, alpha, tests, effects, max(tests.values()))


def t_test(differences, alpha):
    """One-sided p that the mean of differences [n >= 2] is below 0, and (mean, low, high) at 1 - 2 alpha."""
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    p = float(stats.t.cdf(mean / error, n - 1)) if error else float(mean >= 0)  # no spread: the sign decides
    half = float(stats.t.ppf(1 - alpha, n - 1)) * error
    return p, (mean, mean - half, mean + half)


def over_seeds(values, alpha=0.05):
    """(mean, low, high) at 1 - 2 alpha of one value a seed; low and high are None below three: no verdict."""
    values = np.array(values, float)
    return t_test(values, alpha)[1] if len(values) > 2 else (float(values.mean()), None, None)


def deviation(values):
    """Standard deviation over seeds; None of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def slope(values):
    """(slope, its standard error) of a straight line through values in the order of the blocks, from place 0,
    the first, to 1, the last; what is NaN is left out."""
    place, values = np.linspace(0, 1, len(values)), np.array(values, float)
    known = np.isfinite(values)
    if known.sum() < 3:
        return math.nan, math.nan
    line = stats.linregress(place[known], values[known])
    return float(line.slope), float(line.stderr)


def verdicts(tables, **options):
    """dict sparsity -> table (see verdict) to dict sparsity -> Verdict, with Holm's p across sparsities. One
    without a verdict, for a diverged run say, stays in the family with p = 1: losing it must not help."""
    found = {sparsity: verdict(table, **options) for sparsity, table in tables.items()}
    adjusted = holm([1.0 if one.p is None else one.p for one in found.values()])
    return {sparsity: one if one.p is None else dataclasses.replace(one, p_holm=p)
            for (sparsity, one), p in zip(found.items(), adjusted)}


def holm(pvalues):
    """Holm's step-down adjustment of a list of p-values, in the same order, each to compare with alpha."""
    adjusted, running = [0.0] * len(pvalues), 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        adjusted[i] = running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[i]))
    return adjusted


def main(argv=None):
    """The command line; exit code 2, with one line, when something is wrong."""
    from ddpm import Parser, load_images, one_line, pick_device  # here alone: the yardsticks need none of it
    parser = Parser(description="checks of the yardsticks themselves")
    add, task = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    task("--check-inception", action="store_true", help="FID of CIFAR-10's test against its training images")
    task("--train-classifier", metavar="DATASET", help="train and save results/classifiers/DATASET.pt")
    add("--inception", metavar="PATH", help=f"where {INCEPTION_FILE} is, if not in the data folder")
    add("--data-dir", default=os.environ.get("LTH_DATA", "data"), help="default: $LTH_DATA or data")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    with one_line(parser):
        name, device = args.train_classifier, pick_device(args.device)[0]
        if name:
            path = os.path.join(HERE, "results", "classifiers", f"{name}.pt")
            model = train_classifier(*load_images(name, args.data_dir), device=device)
            save_classifier(model, path)
            test, labels = load_images(name, args.data_dir, "test")
            right = features(model, test, logits=True)[1].argmax(1) == labels
            print(f"{path}: {weights_hash(model)}, test accuracy {right.double().mean():.4f}")
        else:
            model = load_inception(args.inception, args.data_dir).to(device)
            train, test = (load_images("cifar10", args.data_dir, split)[0] for split in ("train", "test"))
            value = fid(features(model, test), reference_statistics(model, train, "cifar10"))
            print(f"CIFAR-10 FID, n={len(test):,} test against {len(train):,} training images: {value:.4f} "
                  "(about 3.15 is often quoted)")


if __name__ == "__main__":
    main()
