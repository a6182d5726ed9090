"""studies.pitfalls: each mistake by a case whose answer is known."""
import csv
import types

import numpy as np
import pytest
import torch

import lth_diffusion as lth
import metrics
from studies import pitfalls
from unet import UNet


def test_a_run(compared, capsys, monkeypatch):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))  # as the run was made
    monkeypatch.setattr(pitfalls, "REPEATS", 3)
    monkeypatch.setattr(pitfalls, "DRAWS", 2)
    monkeypatch.setattr(pitfalls, "FEW", 8)
    flags = ["--from", str(compared / "runs" / "imp"), "--out", str(compared)]
    pitfalls.main(flags)
    said = capsys.readouterr().out
    assert "n=1 seed: orders of figures" in said and "of 6 mistakes" in said
    with open(compared / "pitfalls_digits.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 + 1 + 6 + 2 * 2  # evaluation, standardisation, thresholds, two trainings
    ticket = lth.open_run(str(compared / "runs" / "imp"))[1][lth.Job(0, 2, "rewind")]
    live, total = ticket["live_weights"], ticket["total_weights"]
    left = {row["mistake"]: row for row in rows if row["figure"] == "weights that are not 0"}
    for row in left.values():
        assert int(row["rewind"]) == live < int(row["rewind, mistaken"]) <= total
    wrong = {row["mistake"]: row["rewind, mistaken"] for row in rows if row["figure"] == "fid_domain"}
    assert len(set(wrong.values())) == 6  # each its own figure
    cut = {row["mistake"]: (int(row["rewind"]), int(row["rewind, mistaken"])) for row in rows
           if row["figure"] == "weights cut"}
    assert cut["|w| < t over all weights, the ticket"] == (round(0.2 * live), 0)  # t is 0: 36 % are dead
    asked, got = cut["|w| <= t over all weights, trained dense"]
    assert asked == round(0.2 * total) and got == asked + 1
    assert (compared / "pitfalls_digits.png").stat().st_size > 5_000
    monkeypatch.setattr(lth, "train", None)  # a second time nothing is trained
    pitfalls.main(flags)
    assert capsys.readouterr().out.splitlines()[:-1] == said.splitlines()[:-1]


def test_verdict_by_hand():
    figures = dict(dense=10.0, rewind=10.9, reinit=11.0, random=10.5)
    assert pitfalls.verdict(figures) == "dense yes, reinit yes, random no"
    assert pitfalls.verdict(figures | dict(rewind=11.1)) == "dense no, reinit no, random no"


def test_thresholds_by_hand():
    weights, live = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6, 7.0]), np.ones(10, bool)
    assert pitfalls.threshold_cuts(weights, live) == {"|w| < t": (2, 0), "|w| <= t": (2, 3)}
    live[:3] = False  # the zeros are the dead ones: one of seven asked for, none found
    assert pitfalls.threshold_cuts(weights, live) == {"|w| < t": (1, 0), "|w| <= t": (1, 0)}
    untied = pitfalls.threshold_cuts(np.arange(10.0), np.ones(10, bool))
    assert untied == {"|w| < t": (2, 2), "|w| <= t": (2, 3)}  # one too many


def test_covariance_over_images_depends_on_their_order():
    feats, real = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    there, moved = pitfalls.fid_over_images(feats, real), pitfalls.fid_over_images(feats.flip(0), real)
    assert abs(there - moved) > 1e-3
    assert pitfalls.fid_over_images(feats, feats) == pytest.approx(0, abs=1e-4)
    assert metrics.fid(feats, real) == pytest.approx(metrics.fid(feats.flip(0), real), abs=1e-8)


def test_train_mode_depends_on_the_batch():
    model = metrics.DomainClassifier().eval()
    images = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8)
    four, six = (pitfalls.batch_features(model, images, batch) for batch in (4, 6))
    assert four.shape == six.shape == (12, 64) and not torch.allclose(four, six, atol=1e-3)
    assert len(pitfalls.batch_features(model, images, 5)) == 10  # whole batches
    assert not model.training and not model.body[1].num_batches_tracked  # the ruler itself is left alone


def test_reversal_by_hand():
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(2, 400, 3, generator=generator)
    truth = torch.zeros(3).double(), torch.eye(3).double()
    assert pitfalls.reversal(far + 3, near, 50, truth, truth) == 0  # worse in every draw, as in all
    assert 0.2 < pitfalls.reversal(near, near[torch.randperm(400)] + 1e-4, 5, truth, truth) < 0.8


def test_standardisation_counts_by_hand():
    model = UNet(base=8, mults=(1,), image_size=8)
    with torch.no_grad():
        for p in pitfalls.prunable(model).values():
            p.zero_()
        model.conv_in.weight[0, 0, 0, 0] = 1.0  # one live weight: its filter's eight dead ones come alive
    assert pitfalls.nonzero(model) == 1 and pitfalls.nonzero(pitfalls.standardised(model)) == 9
    assert pitfalls.nonzero(model) == 1


def test_the_average_is_carried_on():
    dense, ema = UNet(base=8, mults=(1,), image_size=8), types.SimpleNamespace(updates=3)
    ema.model = UNet(base=8, mults=(1,), image_size=8)
    hook = pitfalls.carry_on(dense, lambda *_: None)
    hook(0, None, None, ema)
    assert torch.equal(ema.model.conv_in.weight, dense.conv_in.weight) and ema.updates == 10 ** 9
    torch.nn.init.zeros_(dense.conv_in.weight)
    hook(1, None, None, ema)
    assert bool(ema.model.conv_in.weight.any()) and repr(hook).endswith("carried on")


def test_bad_input(compared, capsys):
    with pytest.raises(SystemExit) as stop:
        pitfalls.main(["--from", str(compared / "runs" / "random"), "--out", str(compared)])
    assert stop.value.code == 2 and "needs a run of imp or oneshot" in capsys.readouterr().err
