"""The experiment: plan, resume to the bit, refusals, and bad input that ends in one line."""
import collections
import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import lth_diffusion as lth

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = "--rounds 2 --steps 16 --batch 8 --samples 16 --nfe 2 --arms rewind random".split()
MEASURED = {"train_seconds", "seconds_per_1000", "train_memory", "sample_memory"}


def refusal(capsys, *argv):
    """Run main in this process; return (exit code, stderr)."""
    with pytest.raises(SystemExit) as stop:
        lth.main(list(argv))
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("argv, named", [
    ("--dataset nope", "nope"), ("--rounds 0", "--rounds"), ("--prune-rate 1.2", "--prune-rate"),
    ("--prune-rate nan", "--prune-rate"), ("--prune-rate 0", "--prune-rate"), ("--lr inf", "--lr"),
    ("--seeds 0 0", "--seeds"), ("--arms random", "--arms"), ("--device tpu", "--device"),
    ("--control-rounds 9 --rounds 3", "--control-rounds"), ("--final-sparsity 1", "--final-sparsity"),
    ("--steps 1e3", "--steps"), ("--samples -5", "--samples"), ("--samples 3", "--samples"),
    ("--nfe 5000", "--nfe"), ("--nfe 600", "--nfe"), ("--rewind 0.99 --steps 20", "--rewind"),
    ("--device cuda:x", "--device"), ("--granularity channel --method rigl", "--granularity"),
    ("--method rigl --scope ramp", "--scope"), ("--method rst --score taylor", "--score"),
    ("--prune-rate 0.3 --final-sparsity 0.9", "--prune-rate"), ("--round 3", "--round"),
    ("--lr x", "x is not a positive number"), ("--seeds a", "a is not a whole number"),
])
def test_bad_flags_end_in_one_line(capsys, tmp_path, argv, named):
    code, said = refusal(capsys, *argv.split(), "--out", str(tmp_path / "run"))
    assert code == 2 and named in said.splitlines()[-1]


def test_out_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, said = refusal(capsys, "--out", str(tmp_path / "file" / "run"), *SMALL)
    assert code == 2 and "file" in said.splitlines()[-1]


def test_truncated_data_file_is_named(capsys, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08\0\0\0")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b\x08\0\0\0")
    code, said = refusal(capsys, "--dataset", "mnist", "--data-dir", str(tmp_path),
                         "--out", str(tmp_path / "run"))
    assert code == 2 and "train-images-idx3-ubyte.gz" in said.splitlines()[-1]


def test_plan_has_every_round_its_controls_and_the_twin():
    args, _ = lth.parse_args(["--rounds", "3", "--control-rounds", "1", "3", "--seeds", "0", "5"])
    jobs = [job for job in lth.plan(args) if job.seed == 5]
    assert [(j.round, j.arm) for j in jobs] == [
        (0, "dense"), (0, "twin"), (1, "rewind"), (1, "reinit"), (1, "random"), (2, "rewind"), (3, "rewind"),
        (3, "reinit"), (3, "random")]


def test_final_sparsity_sets_the_rate():
    args, _ = lth.parse_args(["--rounds", "4", "--final-sparsity", "0.9"])
    assert abs((1 - args.prune_rate) ** 4 - 0.1) < 1e-12


def test_a_run_older_than_a_flag_did_without_it(tmp_path, capsys):
    """MNIST's beta2 was 0.999 before it was a flag; today's default is another."""
    out, flags = tmp_path / "run", ["--dataset", "mnist", "--out", str(tmp_path / "run"), "--beta2"]
    out.mkdir()
    args, parser = lth.parse_args([*flags, "0.999"])
    made = {name: value for name, value in vars(args).items() if name != "beta2"}
    (out / "config.json").write_text(json.dumps(dict(args=made, commit="old")))
    lth.check_config(args, parser)
    with pytest.raises(SystemExit):
        lth.check_config(*lth.parse_args([*flags, "0.95"]))
    assert "--beta2: " in capsys.readouterr().err
    (out / "config.json").write_text(json.dumps(dict(args=made | dict(seeds=[]), commit="old")))
    with pytest.raises(OSError, match="damaged"):
        lth.read_config(str(out))


def results(out):
    with open(os.path.join(out, "results.csv")) as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def states(out):
    found = {}
    for folder, _, names in os.walk(out):
        for name in sorted(names):
            if name.endswith(".pt"):
                path = os.path.join(folder, name)
                found[os.path.join(os.path.basename(folder), name)] = lth.load_state(path)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("lth") / "whole")
    lth.main([*SMALL, "--out", out])
    return out


