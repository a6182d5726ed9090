"""studies.robustness: every network meets every trouble, and the attacks are attacks."""
import csv

import pytest
import torch

import lth_diffusion as lth
from studies import robustness
from support import report

FLAGS = "--rounds 2 --steps 8 --batch 8 --samples 8 --nfe 4 --prune-rate 0.5".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of a tiny network."""
    folder = tmp_path_factory.mktemp("robustness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        patch.setattr(report, "draw_run", lambda *_: None)
        patch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
        lth.main([*FLAGS, "--out", str(folder / "run")])
        yield folder


def test_a_run(finished, capsys, monkeypatch):
    for name in ("NOISE", "BUDGETS", "STARTS"):
        monkeypatch.setattr(robustness, name, getattr(robustness, name)[::3])  # fewer, for speed
    robustness.main(["--from", str(finished / "run"), "--images", "20", "--samples", "8",
                     "--out", str(finished)])
    assert "fewer than 3: no verdict" in capsys.readouterr().out
    with open(finished / "robustness_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    troubles = len(robustness.NOISE) + 2 * len(robustness.BUDGETS) + len(robustness.STARTS)
    arms = {(row["round"], row["arm"]) for row in rows}
    assert {("0", "dense"), ("2", "ticket"), ("2", "reinit"), ("2", "random")} <= arms
    assert ("1", "ticket") not in arms and len(rows) == len(arms) * troubles
    error = {(row["arm"], row["trouble"], row["size"]): float(row["value"]) for row in rows}
    for row in rows:
        if row["size"] in ("0", "1 x_T +0"):
            assert float(row["factor"]) == 1  # nothing is disturbed
        if row["size"] == "0":
            assert float(row["value"]) == pytest.approx(error[row["arm"], "noise", "0"], rel=1e-5)
        if row["trouble"] == "PGD":
            weak = error[row["arm"], "FGSM", row["size"]]
            assert float(row["value"]) >= weak * (1 - 1e-5)
    assert error["dense", "FGSM", "0.1"] > error["dense", "FGSM", "0"]
    assert error["dense", "noise", "0.4"] > error["dense", "noise", "0"]
    assert (finished / "robustness_digits.png").stat().st_size > 5_000
    assert (finished / "robustness_digits.json").exists()


def test_a_round_that_is_not_there(finished, capsys):
    with pytest.raises(SystemExit) as stop:
        robustness.main(["--from", str(finished / "run"), "--rounds", "7", "--out", str(finished)])
    assert stop.value.code == 2 and "argument --rounds: no runs of round 7" in capsys.readouterr().err


def test_fgsm_by_hand():
    """Where the error is x^2, the worst change within the budget is away from zero."""
    x, eps, t = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.zeros(2).long()
    moved = robustness.fgsm(lambda x, t: x, x, t, eps, 0.1)
    assert moved.flatten().tolist() == pytest.approx([0.6, -0.6])
    for attack, error in ((None, 0.25), (robustness.fgsm, 0.36), (robustness.pgd, 0.36)):
        found = robustness.mean_error(lambda x, t: x, (x, t, eps), attack, 0.1)
        assert found == pytest.approx(error)


def test_pgd_stays_within_its_budget_and_finds_more_on_a_curve():
    """A 'model' whose error has its maximum inside the ball of a far step: PGD must find more than FGSM."""
    def model(x, t):
        return torch.sin(5 * x)
    x, eps, t = torch.full((2, 1, 2, 2), 0.1), torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    moved = robustness.pgd(model, x, t, eps, 0.5)
    assert float((moved - x).abs().max()) <= 0.5 + 1e-6
    near = robustness.fgsm(model, x, t, eps, 0.5)
    weak, strong = (robustness.error(model, v, t, eps) for v in (near, moved))
    assert bool((strong > weak + 0.1).all())


def test_pgd_keeps_the_best_of_each_image():
    """Even where ascent leads away from a good start, the result is no worse than that of FGSM."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 1, 2, 2, generator=generator)
    eps, t = torch.zeros_like(x), torch.zeros(50, dtype=torch.int64)

    def model(x, t):
        return torch.sin(40 * x)
    weak, strong = (robustness.error(model, attack(model, x, t, eps, 0.5), t, eps)
                    for attack in (robustness.fgsm, robustness.pgd))
    assert bool((strong >= weak).all()) and strong.mean() > weak.mean()


def test_conclusion_by_hand():
    table = []
    for seed in range(3):
        for arm, sparsity, last in (("dense", 0.0, 2.0), ("ticket", 0.9, 1.5 + seed)):
            for budget in robustness.BUDGETS:
                factor = last if budget == robustness.BUDGETS[-1] else 1.0
                table.append(dict(seed=seed, arm=arm, sparsity=sparsity, trouble="PGD", size=budget,
                                  factor=factor))
    said = robustness.conclude(table)
    assert "dense 0.0 % 2.00, ticket 90.0 % 2.50 (larger than dense in 2 of 3 seeds). Seeds: 3." in said
