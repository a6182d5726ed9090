"""studies.initial_noise: blocks land where they should, chance is what it is, and the search is honest."""
import csv

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from studies import initial_noise
from support import cli

FLAGS = "--rounds 2 --steps 8 --batch 8 --samples 8 --nfe 4 --prune-rate 0.5"


def by_sign(x_T):
    """A 'network' whose class is the sign of x_T's mean."""
    return (x_T.mean((1, 2, 3)) > 0).long(), torch.ones(len(x_T))


def test_a_run(finished, capsys, monkeypatch):
    """A few steps teach no digits, so here the class is the sign of x_T's mean."""
    monkeypatch.setattr(initial_noise, "DONORS", 4)
    monkeypatch.setattr(initial_noise, "RECIPIENTS", 4)
    monkeypatch.setattr(initial_noise, "classes", lambda exp, model, x_T: by_sign(x_T))
    initial_noise.main(["--from", str(finished / "run"), "--images", "24", "--out", str(finished)])
    assert "Seeds: 1; fewer than 3: no verdict" in capsys.readouterr().out
    with open(finished / "initial_noise_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parts = [(row["part"], row["network"]) for row in rows]
    for name in ("dense 0 %", "ticket 75 %"):
        assert parts.count(("transplant", name)) == 5 and parts.count(("search", name)) == 2
    for name in ("ticket 75 %", "reinit 75 %", "random 75 %"):
        assert parts.count(("agreement", name)) == 1
    assert not any("50 %" in name for _, name in parts)  # the last round only
    for row in rows:
        difference = float(row["rate"]) - float(row["by chance"])
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-5)
        if row["part"] == "agreement" or row["side"] == "28":  # one network; the whole of x_T
            assert float(row["rate"]) == 1
    assert (finished / "initial_noise_digits.png").stat().st_size > 5_000
    assert (finished / "initial_noise_digits.json").exists()


def test_classes_of_a_real_network(finished, monkeypatch):
    monkeypatch.setattr(initial_noise, "NFE", 4)
    exp, _ = initial_noise.open_run(str(finished / "run"))
    model, x_T = exp.load(lth.Job(0, 0, "dense")).ema, exp.x_T(6)
    found, confidence = initial_noise.classes(exp, model, x_T)
    again, _ = initial_noise.classes(exp, model, x_T)
    assert torch.equal(found, again) and found.shape == (6,) and bool((0.1 <= confidence).all())


def test_agreement_by_hand():
    a, b = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    same, chance = initial_noise.agreement(a, b)
    assert same.tolist() == [1, 1, 0, 1] and chance.tolist() == [0.5] * 4  # 3/4 * 1/2 + 1/4 * 1/2


def test_paste_and_pick(monkeypatch):
    x_T, block = torch.zeros(2, 1, 6, 6), torch.ones(1, 2, 2)
    pasted = initial_noise.paste(x_T, block, 3, 1)
    assert pasted.sum() == 8 and bool((pasted[:, 0, 3:5, 1:3] == 1).all()) and not x_T.any()
    found = torch.tensor([0, 0, 1, 1, 2])
    confidence = torch.tensor([0.95, 0.2, 0.95, 0.9, 0.5])
    monkeypatch.setattr(initial_noise, "RECIPIENTS", 3)
    donors, recipients = initial_noise.pick(found, confidence, torch.Generator().manual_seed(0))
    assert sorted(donors.tolist()) == [0, 2]  # above 0.9, which 0.9 is not
    for donor, mine in zip(donors, recipients):
        assert len(set(mine.tolist())) == 3 and not bool((found[mine] == found[donor]).any())
    with pytest.raises(cli.Mistake, match="--images: 1 of 5 images have a confidence"):
        initial_noise.pick(found, confidence - 0.1 * (found == 1), torch.Generator())
    monkeypatch.setattr(initial_noise, "RECIPIENTS", 4)
    with pytest.raises(cli.Mistake, match="--images: 3 images are of another class"):
        initial_noise.pick(found, confidence, torch.Generator())


def test_a_block_that_decides_is_found(monkeypatch):
    """Where the class is the sign of x_T's mean, a whole x_T always decides and fresh noise half the time."""
    monkeypatch.setattr(initial_noise, "DONORS", 20)
    x_T = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, confidence = by_sign(x_T)
    donors, recipients = initial_noise.pick(found, confidence, torch.Generator().manual_seed(1))
    rates = {}
    for side in (2, 8):
        patched, fresh = initial_noise.transplant(by_sign, x_T, donors, recipients, found[donors], side)
        assert patched.shape == fresh.shape == (20, 16)
        rates[side] = patched.mean(), fresh.mean()
    assert rates[8][0] == 1 and 0.4 < rates[8][1] < 0.6 and rates[2][0] < 0.5


def test_search_tests_on_the_other_half():
    """Blocks without any effect look good where they were chosen and nowhere else; good ones look good."""
    generator = np.random.default_rng(0)
    patched, fresh = generator.random((2, 400, 20)) < 0.3
    other, chance = initial_noise.search(patched, fresh)
    on, by = initial_noise.search(*(np.tile(v[:, :10], 2) for v in (patched, fresh)))  # both halves equal
    assert len(other) == 100 and abs((other - chance).mean()) < 0.05 and (on - by).mean() > 0.2
    patched[:100] = True
    other, chance = initial_noise.search(patched, fresh)
    assert other.mean() > 0.9 and chance.mean() == pytest.approx(0.3, abs=0.05)


def test_means_over_seeds_by_hand():
    rows = []
    for seed, rate, low in ((0, 0.25, -0.1), (1, 0.75, 0.1)):
        values = seed, "search", "ticket 90 %", 4, 8, rate, 0.25, rate - 0.25, low, 1
        rows.append(dict(zip(initial_noise.HEADER, values)))
    line, = initial_noise.summarise(rows)
    assert list(line.values()) == ["search", "ticket 90 %", 4, 0.5, 0.25, 0.25, 2, 1]


def test_a_folder_without_a_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        initial_noise.main(["--from", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "config.json" in capsys.readouterr().err
