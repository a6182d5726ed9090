"""studies/tuning.py: its command line with runs as small as they can be, its report by hand."""
import csv

import pytest

import lth_diffusion as lth
from studies import tuning
from support import report, runs

SMALL = "--steps 8 --batch 8 --samples 8 --nfe 4 --seeds 0".split()


@pytest.fixture
def quick(tiny, monkeypatch):
    monkeypatch.setattr(tuning, "RATES", (0.25, 1))
    monkeypatch.setattr(tuning, "ROUNDS", (1, 2))


def test_tuning(quick, tmp_path, capsys):
    tuning.main(["--runs", str(tmp_path), "--out", str(tmp_path), *SMALL])
    assert "No verdict: fewer than three seeds" in capsys.readouterr().out
    with open(tmp_path / "tuning_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows[::4]] == ["0.25 x rate", "1 x rate", "1 round", "2 rounds"]
    assert all([row["arm"] for row in rows[i:i + 4]] == list(tuning.ARMS) for i in range(0, 16, 4))
    assert [float(row["lr"]) for row in rows[::4]] == [2.25e-3, 9e-3, 9e-3, 9e-3]
    by_setting = {row["setting"]: row["fid_domain"] for row in rows if row["arm"] == "ticket"}
    assert by_setting["1 x rate"] == by_setting["1 round"] != by_setting["2 rounds"]  # the same run
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert {"tuning_digits_lr0.00225_rounds1", "tuning_digits_lr0.009_rounds1", "tuning_digits_lr0.009_rounds2"} <= folders
    dense = [runs.load_state(tmp_path / name / "seed0" / "round00_dense.pt")["row"] for name in
             ("tuning_digits_lr0.009_rounds1", "tuning_digits_lr0.009_rounds2")]
    assert dense[0] == dense[1]  # measured seconds included: trained once
    assert (tmp_path / "tuning_digits.png").stat().st_size > 5_000


def test_the_rounds_alone(quick, tmp_path, capsys):
    tuning.main(["--parts", "rounds", "--runs", str(tmp_path), "--out", str(tmp_path), *SMALL])
    with open(tmp_path / "tuning_digits_rounds.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows[::4]] == ["1 round", "2 rounds"]
    said = capsys.readouterr().out
    assert "No verdict: fewer than three seeds" in said and "own best rate" not in said
    tickets = [float(row["fid_domain"]) for row in rows if row["arm"] == "ticket"]
    assert f"1 seed: 2 rounds {tickets[1]:.2f}, 1 round {tickets[0]:.2f}; " in said


def test_a_ticket_is_compared_with_that_of_the_fewest_rounds():
    arms = {arm: near(9) for arm in tuning.ARMS}
    alone = table_of({("rounds", name): arms for name in ("2 rounds", "5 rounds", "10 rounds")})
    assert tuning.conclude(tuning.summarise(alone)) == "Tickets win in 0 of 3 settings."
    table = table_of({("rounds", "2 rounds"): arms, ("rounds", "10 rounds"): arms | dict(ticket=near(8))})
    [said] = tuning.against_fewest(table)
    assert said == ("fid_domain of the ticket, 3 seeds: 10 rounds 8.00, 2 rounds 9.00; "
                    "-1.00 [-1.00, -1.00]: better")
    assert list(tuning.against_fewest(table_of({("rates", "1 x rate"): arms}))) == []


def table_of(values):
    """Rows of the table from {(part, setting): {arm: values over seeds}}."""
    return [dict(zip(tuning.HEADER, [part, name, seed, arm, 0, 2, value / 100, value]))
            for (part, name), arms in values.items() for arm, over in arms.items() for seed, value in enumerate(over)]


def near(value):
    """Three seeds."""
    return [value, value + 0.1, value - 0.1]


def test_every_arm_has_its_own_best_rate():
    """Dense is best at the high rate, reinit at the low one: there it is as good as the ticket."""
    low = dict(dense=near(9), ticket=near(5), reinit=near(5.01), random=near(9))
    high = dict(dense=near(6), ticket=near(7), reinit=near(8), random=near(8.5))
    table = table_of({("rates", "1 x rate"): low, ("rates", "4 x rate"): high})
    best = tuning.arms_of(table)["rates", tuning.OWN]
    assert {arm: values[0] for arm, values in best.items()} == dict(dense=6, ticket=5, reinit=5.01, random=8.5)
    answers = {row[1]: row[8] for row in tuning.summarise(table)}
    assert answers["4 x rate"] == "not shown"  # within 10 % of dense
    low["reinit"] = near(8)
    answers = {row[1]: row[8] for row in tuning.summarise(table_of({("rates", "1 x rate"): low}))}
    assert {name for name, answer in answers.items() if answer == "winning"} == {"1 x rate", tuning.OWN}
    assert answers["4 x rate"] == answers["0.25 x rate"] == "no verdict"  # nothing of them is there


def test_a_setting_without_one_seed_has_no_verdict():
    """Four seeds, of which one diverged as dense: the three that are left would flatter it."""
    whole = {arm: [*near(9), 9.05] for arm in tuning.ARMS} | dict(ticket=[*near(5), 5.05])
    broken = whole | dict(dense=near(9))
    table = table_of({("rates", "1 x rate"): whole, ("rates", "4 x rate"): broken})
    answers = {row[1]: row[8] for row in tuning.summarise(table)}
    assert answers["1 x rate"] == "winning" and answers["4 x rate"] == "no verdict"


def test_what_diverged_has_no_verdict():
    whole = {arm: near(5) for arm in tuning.ARMS}
    broken = whole | dict(reinit=[], random=[])
    summary = list(tuning.summarise(table_of({("rates", "1 x rate"): whole, ("rates", "4 x rate"): broken})))
    assert {row[1]: row[8] for row in summary}["4 x rate"] == "no verdict"
    assert "0 of 3 settings; with each arm at its own best rate: not shown" in tuning.conclude(summary)


def test_a_run_that_diverges_leaves_what_is_done(quick, tmp_path):
    flags = [*SMALL, "--warmup", "0"]
    found = tuning.run_setting(flags, 1e30, 1, str(tmp_path / "wild"))
    assert all(job.arm == "dense" for job in found)  # none, or the dense networks that ended


@pytest.mark.parametrize("flags, said", [
    ("--nothing", "--nothing"), ("--controls reinit", "argument --controls: this study sets it itself")])
def test_tuning_refuses_what_it_cannot_use(flags, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tuning.main([*flags.split(), "--out", str(tmp_path)])
    assert stop.value.code == 2 and said in capsys.readouterr().err
