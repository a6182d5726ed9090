"""Prune the network, or take fewer sampling steps? Quality against the cost of a sample.

    python -m studies.samplers                               # a small run on digits: minutes
    python -m studies.samplers --from runs/mnist --rounds 7 10

The dense network and the tickets draw equally many samples from the same noise, by ancestral
sampling (Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020, 2006.11239), DDIM
(Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2020, 2010.02502) and DPM-Solver++(2M)
(Lu et al., DPM-Solver++, 2022, 2211.01095), with several numbers of network evaluations. The work
of a sample is evaluations times live multiply-accumulates: what a machine that skips zeros would
do. The seconds are those of this machine, which skips none. A setting is on the Pareto front if no
other is at least as good at no higher cost.

What would change our mind about 'fewer steps are the cheaper way': tickets that fill the front at
low work.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.samplers")

import time

import numpy as np

from ddpm import NOISE
from studies.common import Study, add_run_flag, check_rounds, open_run
from support import charts, cli
from support.words import counted

# Ancestral sampling is poor below 50 evaluations.
STEPS = dict(ddpm=(50, 250), ddim=(5, 10, 20, 50), dpm=(5, 10, 20, 50))
STYLES = dict(ddpm="dotted", ddim="solid", dpm="dashed")
SETTING = "round", "arm", "sampler", "evaluations"
COSTS = {"work": "GMACs per sample", "seconds": "s/1000"}
MEANS = "sparsity", *COSTS.values(), "fid_domain"
HEADER = ["seed", *SETTING, *MEANS, "front of work", "front of seconds"]


def measure(exp, rows, jobs, n):
    """Rows of HEADER, as dicts, without the fronts: each job sampled in each way."""
    for job in jobs:
        model, row = exp.load(job).ema, rows[job]
        for sampler, steps in settings(exp.diffusion):
            began = time.monotonic()
            samples = exp.draw(model, job.seed, n, sampler=sampler, steps=steps,
                               label=f"{job}: {sampler} {steps}")
            seconds = 1000 * (time.monotonic() - began) / n
            fid = exp.quality(samples)["fid_domain"]
            work = steps * row["macs_live"] / 1e9
            values = row["sparsity"], work, seconds, fid
            yield dict(zip(HEADER, [*job, sampler, steps, *values]))
        print(f"{job}: done", flush=True)


def settings(diffusion):
    """(sampler, evaluations) of STEPS that begin at noise with this noise schedule."""
    for sampler, counts in STEPS.items():
        for steps in counts:
            start = (steps - 1) * (diffusion.T // steps)
            if diffusion.alphas_bar[start] <= NOISE:
                yield sampler, steps


def setting_of(row):
    """What the seeds share."""
    return tuple(row[name] for name in SETTING)


def means_of(table):
    """{setting: row with the means over seeds}."""
    groups, means = {}, {}
    for row in table:
        groups.setdefault(setting_of(row), []).append(row)
    for setting, rows in groups.items():
        means[setting] = dict(rows[0])
        for name in MEANS:
            means[setting][name] = float(np.mean([row[name] for row in rows]))
    return means


def front(means, cost):
    """The settings on the Pareto front of fid_domain and a column of costs, cheapest first."""
    points = {setting: (row[cost], row["fid_domain"]) for setting, row in means.items()}

    def beaten(x, y):
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    best = [setting for setting, point in points.items() if not beaten(*point)]
    return sorted(best, key=points.get)


def name_of(row):
    """The network and its sampler."""
    pruned = f" {100 * row['sparsity']:.1f} %" * (row["round"] > 0)
    return f"{row['arm']}{pruned}, {row['sampler']}"


def draw(means, path, note):
    """fid_domain against work: one line per network and sampler."""
    lines = {}
    for row in means.values():
        new = dict(label=name_of(row), x=[], y=[], style=STYLES[row["sampler"]])
        line = lines.setdefault(name_of(row), new)
        line["x"].append(row[COSTS["work"]])
        line["y"].append(row["fid_domain"])
    charts.line_chart(
        lines.values(), path, "Fewer sampling steps, or a sparser network?",
        "billions of live multiply-accumulates per sample (log)",
        "fid_domain (log)", log_x=True, log_y=True, height=520, note=note)


def mark_front(table, means, name):
    """Mark the rows on a front; return what it shows."""
    cost, shown = COSTS[name], []
    best = front(means, cost)
    for row in table:
        row[f"front of {name}"] = "yes" if setting_of(row) in best else ""
    for row in map(means.get, best):
        shown.append(f"{name_of(row)} {row['evaluations']} ({row[cost]:.3g}, "
                     f"{row['fid_domain']:.1f})")
    return f"Front of {name} ({cost}, fid_domain), cheapest first: {'; '.join(shown)}."


def main(argv=None):
    """The command line."""
    study = Study("studies.samplers", __doc__)
    add_run_flag(study)
    add = study.add_argument
    add("--rounds", nargs="+", type=cli.positive_int,
        help="rounds of the tickets (default: those with controls)")
    # Precision and recall, by 3 neighbours, need 4.
    add("--samples", default=500, type=cli.checked(int, lambda n: n >= 4, "4 or more"),
        help="samples per setting (default: 500)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run, methods=True)
        rounds = args.rounds or exp.args.control_rounds
        check_rounds(rounds, rows)
        jobs = [job for job in rows
                if job.arm == "dense" or job.arm == "ticket" and job.round in rounds]
        table = list(measure(exp, rows, jobs, args.samples))
        means = means_of(table)
        said = [mark_front(table, means, name) for name in COSTS]
        cells = [list(row.values()) for row in table]
        path = f"{args.out}/samplers_{exp.args.dataset}"
        study.save(path, HEADER, cells, exp.device, n=args.samples)
        seeds = counted(len({job.seed for job in jobs}), "seed")
        note = (f"{exp.args.dataset}: means over {seeds}, FID "
                f"from {args.samples:,} samples from the same noise")
        draw(means, path + ".png", note + ". Percentages: weights pruned.")
    print(f"\n{charts.text_table(HEADER, cells)}\n")
    print(*said, f"{note}. Differences of a few per cent are noise.",
          f"{path}.csv, .json, .png", sep="\n")


if __name__ == "__main__":
    main()
