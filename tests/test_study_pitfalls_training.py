"""studies.pitfalls_training: each mistake by a case whose answer is known."""
import csv
import json

import pytest
import torch

import lth_diffusion as lth
from studies import pitfalls, pitfalls_training as training
from unet import UNet

SMALL = "--rounds 1 --steps 16 --batch 8 --samples 16 --nfe 4 --prune-rate 0.5 --out".split()
pytestmark = pytest.mark.usefixtures("tiny")


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pitfalls, "DRAWS", 2)
    run = str(tmp_path / "run")
    lth.main([*SMALL, run])
    training.main(["--from", run, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "1 seed: single values" in said and "change an answer" in said and "fresh less restored" in said
    with open(tmp_path / "pitfalls_training_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["mistake"] for row in rows] == [training.FRESH, training.NEGATIVE, training.AVERAGE]
    for row in rows:  # only the ticket is trained again
        assert all(row[arm] == row[f"{arm}, mistaken"] for arm in ("dense", "reinit", "random"))
    assert len({row["ticket, mistaken"] for row in rows} | {rows[0]["ticket"]}) == 4  # each its own value
    facts = json.loads((tmp_path / "pitfalls_training_digits.json").read_text())
    assert facts["live"] < facts["not_zero"]["weight standardisation"]
    assert facts["cut_by_threshold"]["trained"][0] == facts["cut_by_threshold"]["trained"][1] + 1
    assert facts["cut_by_threshold"]["at the start"][0] > facts["cut_by_threshold"]["at the start"][1] + 1  # ties
    assert facts["not_zero"][training.AVERAGE] == 2 * facts["live"]  # half was pruned: all are back
    assert (tmp_path / "pitfalls_training_digits.png").stat().st_size > 5_000


def test_standardisation_counts_by_hand():
    model = UNet(base=8, mults=(1,), image_size=8)
    with torch.no_grad():
        for p in training.prunable(model).values():
            p.zero_()
        model.conv_in.weight[0, 0, 0, 0] = 1.0  # one live weight: its filter's eight dead ones come alive
    assert training.nonzero(model) == 1 and training.nonzero(training.standardised(model)) == 9
    assert training.nonzero(model) == 1


def test_a_threshold_takes_one_too_many_and_all_ties():
    model = torch.nn.Linear(10, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-9.0, 8, -7, 6, -5, 4, -3, 2, -1, 0.5]]))
    assert training.cut_by_threshold(model, 0.2) == 3  # 2 were asked for
    with torch.no_grad():
        model.weight[0, :6] = 0
    assert training.cut_by_threshold(model, 0.2) == 6


def test_ablation_by_hand():
    right = dict(dense=5.0, ticket=4.0, reinit=6.0, random=8.0)
    rows = [pitfalls.row(training.FRESH, seed, right, right | dict(ticket=5.0 + 0.1 * (seed - 1)))
            for seed in range(3)]
    said = training.ablation(rows)
    assert "3 seeds" in said and "fresh less restored +1.00 [+0.83, +1.17]" in said
    assert "restored less reinit -2.00 [-2.00, -2.00]" in said and "fresh less random -3.00 [" in said
    assert "fresh less dense +0.00;" in training.ablation(rows[1:2])
