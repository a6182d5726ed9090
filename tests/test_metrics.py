"""
pytest tests/test_metrics.py      # about 15 seconds on two cores, no network, no data

Identities, closed forms and exact counts of metrics.py.
"""
import io
import math
import mmap
import os
import pickle

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import metrics


def gaussian(n, d, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed):
    x = gaussian(3 * d, d, seed)
    return x.T @ x / len(x)


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


def test_load_inception(tmp_path, monkeypatch, inception):
    buffer = io.BytesIO()
    torch.save(inception.state_dict(), buffer, _use_new_zipfile_serialization=False)  # as the real file is
    data = buffer.getvalue()
    path = checkpoint_in(tmp_path, data)
    with pytest.raises(OSError, match=f"{metrics.INCEPTION_FILE}.*6726825d.*curl"):  # not the real weights
        metrics.load_inception(path)
    monkeypatch.setattr(metrics, "INCEPTION_SHA", metrics.hashlib.sha256(data).hexdigest()[:8])
    for found in (metrics.load_inception(path), metrics.load_inception(root=tmp_path),
                  metrics.load_inception(root=tmp_path / "none", cache=tmp_path)):
        assert metrics.weights_hash(found) == metrics.weights_hash(inception)
    checkpoint_in(tmp_path, data[:len(data) // 2])
    with pytest.raises(OSError, match="cut short"):
        metrics.load_inception(path)
    monkeypatch.setattr(metrics, "INCEPTION_SHA", "")
    with pytest.raises(OSError, match=metrics.INCEPTION_FILE):
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


def test_load_inception_without_file_or_network(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "INCEPTION_URL", "http://127.0.0.1:9/" + metrics.INCEPTION_FILE)
    here = str(tmp_path)
    for arguments in ({"path": here + "/x.pth"}, {"root": here, "cache": here + "/c"}):
        with pytest.raises(OSError, match="curl") as caught:
            metrics.load_inception(**arguments)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []  # no half file is left


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


# --- the domain classifier ---------------------------------------------------------------------------------

def bars(n, seed=0):
    """Two classes: a bright bar standing or lying."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 40, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 2
    images[labels == 0, :, :, 12:16] = 220
    images[labels == 1, :, 12:16, :] = 220
    return images, labels


def test_train_and_load_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "HERE", str(tmp_path))
    images, labels = bars(400)
    before = torch.random.get_rng_state()
    model = metrics.train_classifier(images, labels, steps=25, batch=32)
    assert torch.equal(before, torch.random.get_rng_state())
    test, truth = bars(100, seed=1)
    assert (metrics.features(model, test, logits=True)[1].argmax(1) == truth).double().mean() > 0.95
    pair = metrics.features(model, images, batch=7, logits=True)
    assert pair[0].shape == (400, 64) and pair[1].shape == (400, 2) and not model.training
    assert torch.allclose(pair[0], metrics.features(model, images, batch=400), atol=1e-4)
    with pytest.raises(ValueError, match="images and labels"):
        metrics.load_classifier("bars", cache=tmp_path)
    made, found = (metrics.load_classifier("bars", images, labels, cache=tmp_path, steps=25, batch=32)
                   for _ in range(2))
    assert metrics.weights_hash(made) == metrics.weights_hash(found) == metrics.weights_hash(model)
    path = tmp_path / "results" / "classifiers" / "bars.pt"
    metrics.save_classifier(model, str(path))
    assert metrics.weights_hash(metrics.load_classifier("bars")) == metrics.weights_hash(model)
    for damage in (path.read_bytes()[:5000], pickle.dumps(Bomb(str(tmp_path / "ran")), 2)):
        path.write_bytes(damage)
        with pytest.raises(OSError, match="bars.pt"):
            metrics.load_classifier("bars")
    assert not (tmp_path / "ran").exists()


def test_committed_classifiers():
    folder = os.path.join(metrics.HERE, "results", "classifiers")
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        assert os.path.getsize(path) < 400_000
        model = metrics.load_classifier(os.path.splitext(name)[0])
        channels = model.body[0].in_channels
        assert model(pixels(2, channels, 28 if channels == 1 else 32))[0].shape == (2, 64)


def test_quality_columns_by_extractor(monkeypatch):
    """All of Inception's, the first three of the classifier's; the reference is FID's alone."""
    images, generator = pixels(40), torch.Generator().manual_seed(3)
    fake, real = (torch.randn(n, 6, generator=generator) for n in (40, 50))
    scores, inception = torch.randn(40, 1008, generator=generator), metrics.InceptionV3()
    monkeypatch.setattr(metrics, "features", lambda model, x, logits=False, **_: (fake, scores))
    reference = metrics.statistics(2 * real)
    expected = dict(fid=metrics.fid(fake, reference))
    expected["precision"], expected["recall"] = metrics.precision_recall(real, fake)
    assert metrics.quality(metrics.DomainClassifier(), images, real, reference) == expected
    expected["kid"], expected["kid_error"] = metrics.kid(fake, real, subset_size=20)
    expected["inception_score"] = metrics.inception_score((scores - inception.fc.bias).softmax(1))[0]
    assert metrics.quality(inception, images, real, reference) == expected


def test_floor_is_computed_once(tmp_path, monkeypatch):
    model = metrics.DomainClassifier().eval()
    train, test = bars(300)[0], bars(80, seed=1)[0]
    value = metrics.floor(model, train, test, 60, "bars", cache=str(tmp_path))
    drawn, some = (x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:60]]
                   for x in (test, train))
    drawn, some, whole = (metrics.features(model, x) for x in (drawn, some, train))
    precision, recall = metrics.precision_recall(some, drawn)
    expected = dict(fid=metrics.fid(drawn, whole), precision=precision, recall=recall)
    assert value == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "features", None)  # a second computation would fail
    assert metrics.floor(model, train, test, 60, "bars", cache=str(tmp_path)) == value
    with pytest.raises(ValueError, match="80"):
        metrics.floor(model, train, test, 81, "bars", cache=str(tmp_path))
    (tmp_path / "floors.json").write_text("{")
    with pytest.raises(OSError, match="floors.json"):
        metrics.floor(model, train, test, 60, "bars", cache=str(tmp_path))


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
    assert sum(d for d, _ in metrics.count_macs(metrics.DomainClassifier(), pixels(1, 1, 28)).values()) > 0


