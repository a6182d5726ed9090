"""studies/tuning.py: its command line with runs as small as they can be, its report by hand."""
import collections
import csv
import math
import os

import numpy as np
import pytest

import lth_diffusion as lth
from studies import tuning

SMALL = "--rounds 1 --final-sparsity 0.9 --steps 8 --batch 8 --samples 8 --nfe 2".split()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(lth, "draw_everything", lambda *_: None)
    monkeypatch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
    monkeypatch.setattr(lth, "VAL_IMAGES", 200)
    monkeypatch.setattr(tuning, "BATCHES", (4, 8, 16))
    monkeypatch.setattr(tuning, "SEARCH_NET", 0)  # that of the tickets, so that both can be compared


def test_tuning(quick, tmp_path, capsys):
    flags = ["--settings", "3", "--half", "--runs", str(tmp_path), "--out", str(tmp_path), *SMALL]
    tuning.main(flags)
    said = capsys.readouterr().out
    assert said[said.rindex("Spearman"):].count("n=1, no verdict") == 3 and "n=3." in said
    with open(tmp_path / "tuning_digits.csv") as file:
        rows = list(csv.DictReader(file))
    search, tickets = ([row for row in rows if row["part"] == part] for part in ("search", "tickets"))
    assert [row["setting"] for row in search] == ["default", "draw 1", "draw 2"]
    assert all(int(row["steps"]) * int(row["batch"]) == 8 * 8 for row in search)  # as many images
    best = min(search, key=lambda row: float(row["val_loss"]))
    assert [row["arm"] for row in tickets] == 3 * ["dense", "ticket", "reinit", "random"]
    for row, times in zip(tickets, [1] * 4 + [4] * 4 + [1] * 4):
        assert float(row["lr"]) * times == pytest.approx(float(best["lr"]), rel=0.01)
        assert all(row[name] == best[name] for name in ("batch", "ema", "lr_schedule", "beta2"))
    assert {int(row["steps"]) for row in tickets[:8]} == {int(best["steps"])}
    assert {int(row["steps"]) for row in tickets[8:]} == {int(best["steps"]) // 2}
    # the search trains what lth_diffusion.py trains: in the best setting its run has the same dense network
    assert float(tickets[0]["val_loss"]) == pytest.approx(float(best["val_loss"]), rel=1e-5)
    for name in ("tuning_digits.png", "tuning_digits_arms.png", "tuning_digits.json"):
        assert os.path.getsize(tmp_path / name) > 200
    folders = {name for name in os.listdir(tmp_path) if "_lr" in name}
    assert len(folders) == 3


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


def table_of(values):
    """Rows of the tickets: {setting: {arm: values over seeds}}; val_loss is a hundredth of fid_domain."""
    return [["tickets", name, seed, arm, *[0] * 6, value / 100, value] for name, arms in values.items()
            for arm, over in arms.items() for seed, value in enumerate(over)]


def test_a_verdict_that_changes_with_the_rate_is_said():
    winning = dict(dense=[5, 5.1, 4.9], ticket=[5, 5.0, 4.9], reinit=[7, 7.2, 6.9], random=[8, 8.1, 7.8])
    losing = winning | dict(ticket=[9, 9.1, 8.8])
    table = table_of(dict(best=winning, slow=losing))
    assert "DIFFERS" in tuning.conclude(table)
    assert "is the same" in tuning.conclude(table_of(dict(best=winning, slow=winning)))
    found = {tuple(row[:3]): row[3:] for row in tuning.differences(table)}
    assert len(found) == 2 * 3 * 3  # quantities, other arms, and the two settings and their difference
    assert found["best", "ticket - reinit", "fid_domain"][:2] == [3, pytest.approx(-6.2 / 3)]
    n, mean, low, high = found["slow, less best", "ticket - reinit", "fid_domain"]  # 4, 4.1, 3.9 a seed
    half = 4.3027 * np.std([4, 4.1, 3.9], ddof=1) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((4, 4 - half, 4 + half), abs=1e-4)


def test_diverged_settings_come_last():
    table = [["search", name, 0, "dense", *[0] * 6, loss, fid] for name, loss, fid in (
        ("default", 0.3, 9.0), ("draw 1", math.nan, math.nan), ("draw 2", 0.1, 7.0), ("draw 3", 0.2, 8.0))]
    assert [row[1] for row in tuning.rank(table)] == ["draw 2", "draw 3", "default", "draw 1"]
    assert "draw 2 has the lowest" in tuning.conclude(table) and "+1.00, n=3" in tuning.conclude(table)
    assert "default is number 3" in tuning.conclude(table)


def test_a_setting_that_diverges_does_not_end_the_search(quick, tmp_path):
    args, _ = lth.parse_args([*SMALL, "--out", str(tmp_path)])
    exp = lth.Experiment(args)
    setting = tuning.settings(args, 1)["default"] | dict(lr=1e30)
    assert all(math.isnan(v) for v in tuning.train_dense(exp, 0, "wild", setting))


def test_tuning_refuses_unknown_flags(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tuning.main(["--nothing", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "--nothing" in capsys.readouterr().err


def test_gaps_are_paired_by_seed():
    """Two settings of equal values, whose seeds stand in another order: they differ by nothing."""
    table = [["tickets", name, seed, arm, *[0] * 7, seed + (arm == "dense")]
             for name, seeds in (("a", (1, 0, 2)), ("b", (0, 1, 2))) for arm in ("dense", "ticket")
             for seed in seeds]
    for name in "ab":
        assert list(tuning.gaps(table, name, "dense", 11)) == [-1, -1, -1]
    table[3][11] += 5  # the ticket of seed 1 in setting a
    assert list(tuning.gaps(table, "a", "dense", 11)) == [-1, 4, -1]
