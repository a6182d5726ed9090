"""studies/layers.py: its command line on a real run, its figures on cases where they are known."""
import collections
import contextlib
import csv
import io

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from methods import cka, oneshot
from prune import dense_masks, live_counts, pack_masks, prune_magnitude
from studies import common, layers
from support import runs
from unet import UNet

NETWORK = dict(base=16, mults=(1,), patch=4)
BLOCKS = 5  # of this network: one down, two in the middle, two up
FLAGS = "--rounds 1 --final-sparsity 0.5 --steps 16 --batch 8 --samples 8 --nfe 4".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with two finished runs, imp and oneshot, of a tiny network."""
    folder = tmp_path_factory.mktemp("layers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lth.PRESETS, "tiny", NETWORK)
        patch.setattr(layers, "IMAGES", 40)
        lth.main([*FLAGS, "--controls", "reinit", "--seeds", "0", "1", "--out", str(folder / "imp")])
        oneshot.main([*FLAGS, "--controls", "--out", str(folder / "oneshot")])
        yield folder


@pytest.fixture(scope="module")
def studied(finished):
    """The rows of the study's table by quantity and pair, its overlaps, and what it said."""
    said, out = io.StringIO(), str(finished)
    with contextlib.redirect_stdout(said):
        layers.main(["--from", f"{out}/imp", "--beside", f"{out}/oneshot", "--out", out])
    by_pair = collections.defaultdict(list)
    with open(finished / "layers_digits.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            by_pair[row["quantity"], row["pair"]].append(float(row["value"]))
    with open(finished / "layers_digits_overlap.csv", encoding="utf-8") as file:
        return by_pair, list(csv.DictReader(file)), said.getvalue()


def test_every_pair_block_and_picture_is_there(finished, studied):
    by_pair, overlaps, said = studied
    for pair in ("dense, two orders", "ticket, two orders", "ticket, new weights", "ticket, other seed"):
        assert len(by_pair["CKA", pair]) == len(by_pair["1 - R2", pair]) == 2 * BLOCKS
        assert pair in said
    assert len(by_pair["survival", "theta_0"]) == 2 * layers.TENTHS and len(overlaps) == 9
    assert "n=2, no verdict" in said
    for name in ("cka", "error", "survival", "density", "overlap"):
        assert (finished / f"layers_digits_{name}.png").stat().st_size > 5_000


def test_tickets_of_one_start_agree_more_than_strangers(studied):
    by_pair, overlaps, _ = studied
    for quantity, way in ("CKA", 1), ("1 - R2", -1):
        alike = np.mean(by_pair[quantity, "ticket, two orders"])
        assert way * alike > way * np.mean(by_pair[quantity, "ticket, other seed"])
    value = {(row["ticket"], row["other"]): float(row["times chance"]) for row in overlaps}
    imp, other, cut = list(dict.fromkeys(row["ticket"] for row in overlaps))
    assert value[imp, cut] == value[imp, imp] > 1.5  # one round of imp is one cut of the same dense run
    assert value[imp, other] == value[other, imp] == pytest.approx(1, abs=0.1)


def test_survivors_began_larger_but_not_by_another_seed(studied):
    rates = {start: np.reshape(values, (2, -1)).mean(0) for (quantity, start), values in studied[0].items()
             if quantity == "survival"}
    for start in ("theta_0", "theta_k"):
        assert rates[start][-1] > 1.1 > 0.9 > rates[start][0]
    assert rates["theta_0, other seed"] == pytest.approx([1] * 10, abs=0.1)
    assert all(np.mean(rate) == pytest.approx(1, abs=0.01) for rate in rates.values())


def test_the_dense_network_trained_again_agrees_with_itself(finished):
    """From step k with the run's own order it is itself to the bit: CKA 1, nothing unexplained."""
    exp, _ = common.open_run(str(finished / "imp"))
    dense = exp.load(lth.Job(0, 0, "dense")).ema
    again = common.fit(exp, "layers_test", 0, exp.new_model(0), None, common.checkpoint(exp, 0))
    assert all(torch.equal(p, q) for p, q in zip(dense.parameters(), again.parameters()))
    assert list(cka.block_similarity(dense, again).values()) == pytest.approx([1] * BLOCKS)
    missed = layers.reconstruction(exp, dense, again)
    assert list(missed.values()) == pytest.approx([0] * BLOCKS, abs=1e-6)


def test_unexplained_by_hand():
    """b = 2 a + 3: nothing. b = a + noise as large: half. b apart from a: all. b = a, reordered: nothing."""
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 20_000, 3, dtype=torch.float64, generator=generator)
    for b, expected in ((2 * a + 3, 0), (a + noise, 0.5), (noise, 1), (a[:, [1, 2, 0]], 0)):
        found = layers.unexplained(*(part[:10_000] for part in (a, b)), *(part[10_000:] for part in (a, b)))
        assert found == pytest.approx(expected, abs=0.02)
    dead = torch.cat([a, torch.zeros(len(a), 1, dtype=torch.float64)], 1)  # a channel that is always 0
    assert layers.unexplained(dead, a, dead, a) == pytest.approx(0, abs=1e-9)