def test_seconds_and_memory():
    calls = []
    seconds = metrics.seconds_in_turns([lambda: calls.append(0), lambda: calls.append(1)], n=3, warmup=2)
    assert calls == [0, 1] * 5 and seconds.shape == (3, 2) and (seconds >= 0).all()
    with metrics.PeakMemory() as low:
        pass
    with metrics.PeakMemory() as high:
        with mmap.mmap(-1, 120_000_000) as block:  # not malloc, which may reuse what it kept resident
            block.write(bytes(1) * 120_000_000)
    assert low.bytes is None or high.bytes > 50e6
    if high.kind == "resident":  # where the mark can be reset
        assert high.bytes - low.bytes > 100e6


# --- CKA and the verdict -----------------------------------------------------------------------------------

def test_cka():
    a, b = (gaussian(64, 72, seed).reshape(64, 8, 3, 3) for seed in (0, 1))
    assert metrics.cka(a, a) == pytest.approx(1, abs=1e-9)
    assert metrics.cka(a, 3 * a + 2) == pytest.approx(1, abs=1e-6)  # scale and shift do not count
    assert abs(metrics.cka(a, b)) < 0.1
    assert abs(metrics.cka(a, a[torch.randperm(64)])) < 0.15  # rows are matched by index
    assert 0.3 < metrics.cka(a, a + 0.5 * b) < 1
    assert math.isnan(metrics.cka(a, torch.zeros_like(a)))
    with pytest.raises(ValueError):
        metrics.cka(a, b[:10])