@pytest.mark.parametrize("flags, second", [("--score taylor", 50), ("--method rigl", 30),
                                           ("--method rst --steps 40", 52)])
def test_stopped_in_the_middle_of_training(tmp_path, monkeypatch, capsys, flags, second):
    """A partial state, with dropout, moving masks and a score that is not read off the weights: the run that
    goes on from it ends as the one that was never stopped, to the bit."""
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4, dropout=0.2))
    monkeypatch.setattr(lth, "draw_everything", lambda *_: None)
    monkeypatch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
    base = "--rounds 1 --steps 20 --batch 4 --samples 8 --nfe 2 --arms rewind".split()
    for name in ("whole", "stopped"):
        command = [*base, *flags.split(), "--out", str(tmp_path / name)]
        if name == "stopped":
            calls, ask = [], lth.any_rank
            monkeypatch.setattr(lth, "any_rank",
                                lambda flag: flag or calls.append(0) or len(calls) in (10, second))
            for _ in range(2):  # first in the dense run, then in the ticket's, or its transformation
                code, said = refusal(capsys, *command)
                assert code == 130 and "goes on from here" in said
                assert [f for _, _, files in os.walk(tmp_path / name) for f in files if "partial" in f]
            monkeypatch.setattr(lth, "any_rank", ask)
        lth.main(command)
    assert "going on with" in capsys.readouterr().out
    whole, stopped = states(str(tmp_path / "whole")), states(str(tmp_path / "stopped"))
    assert whole.keys() == stopped.keys() and results(tmp_path / "whole") == results(tmp_path / "stopped")
    for name, state in whole.items():
        for part in ("model", "ema", "masks"):
            for key, value in state.get(part, {}).items():
                assert torch.equal(stopped[name][part][key], value), (name, part, key)


def test_tickets_are_what_they_claim(uninterrupted):
    """Nested masks, exact zeros in weights, EMA and ticket file, and theta_k under the mask at the start."""
    from prune import load_ticket, unpack_masks
    args, _ = lth.parse_args([*SMALL, "--out", uninterrupted])
    exp, before = lth.Experiment(args), None
    for job in lth.plan(args):
        state = exp.load(job)
        masks = unpack_masks(exp.new_model(0), state["masks"])
        for name, mask in masks.items():
            for weights in (state["model"], state["ema"]):
                assert bool((weights[name][~mask] == 0).all()), (job, name)
        ticket, ticket_masks = load_ticket(job.path(args.out, ".ticket"))
        assert all(torch.equal(v, state["ema"][k]) for k, v in ticket.state_dict().items())
        assert all(torch.equal(v, masks[k]) for k, v in ticket_masks.items())
        if job.arm in ("dense", "rewind"):
            assert before is None or all(bool((masks[n] <= before[n]).all()) for n in masks)
            before = masks
        model, start_masks, _, first, _ = exp.start(job)
        if job.arm in ("twin", "rewind", "random"):
            theta = lth.load_state(lth.theta_path(args.out, 0))["model"]
            assert first == exp.k
            for name, p in model.named_parameters():
                assert torch.equal(p, theta[name] * (start_masks or {}).get(name, torch.ones(())))


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lth, "ranks", lambda: (0, 2))
    code, said = refusal(capsys, "--batch", "7", "--out", str(tmp_path / "odd"))
    assert code == 2 and "--batch: 7 images cannot be shared by 2 ranks" in said


def damage(path, how):
    """Cut a state file short, flip one bit of its tensors, or give it another version."""
    if how == "cut":
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
    elif how == "flipped":
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    else:
        torch.save(lth.load_state(path) | dict(format=lth.FORMAT + 1), path)


@pytest.mark.parametrize("how, said_of_it", [
    ("cut", "is damaged"), ("flipped", "is damaged"), ("version", "is of another version")])
def test_damaged_state_is_named(uninterrupted, tmp_path, capsys, how, said_of_it):
    out = str(tmp_path / "damaged")
    shutil.copytree(uninterrupted, out)
    path = os.path.join(out, "seed0", "round01_rewind.pt")
    damage(path, how)
    code, said = refusal(capsys, *SMALL, "--out", out)
    assert code == 2 and path in said.splitlines()[-1] and said_of_it in said.splitlines()[-1]


