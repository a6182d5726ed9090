"""
pytest tests/test_verdict.py      # seconds, no network, no data

Tables whose verdict is known, bad files that end in one line, and the calibration on a few draws.
"""
import argparse
import csv
import json
import math

import numpy as np
import pytest
import scipy.stats

from checks import verdict
from lth_diffusion import MARGINS, Job
from support.report import COLUMNS, write_table
from support.verdict import verdicts

WIN = dict(dense=(10, 11, 12), ticket=(10.1, 11.0, 12.1), reinit=(14, 15, 16.5), random=(20, 21, 19))


def write(path, arms, round=10, sparsity=0.9, columns=tuple(COLUMNS), seeds=(0, 1, 2), mode="w"):
    """A results.csv with one round, or with mode='a' one round more; its path as a string."""
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if mode == "w":
            writer.writeheader()
        for arm, values in arms.items():
            dense = arm == "dense"
            where = dict(round=0 if dense else round, sparsity=0.0 if dense else sparsity)
            for seed, value in zip(seeds, values):
                writer.writerow(where | dict(seed=seed, arm=arm, fid_domain=value, val_loss=1.0,
                                             n_samples=2000, total_weights=100))
    return str(path)


def told(capsys, *argv):
    verdict.main(list(argv))
    return capsys.readouterr().out


