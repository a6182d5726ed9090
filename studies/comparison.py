"""Which way to find a ticket is worth its cost? Methods at equal density and at equal total cost.

    python -m studies.comparison                              # drawn digits, three seeds
    python -m studies.comparison --only oneshot random rigl   # some of the methods, and imp
    python -m studies.comparison --dataset mnist --preset tiny --steps 560

Other flags go to lth_diffusion.py. 90 % sparsity in five rounds, unless they say otherwise. Each
method has a folder of its own and goes on where it stopped; methods that go back to the same step
share their dense networks. At equal density, a method that iterates has trained many times as long
as one that cuts once. Therefore some are run a second time, longer, so that their total comes to
the training steps of `imp` at its last round ('equal cost'), dense among them. What a search cost
beyond dense is also given in samples: after how many a ticket has paid for it, if sampling skipped
every zero and training none. Cost is counted in steps; train_macs_total has it without the zeros.

Margin, fixed before the run: a tenth of the fid_domain compared with, that of `imp` as a rule (the
others: ALSO); intervals of 90 % over seeds, paired. A method that ends at another density
(channels) is shown and gets no answer. What would change our mind about iterating: a method of one
cut that is as good at the same total cost.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.comparison")

import argparse
import os

import numpy as np

import lth_diffusion as lth
from methods import (channels, cka, early_bird, magnitude_init, oneshot, random_pruning, rigl, rst,
                     taylor)
from studies.common import (Study, against, deviation, images_to_pay_back, rounded, rows_of,
                            take_dense)
from support import charts, cli, runs

ITERATE = {  # name -> (module, its flags); the first is what the others are compared with
    "imp": (lth, "--controls reinit random small"),
    "imp-layer": (lth, "--scope layer"),
    "imp-ramp": (lth, "--scope ramp"),
    "imp-erk": (lth, "--scope erk"),
    "imp-cka": (cka, ""),
    "imp-cka-shuffled": (cka, "--shuffled"),  # the control of imp-cka
    "imp-taylor": (taylor, ""),
    "channels": (channels, ""),
}
ONCE = {  # one cut of the trained network
    "oneshot": (oneshot, ""),
    "oneshot-taylor": (taylor, "--oneshot"),
    "early-bird": (early_bird, ""),
}
EARLY = {  # chosen before training, trained from step 0
    "magnitude-init": (magnitude_init, ""),
    "random": (random_pruning, ""),
    "rigl": (rigl, ""),
    "set": (rigl, "--grow random"),
    "rst": (rst, ""),
}
METHODS = ITERATE | ONCE | EARLY
EIGHT = "imp", "imp-layer", "oneshot", "random", "early-bird", "rigl", "set", "channels"  # default
LONG = ", equal cost"
STEPS = "train_steps_total"  # to find the ticket and to train it
LONGER = "oneshot", "random", "early-bird", "rigl"  # run again, at the total cost of imp
AT_ZERO = {*EARLY, "early-bird"}  # methods that do not go back to step k
MARGIN = 0.1  # of what is compared with
ALSO = [("imp-cka-shuffled", "imp-cka"),  # do rates from similarity help in their places alone?
        ("imp-ramp", "imp-layer")]  # rates that grow with depth, and equal ones
USUAL = {"--rounds": "5", "--final-sparsity": "0.9", "--control-rounds": "3 5",
         "--seeds": "10 11 12"}
MEANS = ["fid_domain", "over_dense", "val_loss", "train_macs_total",
         "macs_live", "seconds_per_1000"]
PAID = "images_to_pay_back"
HEADER = ["method", "round", "pruned", "live_weights", STEPS, "seeds",
          "fid_domain", "sd", *MEANS[1:], PAID]
PAIRED = ["method", "against", "pruned", "seeds", "fid_domain", "difference", "low", "high",
          "answer"]
RUNS = ["seed", "round", "arm", "sparsity", "live_weights", "fid_domain",
        "val_loss", STEPS, "train_macs_total"]


# --------------------------------------------------------------------------- the runs

def flags_of(name, args, seeds, ending=""):
    """The flags of a method's run that lth_diffusion.py knows too."""
    out = os.path.join(args.runs, name + ending)
    rewind = ["--rewind", "0"] if name in AT_ZERO else []
    return [*args.rest, "--controls", *rewind, "--out", out,
            "--seeds", *map(str, seeds)]


def run(name, flags, done):
    """Do a method's run, on the dense networks that are there already; return its rows.

    done: {(steps, k): the folders of the runs so far}.
    """
    module, own = METHODS[name]
    args, _ = lth.parse_args(flags)
    before = done.setdefault((args.steps, round(args.rewind * args.steps)), [])
    for source in before:
        take_dense(source, args)
    before.append(args.out)
    module.main([*flags, *own.split()])
    config = runs.read_config(args.out)["args"]  # with the seeds of earlier commands
    rows = rows_of(argparse.Namespace(**config))
    return [row for job, row in rows.items() if job.seed in args.seeds]


