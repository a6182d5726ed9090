"""Which way of finding a ticket is worth its cost? Every method at equal density and at equal total cost.

    python -m studies.methods                                                    # digits, one seed
    python -m studies.methods --dataset mnist --rounds 13 --control-rounds 7 10 13 --more-seeds 1 2
    python -m studies.methods --only oneshot random rigl                         # some of them

Any other flag goes to lth_diffusion.py. Each method is one run of it, under --runs, and goes on where it
stopped; methods that rewind to one and the same step share the dense run. At equal density a method that
iterates has trained many times as long as one that cuts once. So each --longer method is run again with as
many steps as make its total that of `imp` at the last round ('equal cost').

What would change our mind about iterating: a method of one cut that is as good at the same total cost.
"""
import os

import numpy as np

import lth_diffusion as lth
import metrics
from ddpm import one_line, seed_number, writable

METHODS = {  # name -> flags of lth_diffusion.py; the first is what the others are compared with
    "imp": "--arms rewind reinit random small", "imp-layer": "--scope layer", "imp-ramp": "--scope ramp",
    "imp-cka": "--scope cka", "imp-erk": "--scope erk", "imp-taylor": "--score taylor",
    "oneshot": "--method oneshot", "oneshot-taylor": "--method oneshot --score taylor",
    "magnitude-init": "--method magnitude-init", "random": "--method random", "rigl": "--method rigl",
    "set": "--method set", "rst": "--method rst", "channels": "--granularity channel",
}
ONCE = [name for name, flags in METHODS.items() if "--method" in flags]  # these do not iterate
LONGER, LONG = ("oneshot", "random", "rigl"), ", equal cost"  # run again at imp's total cost
OWNED = ("--method", "--scope", "--score", "--granularity", "--arms")  # these make the methods
HEADER = ["method", "round", "pruned", "live weights", "seeds", "fid_domain", "sd", "over dense", "val_loss",
          "total steps", "training TMACs", "live MMACs", "s/1000"]
RUNS = ["method", "seed", "round", "arm", "pruned", "live weights", "fid_domain", "val_loss", "total steps",
        "train_macs_total"]


def flags_of(name, args, rest):
    """The command line of one method's run; those that share a dense run differ in nothing it depends on."""
    arms = [] if "--arms" in METHODS[name] else ["--arms", "rewind"]
    flags = [*rest, *METHODS[name].split(), *arms, "--out", os.path.join(args.runs, name)]
    if args.more_seeds and name in ONCE:
        flags += ["--seeds", *map(str, lth.parse_args(rest)[0].seeds + args.more_seeds)]
    return flags


def run(flags, dense_runs):
    """Run lth_diffusion.py with these flags, on a dense run already there; the rows of its table."""
    args, parser = lth.parse_args(flags)
    source = dense_runs.setdefault((args.steps, lth.rewind_step(args)), args.out)
    return list(lth.run_alone(args, parser, source)[1].values())


def longer_flags(flags, imp_rows):
    """The same command with as many steps as `imp` took in all up to its last ticket."""
    total = max(row["train_steps_total"] for row in imp_rows if row["arm"] == "rewind")
    args, _ = lth.parse_args(flags)
    begins = 1 if args.method in lth.BEFORE_TRAINING else 2 - args.rewind  # trainings it takes to end
    begins += lth.RST_SHARE if args.method == "rst" else 0
    out = ["--steps", str(round(total / begins)), "--control-rounds", str(args.rounds)]
    return [*flags, *out, "--out", args.out + "-longer"]


def label_of(name, row):
    """What a row of one method's run is called."""
    if row["arm"] in ("dense", "twin"):
        longer = f", {row['train_steps_total']:,} steps" * (LONG in name)
        return f"dense{' rewound' * (row['arm'] == 'twin')}{longer}"
    return name if row["arm"] == "rewind" else f"{name}, {row['arm']}"


def lines(name, rows):
    """Dicts of HEADER: one for each round and arm of one method, means over its seeds. "over dense": the mean
    of fid_domain less that of the same seed's dense network, trained for as many steps."""
    groups, dense = {}, {row["seed"]: row["fid_domain"] for row in rows if row["arm"] == "dense"}
    for row in rows:
        if row["arm"] not in ("probe", "transform"):
            groups.setdefault((label_of(name, row), row["round"]), []).append(row)
    for (label, number), group in groups.items():
        def mean(column):
            return float(np.mean([row[column] for row in group]))
        spread = metrics.deviation([row["fid_domain"] for row in group])
        over = float(np.mean([row["fid_domain"] - dense[row["seed"]] for row in group]))
        yield dict(zip(HEADER, [
            label, number, f"{100 * group[0]['sparsity']:.1f} %", group[0]["live_weights"], len(group),
            mean("fid_domain"), spread, over, mean("val_loss"), round(mean("train_steps_total")),
            mean("train_macs_total") / 1e12, mean("macs_live") / 1e6, mean("seconds_per_1000")]))


def run_lines(rows):
    """Lines of RUNS, one for each training behind the table."""
    for name, found in rows.items():
        for row in found:
            yield [name, row["seed"], row["round"], row["arm"], row["sparsity"], row["live_weights"],
                   row["fid_domain"], row["val_loss"], row["train_steps_total"], row["train_macs_total"]]


def once(table):
    """The table without repetitions of a dense run that several methods share: the one with most seeds."""
    seen = {}
    for k, line in enumerate(table):
        key = (line["method"], line["total steps"]) if line["method"].startswith("dense") else k
        seen[key] = max(seen.get(key, line), line, key=lambda one: one["seeds"])
    return list(seen.values())


