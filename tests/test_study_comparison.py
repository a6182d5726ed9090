"""studies/comparison.py: three methods in runs as small as they can be; its table by hand."""
import csv
import json

import pytest

import lth_diffusion as lth
from studies import comparison
from support import report, runs

SMALL = "--rounds 2 --steps 16 --batch 8 --samples 16 --nfe 4 --control-rounds 1 2 --seeds 0".split()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder in which imp, oneshot and random have been compared."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:  # seconds, not minutes
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        patch.setattr(report, "draw_run", lambda *_: None)
        patch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
        comparison.main([*SMALL, "--only", "oneshot", "random", "--more-seeds", "1",
                         "--runs", str(folder / "runs"), "--out", str(folder)])
    return folder


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_total_steps_and_density(compared):
    rows = rows_of(compared / "comparison_digits.csv")
    steps = {(row["method"], row["pruned"]): int(row["train_steps_total"]) for row in rows}
    k = 1  # 5 % of 16 steps
    total = 16 + 2 * (16 - k)
    assert steps["dense", "0.0 %"] == 16 and steps["imp", "20.0 %"] == 16 + 16 - k
    assert steps["imp", "36.0 %"] == steps["random, equal cost", "36.0 %"] == total
    assert steps["dense, equal cost", "0.0 %"] == total  # what longer training alone does
    assert abs(steps["oneshot, equal cost", "36.0 %"] - total) <= 1
    assert steps["oneshot", "36.0 %"] == 16 + 16 - k and steps["random", "36.0 %"] == 16
    assert {"imp, reinit", "imp, random", "imp, small"} < {row["method"] for row in rows}
    live = {row["live_weights"] for row in rows
            if row["pruned"] == "36.0 %" and "small" not in row["method"]}
    assert len(live) == 1
    seeds = {row["method"]: int(row["seeds"]) for row in rows}
    assert (seeds["imp"], seeds["oneshot"], seeds["random"], seeds["dense"]) == (1, 2, 2, 2)
    assert seeds["random, equal cost"] == 1


def test_over_dense_is_paired_by_seed(compared):
    every = rows_of(compared / "comparison_digits_runs.csv")
    fid = {(row["method"], row["seed"], row["round"], row["arm"]): float(row["fid_domain"])
           for row in every}
    over = {(row["method"], row["round"]): float(row["over_dense"])
            for row in rows_of(compared / "comparison_digits.csv")}
    assert over["dense", "0"] == 0
    gap = fid["imp", "0", "2", "ticket"] - fid["imp", "0", "0", "dense"]
    assert over["imp", "2"] == pytest.approx(gap, abs=1e-3)
    gaps = [fid["random", seed, "2", "ticket"] - fid["random", seed, "0", "dense"] for seed in "01"]
    assert over["random", "2"] == pytest.approx(sum(gaps) / 2, abs=1e-3)


def test_files(compared):
    with open(compared / "comparison_digits.json", encoding="utf-8") as file:
        assert json.load(file)["n"] == 16
    assert (compared / "comparison_digits.png").stat().st_size > 10_000


def test_one_dense_network_for_all_that_rewind_to_one_step(compared):
    """To the bit, measured seconds included."""
    folder = compared / "runs"
    dense = [runs.load_state(folder / name / "seed0" / "round00_dense.pt")["row"]
             for name in ("imp", "oneshot")]
    assert dense[0] == dense[1]


@pytest.mark.parametrize("flags, said", [
    ("--scope=layer", "argument --scope: this study sets it itself"),
    ("--controls reinit", "argument --controls: this study sets it itself"),
    ("--seeds 0 --more-seeds 0", "argument --more-seeds: name none that --seeds names"),
    ("--runs README.md", "argument --runs: cannot write to README.md"),
    ("--steps 30 --only rst", "argument --steps: 30 are too few for rst"),
    ("--rounds 3 --control-rounds 2", "argument --control-rounds: the last round, 3, is what is compared"),
    ("--nothing", "unrecognized arguments: --nothing"),
])
def test_a_mistake_is_said_before_anything_runs(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "run", lambda *_: pytest.fail("it began to run"))
    with pytest.raises(SystemExit) as stop:
        comparison.main(["--runs", str(tmp_path), "--out", str(tmp_path), *flags.split()])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def row(seed, number, arm, fid, steps):
    return dict(dict.fromkeys(comparison.MEANS, 0.0), seed=seed, round=number, arm=arm,
                fid_domain=fid, train_steps_total=steps, sparsity=0.5 * (number > 0),
                live_weights=100 - 50 * (number > 0))