def compare(args, common):
    """{name: rows} of every method's run, and of those at the total cost of imp."""
    names, found, done = cli.once(["imp", *args.only]), {}, {}
    if "rst" in names and rst.SHARE * common.steps < 20:
        cli.refuse("steps", f"{common.steps} are too few for rst, which needs 40")
    for name in names:
        seeds = common.seeds + args.more_seeds * (name not in ITERATE)
        found[name] = run(name, flags_of(name, args, seeds), done)
    for name in (name for name in LONGER if name in names):
        total, mine = (np.mean([row[STEPS] for row in found[one] if row["arm"] == "ticket"
                                and row["round"] == common.rounds]) for one in ("imp", name))
        flags = flags_of(name, args, common.seeds, "-longer")
        flags += ["--steps", str(round(common.steps * total / mine))]
        flags += ["--control-rounds", str(common.rounds)]
        found[name + LONG] = run(name, flags, done)
    return found


# --------------------------------------------------------------------------- the table

def label_of(name, row):
    """What a row of a method's run is called; None for what the table leaves out."""
    if row["arm"] == "ticket":
        return name
    if row["arm"] == "dense":
        if LONG not in name:
            return "dense"
        # of as many steps as imp took in all, where the ticket alone takes them too
        return "dense" + LONG if name.removesuffix(LONG) in AT_ZERO else None
    return f"{name}, {row['arm']}"


def summarise(found):
    """Dicts of HEADER from {name: rows of a run}: means over seeds by method, arm and round.

    A dense network that several methods share counts once. over_dense: fid_domain less that of
    the same seed's dense network, trained for as many steps.
    """
    groups = {}
    for name, rows in found.items():
        dense = {row["seed"]: row["fid_domain"] for row in rows
                 if row["arm"] == "dense"}
        for row in rows:
            if label := label_of(name, row):
                over = row["fid_domain"] - dense[row["seed"]]
                group = groups.setdefault((label, row["round"]), {})
                group.setdefault(row["seed"], row | dict(over_dense=over))
    for (label, number), group in groups.items():
        rows, line = list(group.values()), dict.fromkeys(HEADER)
        for name in MEANS:
            values = [row[name] for row in rows]
            line[name] = float(np.mean(values))
            if name == "fid_domain":
                line["sd"] = deviation(values)
        pruned = f"{100 * rows[0]['sparsity']:.1f} %"
        line |= dict(method=label, round=number, pruned=pruned, seeds=len(rows))
        for name in ("live_weights", STEPS):  # of the first seed
            line[name] = rows[0][name]
        yield line


def pay_back(table, nfe):
    """Fill PAID in for tickets, for images drawn with nfe evaluations each."""
    dense = next(line for line in table if line["method"] == "dense")
    for line in table:
        saved = nfe * (dense["macs_live"] - line["macs_live"])
        if line["method"].removesuffix(LONG) in METHODS and saved > 0:
            search = line[STEPS] / dense[STEPS]
            if line["method"] == "channels":  # a smaller network: training is cheaper, too
                search = line["train_macs_total"] / dense["train_macs_total"]
            line[PAID] = images_to_pay_back(search, dense["train_macs_total"], saved)
    return table


def paired(found, last):
    """Rows of PAIRED: every method in the last round, and at equal cost, against imp; and ALSO."""
    values = {name: (fids(rows, last, "ticket"), pruned(rows, last))
              for name, rows in found.items()}
    values["dense"] = fids(found["imp"], 0, "dense"), 0.0
    if long := [name for name in AT_ZERO if name + LONG in found]:
        values["dense" + LONG] = fids(found[long[0] + LONG], 0, "dense"), 0.0
    pairs = [(name, "imp") for name in values if name != "imp"]
    pairs += [pair for pair in ALSO if set(pair) <= set(values)]
    for name, other in pairs:
        (mine, its), (base, left) = values[name], values[other]
        if set(mine) & set(base):
            n, mean, _, *gap, said = against(mine, base, MARGIN)
            alike = its == 0 or abs(its - left) < 0.01
            yield [name, other, f"{100 * its:.1f} %", n, mean, *gap,
                   said if alike else "other density"]


def fids(rows, number, arm):
    """{seed: fid_domain}."""
    return {row["seed"]: row["fid_domain"] for row in rows
            if (row["round"], row["arm"]) == (number, arm)}


def pruned(rows, last):
    """The sparsity of a method's last tickets."""
    return float(np.mean([row["sparsity"] for row in rows
                          if (row["round"], row["arm"]) == (last, "ticket")] or [0]))