def refused(capsys, *argv):
    """The one line on stderr of a run that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        verdict.main(list(argv))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err


# --- verdicts from files

def test_winning(tmp_path, capsys):
    out = told(capsys, write(tmp_path / "a.csv", WIN | dict(small=(99, 99, 99))))
    assert "winning (3 seeds, p=" in out and "not shown" not in out and "n_samples 2000" in out
    assert "At 90.0 % sparsity" in out and "99" not in out
    d, t = np.array(WIN["dense"]), np.array(WIN["ticket"])
    p = scipy.stats.ttest_rel(t, 1.1 * d, alternative="less").pvalue
    assert f"within 10 % of dense: p={p:.4g}\n" in out
    assert f"    ticket - dense: {(t - d).mean():+.4g}, 90 % interval [" in out
    assert "winning" in told(capsys, write(tmp_path / "b.csv", dict(reversed(WIN.items()))))


@pytest.mark.parametrize("arm, values, test", [
    ("ticket", (13, 14, 15.2), "within 10 % of dense"), ("reinit", (10, 11.2, 12), "better than reinit"),
    ("random", (10, 11.2, 12), "better than random mask")])
def test_each_test_can_fail_alone(tmp_path, capsys, arm, values, test):
    arms = WIN | {arm: values}
    if arm == "ticket":  # still far better than both controls
        arms |= dict(reinit=(24, 25, 26.5), random=(30, 31, 29))
    said = told(capsys, write(tmp_path / "a.csv", arms))
    assert "not shown to win (3 seeds" in said and said.count("(p=") == 1 and f"not shown: {test} (p=" in said
    assert "80% power, in each test: from 2.3 sd" in said


def test_margin_and_alpha(tmp_path, capsys):
    path = write(tmp_path / "a.csv", WIN)
    assert "not shown to win" in told(capsys, path, "--margin", "0.01")
    assert "not shown to win" in told(capsys, path, "--alpha", "0.001")
    assert "not shown to win" in told(capsys, path, "--metric", "val_loss")  # all 1.0: better than nobody


def test_every_metric_has_its_own_margin(tmp_path, capsys):
    assert "within 3 % of dense: p=" in told(capsys, write(tmp_path / "a.csv", WIN), "--metric", "val_loss")
    rows = {}
    for number, arm, worse in (0, "dense", 1), (1, "ticket", 1.05), (1, "reinit", 1.5), (1, "random", 2):
        for seed in range(3):
            value = worse * (1 + 0.01 * seed)
            rows[Job(seed, number, arm)] = dict.fromkeys(COLUMNS, 1) | dict(
                seed=seed, round=number, arm=arm, sparsity=0.9, fid_domain=value, val_loss=value)
    args = argparse.Namespace(control_rounds=[1], controls=["reinit", "random"], samples=2000, out=str(tmp_path))
    exp = argparse.Namespace(args=args, rows=rows, planned=list(rows), real=range(2000),
                             reference=dict(fid_domain=0.5, mean_pixel=30.0))
    said = write_table(exp, MARGINS)[2]
    assert "metrics DISAGREE: winning by fid_domain alone" in said and "not shown: within 3 % of dense" in said


def test_no_verdict(tmp_path, capsys):
    two = {arm: values[:2] for arm, values in WIN.items()}
    assert "no verdict (2 seeds; it needs 3)." in told(capsys, write(tmp_path / "a.csv", two))
    diverged = WIN | dict(ticket=(10.1, math.nan, 12.1))
    assert "no verdict (3 seeds; ticket not finite)." in told(capsys, write(tmp_path / "a.csv", diverged))
    out = told(capsys, write(tmp_path / "a.csv", WIN | dict(random=(20, 21))))
    assert "no verdict (2 seeds" in out and "seed 2 left out: not in all arms" in out


def test_files_add_seeds(tmp_path, capsys):
    two = {arm: values[:2] for arm, values in WIN.items()}
    third = {arm: values[2:] for arm, values in WIN.items()}
    paths = [write(tmp_path / "a.csv", two), write(tmp_path / "b.csv", third, seeds=[7])]
    assert "winning (3 seeds" in told(capsys, *paths)
    assert "occur twice" in refused(capsys, paths[0], paths[0])
    text = open(paths[1]).read()
    for old, new, word in ((",2000,", ",500,", "n_samples"), (",100,", ",200,", "total_weights"),
                           (",0.9,", ",0.5,", "round 10")):
        (tmp_path / "c.csv").write_text(text.replace(old, new))
        assert word in refused(capsys, paths[0], str(tmp_path / "c.csv"))


def test_rounds_are_a_family(tmp_path, capsys):
    path = write(tmp_path / "a.csv", WIN)
    alone = told(capsys, path)
    rest = {arm: values for arm, values in WIN.items() if arm != "dense"}
    write(path, rest, round=5, sparsity=0.7, mode="a")
    write(path, {"ticket": (10, 11, 12)}, round=3, sparsity=0.5, mode="a")
    both = told(capsys, path)
    assert "family: 1" in alone and "family: 2" in both
    assert "Round 3 is not tested: no reinit, no random." in both
    p, holm = (float(text.split(", Holm ")[-1].split(")")[0]) for text in (alone, both))
    assert holm == pytest.approx(2 * p, rel=0.01)


# --- bad files

def test_refusals(tmp_path, capsys):
    path = tmp_path / "a.csv"
    for place in (tmp_path / "none.csv", tmp_path):
        assert f"cannot read {place}" in refused(capsys, str(place))
    no_controls = {arm: v for arm, v in WIN.items() if arm in ("dense", "ticket")}
    assert "no reinit, no random" in refused(capsys, write(path, no_controls))
    assert "no dense" in refused(capsys, write(path, {a: v for a, v in WIN.items() if a != "dense"}))
    narrow = ["seed", "round", "arm", "sparsity"]
    assert "no column fid_domain" in refused(capsys, write(path, WIN, columns=narrow))
    good = open(write(path, WIN)).read()
    lines = good.splitlines()
    for text, words in (("", "no column arm"), (lines[0], "no round has all"),
                        (good.replace("10.1", "ten"), "line 5: fid_domain is 'ten'"),
                        (good.replace("10.1", ""), "line 5: fid_domain is ''"),
                        ("\n".join(lines[:4] + ["0,10,ticket"]), "line 5: sparsity is None"),
                        (good.replace("0,10,ticket", "0.5,10,ticket"), "seed is '0.5'"),
                        (good.replace("0.9", "all"), "sparsity is 'all'")):
        path.write_text(text)
        assert words in refused(capsys, str(path))
    path.write_bytes(bytes(range(256)))
    assert "not a text table" in refused(capsys, str(path))


def test_command_line(tmp_path, capsys):
    path = write(tmp_path / "a.csv", WIN)
    assert "results.csv" in refused(capsys) and "results.csv" in refused(capsys, path, "--calibrate")
    assert "--alpha" in refused(capsys, path, "--alpha", "0.7")
    for flag, value in (("--margin", "2"), ("--draws", "0"), ("--metric", "fid"), ("--alpha", "x")):
        with pytest.raises(SystemExit) as stop:
            verdict.main([path, flag, value])
        assert stop.value.code == 2 and flag in capsys.readouterr().err


# --- calibration

ARGS = argparse.Namespace(draws=4000, margin=0.10, alpha=0.05)


def test_boundaries_and_power_are_the_closed_form():
    rng, n = np.random.default_rng(1), 5
    for test in range(3):
        for effect in (0, 1):
            effects = [effect if k == test else verdict.FAR for k in range(3)]
            plain, holm = verdict.p_values(verdict.simulate(rng, [effects], n, ARGS), ARGS)
            assert plain.shape == holm.shape == (1, 4000) and np.array_equal(plain, holm)
            t = scipy.stats.t.ppf(0.95, n - 1)
            expected = scipy.stats.nct.sf(t, n - 1, effect * math.sqrt(n)) if effect else 0.05
            assert verdict.rate(plain, ARGS)[0] == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))
            effect = verdict.detectable(n, 0.05)
            assert scipy.stats.nct.sf(t, n - 1, effect * math.sqrt(n)) == pytest.approx(0.8)


def test_all_draws_at_once_agree_with_the_verdict_itself():
    values = verdict.simulate(np.random.default_rng(2), [[0, 1, 2], [1, 1, 1], [3, 3, 3]], 3, ARGS)
    plain, adjusted = verdict.p_values(values, ARGS)
    for draw in range(20):
        tables = {k: dict(zip(verdict.ARMS, v[:, draw])) for k, v in enumerate(values)}
        found = verdicts(tables, margin=ARGS.margin, alpha=ARGS.alpha).values()
        assert [one.p for one in found] == pytest.approx(list(plain[:, draw]), rel=1e-9)
        assert [one.p_holm for one in found] == pytest.approx(list(adjusted[:, draw]), rel=1e-9)


def test_simulated_values_share_the_seed_and_the_dense_run():
    values = verdict.simulate(np.random.default_rng(0), [[0, 0, 0], [1, 2, 3]], 3, ARGS)
    assert values.shape == (2, 4, 4000, 3) and np.array_equal(values[0, 0], values[1, 0])
    assert np.corrcoef(values[0, 1].ravel(), values[0, 2].ravel())[0, 1] == pytest.approx(0.8, abs=0.03)
    assert values[0].mean((1, 2)) == pytest.approx([100, 110, 110, 110], abs=0.2)
    assert (values[1, 1] - values[1, 2]).mean() == pytest.approx(-2 * math.sqrt(2), abs=0.1)


def test_calibrate(tmp_path, capsys):
    out = told(capsys, "--calibrate", "--draws", "60", "--out", str(tmp_path / "new"))
    assert {p.name for p in (tmp_path / "new").iterdir()} == \
        {"power.png", *(f"verdict_calibration.{end}" for end in ("csv", "md", "json"))}
    with open(tmp_path / "new" / "verdict_calibration.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = {(r["data"], r["setting"], int(r["seeds"])): float(r["rate"]) for r in rows}
    assert len(rates) == len(rows) and all(0 <= v <= 1 for v in rates.values())
    assert rates["normal", "effect 4", 10] == 1 and rates["normal", "all three", 10] < 0.1
    facts = json.loads((tmp_path / "new" / "verdict_calibration.json").read_text("utf-8"))
    assert facts["n"] == 60 and facts["command"].startswith("python -m checks.verdict --calibrate")
    assert (tmp_path / "new" / "verdict_calibration.md").read_text("utf-8").strip() == out.strip()
