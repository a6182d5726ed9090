"""metrics.py: identities, closed forms and exact counts; the Inception network and its checkpoint.

No network, no data. Exact unless a tolerance is written beside the comparison.
"""
import hashlib
import io
import math
import os
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import metrics
from support import quality, runs
from support.classifier import DomainClassifier
from unet import UNet


def gaussian(n, d, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed):
    x = gaussian(3 * d, d, seed)
    return x.T @ x / len(x)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder, and no caches from anywhere else."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path


def pixels(n, channels=3, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


# --- Inception ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inception():
    """Random weights whose activations neither die nor explode over 94 layers."""
    generator = torch.Generator().manual_seed(0)
    model = metrics.InceptionV3()
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    return model


def test_inception_counts(inception):
    keys = inception.state_dict()
    assert len(keys) == 566
    assert sum(p.numel() for p in inception.parameters()) == 23_850_960
    norms = [m for m in inception.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 94 and all(m.eps == 1e-3 for m in norms)
    shapes = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192,),
              "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
              "Mixed_5d.branch_pool.bn.num_batches_tracked": (),
              "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
              "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
              "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
              "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
              "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in shapes.items():
        assert tuple(keys[name].shape) == shape, name


def test_inception_forward(inception):
    x = pixels(2)
    pool, logits = inception(x)
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008)
    assert pool.std() > 0.01  # the comparison below would be empty otherwise
    assert torch.allclose(inception(x[:1])[0], pool[:1], atol=1e-4, rtol=0)  # batch 1 and batch N
    grey = pixels(1, channels=1)
    assert torch.equal(inception(grey)[0], inception(grey.expand(-1, 3, -1, -1))[0])


def test_inception_stays_in_eval_mode(inception):
    assert not any(m.training for m in inception.train().modules())


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 8, 8), pixels(1, channels=2), pixels(1)[0]])
def test_only_uint8_images(inception, bad):
    with pytest.raises(ValueError, match="uint8"):
        inception(bad)


def test_pools():
    """A block whose convolutions copy channel 0 shows its pool branch bare."""
    x = torch.ones(1, 1, 4, 4)
    for pool, corner in (("avg", 1.0), ("max", 1.0)):
        block = metrics.Mixed(1, [], pool, 1).eval()
        block.branch_pool.conv.weight.data.fill_(math.sqrt(1 + 1e-3))  # undoes the norm's eps
        assert block(x)[0, 0, 0, 0].item() == pytest.approx(corner, abs=1e-6)  # with padding counted: 4/9
        bump = torch.zeros(1, 1, 4, 4)
        bump[..., 0, 0] = 9.0
        assert block(bump)[0, 0, 1, 1].item() == pytest.approx(1.0 if pool == "avg" else 9.0, abs=1e-5)


