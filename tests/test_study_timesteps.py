"""studies.timesteps: the switch, what it costs, and that its ends are the single networks."""
import csv
import functools
import types

import pytest
import torch

import lth_diffusion as lth
from ddpm import Diffusion, denoiser, sample
from prune import dense_masks, prune_magnitude
from studies import timesteps
from unet import UNet


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_run(compared, capsys, monkeypatch):
    monkeypatch.setattr(timesteps, "SHARES", (0.0, 0.5, 1.0))  # the run samples by 2 evaluations
    timesteps.main(["--from", str(compared / "runs" / "imp"), "--samples", "8", "--images", "20", "--out",
                    str(compared)])
    said = capsys.readouterr().out
    assert "n=1 seed; fewer than 3: no verdict" in said and "Rounds 0 and 2, shared weights" in said
    rows = read(compared / "timesteps_digits.csv")
    assert len(rows) == 2 * 2 * 3 * 2  # pairs 0:2 and 1:2, weights, m = 0, 1, 2, directions
    costs = {job.round: row for job, row in lth.open_run(str(compared / "runs" / "imp"))[1].items()
             if job.arm in ("dense", "rewind")}
    for row in rows:
        a, b, m = int(row["denser"]), int(row["sparser"]), int(row["sparse evaluations"])
        macs = (m * costs[b]["macs_live"] + (2 - m) * costs[a]["macs_live"]) / 2
        assert float(row["MMACs an evaluation"]) == pytest.approx(macs / 1e6, rel=1e-5)
        if m in (0, 2):
            assert int(row["bytes"]) == costs[b if m else a]["ticket_bytes"]
        elif row["weights"] == "own":
            assert int(row["bytes"]) == costs[a]["ticket_bytes"] + costs[b]["ticket_bytes"]
            assert row["switch at t"] == "500"
        else:  # one mask more, a bit a weight
            bits = 8 * (int(row["bytes"]) - costs[a]["ticket_bytes"])
            assert 0 <= bits - costs[a]["total_weights"] < 8 * 40
        if row["weights"] == "own" and m in (0, 2):
            assert row["fid_domain"] == row["single ticket"]
    ends = {row["fid_domain"] for row in rows if row["denser"] == "0" and row["sparse evaluations"] == "0"}
    assert len(ends) == 1  # dense alone, whatever the direction and the weights
    errors = read(compared / "timesteps_digits_errors.csv")
    assert all(float(row["over dense"]) == 1 for row in errors if row["arm"] == "dense")
    assert len(errors) == 10 * (2 + 2 + 2 * 3) and errors[9]["t below"] == "1000"
    for name in ("timesteps_digits", "timesteps_digits_errors"):
        assert (compared / f"{name}.png").stat().st_size > 5_000


def test_the_switch_by_counting_calls():
    calls = dict(early=[], late=[])

    class Counted(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x, t):
            calls[self.name].append(t[0].item())
            return 0 * x + (1.0 if self.name == "early" else -1.0)

    both = timesteps.Switch(Counted("early"), Counted("late"), 300)
    sample(both, Diffusion(), torch.zeros(2, 1, 4, 4), "ddim", 10)
    assert calls == dict(early=[900, 800, 700, 600, 500, 400, 300], late=[200, 100, 0])
    mixed = both(torch.zeros(3, 1, 2, 2), torch.tensor([0, 300, 299]))
    assert mixed[:, 0, 0, 0].tolist() == [-1, 1, -1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ends_are_the_single_networks(precision):
    a, b = (UNet(base=8, mults=(1,), image_size=8) for _ in range(2))
    for model in (a, b):
        torch.nn.init.normal_(model.conv_out.weight)
    x_T = torch.randn(2, 1, 8, 8)
    draw = functools.partial(sample, diffusion=Diffusion(), x_T=x_T, method="ddim", steps=4)
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
    dense, sparse = (timesteps.Network(torch.nn.Linear(2, 2), {}, macs, 10) for macs in (100, 10))
    rows = list(timesteps.sweep(exp, dense, sparse, (7.0, 9.0), None, True))
    assert [(row[0], row[1], row[2], row[3]) for row in rows[2:4]] == [
        ("sparse early", 800, 1, 82), ("dense early", 200, 1, 82)]
    assert seen[0].early is sparse.model and seen[1].late is sparse.model
    assert [row[5] for row in rows[:2] + rows[-2:]] == [7.0, 7.0, 9.0, 9.0] and len(seen) == 8


def test_shared_weights_and_nesting():
    model = UNet(base=8, mults=(1,), image_size=8)
    masks = dense_masks(model)
    half = prune_magnitude(model, masks, 0.5)
    dense, sparse = timesteps.Network(model, masks, 2, 2), timesteps.Network(None, half, 1, 1)
    cut = timesteps.inherit(dense, sparse)
    for name, mask in half.items():
        ours, theirs = (dict(m.named_parameters())[name] for m in (cut.model, model))
        assert torch.equal(ours[mask], theirs[mask]) and not ours[~mask].any()
    with pytest.raises(ValueError, match="not nested"):
        timesteps.inherit(sparse._replace(model=model), dense)


def test_error_by_hand_and_bad_input(compared, capsys):
    x0, noise, t = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2), torch.tensor([0, 500, 999])
    diffusion = Diffusion()
    assert timesteps.eps_error(diffusion, lambda x, t: 0 * x, x0, t, noise) == 1
    assert timesteps.eps_error(diffusion, lambda x, t: 0 * x + 3, x0, t, noise) == 4
    for flags, words in ((["--pairs", "2:1"], "--pairs"), (["--pairs", "0:7"], "as in 0:2, of [0, 1, 2]")):
        with pytest.raises(SystemExit) as stop:
            timesteps.main(["--from", str(compared / "runs" / "imp"), "--out", str(compared), *flags])
        assert stop.value.code == 2 and words in capsys.readouterr().err
