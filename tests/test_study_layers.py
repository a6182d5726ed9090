"""studies/layers.py: its command line on a real run, its figures on cases where they are known."""
import collections
import csv

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from prune import dense_masks, density_by_block, live_counts, prune_magnitude
from studies import layers
from unet import UNet

BLOCKS = 5  # of the fixture's network: one down, two in the middle, two up


@pytest.fixture
def quick(monkeypatch):
    """The network of the fixture `compared`, and no pictures of the runs within the study."""
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(lth, "draw_everything", lambda *_: None)
    monkeypatch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))


def test_layers(compared, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layers, "SCOPES", ("layer", "global", "ramp"))
    run = str(compared / "runs" / "imp")
    layers.main(["--from", run, "--images", "8", "--runs", str(tmp_path), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "n=1, no verdict" in said and "nulls' slopes: ticket, new weights" in said
    with open(tmp_path / "layers_digits.csv") as file:
        rows = list(csv.DictReader(file))
    count = collections.Counter((row["quantity"], row["pair"]) for row in rows)
    for pair in ("dense, two orders", "ticket, two orders", "ticket, new weights", layers.NEVER):
        assert count["1 - R2", pair] == BLOCKS and count["CKA", pair] == BLOCKS * (pair != layers.NEVER)
    sizes = {name: mask.numel() for name, mask in dense_masks(UNet(base=16, mults=(1,), patch=4)).items()}
    value = {(row["quantity"], row["pair"]): float(row["value"]) for row in rows if not row["block"]}
    live = {scope: (1 - value["sparsity", scope]) * sum(sizes.values()) for scope in layers.SCOPES}
    # every scope has as many live weights, but for the rounding of single layers in `layer`
    assert live["global"] == pytest.approx(live["ramp"], abs=1)
    assert live["layer"] == pytest.approx(live["global"], abs=len(sizes))
    assert all(count["density", scope] == BLOCKS for scope in layers.SCOPES)
    uniform, ramp = ([float(row["value"]) for row in rows if (row["quantity"], row["pair"]) == (
        "density", scope)] for scope in ("layer", "ramp"))
    assert np.ptp(uniform) < 0.001  # uniform is uniform
    assert ramp == sorted(ramp, reverse=True) and ramp[0] - ramp[-1] > 0.02  # and a ramp a ramp
    for scope in ("layer", "ramp"):  # they grew from the run's own dense network
        own, shared = (lth.load_state(lth.Job(0, 0, "dense").path(out))["row"]
                       for out in (tmp_path / f"layers_digits_{scope}", run))
        assert own == shared
    for name in ("cka", "error", "density"):
        assert (tmp_path / f"layers_digits_{name}.png").stat().st_size > 5_000


def test_twin_again_is_the_twin_and_agrees_with_itself(compared, quick):
    """exp.fit with the run's own order is the twin to the bit: CKA 1, nothing missed by the regression."""
    exp, rows = lth.open_run(str(compared / "runs" / "imp"))
    twin, _ = layers.finished(exp, rows, 0, "dense")
    again = exp.fit("layers_test", 0, exp.theta(0))
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), again.parameters()))
    assert all(v == pytest.approx(1) for v in lth.block_similarity(twin, again).values())
    assert all(v == pytest.approx(0, abs=1e-4) for v in layers.reconstruction(exp, twin, again, 8).values())


def moments(z):
    return z.T @ z


def test_missed_by_hand():
    """B = 2 A + 3: nothing is missed. B = A + noise as large: half. B apart from A: all of it."""
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 20_000, 3, dtype=torch.float64, generator=generator)
    one = torch.ones(len(a), 1, dtype=torch.float64)
    for b, expected in ((2 * a + 3, 0), (a + noise, 0.5), (noise, 1), (a[:, [1, 2, 0]], 0)):
        z = torch.cat([a, one, b], 1)
        found = layers.missed(moments(z[:10_000]), moments(z[10_000:]), 4)
        assert found == pytest.approx(expected, abs=0.02)
        w = torch.linalg.lstsq(z[:10_000, :4], b[:10_000]).solution  # the same, without the moments
        left = (b[10_000:] - z[10_000:, :4] @ w).square().sum()
        direct = left / (b[10_000:] - b[10_000:].mean(0)).square().sum()
        assert found == pytest.approx(float(direct), abs=1e-5)


def test_began_larger_by_hand():
    size = torch.tensor([[-4.0, 3.0], [2.0, -1.0]])
    assert layers.began_larger(torch.tensor([[True, True], [False, False]]), size) == 1
    assert layers.began_larger(torch.tensor([[False, False], [True, True]]), size) == 0
    assert layers.began_larger(torch.tensor([[True, False], [False, True]]), size) == 0.5  # 4 wins, 1 loses
    nan = (layers.began_larger(torch.ones(2, 2, dtype=bool), size),
           layers.began_larger(torch.tensor([[True, False], [False, True]]), torch.zeros(2, 2)))
    assert np.isnan(nan).all()


def test_slope_and_intervals_by_hand():
    value, low, high = layers.line_of([1, 2, 3, 4])
    assert value == pytest.approx(3) and low == pytest.approx(3) == pytest.approx(high)
    value, low, high = layers.line_of([0, 1, float("nan"), 0, 1])  # x = 0, 1/4, 3/4, 1: Sxy 1/4, Sxx 5/8
    assert value == pytest.approx(0.4) and low < 0 < high
    assert layers.over_seeds([1.0, 2.0]) == (1.5, None, None, "")
    mean, low, high, _ = layers.over_seeds([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.3027, error 1 / sqrt(3)
    assert (mean, high - mean, mean - low) == pytest.approx((2, 2.4841, 2.4841), abs=1e-3)


def test_summary_pairs_scopes_by_seed():
    table = [[seed, "fid_domain", scope, "", 10.0 * seed + shift] for seed in range(3)
             for scope, shift in (("layer", 5.0), ("ramp", 3.0))]
    found = {row[1]: row for row in layers.summarise(table)}
    assert found["ramp - layer"][2:6] == [3, -2.0, -2.0, -2.0] and "ramp - global" not in found


def test_density_by_block_counts_every_weight():
    model = UNet(base=16, mults=(1,), patch=4)
    masks = prune_magnitude(model, dense_masks(model), 0.5, "layer")
    assert set(density_by_block(model, live_counts(dense_masks(model))).values()) == {1.0}
    density = density_by_block(model, live_counts(masks))
    assert list(density.values()) == pytest.approx([0.5] * BLOCKS, abs=1e-3)
    assert sum(live_counts(masks).values()) < sum(mask.numel() for mask in masks.values())