def test_summary_by_hand():
    """A shared dense network counts once; the dense network of a longer cut is left out."""
    dense = [row(seed, 0, "dense", 10.0 + seed, 20) for seed in (0, 1)]
    tickets = [row(seed, 1, "ticket", 11.0 - seed, 40) for seed in (0, 1)]
    cut = [row(0, 0, "dense", 5.0, 21), row(0, 1, "ticket", 4.0, 40)]
    found = {"imp": [*dense, *tickets], "oneshot": [dense[0], tickets[0]],
             "oneshot, equal cost": cut, "random, equal cost": [row(0, 0, "dense", 3.0, 40)]}
    lines = {line["method"]: line for line in comparison.summarise(found)}
    assert list(lines) == ["dense", "imp", "oneshot", "oneshot, equal cost", "dense, equal cost"]
    assert lines["dense"]["fid_domain"] == 10.5 and lines["dense"]["seeds"] == 2
    assert lines["imp"]["over_dense"] == 0  # +1 and -1
    assert lines["imp"]["sd"] == pytest.approx(0.5 ** 0.5)
    assert lines["oneshot, equal cost"]["over_dense"] == -1 and lines["oneshot"]["sd"] is None


def test_images_to_pay_back():
    """20 steps more than the 20 of dense, which cost 600 MACs; 6 of 10 saved in each of 5 evaluations."""
    table = [dict(line, images_to_pay_back=None) for line in (
        dict(method="dense", train_steps_total=20, train_macs_total=600, macs_live=10),
        dict(method="imp", train_steps_total=40, train_macs_total=900, macs_live=4),
        dict(method="rigl", train_steps_total=20, train_macs_total=100, macs_live=4),
        dict(method="imp, reinit", train_steps_total=40, train_macs_total=900, macs_live=4),
        dict(method="oneshot", train_steps_total=40, train_macs_total=900, macs_live=10),
        dict(method="channels", train_steps_total=40, train_macs_total=900, macs_live=4))]  # trained cheaper
    paid = [line["images_to_pay_back"] for line in comparison.pay_back(table, 5)]
    assert paid == [None, 600 / 30, 0, None, None, 300 / 30]


@pytest.mark.parametrize("value, said", [(8.0, "better"), (10.0, "as good"), (12.0, "worse"), (11.05, "not shown")])
def test_answers_are_paired_and_have_a_margin(value, said):
    imp = [row(seed, 2, "ticket", 10.0 + seed, 40) for seed in range(3)]
    other = [row(seed, 2, "ticket", value + seed + 0.1 * (seed - 1), 40) for seed in range(3)]
    dense = [row(seed, 0, "dense", 20.0, 20) for seed in range(3)]
    found = {line[0]: line[1:] for line in comparison.paired({"imp": [*dense, *imp], "random": other}, 2)}
    assert found["random"][2] == 3 and found["random"][4] == pytest.approx(value - 10) and found["random"][-1] == said
    assert found["dense"][-1] == "worse" and "imp" not in found
    for one in other:
        one["sparsity"] = 0.3
    found = {line[0]: line[1:] for line in comparison.paired({"imp": [*dense, *imp], "random": other}, 2)}
    assert found["random"][:2] == ["imp", "30.0 %"] and found["random"][-1] == "other density"
    longer = {"random, equal cost": [row(seed, 0, "dense", 5.0, 40) for seed in range(3)]}
    found = {line[0]: line[1:] for line in comparison.paired({"imp": [*dense, *imp], **longer}, 2)}
    assert found["dense, equal cost"][-1] == "better" and "random, equal cost" not in found


def test_shuffled_similarities_are_compared_with_those_as_they_are():
    found = {name: [row(seed, 2, "ticket", value + seed, 40) for seed in range(3)]
             for name, value in (("imp", 10.0), ("imp-cka", 8.0), ("imp-cka-shuffled", 12.0))}
    found["imp"] += [row(seed, 0, "dense", 20.0, 20) for seed in range(3)]
    rows = {tuple(line[:2]): line[2:] for line in comparison.paired(found, 2)}
    assert rows["imp-cka-shuffled", "imp-cka"][3] == 4 and rows["imp-cka-shuffled", "imp"][3] == 2


def test_columns_of_the_picture():
    def columns(method, number, steps=46):
        line = dict(method=method, round=number, train_steps_total=steps)
        return list(comparison.columns_of(line, dict(round=2, train_steps_total=46)))
    equal = comparison.LONG
    assert columns("dense", 0) == [1, 2] and columns("dense, equal cost", 0) == [equal]
    assert columns("imp-erk", 2) == [2, equal] and columns("imp-erk", 1) == [1]
    assert columns("imp-cka", 2, steps=78) == [2] and columns("imp, random", 2) == [2]
    assert columns("oneshot", 2) == [2]
