"""studies.timesteps: the switch, the work it counts, and that its ends are the single networks."""
import csv
import functools
import types

import pytest
import torch

import lth_diffusion as lth
from ddpm import Diffusion, denoiser, sample
from prune import dense_masks, prune_magnitude
from studies import timesteps
from support import report
from unet import UNet

FLAGS = "--rounds 2 --steps 8 --batch 8 --samples 8 --nfe 4 --prune-rate 0.5 --controls".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of a tiny network."""
    folder = tmp_path_factory.mktemp("timesteps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        patch.setattr(report, "draw_run", lambda *_: None)
        patch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
        lth.main([*FLAGS, "--out", str(folder / "run")])
        yield folder


def test_a_run(finished, capsys):
    timesteps.main(["--from", str(finished / "run"), "--out", str(finished)])
    said = capsys.readouterr().out
    assert "Seeds: 1; fewer than 3: no verdict" in said and "Rounds 0 and 2, shared weights" in said
    with open(finished / "timesteps_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5 * 2  # pairs 0:2 and 1:2, weights, m = 0 .. 4, directions
    exp, _ = timesteps.open_run(str(finished / "run"))
    macs = [exp.load(lth.Job(0, r, "ticket" if r else "dense")).row["macs_live"] for r in range(3)]
    for row in rows:
        a, b, m = (int(row[name]) for name in ("denser", "sparser", "sparse_evaluations"))
        assert float(row["mmacs"]) == pytest.approx((m * macs[b] + (4 - m) * macs[a]) / 4e6, rel=1e-5)
        below = 4 - m if row["direction"] == "sparse early" else m
        assert int(row["switch"]) == 250 * below
        if row["weights"] == "own" and m in (0, 4):  # one of the measured tickets
            assert row["fid_domain"] == row["single_ticket"]
    ends = {row["fid_domain"] for row in rows if (row["denser"], row["sparse_evaluations"]) == ("0", "0")}
    assert len(ends) == 1  # dense alone, whatever the direction and the weights
    assert (finished / "timesteps_digits.png").stat().st_size > 5_000
    assert (finished / "timesteps_digits.json").exists()


@pytest.mark.parametrize("pairs, words", [
    (["2:1"], "2:1 is not two rounds"), (["0:1:2"], "not two rounds"), (["a"], "not two rounds"),
    (["0:1", "0:7"], "argument --pairs: two of [0, 1, 2]"),
])
def test_bad_pairs(finished, capsys, pairs, words):
    with pytest.raises(SystemExit) as stop:
        timesteps.main(["--from", str(finished / "run"), "--out", str(finished), "--pairs", *pairs])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_switch_by_counting_calls():
    calls = dict(early=[], late=[])

    def network(name):
        class Counted(torch.nn.Module):
            def forward(self, x, t):
                calls[name].append(t[0].item())
                return 0 * x
        return Counted()
    both = timesteps.Switch(network("early"), network("late"), 300)
    sample(both, Diffusion(), torch.zeros(2, 1, 4, 4), "ddim", 10)
    assert calls == dict(early=[900, 800, 700, 600, 500, 400, 300], late=[200, 100, 0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ends_are_the_single_networks(precision):
    a, b = (UNet(base=8, mults=(1,), image_size=8) for _ in range(2))
    for model in (a, b):
        torch.nn.init.normal_(model.conv_out.weight)
    draw = functools.partial(sample, diffusion=Diffusion(), x_T=torch.randn(2, 1, 8, 8), method="ddim",
                             steps=4)
    both = draw(denoiser(timesteps.Switch(a, b, 500), precision))
    for switch, one in ((0, a), (1000, b)):
        alone = draw(denoiser(one, precision))
        assert torch.equal(draw(denoiser(timesteps.Switch(a, b, switch), precision)), alone)
        assert not torch.equal(both, alone)


def test_directions_do_equal_work(monkeypatch):
    """m sparse evaluations are at the high t in one direction and at the low t in the other."""
    seen = []
    monkeypatch.setattr(timesteps, "score", lambda exp, model, *_: seen.append(model) or 0.0)
    exp = types.SimpleNamespace(args=types.SimpleNamespace(nfe=5), diffusion=Diffusion())
    dense, sparse = (lth.Trained(None, torch.nn.Linear(2, 2), {}, dict(macs_live=macs))
                     for macs in (100_000_000, 10_000_000))
    rows = list(timesteps.sweep(exp, dense, sparse, (7.0, 9.0), 8))
    assert [tuple(row.values())[:4] for row in rows[2:4]] == [
        ("sparse early", 800, 1, 82.0), ("dense early", 200, 1, 82.0)]
    assert seen[0].early is sparse.ema and seen[1].late is sparse.ema and len(seen) == 8
    assert [row["fid_domain"] for row in rows[:2] + rows[-2:]] == [7.0, 7.0, 9.0, 9.0]


def test_shared_weights():
    """The denser ticket's weights under the sparser one's mask, at the sparser one's work."""
    model = UNet(base=8, mults=(1,), image_size=8)
    masks = dense_masks(model)
    half = prune_magnitude(model, masks, 0.5)
    dense, sparse = (lth.Trained(None, ema, its_masks, dict(macs_live=macs))
                     for ema, its_masks, macs in ((model, masks, 2), (None, half, 1)))
    cut = timesteps.inherit(dense, sparse)
    assert cut.row["macs_live"] == 1
    for name, mask in half.items():
        ours, theirs = (dict(m.named_parameters())[name] for m in (cut.ema, model))
        assert torch.equal(ours[mask], theirs[mask]) and not ours[~mask].any()


def test_conclusion_by_hand():
    """Per seed the mean over the inner places; the ends, where one network works alone, do not count."""
    table = []
    for seed in range(3):
        single = 3 + seed
        for m, early, late in ((0, 99, 99), (1, 4, 6), (2, 2, 6), (3, 0, 0)):
            for direction, fid in zip(timesteps.DIRECTIONS, (early, late)):
                table.append(dict(seed=seed, denser=0, sparser=2, weights="own", direction=direction, n=8,
                                  sparse_evaluations=m, fid_domain=fid, single_ticket=single))
    gaps = {name: values.tolist() for name, values in timesteps.differences(table).items()}
    assert gaps == {"sparse early - dense early": [-3, -3, -3], "sparse early - single ticket": [0, -1, -2],
                    "dense early - single ticket": [3, 2, 1]}
    said = timesteps.conclude(table)
    assert "sparse early - dense early -3.00 [-3.00, -3.00]" in said and "Seeds: 3; brackets" in said
