"""The experiment: the loop and its plan, resume to the bit, refusals, bad input that ends in one line."""
import copy
import csv
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from methods import channels, cka, magnitude_init, oneshot, random_pruning, rigl, rst, taylor
from prune import dense_masks, live_total, load_ticket, prunable, prune_magnitude
from support import cli, ranks, report, runs

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = "--rounds 2 --steps 16 --batch 8 --samples 16 --nfe 4 --controls random".split()
MEASURED = {"train_seconds", "seconds_per_1000", "train_memory", "sample_memory"}


def refusal(capsys, *argv, main=lth.main):
    """Run main in this process; return (exit code, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code, capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch):
    """A network of seconds, not minutes, without pictures."""
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4, dropout=0.2))
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    monkeypatch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))


@pytest.mark.parametrize("argv, named", [
    ("--dataset nope", "nope"), ("--rounds 0", "--rounds"), ("--prune-rate 1.2", "--prune-rate"),
    ("--prune-rate nan", "--prune-rate"), ("--prune-rate 0", "--prune-rate"), ("--lr inf", "--lr"),
    ("--controls nothing", "--controls"), ("--device tpu", "--device"),
    ("--control-rounds 9 --rounds 3", "--control-rounds"), ("--final-sparsity 1", "--final-sparsity"),
    ("--steps 1e3", "--steps"), ("--samples -5", "--samples"), ("--samples 3", "--samples"),
    ("--nfe 5000", "--nfe"), ("--nfe 600", "--nfe"), ("--rewind 0.99 --steps 20", "--rewind"),
    ("--device cuda:x", "--device"), ("--prune-rate 0.3 --final-sparsity 0.9", "--prune-rate"),
    ("--round 3", "--round"), ("--lr x", "x is not a positive number"),
    ("--seeds a", "a is not a whole number"), ("--preset cifar --dataset mnist", "--preset"),
    ("--rounds 3 --prune-rate 0.99", "--prune-rate"), ("--final-sparsity 0.99999", "--final-sparsity"),
    ("--score lamp --scope layer", "--score"), ("--warmup -1", "--warmup"),
    ("--samples 200000000000", "--samples"), ("--batch 99999999999", "--batch"),
])
def test_bad_flags_end_in_one_line(capsys, tmp_path, argv, named):
    """Before any folder is made, and so before any training."""
    code, said = refusal(capsys, *argv.split(), "--out", str(tmp_path / "run"))
    assert code == 2 and named in said.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main, argv, named", [
    (rigl.main, "--scope ramp", "--scope"), (rst.main, "--steps 20", "--steps"),
    (channels.main, "--scope erk", "--scope"), (rigl.main, "--rewind 0.2", "--rewind"),
    (taylor.main, "--nfe 2", "--nfe"), (cka.main, "--scope layer", "--scope"),
    (oneshot.main, "--prune-rate 0", "--prune-rate"), (rigl.main, "--grow x", "--grow"),
])
def test_methods_refuse_what_they_cannot_do(capsys, tmp_path, main, argv, named):
    code, said = refusal(capsys, *argv.split(), "--out", str(tmp_path / "run"), main=main)
    assert code == 2 and named in said.splitlines()[-1] and "methods." in said


@pytest.mark.parametrize("module, flags", [
    (lth, ""), (lth, "--rewind 0 --optimizer sgd --lr 0.01"), (lth, "--rewind 0.5 --ema 0.5"), (cka, ""),
    (channels, ""), (channels, "--oneshot --rewind 0.5"), (oneshot, ""), (taylor, ""),
    (lth, "--score lamp")])
def test_a_ticket_that_prunes_nothing_is_the_dense_run(quick, tmp_path, module, flags):
    """To the bit, after training: weights, average, losses and quality; a random mask of all weights too."""
    out = tmp_path / "run"
    base = "--rounds 1 --prune-rate 1e-9 --steps 12 --batch 4 --samples 8 --nfe 4 --controls random"
    module.main([*base.split(), *flags.split(), "--out", str(out)])
    dense, *others = (runs.load_state(str(out / "seed0" / name))
                      for name in ("round00_dense.pt", "round01_ticket.pt", "round01_random.pt"))
    for other in others:
        for part in ("model", "ema"):
            assert all(torch.equal(value, other[part][name]) for name, value in dense[part].items()), part
        assert other["losses"] == dense["losses"]
        assert all(other["row"][column] == dense["row"][column] for column in
                   ("fid_domain", "val_loss", "val_loss_t4", "mean_pixel", "classes_domain"))
    columns = "fid_domain", "val_loss", "classes_domain", "live_weights", "macs_live"
    rows = [[row[column] for column in columns] for row in results(out) if row["arm"] != "probe"]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2]


def test_score_is_for_a_ranking_over_the_network():
    assert lth.parse_args(["--score", "lamp"])[0].score == "lamp"
    assert lth.parse_args(["--score", "magnitude", "--scope", "layer"])[0].score == "magnitude"


@pytest.mark.parametrize("rate, rounds, expected", [
    (0.2, 10, [5, 10]), (0.2, 3, [3]), (0.5, 4, [2, 4]), (0.9, 1, [1])])
def test_controls_run_at_the_last_round_and_near_two_thirds(rate, rounds, expected):
    args, _ = lth.parse_args(["--prune-rate", str(rate), "--rounds", str(rounds)])
    assert args.control_rounds == expected


def test_out_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, said = refusal(capsys, "--out", str(tmp_path / "file" / "run"), *SMALL)
    assert code == 2 and "--out" in said.splitlines()[-1]


def test_truncated_data_file_is_named(capsys, tmp_path):
    (tmp_path / "mnist").mkdir()
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / "mnist" / name).write_bytes(b"\x1f\x8b\x08\0\0\0")
    code, said = refusal(capsys, "--dataset", "mnist", "--data-dir", str(tmp_path),
                         "--out", str(tmp_path / "run"))
    assert code == 2 and "train-images-idx3-ubyte.gz" in said.splitlines()[-1]


# ------------------------------------------------------------------------------------------- the loop

def test_jobs_has_every_round_its_controls():
    args, _ = lth.parse_args(["--rounds", "3", "--control-rounds", "1", "3", "--seeds", "0", "5"])
    jobs = [job for job in lth.jobs(args) if job.seed == 5]
    assert [(j.round, j.arm) for j in jobs] == [
        (0, "dense"), (1, "ticket"), (1, "reinit"), (1, "random"), (2, "ticket"), (3, "ticket"),
        (3, "reinit"), (3, "random")]


def test_rounds_that_nobody_asked_for():
    """Digits: two rounds to 90 %; others, and where a rate is given: rounds of 20 %."""
    for flags, expected in (([], (2, 0.9)), (["--rounds", "3"], (3, None)), (["--prune-rate", "0.5"], (10, None)),
                            (["--dataset", "mnist"], (10, None)), (["--demo"], (1, 0.8)),
                            (["--demo", "--final-sparsity", "0.5"], (1, 0.5))):
        args, _ = lth.parse_args(flags)
        assert (args.rounds, args.final_sparsity) == expected, flags
    demo = lth.parse_args(["--demo"])[0]
    assert demo.controls == ["reinit"] and demo.out == "runs/demo"
    assert [str(job) for job in lth.jobs(demo)] == [
        "seed 0 round 0 dense", "seed 0 round 1 ticket", "seed 0 round 1 reinit"]
    assert lth.parse_args(["--demo", "--controls"])[0].controls == []


def test_the_dense_run_of_another_run_is_taken_over(uninterrupted, tmp_path, monkeypatch, capsys):
    """With another scope the tickets alone are trained; whatever a dense network depends on is refused."""
    trained, out, train = [], str(tmp_path / "layer"), lth.train
    monkeypatch.setattr(lth, "train", lambda *a, **k: trained.append(k["label"]) or train(*a, **k))
    monkeypatch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
    command = [*SMALL, "--scope", "layer", "--dense-from", uninterrupted, "--out", out]
    lth.main(command)
    assert trained == ["seed 0 round 1 ticket", "seed 0 round 2 ticket", "seed 0 round 2 random"]
    assert results(out)[0] == results(uninterrupted)[0] and results(out)[1] != results(uninterrupted)[1]
    lth.main([word for word in command if word not in ("--dense-from", uninterrupted)])  # and goes on without
    for flags, named in (["--steps", "17"], "--steps 16, not 17"), (["--seeds", "3"], "no dense network"), \
            (["--dense-from", str(tmp_path)], "config.json"):
        code, said = refusal(capsys, *command, *flags, "--out", str(tmp_path / "other"))
        assert code == 2 and named in said.splitlines()[-1]


def test_another_kind_of_experiment_lends_no_dense_network(uninterrupted, tmp_path, capsys, monkeypatch):
    """A run on codes, say, has the same flags and other networks."""
    class Other(lth.Experiment):
        pass
    args, parser = lth.parse_args([*SMALL, "--dense-from", uninterrupted, "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as stop:
        lth.run(args, parser, experiment=Other)
    assert stop.value.code == 2 and "was made by Experiment, this run is Other" in capsys.readouterr().err


def test_the_fine_tuned_control_leaves_the_dense_network_as_it_was(tmp_path):
    """Its weights are a copy: what is cut later must not depend on the controls that were asked for."""
    args, _ = lth.parse_args([*SMALL, "--controls", "finetune", "--control-rounds", "2", "--out", str(tmp_path)])
    exp = lth.Experiment(args)
    model = exp.new_model(0)
    row = dict(train_steps_total=1, train_macs_total=1)
    dense = lth.Trained(model, copy.deepcopy(model), dense_masks(model), row)
    before = copy.deepcopy(model.state_dict())
    masks = prune_magnitude(model, dense.masks, 0.5)
    (_, tuned, *_), = lth.controls(exp, lth.Job(0, 2, "ticket"), masks, dense, dense)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert live_total(masks) >= sum(int(p.count_nonzero()) for p in prunable(tuned).values())


def test_repeated_values_of_a_list_count_once():
    args, _ = lth.parse_args("--seeds 1 1 0 --controls random random --control-rounds 2 2".split())
    assert args.seeds == [1, 0] and args.controls == ["random"] and args.control_rounds == [2]
    assert len(set(lth.jobs(args))) == len(lth.jobs(args))


def test_final_sparsity_sets_the_rate():
    args, _ = lth.parse_args(["--rounds", "4", "--final-sparsity", "0.9"])
    assert abs((1 - args.prune_rate) ** 4 - 0.1) < 1e-12


@pytest.mark.parametrize("module, flags", [
    (lth, ""), (lth, "--scope ramp --rewind 0"), (oneshot, ""), (random_pruning, "--scope erk"),
    (magnitude_init, ""), (rigl, ""), (rigl, "--grow random"), (rst, "--steps 40"), (taylor, ""),
    (taylor, "--oneshot"), (cka, ""), (channels, ""), (channels, "--oneshot --scope layer")])
def test_every_method_trains_its_jobs_at_exact_counts(quick, tmp_path, capsys, module, flags):
    """All controls at two rounds: the jobs planned are those trained, in this order, and each arm of a
    round has as many weights."""
    out, trained = str(tmp_path / "run"), []
    base = "--rounds 2 --steps 12 --batch 4 --samples 8 --nfe 4 --control-rounds 1 2 --controls"
    argv = [*base.split(), *lth.CONTROLS, *flags.split(), "--precision", "fp32", "--out", out]
    train = lth.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "train", lambda *a, **k: trained.append(k["label"]) or train(*a, **k))
        module.main(argv)
    rows = results(out)
    planned = [f"seed {r['seed']} round {r['round']} {r['arm']}" for r in rows]
    assert trained == planned and len(set(planned)) == len(planned)
    assert f"{len(rows)} training runs, 0 of them done" in capsys.readouterr().out
    total, tickets = int(rows[0]["total_weights"]), [r for r in rows if r["arm"] == "ticket"]
    first = total - round(0.2 * total)
    for number, wanted in ((1, first), (2, first - round(0.2 * first))):
        live = {r["arm"]: int(r["live_weights"]) for r in rows if r["round"] == str(number)}
        assert set(lth.CONTROLS) <= set(live)
        assert live["ticket"] == live["reinit"] == live["random"] == live["finetune"] < total
        if module not in (channels, rst, magnitude_init):  # these round by layer or group
            assert abs(live["ticket"] - wanted) <= 1  # one cut may round otherwise than two
    steps = [int(r["train_steps_total"]) for r in tickets]
    assert steps == sorted(steps) and steps[0] >= 12


def results(out):
    with open(os.path.join(out, "results.csv")) as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def states(out):
    found = {}
    for folder, _, names in os.walk(out):
        for name in sorted(names):
            if name.endswith(".pt"):
                path = os.path.join(folder, name)
                found[os.path.join(os.path.basename(folder), name)] = runs.load_state(path)
    return found


def equal(a, b):
    """Whether two runs ended with equal tables and, to the bit, equal weights, averages and masks."""
    one, two = states(a), states(b)
    parts = [(name, part, key) for name, state in one.items() for part in ("model", "ema", "masks")
             for key in state.get(part, {})]
    return one.keys() == two.keys() and results(a) == results(b) and all(
        torch.equal(one[name][part][key], two[name][part][key]) for name, part, key in parts)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("lth") / "whole")
    lth.main([*SMALL, "--out", out])
    return out


@pytest.mark.parametrize("main, flags, second", [
    (taylor.main, "", 35), (rigl.main, "", 30), (rst.main, "--steps 40", 52),
    (channels.main, "", 35)])
def test_stopped_in_the_middle_of_training(tmp_path, monkeypatch, capsys, quick, main, flags, second):
    """A partial state, with dropout, moving masks and a score that is not read off the weights: the
    run that goes on from it ends as the one that was never stopped, to the bit."""
    base = "--rounds 1 --steps 20 --batch 4 --samples 8 --nfe 4 --controls".split()
    for name in ("whole", "stopped"):
        command = [*base, *flags.split(), "--out", str(tmp_path / name)]
        if name == "stopped":
            calls = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runs, "any_rank", lambda flag: flag or calls.append(0) or
                              len(calls) in (10, second))
                for _ in range(2):  # in the dense run, then in the ticket's or its transformation
                    code, said = refusal(capsys, *command, main=main)
                    assert code == 130 and "goes on from here" in said
                    assert [f for _, _, files in os.walk(tmp_path / name) for f in files
                            if "partial" in f]
        main(command)
    assert "going on at step" in capsys.readouterr().out
    assert equal(str(tmp_path / "whole"), str(tmp_path / "stopped"))


def test_tickets_are_what_they_claim(uninterrupted):
    """Nested masks, exact zeros in weights, EMA and ticket file."""
    args, _ = lth.parse_args([*SMALL, "--out", uninterrupted])
    exp, before = lth.Experiment(args), None
    for job in lth.jobs(args):
        trained = exp.load(job)
        for name, mask in trained.masks.items():
            for model in (trained.model, trained.ema):
                assert bool((dict(model.named_parameters())[name][~mask] == 0).all()), (job, name)
        ticket, masks = load_ticket(job.path(args.out, ".ticket"))
        ema = trained.ema.state_dict()
        assert all(torch.equal(v, ema[k]) for k, v in ticket.state_dict().items())
        assert all(torch.equal(v, trained.masks[k]) for k, v in masks.items())
        if job.arm in ("dense", "ticket"):
            assert before is None or all(bool((masks[n] <= before[n]).all()) for n in masks)
            before = masks


def test_a_control_starts_where_it_says(uninterrupted):
    """random: the weights of step k under another mask of the same counts; reinit: others."""
    args, _ = lth.parse_args([*SMALL, "--controls", "reinit", "random", "--out", uninterrupted])
    exp = lth.Experiment(args)
    dense, ticket = exp.load(lth.Job(0, 0, "dense")), exp.load(lth.Job(0, 2, "ticket"))
    job, found = lth.Job(0, 2, "ticket"), {}
    for arm, model, masks, options in lth.controls(exp, job, ticket.masks, dense, dense):
        found[arm] = masks
        weights = dict(model.named_parameters())
        if arm == "random":
            assert options["state"]["step"] == exp.k
            then = dense.checkpoint["model"]
            assert all(torch.equal(weights[n], then[n] * m) for n, m in masks.items())
        else:
            assert "state" not in options
    assert all(torch.equal(found["reinit"][n], m) for n, m in ticket.masks.items())
    assert all(int(found["random"][n].sum()) == int(m.sum()) for n, m in ticket.masks.items())
    assert any(not torch.equal(found["random"][n], m) for n, m in ticket.masks.items())


# ---------------------------------------------------------------------- a folder and what it survives

def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ranks, "ranks", lambda: (0, 2))
    code, said = refusal(capsys, "--batch", "7", "--out", str(tmp_path / "odd"))
    assert code == 2 and "--batch: 7 images cannot be shared by 2 ranks" in said


def damage(path, how):
    """Cut a state file short, flip one bit of its tensors, or give it another version."""
    if how == "version":
        torch.save(runs.load_state(path) | dict(format=runs.FORMAT + 1), path)
        return
    with open(path, "r+b") as file:
        if how == "cut":
            file.truncate(os.path.getsize(path) // 2)
            return
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("how, said_of_it", [
    ("cut", "is damaged"), ("flipped", "is damaged"), ("version", "is of another version")])
def test_damaged_state_is_named(uninterrupted, tmp_path, capsys, how, said_of_it):
    out = str(tmp_path / "damaged")
    shutil.copytree(uninterrupted, out)
    path = os.path.join(out, "seed0", "round01_ticket.pt")
    damage(path, how)
    code, said = refusal(capsys, *SMALL, "--out", out)
    assert code == 2 and path in said.splitlines()[-1] and said_of_it in said.splitlines()[-1]
    assert "delete" not in said and os.path.exists(path)


def test_a_second_run_on_the_same_folder_is_refused(uninterrupted, capsys):
    with runs.alone_in(uninterrupted):
        code, said = refusal(capsys, *SMALL, "--out", uninterrupted)
    assert code == 2 and uninterrupted in said and "another run" in said.splitlines()[-1]


def test_another_method_on_the_same_folder_is_refused(uninterrupted, capsys):
    code, said = refusal(capsys, *SMALL, "--out", uninterrupted, main=oneshot.main)
    assert code == 2 and "lth_diffusion.py" in said and "choose another --out" in said


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is Unix's")
def test_a_full_disk_is_named_and_what_was_done_is_kept(uninterrupted, tmp_path):
    """A limit on the size of files stands in for a full disk; without it the same command goes on."""
    out = str(tmp_path / "full")
    shutil.copytree(uninterrupted, out)
    os.remove(os.path.join(out, "seed0", "round02_random.pt"))
    command = f"ulimit -f 300; exec {sys.executable} lth_diffusion.py {' '.join(SMALL)} --out {out}"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 2 and "could not be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "disk is full" not in done.stderr  # it is not
    assert not [name for name in os.listdir(os.path.join(out, "seed0")) if name.endswith(".part")]
    lth.main([*SMALL, "--out", out])
    assert results(out) == results(uninterrupted)


@pytest.mark.parametrize("where, named", [("train", "--batch"), ("draw_samples", "--samples")])
def test_out_of_memory_names_the_flag_of_its_phase(quick, monkeypatch, tmp_path, capsys, where, named):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")
    monkeypatch.setattr(lth, where, fail)
    code, said = refusal(capsys, *SMALL, "--out", str(tmp_path / "run"))
    assert code == 1 and f"lower {named}" in said and "20.00 GiB" in said and "more" not in said


def test_a_loss_that_is_not_finite_stops_with_what_was_done(tmp_path, capsys):
    flags = "--steps 30 --batch 8 --lr 1e30 --optimizer sgd --samples 8 --nfe 4 --rounds 1"
    code, said = refusal(capsys, *flags.split(), "--out", str(tmp_path / "run"))
    assert code == 1 and "seed 0 round 0 dense" in said and "--lr" in said
    found = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert not [name for name in found if name.startswith("round")]
