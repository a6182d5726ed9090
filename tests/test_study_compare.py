"""studies/compare.py: which runs compare, the differences by hand, and a run of two scopes."""
import csv
import json

import pytest

import lth_diffusion as lth
from studies import compare
from support import cli


def config(**changed):
    args = dict(dataset="digits", samples=16, sampler="dpm", nfe=20) | changed
    return dict(args=args, data_hash="a", classifier_hash="b", commit="c")


def ticket(seed, sparsity, fid, arm="ticket"):
    return dict(arm=arm, seed=str(seed), round="1", sparsity=str(sparsity), fid_domain=str(fid), val_loss="0.1",
                train_steps_total="10")


def test_differences_by_hand():
    """Tickets of equal sparsity, of the seeds that both runs have; another sparsity has no partner."""
    one = [ticket(seed, 0.9, 5 + seed) for seed in (0, 1, 2)] + [ticket(0, 0.5, 4)]
    two = [ticket(seed, 0.9002, 7 + seed) for seed in (1, 2, 3)] + [ticket(0, 0.7, 9)]
    rows = list(compare.differences([("a", None, one), ("b", None, two)]))
    assert rows == [[0.9002, "b", "a", 2, 2.0, None, None]]
    three = [ticket(seed, 0.9, 7 + 2 * seed) for seed in (0, 1, 2)]
    (_, _, _, n, mean, low, high), = compare.differences([("a", None, one), ("b", None, three)])
    assert (n, mean) == (3, 3.0) and low < 3 < high


def test_late_rounds_are_not_taken_for_one_another():
    """At high sparsity 20 % of what is left is little of the whole."""
    rows = [ticket(0, 1 - 0.8 ** r, r) for r in range(1, 31)]
    assert list(compare.tickets(rows).values()) == [{"0": float(r)} for r in range(1, 31)]


@pytest.mark.parametrize("other, named", [
    (config(samples=17), "samples is 16 and 17"), (config() | dict(data_hash="z"), "data_hash"),
    (config(sampler="ddpm"), "sampler")])
def test_runs_that_do_not_compare_are_refused(other, named):
    with pytest.raises(cli.Mistake, match=named):
        compare.check([("a", config(), []), ("b", other, [])])


def test_two_scopes_of_one_dense_network(tiny, tmp_path, capsys):
    flags = "--rounds 1 --prune-rate 0.5 --steps 8 --batch 4 --samples 8 --nfe 4 --controls".split()
    lth.main([*flags, "--out", str(tmp_path / "one")])
    lth.main([*flags, "--scope", "layer", "--dense-from", str(tmp_path / "one"), "--out", str(tmp_path / "two")])
    capsys.readouterr()
    folders = str(tmp_path / "one"), str(tmp_path / "two")
    compare.main([*folders, "--out", str(tmp_path)])
    with open(tmp_path / "compare_one_two.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["arm"]) for row in rows] == [
        ("one", "dense"), ("one", "ticket"), ("two", "dense"), ("two", "ticket")]
    assert rows[0]["fid_domain"] == rows[2]["fid_domain"] and rows[1]["fid_domain"] != rows[3]["fid_domain"]
    gap = json.loads((tmp_path / "compare_one_two.json").read_text())["differences"][0]
    assert gap[:4] == [0.5, "two", "one", 1]
    apart = float(rows[3]["fid_domain"]) - float(rows[1]["fid_domain"])  # of six digits each
    assert gap[4] == pytest.approx(apart, abs=2e-4)
    assert (tmp_path / "compare_one_two.png").stat().st_size > 5_000
    for argv, named in ([folders[0]], "two runs"), ([folders[0], str(tmp_path)], "config.json"):
        with pytest.raises(SystemExit) as stop:
            compare.main([*argv, "--out", str(tmp_path)])
        assert stop.value.code == 2 and named in capsys.readouterr().err
