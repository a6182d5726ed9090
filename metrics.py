"""How good samples are and what a network costs: FID, precision and recall, KID, Inception score,
a domain classifier, multiply-accumulates.

    inception = load_inception("pt_inception-2015-12-05-6726825d.pth")    # needs support/
    distance = fid(features(inception, fake), features(inception, real))  # uint8 [N, C, H, W]

    python metrics.py mnist FOLDER     # training images against a folder or an .npz; needs support/
"""
import collections
import contextlib
import functools
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import lapack
from torch import nn
from tqdm import tqdm

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
INCEPTION_SHA = "6726825d"
progress = functools.partial(tqdm, leave=False, delay=2, mininterval=1, disable=None)


# --------------------------------------------------------------------------- FID
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two Gaussians, float64 (Heusel et al. 2017,
    1706.08500). mu [D], sigma [D, D]. ValueError for other shapes or numbers not finite."""
    moments = [torch.as_tensor(v).detach().cpu().double() for v in (mu1, sigma1, mu2, sigma2)]
    shapes, d = [tuple(v.shape) for v in moments], moments[0].numel()
    if shapes != [(d,), (d, d), (d,), (d, d)] or not all(v.isfinite().all() for v in moments):
        raise ValueError(f"frechet_distance needs finite mu [D], sigma [D, D] twice, not {shapes}")
    mu1, sigma1, mu2, sigma2 = moments
    # With S1 = L L^T, S1 S2 has the eigenvalues of the symmetric L^T S2 L; S1, S2 may swap.
    pairs = (low_rank_factor(sigma1), sigma2), (low_rank_factor(sigma2), sigma1)
    factor, sigma = min(pairs, key=lambda pair: pair[0].shape[1])
    roots = torch.linalg.eigvalsh(factor.T @ sigma @ factor).clamp(min=0).sqrt()
    means = (mu1 - mu2).square().sum()
    distance = means + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    return max(distance.item(), 0.0)  # rounding leaves -1e-12 where the truth is 0


def low_rank_factor(sigma):
    """L [D, rank] with L L^T = sigma, a covariance float64 [D, D], by Cholesky with pivots.
    It drops eigenvalues that are only rounding: 1e-16 instead of zero is 1e-8 in its root."""
    lower, order, rank, _ = lapack.dpstrf(sigma.numpy(), lower=1)
    factor = np.empty((len(sigma), rank))
    factor[order - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(factor)


def statistics(feats):
    """Mean [D] and covariance [D, D] of feats [N >= 2, D], over n - 1, float64."""
    feats = torch.as_tensor(feats)
    if feats.dim() != 2 or len(feats) < 2:
        raise ValueError(f"statistics need features [N >= 2, D], not {list(feats.shape)}")
    mu = feats.mean(0, dtype=torch.float64)  # (D,)
    sigma = mu.new_zeros(len(mu), len(mu))  # (D, D)
    for rows in feats.split(4096):  # slice by slice: 50,000 x 2048 doubles are 0.8 GB
        rows = rows.double() - mu
        sigma += rows.T @ rows
    return mu, sigma / (len(feats) - 1)


def fid(feats, reference):
    """frechet_distance of feats [N, D] from (mu, sigma) or from features [M, D]."""
    if not isinstance(reference, (tuple, list)):
        reference = statistics(reference)
    return frechet_distance(*statistics(feats), *reference)


# --------------------------------------------------------------------------- other distances
def inception_score(probs, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) of probs [N, K]: (mean, standard deviation) over splits
    (Salimans et al. 2016, 1606.03498)."""
    probs = torch.as_tensor(probs).detach().cpu().double()
    valid = (probs.dim() == 2 and 1 <= splits <= len(probs)  # so that NaN fails too
             and probs.min() >= 0 and (probs.sum(1) - 1).abs().max() < 1e-3)
    if not valid:
        raise ValueError(f"probs must be softmax, [N >= {splits}, K], not {list(probs.shape)}")
    scores = []
    for i in range(splits):
        p = probs[i * len(probs) // splits:(i + 1) * len(probs) // splits]  # (n, K)
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(feats_x, feats_y, subsets=100, subset_size=1000, seed=0):
    """Unbiased squared MMD of feats [N, D], [M, D], kernel (x.y / D + 1)^3 (Binkowski et al. 2018,
    1801.01401): (mean over random subsets, its standard error; where subsets overlap it reflects
    their drawing alone). ValueError when a set holds fewer than subset_size."""
    sets, n, values = same_width(feats_x, feats_y), subset_size, []
    sizes, generator = [len(x) for x in sets], torch.Generator().manual_seed(seed)
    if not 2 <= n <= min(sizes):
        raise ValueError(f"subset_size={n} must lie between 2 and {min(sizes)}, the features")
    for _ in range(subsets):
        picks = [torch.randperm(size, generator=generator)[:n] for size in sizes]
        a, b = (x[pick].double() for x, pick in zip(sets, picks))  # (n, D)
        aa, bb, ab = ((u @ v.T / a.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1))
        values.append((within - 2 * ab.mean()).item())
    error = np.std(values, ddof=1) / math.sqrt(subsets) if subsets > 1 else math.nan
    return float(np.mean(values)), float(error)


def precision_recall(real, fake, k=3, chunk=1024):
    """Improved precision and recall of features [N, D], [M, D] (Kynkaanniemi et al. 2019,
    1904.06991): the share of fake ones inside a ball around a real one, and the reverse. A ball
    reaches the k-th neighbour in its own set. ValueError for too few features."""
    real, fake = same_width(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k} neighbours need more features than {len(real)} and {len(fake)}")

    def covered(points, centres):  # the first of k + 1 distances is a centre's own, zero
        radii = torch.cat([squared_distances(part, centres).kthvalue(k + 1, dim=1).values
                           for part in centres.split(chunk)])  # (len(centres),)
        inside = [(squared_distances(part, centres) <= radii).any(1)
                  for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


def squared_distances(x, y):
    """|x_i - y_j|^2 as float64 [N, M]; float32 would lose the near neighbours that matter."""
    x, y = x.double(), y.double()
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return (squares - 2 * x @ y.T).clamp(min=0)


def same_width(x, y):
    """Both as finite CPU tensors [., D]; ValueError otherwise."""
    x, y = (torch.as_tensor(v).detach().cpu() for v in (x, y))
    fit = x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1]
    if not (fit and x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"features must be finite [N, D], [M, D], not {x.shape}, {y.shape}")
    return x, y


# --------------------------------------------------------------------------- Inception
class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with TensorFlow's eps, ReLU; stride 2 has no padding."""

    def __init__(self, channels, out, kernel, stride=1, padding="same"):
        super().__init__()
        padding = padding if stride == 1 else 0
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel chains of convolutions and one pool branch, concatenated over channels. chains:
    (name, (out, kernel[, stride]), ...); "fork": 1x3 and 3x1 side by side. pool: avg, max, down."""

    def __init__(self, channels, chains, pool, pool_out=0):
        super().__init__()
        self.pool, self.chains = pool, []
        for prefix, *steps in chains:
            width, names = channels, []
            for i, (out, kernel, *stride) in enumerate(steps, 1):
                name = f"branch{prefix}_{i}" if len(steps) > 1 else f"branch{prefix}"
                forks = {name + "a": (1, 3), name + "b": (3, 1)}
                kernels = forks if kernel == "fork" else {name: kernel}
                for name, size in kernels.items():
                    self.add_module(name, ConvNorm(width, out, size, *stride))
                width, names = out, [*names, list(kernels)]
            self.chains.append(names)
        if pool_out:
            self.branch_pool = ConvNorm(channels, pool_out, 1)

    def forward(self, x):
        """(N, channels, H, W) -> (N, sum of the ends, H', W')."""
        outs = []
        for chain in self.chains:
            ends = [x]
            for names in chain:
                ends = [getattr(self, name)(ends[0]) for name in names]
            outs += ends
        if self.pool == "down":
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        # TensorFlow leaves the padding out of the mean.
        pooled = (F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else
                  F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        return torch.cat([*outs, self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """Inception v3 as FID uses it: x uint8 [N, 3|1, H, W] -> (pool [N, 2048], logits [N, 1008]).

    torchvision's names, so that the FID checkpoint loads strictly, but 1008 outputs, average pools
    that leave padding out, and a max pool in Mixed_7c. Always in eval mode, without gradients.
    """

    def __init__(self):  # in the order in which forward goes through
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)  # (N, 32, 149, 149)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)  # (N, 64, 147, 147), then a max pool
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)  # (N, 80, 73, 73)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, 1, "valid")  # (N, 192, 71, 71), max pool
        long = "3x3dbl", (64, 1), (96, 3), (96, 3)
        for name, width, out in ("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64):
            chains = ("1x1", (64, 1)), ("5x5", (48, 1), (64, 5)), long
            self.add_module(f"Mixed_{name}", Mixed(width, chains, "avg", out))  # (N, 288, 35, 35)
        chains = ("3x3", (384, 3, 2)), ("3x3dbl", (64, 1), (96, 3), (96, 3, 2))
        self.Mixed_6a = Mixed(288, chains, "down")
        row, col = (1, 7), (7, 1)
        for name, c in ("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192):  # (N, 768, 17, 17)
            long = "7x7dbl", (c, 1), (c, col), (c, row), (c, col), (192, row)
            chains = ("1x1", (192, 1)), ("7x7", (c, 1), (c, row), (192, col)), long
            self.add_module(f"Mixed_{name}", Mixed(768, chains, "avg", 192))
        long = "7x7x3", (192, 1), (192, row), (192, col), (192, 3, 2)
        self.Mixed_7a = Mixed(768, [("3x3", (192, 1), (320, 3, 2)), long], "down")
        chains = [("1x1", (320, 1)), ("3x3", (384, 1), (384, "fork")),
                  ("3x3dbl", (448, 1), (384, 3), (384, "fork"))]
        self.Mixed_7b = Mixed(1280, chains, "avg", 192)
        self.Mixed_7c = Mixed(2048, chains, "max", 192)  # (N, 2048, 8, 8)
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # batch statistics would make a score depend on its batch

    def forward(self, x):
        """(pool, logits) of x uint8, resized as pytorch-fid does: others give other scores."""
        x = check_images(x).expand(-1, 3, -1, -1).float() / 255
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        with full_precision():
            for block in list(self.children())[:-1]:  # all but fc
                x = block(x)
                if block in (self.Conv2d_2b_3x3, self.Conv2d_4a_3x3):
                    x = F.max_pool2d(x, 3, 2)
            pool = x.mean((2, 3))  # (N, 2048)
            return pool, self.fc(pool)


@contextlib.contextmanager
def full_precision():
    """No gradients, and no TF32 in convolutions, where GPUs round to 10 bits."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def load_inception(path=None, root=None):
    """InceptionV3 with the FID checkpoint: at path, else in root ($LTH_DATA or data), else cached,
    else downloaded. OSError says how to get it by hand."""
    root, url = root or os.environ.get("LTH_DATA") or "data", INCEPTION_URL + INCEPTION_FILE
    from support import data, runs
    if path is None:
        folders = [root, *runs.cache_folders()]
        places = [os.path.join(folder, INCEPTION_FILE) for folder in folders]
        path = next(filter(os.path.exists, places), None) or data.download(
            [url], os.path.join(runs.writable(folders), INCEPTION_FILE), INCEPTION_SHA,
            algorithm="sha256")
    hint = f"get it with  curl -L --create-dirs -o {os.path.join(root, INCEPTION_FILE)} {url}"
    return runs.load_weights(path, lambda state: InceptionV3(), hint, INCEPTION_SHA)


def load_classifier(dataset, images=None, labels=None, **options):
    """The domain classifier of a data set, x uint8 [N, C, H, W] -> (features [N, 64], logits):
    from its file, else trained on images, labels and cached; see support/classifier.py."""
    from support import classifier
    return classifier.load(dataset, images, labels, **options)


# --------------------------------------------------------------------------- quality of samples
def features(model, images, batch=64, logits=False):
    """Features float32 [N, D], CPU, of images uint8 [N, C, H, W]; or the pair that it gives."""
    device, model, outs = next(model.parameters()).device, model.eval(), []
    with full_precision():
        for part in progress(check_images(images).split(batch), "features"):
            outs.append([out.float().cpu() for out in model(part.to(device))])
    pair = tuple(torch.cat(parts) for parts in zip(*outs))  # (N, D), (N, K)
    return pair if logits else pair[0]


def check_images(x):
    """x itself when it is uint8 [N, 1|3, H, W]; ValueError otherwise: floats are rejected."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 [N, 1|3, H, W], not {x.dtype} {list(x.shape)}")
    return x


def random_draw(images, n):
    """n of the images, at random but always the same: the two halves of MNIST's test file differ in
    writers, and the first 5,000 have five times the FID."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]]


# --------------------------------------------------------------------------- multiply-accumulates
def count_macs(model, x, t=None, masks=None):
    """{layer: (dense, live)} multiply-accumulates of model(x, t), or model(x), for the batch x.

    Conv2d and Linear, live by masks {"layer.weight": bool tensor}. A module with product_macs
    (attention) adds "layer.products", which no mask reduces. Biases and norms count nothing. Twice
    the sum is torch.utils.flop_counter's.
    """
    dense, live, masks = collections.Counter(), collections.Counter(), masks or {}
    training = model.training

    def add(name, layer, inputs, out):
        """Count one call of a layer: one that is called twice counts twice."""
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weights, mask = layer.weight.numel(), masks.get(f"{name}.weight")
            positions = out.numel() // len(layer.weight)  # each uses every weight once
            dense[name] += weights * positions
            live[name] += (weights if mask is None else int(mask.sum())) * positions
        if hasattr(layer, "product_macs"):
            for total in (dense, live):
                total[f"{name}.products".lstrip(".")] += int(layer.product_macs(inputs[0]))

    hooks = [layer.register_forward_hook(functools.partial(add, name))
             for name, layer in model.named_modules()]
    try:
        with torch.no_grad():
            model.eval()(*(x,) if t is None else (x, t))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: (dense[name], live[name]) for name in dense}


def main(argv=None):
    """How far one set of images is from another; see support/measure.py."""
    from support import measure
    measure.main(argv, sys.modules[__name__])


if __name__ == "__main__":
    main()
