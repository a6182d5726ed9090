"""studies/tuning.py: its command line with runs as small as they can be, its report by hand."""
import csv
import math
import os

import numpy as np
import pytest

import lth_diffusion as lth
from studies import tuning
from support import report

SMALL = "--rounds 1 --final-sparsity 0.9 --steps 8 --batch 8 --samples 8 --nfe 4".split()
ARMS = ["dense", "ticket", "reinit", "random"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    monkeypatch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(tuning, "BATCHES", (4, 8, 16))
    monkeypatch.setattr(tuning, "SEARCH_NET", 0)  # that of the tickets, so that both can be compared


def table_in(folder):
    with open(folder / "tuning_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [[row for row in rows if row["part"] == part] for part in ("search", "tickets")]


def test_tuning(quick, tmp_path, capsys):
    folders = ["--runs", str(tmp_path), "--out", str(tmp_path)]
    tuning.main(["--settings", "3", "--half", *folders, *SMALL])
    said = capsys.readouterr().out
    assert said[said.rindex("Of 3 settings"):].count("no verdict (1 seed; it needs 3)") == 3
    search, tickets = table_in(tmp_path)
    assert {row["setting"] for row in search} == {"default", "draw 1", "draw 2"}
    assert all(int(row["steps"]) * int(row["batch"]) == 8 * 8 for row in search)  # as many images
    best, losses = search[0], [float(row["val_loss"]) for row in search]
    assert losses == sorted(losses)
    assert [row["arm"] for row in tickets] == 3 * ARMS
    for row, times in zip(tickets, [1] * 4 + [4] * 4 + [1] * 4):
        assert float(row["lr"]) * times == pytest.approx(float(best["lr"]), rel=0.01)
        assert all(row[name] == best[name] for name in ("batch", "ema", "lr_schedule", "beta2"))
    assert {int(row["steps"]) for row in tickets[:8]} == {int(best["steps"])}
    assert {int(row["steps"]) for row in tickets[8:]} == {int(best["steps"]) // 2}
    # the search trains what lth_diffusion.py trains: the run in the best setting has the same network
    assert float(tickets[0]["val_loss"]) == pytest.approx(losses[0], rel=1e-5)
    for name in ("tuning_digits.png", "tuning_digits.json"):
        assert os.path.getsize(tmp_path / name) > 200
    assert len([name for name in os.listdir(tmp_path) if "_lr" in name]) == 3


def test_without_a_search(quick, tmp_path, capsys):
    tuning.main(["--settings", "1", "--runs", str(tmp_path), "--out", str(tmp_path), *SMALL])
    search, tickets = table_in(tmp_path)
    assert not search and [row["arm"] for row in tickets] == 2 * ARMS
    assert {float(row["lr"]) for row in tickets} == {9e-3, 2.25e-3}  # the default on digits, a quarter


def test_settings_keep_their_ranges_and_their_draw():
    args, _ = lth.parse_args(["--dataset", "mnist"])
    found = tuning.settings(args, 24)
    assert found["default"] == dict(lr=4e-3, batch=32, steps=2000, ema=0.995, lr_schedule="cosine",
                                    beta2=0.95)
    assert len(found) == 24 and list(tuning.settings(args, 8).items()) == list(found.items())[:8]
    for one in found.values():
        assert list(one) == tuning.SETTING and one["steps"] * one["batch"] == 64_000
        assert 0.1 * 4e-3 * 0.99 <= one["lr"] <= 3 * 4e-3 * 1.01 and 0 <= one["ema"] < 1
    assert len({one["lr"] for one in found.values()}) == 24


def row(part, name, seed, arm, fid):
    """A row of the table; val_loss is a hundredth of fid_domain."""
    return dict(zip(tuning.HEADER, [part, name, seed, arm, *[0] * 6, fid / 100, fid]))


def table_of(values):
    """Rows of the tickets from {setting: {arm: values over seeds}}."""
    return [row("tickets", name, seed, arm, value) for name, arms in values.items()
            for arm, over in arms.items() for seed, value in enumerate(over)]


def test_a_verdict_that_changes_with_the_rate_is_said():
    winning = dict(dense=[5, 5.1, 4.9], ticket=[5, 5.0, 4.9], reinit=[7, 7.2, 6.9], random=[8, 8.1, 7.8])
    losing = winning | dict(ticket=[9, 9.1, 8.8])
    table = table_of(dict(best=winning, slow=losing))
    assert "DIFFERS" in tuning.conclude(table)
    assert "is the same" in tuning.conclude(table_of(dict(best=winning, slow=winning)))
    found = {tuple(line[:2]): line[2:] for line in tuning.differences(table)}
    assert len(found) == 3 * 3  # other arms, and the two settings and their difference
    assert found["best", "ticket - reinit"][:2] == [3, pytest.approx(-6.2 / 3)]
    n, mean, low, high = found["slow, less best", "ticket - reinit"]  # 4, 4.1, 3.9 in the three seeds
    half = 4.3027 * np.std([4, 4.1, 3.9], ddof=1) / math.sqrt(3)
    assert n == 3 and (mean, low, high) == pytest.approx((4, 4 - half, 4 + half), abs=1e-4)


def test_gaps_are_paired_by_seed():
    """Two settings of equal values, whose seeds stand in another order: they differ by nothing."""
    table = [row("tickets", name, seed, arm, seed + (arm == "dense"))
             for name, seeds in (("a", (1, 0, 2)), ("b", (0, 1, 2))) for arm in ("dense", "ticket")
             for seed in seeds]
    for arms in tuning.arms_of(table).values():
        assert list(tuning.gaps(arms, "dense")) == [-1, -1, -1]
    table[3]["fid_domain"] += 5  # the ticket of seed 1 in setting a
    assert list(tuning.gaps(tuning.arms_of(table)["a"], "dense")) == [-1, 4, -1]


def test_diverged_settings_come_last(quick, monkeypatch):
    measured = iter([(0.3, 9.0), (math.inf, math.inf), (0.1, 7.0), (0.2, 8.0)])
    monkeypatch.setattr(tuning, "train_dense", lambda *_: next(measured))
    args, _ = lth.parse_args(SMALL)
    table = tuning.search(type("Experiment", (), dict(args=args)), 4)
    assert [line["setting"] for line in table] == ["draw 2", "draw 3", "default", "draw 1"]
    assert next(iter(tuning.variations(args, table, False))) == "draw 2"
    said = tuning.conclude(table)
    assert "draw 2 has the lowest" in said and "default is number 3" in said
    with pytest.raises(FloatingPointError, match="every setting diverged"):
        tuning.variations(args, table[3:], False)


def test_a_setting_that_diverges_does_not_end_the_search(quick, tmp_path):
    args, _ = lth.parse_args([*SMALL, "--out", str(tmp_path)])
    setting = tuning.settings(args, 1)["default"] | dict(lr=1e30)
    assert tuning.train_dense(lth.Experiment(args), 0, "wild", setting) == (math.inf, math.inf)


@pytest.mark.parametrize("flags, said", [
    ("--nothing", "--nothing"), ("--controls reinit", "argument --controls: this study sets it itself")])
def test_tuning_refuses_what_it_cannot_use(flags, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tuning.main([*flags.split(), "--out", str(tmp_path)])
    assert stop.value.code == 2 and said in capsys.readouterr().err