def place(line, rounds, last):
    """(row, columns) that a line of the table fills in the picture: control rounds, and LONG where it took as
    many training steps in all as imp's last. What is never pruned has one figure for all rounds."""
    name, number = line["method"].removesuffix(LONG), line["round"]
    if name != line["method"] or name == f"dense, {last['total steps']:,} steps":
        return name.split(",")[0], [LONG]
    if number == 0:
        return name, rounds if name in ("dense", "dense rewound") else []
    same_cost = all(line[key] == last[key] for key in ("round", "total steps"))
    return name, [number] * (number in rounds) + [LONG] * same_cost


def draw(table, rounds, path, note):
    """fid_domain of every method at the control rounds and at equal cost, the best at the top."""
    imp = {line["round"]: line for line in table if line["method"] == "imp"}
    last, rows, names = imp[max(imp)], {}, {}
    for line in table:
        name, columns = place(line, rounds, last)
        rows.setdefault(name, {}).update(dict.fromkeys(columns, line["fid_domain"]))
        if line["method"] == name:
            other = line["round"] and line["pruned"] != imp[line["round"]]["pruned"]
            pruned = f" (to {line['pruned']})" if other else " (not pruned)" * (line["round"] == 0)
            names[name] = f"{name}{pruned}, n={line['seeds']}"
    order = sorted((name for name in rows if rows[name]), key=lambda name: rows[name].get(rounds[-1], np.inf))
    lth.heat_map([[rows[name].get(column) for column in [*rounds, LONG]] for name in order],
                 [names.get(name, name) for name in order],
                 [*(imp[number]["pruned"] for number in rounds), f"{last['pruned']}\nequal cost"], path,
                 "Every way to find a ticket: fid_domain", note, log=True, x_label="weights pruned",
                 bar_label="lower is better")


def draw_rounds(table, path, note):
    """fid_domain against sparsity for what iterates, a line a method. Every round that cuts the same share is
    as wide."""
    dense = next(line for line in table if line["method"] == "dense")
    series, ticks = [], [(0.0, dense["pruned"])]
    for label in (name for name in METHODS if name not in ONCE):
        mine = [line for line in table if line["method"] == label]
        if mine:
            x = [np.log(dense["live weights"] / line["live weights"]) for line in mine]
            y, spread = ([line[key] or np.nan for line in mine] for key in ("fid_domain", "sd"))
            ticks += [(at, line["pruned"]) for at, line in zip(x, mine)] if label == "imp" else []
            series.append(dict(label=f"{label}, n={mine[0]['seeds']}", x=x, y=y,
                               y_low=np.subtract(y, spread), y_high=np.add(y, spread)))
    levels = [(f"{line['method']}, n={line['seeds']}", line["fid_domain"], style) for line in table
              for name, style in (("dense", "dashed"), ("dense rewound", "dotted")) if line["method"] == name]
    lth.line_chart(series, path, "Round by round: what iterates", "weights pruned", "fid_domain",
                   hlines=levels, height=460, x_ticks=ticks, note=note)


def main(argv=None):
    """The command line; what it does not know goes to lth_diffusion.py."""
    study = lth.Study("methods", __doc__)
    add = study.add_argument
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), help="imp is always among them")
    add("--longer", nargs="*", choices=ONCE, default=list(LONGER), help="run again at imp's total cost")
    add("--more-seeds", nargs="+", type=seed_number, default=[], metavar="S",
        help="further seeds for the cheap ones, which cut once")
    add("--runs", help="folder of the runs (default: runs/methods_DATASET)")
    with study.arguments(argv, OWNED) as args, one_line(study, args.runs or "runs"):
        rest, names, dense_runs, rows = args.rest, dict.fromkeys(["imp", *args.only]), {}, {}
        if not any(flag.startswith("--rounds") for flag in rest):
            rest = ["--rounds", "3", "--final-sparsity", "0.9", "--control-rounds", "2", "3", *rest]
        common, _ = lth.parse_args(rest)  # a mistake in them ends here
        if len({*common.seeds, *args.more_seeds}) < len(common.seeds) + len(args.more_seeds):
            study.error("argument --more-seeds: each one once, and none that --seeds names")
        args.runs = args.runs or os.path.join("runs", f"methods_{common.dataset}")
        writable([args.runs], "--runs")
        for name in [*names, *args.longer]:  # what any method cannot do is said before the first one runs
            lth.parse_args(flags_of(name, args, rest))
        for name in names:
            rows[name] = run(flags_of(name, args, rest), dense_runs)
        for name in args.longer:
            flags = [*flags_of(name, args, rest), "--seeds", *map(str, common.seeds)]
            rows[name + LONG] = run(longer_flags(flags, rows["imp"]), dense_runs)
        table = once([line for name, found in rows.items() for line in lines(name, found)])
        path = os.path.join(args.out, f"methods_{common.dataset}")
        note = (f"{common.dataset}, {common.steps:,} steps of {common.batch} a training, "
                f"{common.samples:,} samples a figure; n: seeds.")
        facts = dict(n=common.samples, seeds=[*common.seeds, *args.more_seeds], flags=vars(common))
        cells = [list(line.values()) for line in table]
        study.save(path, HEADER, cells, **facts)
        study.save(path + "_runs", RUNS, list(run_lines(rows)), **facts)
        equal = f" Equal cost: as many training steps in all as imp took, n={len(common.seeds)}."
        draw(table, common.control_rounds, path + ".png", note + equal * bool(args.longer))
        draw_rounds(table, path + "_rounds.png", f"{note} Bars: standard deviation over seeds.")
    print(f"\n{lth.text_table(HEADER, cells)}\n\n{note}\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
