"""The domain classifier: a small CNN whose features know digits, where Inception knows dogs.

    model = load("mnist")       # results/classifiers/mnist.pt; a data set without a file is trained
"""
import os

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import runs


class Grid(nn.Flatten):
    """(N, C, H, W) -> (N, 16 C): flattened at 4 x 4, which 25 to 32 pixels end at; other sizes
    are averaged, or repeated, to that."""

    def forward(self, x):
        fits = x.shape[2:] == (4, 4)
        return super().forward(x if fits else F.adaptive_avg_pool2d(x, 4))


class DomainClassifier(nn.Module):
    """Small CNN, x uint8 [N, C, H, W] -> (features [N, 64], logits [N, K]): it knows digits, where
    Inception knows dogs."""

    def __init__(self, channels=1, classes=10, width=64):
        super().__init__()
        layers, sizes = [], ((channels, 24, 5, 2, 2), (24, 48, 3, 2, 1), (48, 64, 3, 2, 1))
        for inp, out, *how in sizes:  # (N, 24, 14, 14), (N, 48, 7, 7), (N, 64, 4, 4)
            layers += nn.Conv2d(inp, out, *how, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        layers += Grid(), nn.Linear(1024, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()
        self.body = nn.Sequential(*layers)  # normed at the end: no dead features
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        feats = self.body(x.float() / 127.5 - 1)  # (N, 64)
        return feats, self.head(feats)


# Photographs need more: test accuracy on CIFAR-10 (JPEG copy) is 0.66 without this, 0.76 with it.
PHOTOGRAPHS = dict(steps=4000, lr=4e-3, weight_decay=0.05, flip=True)


def train(images, labels, seed=0, steps=None, batch=128, lr=3e-3, weight_decay=0.01, flip=False,
          device="cpu"):
    """DomainClassifier trained on images uint8 [N, C, H, W], labels int64 [N]; eval mode, CPU.

    Without labels it learns to tell by which of four rotations an image was turned (Gidaris, Singh
    and Komodakis, Unsupervised Representation Learning by Predicting Image Rotations, 2018,
    1803.07728): that needs features of what is seen. steps: 1000, fewer for more than 32 x 32
    pixels, so that it stays at a minute. flip: half of the batches are mirrored.
    """
    generator, size = torch.Generator().manual_seed(seed), images.shape[-1]
    steps = steps or round(1000 * min(1, 32 * 32 / size ** 2))
    far = min(2, size // 14)  # pixels; in tiny images that would move what matters
    classes = 4 if labels is None else int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = DomainClassifier(images.shape[1], classes).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in tqdm(range(steps), "domain classifier", leave=False, delay=2, disable=None):
        pick = torch.randint(len(images), (batch,), generator=generator)
        shift = torch.randint(-far, far + 1, (2,), generator=generator).tolist()
        x, y = images[pick], None if labels is None else labels[pick]
        if y is None:
            y = torch.randint(4, (batch,), generator=generator)
            x = turn(x, y)
        x = torch.roll(x, shift, (2, 3)).to(device)  # all together
        if flip and torch.rand((), generator=generator) < 0.5:
            x = x.flip(3)
        loss = F.cross_entropy(model(x)[1], y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.cpu().half().float().eval()  # rounded as in its file, so that both are equal


def turn(images, quarters):
    """Images [N, C, S, S], each turned by its number of quarters [N] counter-clockwise."""
    turned = images.clone()
    for k in range(1, 4):
        turned[quarters == k] = torch.rot90(images[quarters == k], k, (2, 3))
    return turned


def accuracy(model, images, labels=None):
    """The share of images uint8 [N, C, S, S] put into their class; without labels, of their four
    rotations each that are told apart."""
    if labels is None:
        labels = torch.arange(4).repeat_interleave(len(images))
        images = turn(images.repeat(4, 1, 1, 1), labels)
    device = next(model.parameters()).device
    with torch.no_grad():
        right = [(model(x.to(device))[1].argmax(1).cpu() == y).sum().item()
                 for x, y in zip(images.split(256), labels.split(256))]
    return sum(right) / len(images)


def half_state(model):
    """A model's state with floats as float16: about 220 kB for a DomainClassifier."""
    state = model.state_dict()
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def options_of(dataset):
    """How the classifier of a data set is trained: options of train()."""
    return dict(PHOTOGRAPHS) if dataset.startswith("cifar") else {}


def load(dataset, images=None, labels=None, cache=None, **options):
    """DomainClassifier of a data set: results/classifiers/{dataset}.pt, else a cached one, else
    train(images, labels, **options), cached; labels None: see train. OSError naming a damaged
    file; ValueError without file and images. Scores compare where weights_hash(model) agrees."""
    def make(state):
        width, channels = state["head.weight"].shape[1], state["body.0.weight"].shape[1]
        return DomainClassifier(channels, len(state["head.bias"]), width)

    path = os.path.join(runs.HERE, "results", "classifiers", f"{dataset}.pt")
    if os.path.exists(path):
        return runs.load_weights(path, make, f"restore it with  git checkout -- {path}")
    options = options_of(dataset) | options
    if images is None:
        raise ValueError(f"no {path}: pass the training images and labels of {dataset}")
    how = "".join(f"-{k}{v}" for k, v in sorted(options.items()) if k != "device")
    how += "-rotations" if labels is None else f"-{runs.digest(labels.numpy().tobytes())}"
    state = runs.cached(f"classifier-{dataset}-{runs.images_hash(images)}{how}.pt",
                   lambda: half_state(train(images, labels, **options)), cache)
    model = make(state)
    model.load_state_dict(state)
    return model.eval()
