"""studies.pitfalls: each mistake by a case whose answer is known."""
import csv
import json
import types

import pytest
import torch

import lth_diffusion as lth
import metrics
from studies import pitfalls
from support.classifier import DomainClassifier

SMALL = "--rounds 1 --steps 16 --batch 8 --samples 16 --nfe 4 --prune-rate 0.5 --out".split()
pytestmark = pytest.mark.usefixtures("tiny")


def test_a_run(tmp_path, capsys, monkeypatch):
    for name, value in dict(REPEATS=3, DRAWS=2, FEW=8, REAL=8).items():
        monkeypatch.setattr(pitfalls, name, value)
    run = str(tmp_path / "run")
    lth.main([*SMALL, run])
    pitfalls.main(["--from", run, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "1 seed: single values" in said and "change an answer" in said and "reverse ticket and dense" in said
    with open(tmp_path / "pitfalls_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and len({row["ticket, mistaken"] for row in rows}) == 4  # each its own value
    right = {tuple(row[arm] for arm in pitfalls.ARMS) for row in rows}
    assert len(right) == 1
    facts = json.loads((tmp_path / "pitfalls_digits.json").read_text())
    assert facts["reversals"]["0"] in [k / 3 for k in range(4)] and len(facts["said"]) == 3
    assert (tmp_path / "pitfalls_digits.png").stat().st_size > 5_000


def test_a_run_without_controls_is_refused(tmp_path, capsys):
    run = str(tmp_path / "run")
    lth.main([*SMALL, run, "--controls", "reinit"])
    with pytest.raises(SystemExit) as stop:
        pitfalls.main(["--from", run, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "no seed with reinit and random" in said and said.count("\n") == 1


def test_verdict_by_hand():
    values = dict(dense=10.0, ticket=10.9, reinit=11.0, random=10.5)
    assert pitfalls.verdict(values) == "dense yes, reinit yes, random no"
    assert pitfalls.verdict(values | dict(ticket=11.1)) == "dense no, reinit no, random no"


def test_best_seed_and_ratios_by_hand():
    right = [dict(dense=2.0, ticket=4.0, reinit=1.0, random=8.0),
             dict(dense=8.0, ticket=1.0, reinit=1.0, random=2.0)]
    rows = [pitfalls.row("a", seed, one, one | dict(ticket=2.0)) for seed, one in enumerate(right)]
    assert pitfalls.over_others(rows, 2) == pytest.approx([2 / 4, 2, 2 / 4])
    assert pitfalls.over_others(rows, 6) == pytest.approx([2 / 4, 2, 2 / 4])
    best = pitfalls.best_seed([types.SimpleNamespace(right=one) for one in right])
    assert best[:2] == ["best seed for the ticket", "all"] and best[2:6] == [5, 2.5, 1, 5] and best[6:10] == [5, 1, 1, 5]
    said = pitfalls.conclude(dict(a=rows, b=[pitfalls.row("b", 0, right[0], right[0])]), 2)
    assert "answer, 1 of 2: " in said and "a (2 of 2: dense no, reinit no, random yes -> dense yes" in said


def test_covariance_over_images_depends_on_their_order():
    feats, real = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    there, moved = pitfalls.fid_over_images(feats, real), pitfalls.fid_over_images(feats.flip(0), real)
    assert abs(there - moved) > 1e-3
    assert pitfalls.fid_over_images(feats, feats) == pytest.approx(0, abs=1e-4)
    assert metrics.fid(feats, real) == pytest.approx(metrics.fid(feats.flip(0), real), abs=1e-8)


def test_train_mode_depends_on_the_batch():
    model = DomainClassifier().eval()
    images = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8)
    four, six = (pitfalls.batch_features(model, images, batch) for batch in (4, 6))
    assert four.shape == six.shape == (12, 64) and not torch.allclose(four, six, atol=1e-3)
    assert len(pitfalls.batch_features(model, images, 5)) == 10  # whole batches
    assert not model.training and not model.body[1].num_batches_tracked  # the extractor is left alone


def test_reversals_by_hand(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    near, far, real = torch.randn(3, 400, 3, generator=generator)
    bench = types.SimpleNamespace(real=real, reference=metrics.statistics(real))
    bench.features = dict(ticket=far + 3, dense=near)
    assert pitfalls.reversals(bench) == 0  # worse in every draw, as in all
    bench.features = dict(ticket=near, dense=near[torch.randperm(400, generator=generator)] + 1e-4)
    assert 0.2 < pitfalls.reversals(bench) < 0.8


def test_dense_alone_by_hand():
    right = [dict(dense=10, ticket=9, reinit=10.9, random=11.1), dict(dense=10, ticket=10.9, reinit=20, random=20)]
    said = pitfalls.dense_alone([types.SimpleNamespace(right=one) for one in right])
    assert said == "Within 10% of dense, of 2 seeds: ticket in 2, reinit in 1, random mask in 0."
