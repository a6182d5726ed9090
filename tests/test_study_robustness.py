"""studies.robustness: every network meets every trouble, and the attacks are attacks."""
import csv
import functools

import pytest
import torch

import ddpm
from studies import robustness

FLAGS = "--rounds 2 --steps 8 --batch 8 --samples 8 --nfe 4 --prune-rate 0.5"


def test_a_run(finished, capsys, monkeypatch):
    for name in ("NOISE", "BUDGETS", "STARTS"):
        monkeypatch.setattr(robustness, name, getattr(robustness, name)[::3])  # fewer, for speed
    monkeypatch.setattr(robustness, "NFE", 5)
    monkeypatch.setattr(robustness, "ASCENT", 3)
    robustness.main(["--from", str(finished / "run"), "--images", "20", "--samples", "8", "--attacked", "4",
                     "--out", str(finished)])
    assert "no verdict" in capsys.readouterr().out
    with open(finished / "robustness_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sizes = len(robustness.BUDGETS)
    troubles = len(robustness.NOISE) + 2 * sizes + len(robustness.STARTS) + 3 * (sizes - 1)
    arms = {(row["round"], row["arm"]) for row in rows}
    assert {("0", "dense"), ("2", "ticket"), ("2", "reinit"), ("2", "random")} <= arms
    assert ("1", "ticket") not in arms and len(rows) == len(arms) * troubles
    error = {(row["arm"], row["trouble"], row["size"]): float(row["value"]) for row in rows}
    for row in rows:
        if row["size"] == "0":
            assert float(row["value"]) == pytest.approx(error[row["arm"], "noise", "0"], rel=1e-5)
        if row["trouble"] == "PGD":
            weak = error[row["arm"], "FGSM", row["size"]]
            assert float(row["value"]) >= weak * (1 - 1e-5)
        if row["trouble"] == "sampler":  # an attack does more than chance
            assert float(row["value"]) > error[row["arm"], "chance", row["size"]] > 0
        if row["trouble"] == "flips":
            assert 0 <= float(row["value"]) <= 1
    assert error["dense", "FGSM", "0.1"] > error["dense", "FGSM", "0"]
    assert error["dense", "noise", "0.4"] > error["dense", "noise", "0"]
    assert (finished / "robustness_digits.png").stat().st_size > 5_000
    assert (finished / "robustness_digits_summary.json").exists()


def tables(values):
    """Rows as measure() makes them, of PGD with budget 0.1 and without; values: {arm: (clean, attacked) by seed}."""
    return [dict(seed=seed, round=0 if arm == "dense" else 2, arm=arm, trouble="PGD", size=size, value=value)
            for arm, by_seed in values.items() for seed, pair in enumerate(by_seed)
            for size, value in zip(("0", "0.1"), pair)]


@pytest.mark.parametrize("attacked, said", [(1.5, "more fragile"), (0.9, "as robust"), (1.1, "not shown")])
def test_the_margin_is_a_tenth_of_dense(attacked, said):
    values = dict(dense=[(0.5, 1.0)] * 3, ticket=[(0.4, attacked + d) for d in (-0.01, 0, 0.01)])
    *_, row = robustness.summarise(tables(values))
    found = dict(zip(robustness.SUMMARY, row))
    assert found["answer"] == said and found["ticket - 1.1 dense"] == pytest.approx(attacked - 1.1)
    assert found["beyond clean"] is None  # no controls to draw a line through


def test_beyond_clean_is_the_distance_from_the_line_of_the_other_arms():
    """Dense, reinit and random mask lie on attacked = 2 clean; the ticket 0.1 above."""
    values = dict(dense=[(0.5, 1.0)] * 3, ticket=[(0.4, 0.9)] * 3, reinit=[(0.6, 1.2)] * 3, random=[(1.0, 2.0)] * 3)
    clean, attacked = robustness.summarise(tables(values))
    assert attacked[-3] == pytest.approx(0.1) and clean[-3] is None


def test_an_attack_through_the_sampler_stays_within_its_budget():
    """The sampler is x -> x^2: the worst change of x = 1 is upwards, to 1.1^2."""
    x, sign = torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    clean, worst, chance = robustness.through_sampler(torch.square, x, 0.1, -sign)
    assert clean.flatten().tolist() == [1, 1] and worst.flatten().tolist() == pytest.approx([0.81, 0.81])
    assert torch.equal(chance, worst)  # below 1, up the gradient is down: further away from 1
    _, worst, _ = robustness.through_sampler(torch.square, x, 0.1, sign)
    assert worst.flatten().tolist() == pytest.approx([1.21, 1.21])


def test_the_sampler_that_is_attacked_is_ddim():
    model = ddpm.UNet(base=16, mults=(1,), patch=4, image_size=28).eval()
    diffusion, x_T = ddpm.Diffusion(), torch.randn(2, 1, 28, 28)
    predict = functools.partial(diffusion.predict, model)
    with torch.no_grad():
        found = robustness.images_of(diffusion, predict, x_T)
    wanted = ddpm.sample(model, diffusion, x_T, "ddim", steps=robustness.NFE)
    assert found.abs().max() == 1  # clipped, as all samples are
    assert torch.allclose(found, wanted, atol=1e-5)


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
