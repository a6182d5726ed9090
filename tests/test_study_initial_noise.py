"""studies.initial_noise: blocks land where they should, chance is what it is, and the search is honest."""
import csv
import types

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from studies import initial_noise


def test_a_run(compared, capsys, monkeypatch):
    """Sixteen steps teach no digits, so here the class is the sign of x_T's mean."""
    monkeypatch.setattr(initial_noise, "DONORS", 4)
    monkeypatch.setattr(initial_noise, "RECIPIENTS", 4)
    monkeypatch.setattr(initial_noise, "classes", by_sign)
    initial_noise.main(["--from", str(compared / "runs" / "imp"), "--images", "24", "--out", str(compared)])
    said = capsys.readouterr().out
    assert "n=1 seed; fewer than 3: no verdict" in said and "36 %: chosen 8 pixel blocks" in said
    with open(compared / "initial_noise_digits.csv") as file:
        rows = list(csv.DictReader(file))
    parts = [row["part"] for row in rows]
    assert parts.count("agreement") == 5 and parts.count("transplant") == 2 * 5  # twin and four arms
    assert parts.count("search, chosen on") == parts.count("search, tested on") == 2 * 2
    for row in rows:
        difference = float(row["rate"]) - float(row["by chance"])
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-5)
        if row["part"] == "transplant" and row["side"] == "28":
            assert float(row["rate"]) == 1
    assert (compared / "initial_noise_digits.png").stat().st_size > 5_000
    assert (compared / "initial_noise_digits.json").exists()


def by_sign(exp, model, x_T, args, label):
    """A 'network' whose class is the sign of x_T's mean."""
    return (x_T.mean((1, 2, 3)) > 0).long(), torch.ones(len(x_T))


def test_classes_of_a_real_network(compared):
    exp, rows = lth.open_run(str(compared / "runs" / "imp"))
    model, _ = exp.rebuild(exp.load(lth.Job(0, 0, "dense")), "ema")
    args = types.SimpleNamespace(nfe=2)
    found, confidence = initial_noise.classes(exp, model, exp.x_T(6), args, "")
    again, _ = initial_noise.classes(exp, model, exp.x_T(6), args, "")
    assert torch.equal(found, again) and found.shape == (6,) and bool((0.1 <= confidence).all())


def test_agreement_by_hand():
    a, b = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    same, chance = initial_noise.agreement(a, b, 3)
    assert same.tolist() == [1, 1, 0, 1] and chance.tolist() == [0.5] * 4  # 3/4 * 1/2 + 1/4 * 1/2
    row = initial_noise.line("agreement", 0, "a", "b", None, same, chance)
    assert row[5:9] == [4, 0.75, 0.5, 0.25] and row[9] < 0.25 < row[10]


def test_paste_and_pick():
    x_T, block = torch.zeros(2, 1, 6, 6), torch.ones(1, 2, 2)
    pasted = initial_noise.paste(x_T, block, 3, 1)
    assert pasted.sum() == 8 and bool((pasted[:, 0, 3:5, 1:3] == 1).all()) and not x_T.any()
    found = torch.tensor([0, 0, 1, 1, 2])
    confidence = torch.tensor([0.95, 0.2, 0.95, 0.9, 0.5])
    donors, recipients = initial_noise.pick(found, confidence, torch.Generator().manual_seed(0), 9, 3)
    assert sorted(donors.tolist()) == [0, 2]  # above 0.9, which 0.9 is not
    for donor, mine in zip(donors, recipients):
        assert len(set(mine.tolist())) == 3 and not bool((found[mine] == found[donor]).any())
    with pytest.raises(ValueError, match="too few recipients"):
        initial_noise.pick(found, confidence, torch.Generator(), 9, 4)
    with pytest.raises(ValueError, match="1 images have a confidence"):
        initial_noise.pick(found, confidence - 0.1 * (found == 1), torch.Generator(), 9, 3)


def test_a_block_that_decides_is_found(monkeypatch):
    """Where the class is the sign of x_T's mean, a whole x_T always decides and fresh noise half the time."""
    monkeypatch.setattr(initial_noise, "classes", by_sign)
    x_T = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, confidence = by_sign(None, None, x_T, None, None)
    donors, recipients = initial_noise.pick(found, confidence, torch.Generator().manual_seed(1), 20, 16)
    rates = {}
    for side in (2, 8):
        patched, fresh = initial_noise.transplant(None, None, x_T, donors, recipients, found[donors], side,
                                                  None, "")
        assert patched.shape == fresh.shape == (20, 16)
        rates[side] = patched.mean(), fresh.mean()
    assert rates[8][0] == 1 and 0.4 < rates[8][1] < 0.6 and rates[2][0] < 0.5


def test_search_tests_on_the_other_half():
    """Blocks without any effect look good where they were chosen and nowhere else; good ones look good."""
    generator = np.random.default_rng(0)
    patched, fresh = generator.random((2, 400, 20)) < 0.3
    (on, by), (other, chance) = initial_noise.search(patched, fresh)
    assert len(on) == 100 and (on - by).mean() > 0.2 and abs((other - chance).mean()) < 0.05
    patched[:100] = True
    (_, _), (other, chance) = initial_noise.search(patched, fresh)
    assert other.mean() > 0.9 and chance.mean() == pytest.approx(0.3, abs=0.05)


def test_bad_input(compared, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        initial_noise.main(["--from", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "config.json" in capsys.readouterr().err
