"""What a run survives: SIGKILL at any moment, SIGTERM, a rank that dies; it ends with the same numbers."""
import collections
import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import lth_diffusion as lth
from support import report, runs

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ("--rounds 2 --steps 16 --batch 8 --samples 16 --nfe 4 --controls random").split()
MEASURED = {"train_seconds", "seconds_per_1000", "train_memory", "sample_memory"}
KILLS, PROCESSES = 20, 4
PHASES = ("starting", "training", "sampling", "saving")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and ranks are Unix's")


def results(out):
    """The table without what is measured by a clock."""
    with open(os.path.join(out, "results.csv")) as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def weights(out):
    """{(file, part, name): tensor} of every state file of a run."""
    found = {}
    for name in sorted(os.listdir(os.path.join(out, "seed0"))):
        if name.endswith(".pt"):
            state = runs.load_state(os.path.join(out, "seed0", name))
            for part in ("model", "ema", "masks"):
                found |= {(name, part, key): value for key, value in state.get(part, {}).items()}
    return found


def same(a, b):
    """Whether two runs ended with equal tables and, to the bit, equal weights, averages and masks."""
    first, second = weights(a), weights(b)
    return results(a) == results(b) and first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items())


def live(phase, argv):
    """One life of a run, in a process of its own, that saves after every step and says what it is doing."""
    def telling(number, function):
        def call(*args, **named):
            before, phase.value = phase.value, number
            try:
                return function(*args, **named)
            finally:
                phase.value = before
        return call
    torch.set_num_threads(1)
    lth.PRESETS["tiny"] = dict(base=8, mults=(1,), patch=4)
    runs.Guard.EVERY, lth.VAL_IMAGES = 0.0, 200
    report.measure_speed = lambda *_: (0.0, 0.0)
    report.draw_run = lambda *_: None
    lth.train, lth.draw_samples = telling(1, lth.train), telling(2, lth.draw_samples)
    runs.save_state = telling(3, runs.save_state)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    lth.main(argv)


def start(out, flags=()):
    """(process, what it is doing) of a run on `out`."""
    context = multiprocessing.get_context("forkserver")  # a new process, but torch is imported once
    context.set_forkserver_preload(["lth_diffusion", "torch._dynamo"])  # optimizers import the latter: 3 s
    phase = context.Value("i", 0)
    process = context.Process(target=live, args=(phase, [*FLAGS, *flags, "--out", out]))
    process.start()
    return process, phase


def finish(out, flags=()):
    process, _ = start(out, flags)
    process.join(120)
    assert process.exitcode == 0


def test_killed_at_twenty_moments(tmp_path):
    """SIGKILL in training, in sampling and while saving; the same command goes on until the run is done."""
    rng, killed, whole = random.Random(0), [], str(tmp_path / "whole")
    finish(whole)
    while len(killed) < KILLS:
        out, done = str(tmp_path / f"killed{len(killed)}"), False
        while len(killed) < KILLS and not done:
            process, phase = start(out)
            while phase.value == 0 and process.is_alive():
                time.sleep(0.001)
            wanted = min((1, 2, 3), key=lambda number: killed.count(PHASES[number]))  # the least tried so far
            process.join(rng.uniform(0, 0.3))  # some way on, then into the wanted phase, then somewhere in it
            while phase.value != wanted and process.is_alive():
                pass
            time.sleep(rng.uniform(0, 0.004))
            done = not process.is_alive()
            if not done:
                process.kill()
                process.join()
                killed.append(PHASES[phase.value])
        finish(out)
        assert same(out, whole), killed
    counts = collections.Counter(killed)
    print(dict(counts))
    assert min(counts[phase] for phase in PHASES[1:]) >= KILLS // 4, counts


def test_several_processes_share_a_folder_and_some_die(tmp_path):
    """PROCESSES on one folder, of which one is killed at a random moment, again and again: the table and the
    weights are those of one process; no training run is lost, none stays with the dead."""
    rng, whole, out = random.Random(1), str(tmp_path / "whole"), str(tmp_path / "shared")
    flags = ["--seeds", "0", "1"]
    finish(whole, flags)
    processes, kills = [start(out, flags) for _ in range(PROCESSES)], 0
    while any(process.is_alive() for process, _ in processes):
        time.sleep(rng.uniform(0.2, 0.8))
        if kills < 2 * PROCESSES and all(process.is_alive() for process, _ in processes):
            victim, _ = processes.pop(rng.randrange(PROCESSES))
            victim.kill()
            victim.join()
            kills += 1
            processes.append(start(out, flags))
    assert kills and {process.exitcode for process, _ in processes} == {0}, kills
    assert same(out, whole)
    log = [line for line in open(os.path.join(out, "log.jsonl"))]
    assert len(log) >= len(results(out)) == 8
    assert not [name for name in os.listdir(os.path.join(out, "seed0")) if name.endswith("partial.pt")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path):
    command = [sys.executable, "lth_diffusion.py", *FLAGS, "--steps", "400", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not os.path.exists(tmp_path / "run" / "seed0" / "round00_dense.step_k.pt") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on from here" in said, said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "seed0" / "round00_dense.partial.pt").exists()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_of_which_one_dies_and_one_process_goes_on(tmp_path):
    """A dead rank ends the run at once, one process does the rest, and all equals a run by one process within
    1e-5: in fp32 with SGD (Adam divides rounding by rounding where a gradient is nothing but that)."""
    flags = [*FLAGS, *"--rounds 1 --controls --precision fp32 --optimizer sgd --lr 0.01 --out".split()]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "lth_diffusion.py", *flags, two]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not os.path.exists(os.path.join(two, "seed0", "round00_dense.pt")) and process.poll() is None:
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "lth_diffusion.py FAILED" in said, said
    assert said.count("device   cpu") == 1  # rank 0 alone speaks
    assert time.monotonic() - killed < 60  # prompt, beside the four hours that ranks may wait for each other
    assert not os.path.exists(os.path.join(two, "results.csv")) or len(results(two)) < 2
    for out in (one, two):
        lth.main([*flags, out])
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and len(results(two)) == 2
    for (name, part, key), value in first.items():
        if part != "masks" and "round00" in name:  # later ones rest on a ranking: a tie may fall otherwise
            assert torch.allclose(value, second[name, part, key], rtol=0, atol=1e-5), (name, part, key)
    assert [r["live_weights"] for r in results(one)] == [r["live_weights"] for r in results(two)]