def test_pool_kinds(inception):
    kinds = {name: m.pool for name, m in inception.named_modules() if isinstance(m, metrics.Mixed)}
    assert len(kinds) == 11 and [n for n, pool in kinds.items() if pool == "down"] == ["Mixed_6a", "Mixed_7a"]
    assert [n for n, pool in kinds.items() if pool == "max"] == ["Mixed_7c"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def checkpoint_in(folder, data):
    path = os.path.join(folder, metrics.INCEPTION_FILE)
    with open(path, "wb") as file:
        file.write(data)
    return path


def test_load_inception(elsewhere, monkeypatch, inception):
    """By its path, in the data folder, in a cache; never another file in its place."""
    buffer, folder = io.BytesIO(), elsewhere / "data"
    torch.save(inception.state_dict(), buffer, _use_new_zipfile_serialization=False)  # as the real file is
    data = buffer.getvalue()
    folder.mkdir()
    path = checkpoint_in(folder, data)
    with pytest.raises(OSError, match=f"{metrics.INCEPTION_FILE}.*6726825d.*curl"):  # not the real weights
        metrics.load_inception(path)
    monkeypatch.setattr(metrics, "INCEPTION_SHA", hashlib.sha256(data).hexdigest()[:8])
    for options in (dict(path=path), dict(root=str(folder))):
        assert runs.weights_hash(metrics.load_inception(**options)) == runs.weights_hash(inception)
    cache = elsewhere / "home" / "lth_diffusion"
    cache.mkdir(parents=True)
    os.rename(path, cache / metrics.INCEPTION_FILE)
    assert runs.weights_hash(metrics.load_inception(root=str(folder))) == runs.weights_hash(inception)
    checkpoint_in(folder, data[:len(data) // 2])
    for sha, said in ((metrics.INCEPTION_SHA, "cut short"), ("", metrics.INCEPTION_FILE)):
        monkeypatch.setattr(metrics, "INCEPTION_SHA", sha)
        with pytest.raises(OSError, match=said):
            metrics.load_inception(path)


def test_load_inception_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "INCEPTION_SHA", "")
    trace = str(tmp_path / "ran")
    plain = pickle.dumps({"fc.bias": Bomb(trace)}, protocol=2)
    pickle.loads(plain)["fc.bias"].close()
    os.remove(trace)  # so the code in it does run where it is let to
    zipped = io.BytesIO()
    torch.save({"fc.bias": Bomb(trace)}, zipped)
    for data in (plain, zipped.getvalue()):
        path = checkpoint_in(tmp_path, data)
        with pytest.raises(OSError, match="more than plain weights"):
            metrics.load_inception(path)
        assert not os.path.exists(trace)
    for state in ({}, [1, 2], {"fc.bias": torch.zeros(1008), "extra": torch.zeros(1)}):
        torch.save(state, path)
        with pytest.raises(OSError, match="does not fit") as caught:
            metrics.load_inception(path)
        assert "\n" not in str(caught.value)


def test_load_inception_without_file_or_network(elsewhere, monkeypatch):
    monkeypatch.setattr(metrics, "INCEPTION_URL", "http://127.0.0.1:9/")
    before = sorted(elsewhere.rglob("*"))
    for arguments in ({"path": str(elsewhere / "x.pth")}, {"root": str(elsewhere / "data")}):
        with pytest.raises(OSError, match="curl") as caught:
            metrics.load_inception(**arguments)
        assert str(elsewhere) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(elsewhere.rglob("*.p*t*")) and set(before) <= set(elsewhere.rglob("*"))  # no half file


# --- statistics and Frechet --------------------------------------------------------------------------------

def test_statistics_are_over_features():
    x = gaussian(50, 7)
    mu, sigma = metrics.statistics(x.float())
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(sigma, np.cov(x.float().double().numpy(), rowvar=False), rtol=1e-10)
    with pytest.raises(ValueError):
        metrics.statistics(x[:1])


def test_frechet_closed_forms():
    d = 12
    sigma, mu1, mu2 = covariance(d, 1), gaussian(1, d, 2)[0], gaussian(1, d, 3)[0]
    apart = float((mu1 - mu2).square().sum())
    assert metrics.frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(apart, rel=1e-8)
    basis, a, b = torch.linalg.qr(gaussian(d, d, 4))[0], torch.rand(d).double() + 0.1, torch.rand(d).double()
    commuting = [basis @ torch.diag(v) @ basis.T for v in (a, b)]
    expected = float((a.sqrt() - b.sqrt()).square().sum()) + apart
    assert metrics.frechet_distance(mu1, commuting[0], mu2, commuting[1]) == pytest.approx(expected, rel=1e-8)
    line = metrics.frechet_distance(np.zeros(1), np.array([[4.0]]), np.array([3.0]), np.array([[25.0]]))
    assert line == pytest.approx(3 ** 2 + (2 - 5) ** 2, rel=1e-8)


def test_frechet_against_sqrtm_and_nuclear_norm():
    x, y = gaussian(40, 10, 5), gaussian(30, 10, 6, 1.5) + 0.3
    (mu1, s1), (mu2, s2) = metrics.statistics(x), metrics.statistics(y)
    value = metrics.frechet_distance(mu1.numpy(), s1.numpy(), mu2.numpy(), s2.numpy())
    by_sqrtm = (mu1 - mu2).square().sum() + (s1 + s2).trace() - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    centred = [(v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y)]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    by_norm = (mu1 - mu2).square().sum() + (s1 + s2).trace() - 2 * nuclear
    assert value == pytest.approx(float(by_sqrtm), rel=1e-8) == pytest.approx(float(by_norm), rel=1e-8)
    assert metrics.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(value, rel=1e-8)
    assert metrics.fid(x, y) == metrics.fid(x, (mu2, s2)) == value


def test_frechet_with_fewer_images_than_features():
    x, y = gaussian(60, 400, 7, 3.0), gaussian(90, 400, 8)
    assert metrics.fid(x, x) < 1e-4
    centred = [(v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y)]
    (mu1, s1), (mu2, s2) = metrics.statistics(x), metrics.statistics(y)
    expected = (mu1 - mu2).square().sum() + (s1 + s2).trace() \
        - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    assert metrics.fid(x, y) == pytest.approx(float(expected), rel=1e-8)
    dead = gaussian(500, 20, 9)
    dead[:, 3] = 0  # a feature that never fires
    assert metrics.fid(dead, dead) < 1e-8


def test_frechet_refuses():
    mu, sigma = torch.zeros(3), torch.eye(3)
    for bad in ((mu, sigma, torch.zeros(4), torch.eye(4)), (mu, sigma, mu, torch.zeros(3)),
                (mu, sigma * math.nan, mu, sigma), (mu + math.inf, sigma, mu, sigma)):
        with pytest.raises(ValueError):
            metrics.frechet_distance(*bad)


# --- IS, KID, precision and recall -------------------------------------------------------------------------

def test_inception_score():
    sure = torch.eye(10).repeat(20, 1)  # certain and diverse: as many as classes
    assert metrics.inception_score(sure) == pytest.approx((10.0, 0.0), abs=1e-9)
    assert metrics.inception_score(torch.full((50, 4), 0.25), splits=5) == pytest.approx((1.0, 0.0), abs=1e-9)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    m = [0.55, 0.45]
    divergence = np.mean([sum(q * math.log(q / r) for q, r in zip(row, m)) for row in p.tolist()])
    assert metrics.inception_score(p, splits=1)[0] == pytest.approx(math.exp(divergence), rel=1e-6)
    for bad in (torch.randn(20, 5), torch.full((20, 5), math.nan), sure[:5]):
        with pytest.raises(ValueError):
            metrics.inception_score(bad)


def test_kid():
    x, y = gaussian(6, 3, 1), gaussian(6, 3, 2) + 1
    k = lambda u, v: float((u @ v / 3 + 1) ** 3)  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6)]
    within = sum(k(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / 30
    expected = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 36
    assert metrics.kid(x, y, subsets=1, subset_size=6)[0] == pytest.approx(expected, rel=1e-10)
    same, error = metrics.kid(gaussian(2000, 8, 3), gaussian(2000, 8, 4), subsets=20, subset_size=200)
    far, _ = metrics.kid(gaussian(2000, 8, 3), gaussian(2000, 8, 4) + 1, subsets=20, subset_size=200)
    assert abs(same) < 0.03 and 0 < error < 0.03 and far > 1  # unbiased: about zero for one distribution
    with pytest.raises(ValueError, match="subset_size"):
        metrics.kid(x, y)


def test_precision_recall():
    x = gaussian(300, 4, 1)
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    assert metrics.precision_recall(x, x + 100) == (0.0, 0.0)
    left, right = gaussian(150, 4, 2), gaussian(150, 4, 3) + 50
    both = torch.cat([left, right])
    assert metrics.precision_recall(both, left, chunk=64) == (1.0, 0.5)  # one of two modes
    assert metrics.precision_recall(left, both) == (0.5, 1.0)
    line, points = torch.arange(4.0)[:, None], torch.tensor([[-0.5], [4.5], [1.2]])  # balls of radius 1
    assert metrics.precision_recall(line, points, k=1)[0] == pytest.approx(2 / 3)


# --- quality of samples -------------------------------------------------------------------------------------

def test_quality_columns_by_extractor():
    """All of Inception's, the first four of the classifier's; the reference is FID's alone."""
    images, generator = pixels(40), torch.Generator().manual_seed(3)
    fake, real = (torch.randn(n, 6, generator=generator) for n in (40, 50))
    scores, inception = torch.randn(40, 1008, generator=generator), metrics.InceptionV3()
    how, reference = (lambda model, x, logits: (fake, scores)), metrics.statistics(2 * real)
    expected = dict(fid=metrics.fid(fake, reference))
    expected["precision"], expected["recall"] = metrics.precision_recall(real, fake)
    assert quality.columns(metrics, DomainClassifier(), images, real, reference, None, how) == expected
    found, shares = scores.argmax(1), torch.full((1008,), 1 / 1008)
    gaps = [abs(int((found == k).sum()) / 40 - 1 / 1008) for k in range(1008)]
    classes = quality.columns(metrics, DomainClassifier(), images, real, reference, shares, how)
    assert classes == expected | dict(classes=pytest.approx(sum(gaps) / 2, abs=1e-6))
    expected["kid"], expected["kid_error"] = metrics.kid(fake, real, subset_size=20)
    expected["inception_score"] = metrics.inception_score((scores - inception.fc.bias).softmax(1))[0]
    assert quality.columns(metrics, inception, images, real, reference, None, how) == expected


class Means(nn.Module):
    """An extractor of one's own: mean and deviation of each channel, and the first four pixels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.scale * x.float()
        feats = torch.cat([x.mean((2, 3)), x.std((2, 3)), x[:, 0, 0, :4]], 1)
        return feats, feats[:, :2]


def test_features_of_any_network():
    """Whatever the batch, in eval mode, without gradients, on the CPU."""
    model, x = Means().train(), pixels(11)
    feats, logits = metrics.features(model, x, batch=4, logits=True)
    assert torch.equal(feats, metrics.features(model, x, batch=64)) and feats.shape == (11, 10)
    assert torch.equal(logits, feats[:, :2]) and not feats.requires_grad and not model.training
    torch.testing.assert_close(feats[:, :3], x.float().mean((2, 3)))
    with pytest.raises(ValueError, match="uint8"):
        metrics.features(model, x.float())


def test_reference_statistics_are_computed_once(elsewhere, monkeypatch):
    model, images = Means(), pixels(50)
    mu, sigma = quality.reference_statistics(metrics, model, images, "made-up")
    wanted = metrics.statistics(metrics.features(model, images))
    assert torch.equal(mu, wanted[0]) and torch.equal(sigma, wanted[1])
    other = quality.reference_statistics(metrics, model, pixels(50, seed=1), "made-up")
    assert not torch.equal(other[0], mu)  # other images, the same name
    nn.init.constant_(model.scale, 2)
    assert torch.allclose(quality.reference_statistics(metrics, model, images, "made-up")[0], 2 * mu)
    nn.init.constant_(model.scale, 1)
    monkeypatch.setattr(metrics, "features", None)  # a second computation would fail
    again = quality.reference_statistics(metrics, model, images, "made-up")
    assert torch.equal(again[0], mu) and torch.equal(again[1], sigma)


@pytest.mark.parametrize("n, draws", [(60, 1), (20, 4), (10, 5)])
def test_real_reference_is_a_mean_over_disjoint_draws(n, draws):
    """Real images in the place of samples: FID against all training images, the rest against n of them."""
    model, train, test = Means(), pixels(300), pixels(80, seed=1)
    reference = metrics.statistics(metrics.features(model, train))
    value = quality.real_reference(metrics, model, reference, train, test, n)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    some = metrics.features(model, metrics.random_draw(train, n))
    found = []
    for i in range(draws):
        feats = metrics.features(model, test[order[i * n:(i + 1) * n]])
        found.append([metrics.fid(feats, reference), *metrics.precision_recall(some, feats)])
    assert list(value) == ["fid", "precision", "recall"]
    assert list(value.values()) == pytest.approx(np.mean(found, axis=0).tolist(), rel=1e-9)


@pytest.mark.parametrize("n", [81, 1, 0])
def test_real_reference_refuses_what_the_test_images_cannot_give(n):
    model, train, test = Means(), pixels(100), pixels(80, seed=1)
    with pytest.raises(ValueError, match=f"n={n}"):
        quality.real_reference(metrics, model, metrics.statistics(metrics.features(model, train)), train, test, n)


def test_random_draw_is_always_the_same_and_no_prefix():
    images = torch.arange(1000)
    assert torch.equal(metrics.random_draw(images, 100), metrics.random_draw(images, 200)[:100])
    assert len(set(metrics.random_draw(images, 1000).tolist())) == 1000
    assert 400 < float(metrics.random_draw(images, 100).float().mean()) < 600  # 3.5 standard errors


# --- costs -------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)

    def product_macs(self, x):
        return 2 * x.shape[0] * x.shape[1] ** 2 * x.shape[2]

    def forward(self, x):  # (B, T, D)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.time, self.attention, self.dropout = nn.Linear(1, 8), Attention(8), nn.Dropout(0.5)

    def forward(self, x, t):
        h = self.down(x) + self.time(t[:, None].float())[:, :, None, None]
        h = self.grouped(self.grouped(h))  # one layer twice
        return self.dropout(self.attention(h.flatten(2).transpose(1, 2)))


def test_count_macs():
    model, x, t = Small(), torch.randn(3, 2, 10, 10), torch.zeros(3, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    masks = {"down.weight": torch.zeros(8, 2, 3, 3, dtype=torch.bool), "time.weight": torch.ones(8, 1).bool()}
    masks["down.weight"][0, 0, 0, :2] = True
    macs = metrics.count_macs(model, x, t, masks)
    assert 2 * sum(dense for dense, _ in macs.values()) == counter.get_total_flops()
    assert macs["down"] == (3 * 25 * 144, 3 * 25 * 2) and macs["time"] == (24, 24)
    assert macs["grouped"] == (2 * 3 * 25 * 144,) * 2
    assert macs["attention.products"] == (2 * 3 * 25 ** 2 * 8,) * 2
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert sum(d for d, _ in metrics.count_macs(DomainClassifier(), pixels(1, 1, 28)).values()) > 0


def test_masks_reduce_the_macs_of_a_unet_but_not_its_products():
    model = UNet(base=8, mults=(1, 2), image_size=8, attention=(4,))
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    half = {name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in model.named_parameters()}
    macs = metrics.count_macs(model, x, t, half)
    for name, (dense, live) in macs.items():
        assert live == (dense if name.endswith("products") else dense // 2), name
    whole = metrics.count_macs(model, x, t)
    assert whole == {name: (dense, dense) for name, (dense, _) in macs.items()}