def test_a_second_run_on_the_same_folder_is_refused(uninterrupted, capsys):
    with lth.alone_in(uninterrupted):
        code, said = refusal(capsys, *SMALL, "--out", uninterrupted)
    assert code == 2 and uninterrupted in said and "another run" in said.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is Unix's")
def test_a_full_disk_is_named_and_what_was_done_is_kept(uninterrupted, tmp_path):
    """A limit on the size of files stands in for a full disk; without it the same command goes on."""
    out = str(tmp_path / "full")
    shutil.copytree(uninterrupted, out)
    os.remove(os.path.join(out, "seed0", "round02_random.pt"))
    command = f"ulimit -f 300; exec {sys.executable} lth_diffusion.py {' '.join(SMALL)} --out {out}"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "disk full" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not [name for name in os.listdir(os.path.join(out, "seed0")) if name.endswith(".part")]
    lth.main([*SMALL, "--out", out])
    assert results(out) == results(uninterrupted)


def test_out_of_memory_names_the_flags(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")
    monkeypatch.setattr(lth, "run", fail)
    code, said = refusal(capsys, *SMALL, "--out", str(tmp_path / "run"))
    assert code == 1 and "--batch" in said and "20.00 GiB" in said and "more lines" not in said


def test_a_loss_that_is_not_finite_stops_with_what_was_done(tmp_path, capsys):
    flags = "--steps 30 --batch 8 --lr 1e30 --optimizer sgd --samples 8 --nfe 2 --rounds 1"
    code, said = refusal(capsys, *flags.split(), "--out", str(tmp_path / "run"))
    assert code == 1 and "seed 0 round 0 dense" in said and "--lr" in said
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".pt")]


# ------------------------------------------------------------------------------------------------- pictures

def test_pictures_survive_odd_data(tmp_path):
    chart = str(tmp_path / "chart.png")
    nan = float("nan")
    for series in ([], [dict(label="one", x=[1], y=[2.0])], [dict(label="none", x=[0, 1], y=[nan, None])],
                   [dict(label="flat " * 20, x=[0, 1, 2], y=[3] * 3, y_low=[2, nan, 2], y_high=[4, nan, 4])]):
        lth.line_chart(series, chart, "title", "x", "y", hlines=[("floor", nan, "dotted")], log_y=True)
    lth.heat_map([[nan, 0.0], [1.0, 0.5]], ["a", "b" * 80], ["0", "1"], chart, "title", log=True)
    lth.sample_rows([("row", np.zeros((2, 3, 8, 8), np.uint8)), ("empty", np.zeros((0, 1, 8, 8), np.uint8))],
                    chart, "title")
    assert os.path.getsize(chart) > 500


def test_tables_align():
    text = lth.text_table(["name", "value"], [["a", 1.5], ["long name", None]])
    assert len({len(line) for line in text.splitlines()[:3]}) == 1 and text.splitlines()[3].endswith("-")
    assert lth.markdown_table(["a|b"], [["x"]]).splitlines()[0] == "| a\\|b |"


# --------------------------------------------------------------------------------- every way to find a ticket

@pytest.mark.parametrize("flags", [
    "--method oneshot --score taylor --scope cka", "--method rigl", "--method rst --steps 40",
    "--granularity channel"])
def test_methods_run_with_all_arms_at_exact_counts(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))  # seconds, not minutes
    monkeypatch.setattr(lth, "draw_everything", lambda *_: None)
    monkeypatch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
    out = str(tmp_path / "run")
    base = "--rounds 2 --steps 12 --batch 4 --samples 8 --nfe 2 --control-rounds 1 2 --precision fp32 --arms"
    lth.main([*base.split(), *lth.ARMS, *flags.split(), "--out", out])
    rows = results(out)
    assert "no verdict" in capsys.readouterr().out
    for round in (1, 2):
        live = {r["arm"]: int(r["live_weights"]) for r in rows if int(r["round"]) == round}
        assert set(lth.ARMS) <= set(live)
        assert live["rewind"] == live["reinit"] == live["random"] == live["finetune"]
        total = int(rows[0]["total_weights"])
        if "channel" not in flags and "rst" not in flags:
            first = total - int(np.rint(0.2 * total))
            wanted = first if round == 1 else first - int(np.rint(0.2 * first))
            slack = 1 if "method" in flags else 0  # one cut may round otherwise
            assert abs(live["rewind"] - wanted) <= slack
    consumed = [int(r["train_steps_total"]) for r in rows if r["arm"] == "rewind"]
    assert consumed == sorted(consumed) and consumed[0] >= 12