def columns_of(line, last):
    """The columns of the heat map that a line of the table fills: rounds, or LONG."""
    if line["method"].endswith(LONG):
        return [LONG]
    if line["round"] == 0:  # never pruned: one value for all rounds
        return range(1, last["round"] + 1)
    iterated = line["method"] in ITERATE and line["round"] == last["round"]
    at_cost = iterated and line[STEPS] == last[STEPS]
    return [line["round"]] + [LONG] * at_cost


def draw(table, number, path, note):
    """fid_domain of every method by round and at equal cost, the best of one round at the top."""
    imp = {line["round"]: line for line in table if line["method"] == "imp"}
    last, cells, names = imp[max(imp)], {}, {}
    for line in table:
        name = line["method"].removesuffix(LONG)
        for column in columns_of(line, last):
            cells.setdefault(name, {})[column] = line["fid_domain"]
            if column != LONG:
                other = line["pruned"] != imp[column]["pruned"]
                pruned = f" ({line['pruned']})" * other
                names[name] = f"{name}{pruned}, n={line['seeds']}"
    order = sorted(cells, key=lambda name: cells[name].get(number, np.inf))
    matrix = [[cells[name].get(column) for column in [*imp, LONG]]
              for name in order]
    titles = [*(line["pruned"] for line in imp.values()), "equal\ncost"]
    alike = {line["method"] for line in table if line["pruned"] == imp[number]["pruned"]}
    best = next(name for name in order if name in METHODS and name in alike)
    title = f"At {imp[number]['pruned']} sparsity the lowest fid_domain is that of {best}"
    if any(line["method"].endswith(LONG) for line in table):
        paid = {name: values[LONG] for name, values in cells.items()
                if LONG in values and name in alike | {"dense"}}
        title += f", at equal cost that of {min(paid, key=paid.get)}"
    charts.heat_map(matrix, [names[name] for name in order], titles, path, title, note, log=True,
                    x_label="weights pruned", bar_label="lower is better")


def report(study, path, common, found):
    """Save the tables, draw, print what came out."""
    table = pay_back(list(summarise(found)), common.nfe)
    cells = [list(line.values()) for line in table]
    facts = dict(device=cli.pick_device(common.device)[0], n=common.samples,
                 seeds=common.seeds, flags=vars(common))
    study.save(path, HEADER, cells, **facts)
    every = []
    for name, rows in found.items():
        every += [[name, *(row[column] for column in RUNS)] for row in rows]
    study.save(path + "_runs", ["method", *RUNS], every, **facts)
    pairs = list(paired(found, common.rounds))
    study.save(path + "_paired", PAIRED, pairs, **facts)
    note = (f"{common.dataset}, {common.steps:,} steps of {common.batch} images "
            f"per training run; FID from {common.samples:,} samples; n: seeds. "
            "(%): pruned in the end, where that is not what imp has. Equal cost: "
            f"as many steps in all as imp took, n={len(common.seeds)}.")
    draw(table, common.control_rounds[-1], path + ".png", note)
    print(f"\n{charts.text_table(HEADER, rounded(cells))}\n\n"
          f"{charts.text_table(PAIRED, rounded(pairs))}\n\n{note}\n"
          f"{path}.csv, _paired.csv, _runs.csv, .json, .png")


def main(argv=None):
    """The command line; other flags go to lth_diffusion.py."""
    study = Study("studies.comparison", __doc__)
    add = study.add_argument
    add("--only", nargs="+", choices=METHODS, metavar="METHOD",
        default=list(EIGHT), help=f"some of {', '.join(METHODS)}; imp is run too (default: "
        f"{' '.join(EIGHT)})")
    add("--more-seeds", nargs="+", type=cli.seed_number, default=[],
        metavar="S", help="more seeds for the methods that do not iterate")
    add("--runs", type=cli.path,
        help="folder of the runs (default: runs/comparison_DATASET)")
    with study.arguments(argv, ["--scope", "--controls"]) as args:
        given = {flag.split("=")[0] for flag in args.rest}
        pruning = {"--rounds", "--final-sparsity", "--prune-rate", "--control-rounds"}
        for flag, values in USUAL.items():
            if flag not in given and not (flag in pruning and pruning & given):
                args.rest += [flag, *values.split()]
        common, _ = lth.parse_args(args.rest)  # a mistake in them ends here
        if common.rounds not in common.control_rounds:
            cli.refuse("control-rounds", f"the last round, {common.rounds}, is what is compared: "
                       "add it")
        if set(common.seeds) & set(args.more_seeds):
            cli.refuse("more-seeds", "name none that --seeds names")
        args.runs = args.runs or f"runs/comparison_{common.dataset}"
        runs.writable([args.runs], "--runs")
        path = os.path.join(args.out, f"comparison_{common.dataset}")
        report(study, path, common, compare(args, common))


if __name__ == "__main__":
    main()