def test_unbiased_hsic_is_the_published_sum():
    n = 9
    k, l = (v @ v.T for v in (gaussian(n, 3, 0), gaussian(n, 3, 1)))
    kt, lt = k - torch.diag(k.diag()), l - torch.diag(l.diag())
    expected = ((kt * lt).sum() + kt.sum() * lt.sum() / ((n - 1) * (n - 2))
                - 2 / (n - 2) * (kt.sum(0) @ lt.sum(0))) / (n * (n - 3))
    found = (metrics.u_centred(k) * metrics.u_centred(l)).sum() / (n * (n - 3))
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def table(ticket, reinit=(14, 15, 16.5), random=(20, 21, 19)):
    return {"dense": dict(enumerate((10, 11, 12))), "ticket": dict(enumerate(ticket)),
            "reinit": dict(enumerate(reinit)), "random": dict(enumerate(random))}


def test_verdict():
    good = metrics.verdict(table((10.1, 11.0, 12.1)))
    assert good.winning and good.n == 3 and good.p == max(good.tests.values()) < 0.05
    assert str(good).startswith("winning: n=3")
    low, high = good.effects["reinit"][1:]
    assert low < good.effects["reinit"][0] < high < 0
    # each of the three conditions can fail alone
    for bad, word in ((table((13, 14, 15.2)), "dense"),
                      (table((10.1, 11, 12.1), reinit=(10, 11.2, 12)), "reinit"),
                      (table((10.1, 11, 12.1), random=(10, 11.2, 12)), "random")):
        found = metrics.verdict(bad)
        assert found.winning is False and [t for t, p in found.tests.items() if p >= 0.05][0].endswith(word)
        assert "not shown to win" in str(found) and word in str(found)
    d, t = np.array([10, 11, 12]), np.array([10.1, 11.0, 12.1])
    assert good.tests["within 10 % of dense"] == pytest.approx(
        scipy.stats.ttest_rel(t, 1.1 * d, alternative="less").pvalue)


def test_verdict_is_paired_by_seed():
    values = table((10.1, 11.0, 12.1))
    shuffled = {arm: dict(reversed(list(seeds.items()))) for arm, seeds in values.items()}
    assert metrics.verdict(shuffled).p == metrics.verdict(values).p
    values["dense"][7] = 1.0  # a seed the others lack
    assert metrics.verdict(values).n == 3


def test_no_verdict():
    two = {arm: {0: v[0], 1: v[1]} for arm, v in table((10, 11, 12)).items()}
    assert str(metrics.verdict(two)) == "n=2, no verdict" and metrics.verdict(two).winning is None
    diverged = metrics.verdict(table((10, 11, math.nan)))
    assert diverged.winning is None and "ticket" in str(diverged)
    with pytest.raises(ValueError, match="random"):
        metrics.verdict({arm: v for arm, v in two.items() if arm != "random"})
    equal = metrics.verdict(dict(dense=[2.0] * 3, ticket=[1.0] * 3, reinit=[3.0] * 3, random=[1.0] * 3))
    assert equal.p == 1.0  # no spread and no difference: not better than random


def test_holm():
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.5, 0.9]) == [1.0, 1.0] and metrics.holm([]) == []
    tables = {0.5: table((10.1, 11.0, 12.1)), 0.9: table((13, 14, 15.2)), 0.8: {a: v for a, v in zip(
        ("dense", "ticket", "reinit", "random"), [[1.0]] * 4)}}
    found = metrics.verdicts(tables)
    assert found[0.5].p_holm == pytest.approx(3 * found[0.5].p)  # what has no verdict counts in the family
    assert found[0.8].p_holm is None and found[0.8].winning is None


def test_command_line(capsys):
    with pytest.raises(SystemExit):
        metrics.main([])
    for flags, said in (["--train-classifier", "no-such-data"], "unknown data set"), (
            ["--check-inception", "--inception", "/nowhere/x.pth"], "curl"):
        with pytest.raises(SystemExit) as stop:
            metrics.main(flags)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and said in lines[-1]
