"""Prune the network, or take fewer steps? Quality against the multiply-accumulates and seconds of a sample.

    python -m studies.samplers                                                # a small run on digits: minutes
    python -m studies.samplers --from runs/mnist runs/mnist_channels          # finished runs of one data set

Each network (dense, the tickets of the chosen rounds, channel tickets where a run has them) draws the same
number of samples from the same noise with the ancestral sampler (2006.11239), DDIM (2010.02502) and DPM-
Solver++(2M) (2211.01095) at several numbers of network evaluations. The work of a sample is evaluations times
the live multiply-accumulates of one: what a machine that skips zeros would do. The seconds are this
machine's, which skips none: only channel tickets, which are smaller for real, save any. A setting is on the
Pareto front when none is better at equal or less work.

What would change our mind about 'fewer steps are the cheaper way': tickets that fill the front at low work.
"""
import os
import time

import numpy as np

import lth_diffusion as lth
from ddpm import positive_int

STEPS = dict(ddpm=(50, 250), ddim=(5, 10, 20, 50), dpm=(5, 10, 20, 50))  # the ancestral one is lost below 50
HEADER = ["run", "seed", "round", "arm", "sparsity", "sampler", "evaluations", "GMACs a sample", "s/1000",
          "fid_domain", "front of work", "front of seconds"]


def networks(exp, rows, args):
    """The jobs to compare: dense, and the tickets of the rounds asked for."""
    rounds = args.rounds or exp.args.control_rounds
    jobs = [job for job in rows if job.arm == "dense" or job.arm == "rewind" and job.round in rounds]
    lth.check_rounds(rounds, rows)
    return jobs


def lines(exp, rows, args):
    """Rows of HEADER but for the two fronts."""
    name = os.path.basename(os.path.normpath(exp.args.out))
    for job in networks(exp, rows, args):
        model, _ = exp.rebuild(exp.load(job), "ema")
        for sampler, counts in STEPS.items():
            for steps in counts:
                began = time.monotonic()
                samples = exp.draw(model, args.samples, sampler=sampler, steps=steps,
                                   label=f"{job}: {sampler} {steps}")
                seconds = 1000 * (time.monotonic() - began) / args.samples
                value = exp.quality(samples)["fid_domain"]
                yield [name, job.seed, job.round, job.arm, rows[job]["sparsity"], sampler, steps,
                       steps * rows[job]["macs_live"] / 1e9, seconds, value]
        print(f"{name}, {job}: done", flush=True)


def setting(row):
    """What a row is of, whatever its seed: run, round, arm, sampler, evaluations."""
    return row[0], row[2], row[3], row[5], row[6]


def over_seeds(table):
    """{setting: row with the means of work, seconds and fid_domain over seeds}."""
    groups = {}
    for row in table:
        groups.setdefault(setting(row), []).append(row)
    return {key: [*rows[0][:7], *np.mean([row[7:10] for row in rows], axis=0).tolist()]
            for key, rows in groups.items()}


def on_front(table, cost):
    """For each row whether no other is better in fid_domain at equal or less of column `cost`."""
    return [not any(other is not row and other[cost] <= row[cost] and other[9] <= row[9] for other in table)
            for row in table]


def draw(table, path, note):
    """fid_domain against work, a line a network and sampler, means over seeds."""
    groups = {}
    for row in over_seeds(table).values():
        groups.setdefault((f"{row[3]} {100 * row[4]:.0f} %", row[5], row[0]), []).append(row)
    series = [dict(label=f"{label}, {sampler}", x=[row[7] for row in group], y=[row[9] for row in group],
                   style={"ddim": "solid", "dpm": "dashed", "ddpm": "dotted"}[sampler])
              for (label, sampler, _), group in groups.items()]
    lth.line_chart(series, path, "Fewer steps, or a sparser network?",
                   "billions of live multiply-accumulates a sample (log)", "fid_domain (log)", log_x=True,
                   log_y=True, height=520, note=note)


def main(argv=None):
    """The command line."""
    study = lth.Study("samplers", __doc__)
    add = study.add_argument
    add("--from", dest="runs", nargs="+", default=[None], metavar="runs/NAME",
        help="finished runs of one data set (default: a small one on digits)")
    add("--rounds", nargs="+", type=positive_int, help="which tickets (default: those with controls)")
    add("--samples", type=positive_int, default=500, help="samples a setting (default: 500)")
    with study.arguments(argv) as args:
        found = [lth.open_run(run) for run in args.runs]
        names = {exp.args.dataset for exp, _ in found}
        if len(names) > 1:
            raise ValueError(f"--from: runs of different data sets: {', '.join(sorted(names))}")
        table = [line for exp, rows in found for line in lines(exp, rows, args)]
        means = over_seeds(table)
        fronts = [dict(zip(means, on_front(list(means.values()), cost))) for cost in (7, 8)]
        table = [[*row, *("yes" if front[setting(row)] else "" for front in fronts)] for row in table]
        path = os.path.join(args.out, f"samplers_{names.pop()}")
        study.save(path, HEADER, table, found[0][0].device, n=args.samples)
        draw(table, path + ".png", f"n={args.samples:,} samples a figure from the same noise; "
             "percentages: weights pruned; means over seeds.")
    best = [f"{row[3]} {100 * row[4]:.0f} % with {row[5]} {row[6]} ({row[7]:.2f} GMACs, {row[9]:.1f})"
            for key, row in sorted(means.items(), key=lambda item: item[1][7]) if fronts[0][key]]
    print(f"\n{lth.text_table(HEADER, table)}\n\nThe front of work, cheapest first: {'; '.join(best)}.\n"
          f"{len({row[1] for row in table})} seed(s), n={args.samples:,} samples: differences of a few per "
          f"cent are noise.\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
