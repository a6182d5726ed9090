"""How fast on a busy machine, with several processes, and until the first step?

    python -m checks.workers                # all four: about half an hour on two cores
    python -m checks.workers busy start     # two of them

busy      A training step of `mnist`, alone and beside two processes that only spin, with the
          thread wait policy that support/early.py sets and with that of the OpenMP library.
start     Seconds until a run's first line and until its first training step. It was started once
          before, so that the bytecode of what it imports is there.
shared    A small job of four seeds by one process, by 2 and by 4 workers, each to the last picture.
simulate  The main job of ten seeds on 1 to 256 workers, with the seconds of a training run that
          this machine measures: the chain of rounds of a seed is done by one worker after another.

Everything is measured in turns; a value is the median of --turns, with the smallest and largest.

What would change our mind about bounded waiting: an idle machine on which it is slower.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m checks.workers")

import contextlib
import heapq
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

import lth_diffusion as lth
from ddpm import denoiser, train
from studies.common import Study
from support import charts, cli, early, report, runs

STEP = """
import time, torch, lth_diffusion as lth, ddpm
args, _ = lth.parse_args(["--dataset", "digits", "--preset", "mnist", "--batch", "32"])
images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
marks, model = [], ddpm.UNet(**ddpm.PRESETS["mnist"], image_size=28)
ddpm.train(model, ddpm.Diffusion(), images, steps=12, batch=32,
           after_step=lambda *_: marks.append(time.monotonic()))
print((marks[-1] - marks[1]) / (len(marks) - 2))
"""
JOB = ["--rounds", "2", "--steps", "150", "--batch", "32", "--samples", "64", "--nfe", "10",
       "--precision", "fp32", "--seeds", "0", "1", "2", "3"]
WORKERS = 1, 2, 4
MANY = 1, 2, 4, 8, 16, 32, 64, 128, 256
HEADER = ["section", "what", "seconds", "smallest", "largest", "turns"]


def run(code, **environment):
    """What a fresh Python prints, its waiting of threads set in the environment or not at all."""
    clean = {name: value for name, value in os.environ.items() if name not in early.WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, cwd=runs.HERE,
                          capture_output=True, text=True, check=True)
    return done.stdout


@contextlib.contextmanager
def spinning(n):
    """n processes that do nothing but use a core each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def busy(args):
    """Seconds of a training step: [(what, values over turns)]."""
    ways = {"bounded waiting": early.WAITING, "the library's waiting": {}}
    found = {(where, name): [] for where in ("idle", "two spin beside it") for name in ways}
    for _ in range(args.turns):
        for (where, name), values in found.items():
            with spinning(2 if where != "idle" else 0):
                values.append(float(run(STEP, **ways[name])))
    return [(f"a step, {where}, {name}", values) for (where, name), values in found.items()]


def start(args):
    """Seconds until the first line, and until the first training step."""
    lines, steps = [], []
    kept = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(1 + args.turns):  # the first is not counted
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "lth_diffusion.py", "--steps", "4", "--out", out]
            began = time.monotonic()
            process = subprocess.Popen(command, cwd=runs.HERE, stdout=subprocess.PIPE, text=True,
                                       env=kept)
            process.stdout.readline()
            lines.append(time.monotonic() - began)
            for line in process.stdout:
                if line.startswith("jobs"):  # the last one before training
                    break
            steps.append(time.monotonic() - began)
            process.kill()
            process.communicate()
    return [("first line", lines[1:]), ("first training step", steps[1:])]


def shared(args):
    """Seconds of a whole small job by several workers; its threads are shared out."""
    found = {n: [] for n in WORKERS}
    for _ in range(args.turns):
        for n, values in found.items():
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, "lth_diffusion.py", *JOB, "--workers", str(n)]
                began = time.monotonic()
                subprocess.run([*command, "--out", out], cwd=runs.HERE, check=True,
                               stdout=subprocess.DEVNULL)
                values.append(time.monotonic() - began)
    return [(f"four seeds, {n} worker{'s' * (n > 1)}", values) for n, values in found.items()]


def simulate(args):
    """Seconds of the main job of ten seeds on many workers, chains first."""
    flags = ["--dataset", "mnist", "--data-dir", args.data_dir, "--device", str(args.device)]
    run, _ = lth.parse_args([*flags, "--seeds", *map(str, range(10))])
    cli.settle_device(run)
    exp, jobs = lth.Experiment(run), lth.jobs(run)
    model = exp.new_model(0)
    exp.cost = report.measure_speed(exp, model, train, denoiser(model, run.precision))
    seconds = {job: report.seconds_of(exp, [job]) for job in jobs}
    return [(f"ten seeds on {n}, simulated", [finish(jobs, seconds, n)]) for n in MANY]


def finish(jobs, seconds, workers):
    """When the last job ends: a free worker takes the next of a seed's chain, else a control.

    jobs: in the order of the plan; a control waits for its round's ticket, each ticket for the one
    before it.
    """
    chains, waiting = {}, {}
    for job in jobs:
        control = job.arm in lth.CONTROLS
        (waiting.setdefault((job.seed, job.round), []) if control
         else chains.setdefault(job.seed, [])).append(job)
    heads, controls = [chain.pop(0) for chain in chains.values()], []
    running, now = [], 0.0
    while heads or controls or running:
        while (heads or controls) and len(running) < workers:
            job = heads.pop(0) if heads else controls.pop(0)
            heapq.heappush(running, (now + seconds[job], job))
        now, job = heapq.heappop(running)
        if job.arm not in lth.CONTROLS:
            controls += waiting.pop((job.seed, job.round), [])
            heads += chains[job.seed][:1]
            del chains[job.seed][:1]
    return now


SECTIONS = dict(busy=busy, start=start, shared=shared, simulate=simulate)


def draw(rows, path):
    """The speed-up of the simulated job."""
    values = [(n, row[2]) for n, row in zip(MANY, rows)]
    alone = values[0][1]
    series = [dict(label="simulated", x=[n for n, _ in values], y=[alone / s for _, s in values]),
              dict(label="ideal", x=MANY, y=MANY, style="dashed")]
    charts.line_chart(series, path, "How far more workers help: the chain of rounds sets the end",
                      "workers (log)", "times as fast as one (log)", log_x=True, log_y=True,
                      note="Ten seeds of the main job on MNIST, chains of tickets first.")


def main(argv=None):
    """The command line."""
    study = Study("checks.workers", __doc__)
    study.add_argument("sections", nargs="*", metavar="SECTION",
                       help=f"{', '.join(SECTIONS)} (default: all)")
    study.add_argument("--turns", type=cli.positive_int, default=3,
                       help="measurements per value (default: 3)")
    cli.add_data_flags(study)
    with study.arguments(argv) as args:
        if unknown := [name for name in args.sections if name not in SECTIONS]:
            raise cli.Mistake(f"no section {unknown[0]}: choose from {', '.join(SECTIONS)}")
        args.device, _ = cli.pick_device(args.device)
        path, rows = f"{args.out}/workers", []
        for name in args.sections or SECTIONS:
            found = [[name, what, float(np.median(values)), min(values), max(values), len(values)]
                     for what, values in SECTIONS[name](args)]
            for row in found:
                print(*(f"{v:.4g}" if isinstance(v, float) else v for v in row), flush=True)
            if name == "simulate":
                draw(found, path + ".png")
            rows += found
            study.save(path, HEADER, rows, args.device)
    print("", charts.text_table(HEADER, rows), f"{path}.csv, .json", sep="\n\n")


if __name__ == "__main__":
    main()