def test_halves_do_not_share_noise(finished):
    exp, _ = common.open_run(str(finished / "imp"))
    x0, model = torch.zeros(4, 1, 28, 28), exp.new_model(0)
    first, again, other = (layers.activations(exp, model, x0, seed) for seed in (1, 1, 2))
    block = next(iter(first))
    assert torch.equal(first[block], again[block]) and not torch.allclose(first[block], other[block])
    assert first[block].shape == (4 * len(layers.TIMES) * 4, 16)  # 7x7 pixels, every fourth: 2x2


def test_survival_by_hand():
    model = UNet(base=8, mults=(1,))
    kept = prune_magnitude(model, dense_masks(model), 0.5, "layer")
    layer = "mid.0.conv1.weight"
    weights = dict(model.named_parameters())[layer]
    # Of every layer the largest half survives: the upper five tenths whole, at twice the layer's density.
    assert layers.survival(kept[layer], weights) == pytest.approx([0] * 5 + [2] * 5, abs=0.1)
    assert layers.survival(torch.ones(20, dtype=torch.bool), torch.arange(20.0)) == [1] * 10


def test_layers_that_start_at_zero_do_not_count(finished):
    """Masks of them alone change no rate."""
    exp, _ = common.open_run(str(finished / "imp"))
    masks = dense_masks(exp.new_model(0))
    assert not dict(exp.new_model(0).named_parameters())["conv_out.weight"].any()
    masks["conv_out.weight"] = torch.rand(masks["conv_out.weight"].shape) < 0.3
    assert all(row[-1] == 1 for row in layers.survivors(exp, 0, masks))


def test_slopes_by_hand():
    table = [[seed, "CKA", "ticket, two orders", block, seed - block * (1 + seed)]
             for seed in range(3) for block in range(4)]
    (quantity, pair, n, mean, value, low, high), = layers.slopes(table)
    assert (quantity, n, mean) == ("CKA", 3, pytest.approx(1 - 1.5 * 2))
    # Slopes -3, -6, -9: t(0.975, 2) = 4.3027, standard error sqrt(3).
    assert (value, high - value, value - low) == pytest.approx((-6, 7.4524, 7.4524), abs=1e-3)
    assert "slope not shown (-6.000). n=3." in layers.conclude([[quantity, pair, n, mean, value, low, high]])
    said = layers.conclude([[quantity, pair, 3, mean, -6.0, -7.0, -5.0]])
    assert said == "CKA of two tickets: falls with depth (-6.000). n=3."
    assert "slope not shown" in layers.conclude([[quantity, pair, 2, mean, -6.0, None, None]])


def test_density_by_block_counts_every_weight():
    model = UNet(**NETWORK)
    masks = prune_magnitude(model, dense_masks(model), 0.5, "layer")
    whole = common.density_by_block(model, live_counts(dense_masks(model)))
    assert set(whole.values()) == {1.0} and len(whole) == BLOCKS
    density = common.density_by_block(model, live_counts(masks))
    assert list(density.values()) == pytest.approx([0.5] * BLOCKS, abs=1e-3)


def test_overlap_by_hand():
    model = UNet(base=8, mults=(1,))
    masks, generator = dense_masks(model), torch.Generator().manual_seed(0)
    assert common.overlap(masks, masks) == (1.0, 1.0)
    half = {name: torch.rand(mask.shape, generator=generator) < 0.5 for name, mask in masks.items()}
    other = {name: ~mask for name, mask in half.items()}
    assert common.overlap(half, half)[0] == 1.0 and common.overlap(half, other)[0] == 0.0
    assert common.overlap(half, other)[1] == pytest.approx(1 / 3, abs=0.01)  # 1/4 of 3/4


@pytest.mark.parametrize("flags, said", [
    ("--seeds 7", "argument --seeds"), ("--beside nowhere", "argument --beside: nowhere has no ticket"),
    ("--from nowhere", "nowhere/config.json cannot be read"),
])
def test_a_mistake_ends_in_one_line(flags, said, finished, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        layers.main(["--from", str(finished / "imp"), *flags.split(), "--out", str(tmp_path)])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_tickets_of_another_network_are_refused(finished, tmp_path, capsys):
    model = UNet(**NETWORK | dict(base=8))
    runs.save_state(lth.Job(0, 1, "ticket").path(str(tmp_path)), config=model.config, row={}, losses=[],
                    model=model.state_dict(), ema=model.state_dict(), masks=pack_masks(dense_masks(model)))
    with pytest.raises(SystemExit) as stop:
        layers.main(["--from", str(finished / "imp"), "--beside", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "another network" in capsys.readouterr().err


def test_tickets_of_another_density_are_refused(finished, tmp_path, capsys):
    """Their overlap would be compared with one of as many weights."""
    path = lth.Job(0, 1, "ticket").path(str(finished / "imp"))
    state = runs.load_state(path)
    state.pop("format")
    model = UNet(**state["config"])
    state["masks"] = pack_masks(prune_magnitude(model, dense_masks(model), 0.9))
    runs.save_state(lth.Job(0, 1, "ticket").path(str(tmp_path)), **state)
    with pytest.raises(SystemExit) as stop:
        layers.main(["--from", str(finished / "imp"), "--beside", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "keeps 10.0% of the weights in round 1" in capsys.readouterr().err
