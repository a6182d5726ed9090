"""Finished runs side by side: which way to prune keeps more quality?

    python -m studies.compare runs/A runs/B ...    # folders of lth_diffusion.py or of methods

One table and one picture of the tickets and of the arms that the runs share, means over seeds. The
runs must have seen the same data and been measured alike (data set, samples, sampler, feature
extractor). Where they have seeds in common, tickets of equal sparsity are compared seed by seed.

What would change our mind about two rules being alike: an interval of their difference, paired by
seed, that leaves 0 out.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.compare")

import csv
import os

import numpy as np

from studies.common import Study, deviation, over_seeds
from support import charts, cli, runs

ALIKE = "dataset", "samples", "sampler", "nfe"  # flags
HEADER = ["run", "arm", "round", "sparsity", "seeds", "fid_domain", "sd", "val_loss",
          "train_steps_total"]
GAPS = ["sparsity", "run", "less", "seeds", "fid_domain", "low", "high"]
LEGEND = ("sd: standard deviation over seeds. fid_domain in the second table: tickets of `run` "
          "minus those of `less`, seed by seed; low, high: 90 % interval, from three seeds on.")
NEAR = 0.05  # sparsities are compared if the share left differs by less than this part of it


def read(folder):
    """(name, config.json, rows) of a finished run. Mistake for a folder without one."""
    config, path = runs.read_config(folder), os.path.join(folder, "results.csv")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise cli.Mistake(f"{path} cannot be read: {error.strerror}; finish the run") from error
    return os.path.basename(os.path.normpath(folder)), config, rows


def check(found):
    """Mistake, naming what differs, for runs whose figures do not compare."""
    (first, config, _), *others = found
    for name, other, _ in others:
        facts = [(flag, config["args"].get(flag), other["args"].get(flag)) for flag in ALIKE]
        facts += [(key, config.get(key), other.get(key)) for key in ("data_hash",
                                                                     "classifier_hash")]
        for key, one, two in facts:
            if one != two:
                raise cli.Mistake(f"{first} and {name} do not compare: {key} is {one} and {two}")
    names = [name for name, *_ in found]
    if len(set(names)) < len(names):
        raise cli.Mistake("name runs in folders of different names")


def summarise(name, rows):
    """Rows of HEADER, as dicts: means over seeds by arm and round."""
    groups = {}
    for row in rows:
        groups.setdefault((row["arm"], int(row["round"])), []).append(row)
    for (arm, number), group in groups.items():
        columns = [[float(row[column]) for row in group]
                   for column in ("sparsity", "fid_domain", "val_loss", "train_steps_total")]
        sparsity, fids, losses, steps = columns
        values = np.mean(sparsity), len(group), np.mean(fids), deviation(fids), np.mean(losses)
        yield dict(zip(HEADER, [name, arm, number, *values, np.mean(steps)]))


def alike(a, b):
    """Whether two sparsities are the same but for rounding and the method's steps."""
    return abs(a - b) < NEAR * (1 - min(a, b))


def tickets(rows):
    """{sparsity: {seed: fid_domain}} of the tickets of a run."""
    found = {}
    for row in rows:
        if row["arm"] == "ticket":
            near = [key for key in found if alike(key, float(row["sparsity"]))]
            key = near[0] if near else float(row["sparsity"])
            found.setdefault(key, {})[row["seed"]] = float(row["fid_domain"])
    return found


def differences(found):
    """Rows of GAPS: tickets of each run less those of the first, at sparsities that both have."""
    (first, _, rows), *others = found
    base = tickets(rows)
    for name, _, rows in others:
        for sparsity, values in tickets(rows).items():
            for key in (key for key in base if alike(key, sparsity)):
                seeds = sorted(set(values) & set(base[key]))
                if seeds:
                    gaps = [values[seed] - base[key][seed] for seed in seeds]
                    yield [sparsity, name, first, len(seeds), *over_seeds(gaps)]


def draw(table, path, note):
    """fid_domain of the tickets of each run against sparsity; dense as level lines."""
    series, levels = [], []
    for name in cli.once(row["run"] for row in table):
        rows = [row for row in table if row["run"] == name and row["arm"] == "ticket"]
        x, y = ([row[column] for row in rows] for column in ("sparsity", "fid_domain"))
        series.append(dict(label=name, x=[100 * value for value in x], y=y))
        levels += [(f"{name}: dense", row["fid_domain"], "dashed") for row in table
                   if row["run"] == name and row["arm"] == "dense"]
    if len({round(value, 6) for _, value, _ in levels}) == 1:  # one dense network for all
        levels = [("dense", levels[0][1], "dashed")]
    charts.line_chart(series, path, "Tickets by how they were found", "weights pruned, %",
                      "fid_domain (lower is better)", hlines=levels, note=note)


def main(argv=None):
    """The command line."""
    study = Study("studies.compare", __doc__)
    study.add_argument("folders", nargs="+", metavar="runs/NAME", type=cli.path,
                       help="finished runs, two or more")
    with study.arguments(argv) as args:
        if len(args.folders) < 2:
            study.error("name two runs or more")
        found = [read(folder) for folder in args.folders]
        check(found)
        table = [row for name, _, rows in found for row in summarise(name, rows)]
        gaps, flags = list(differences(found)), found[0][1]["args"]
        path = os.path.join(args.out, "compare_" + "_".join(name for name, *_ in found))
        study.save(path, HEADER, [list(row.values()) for row in table], differences=gaps,
                   runs={name: config["commit"] for name, config, _ in found})
        note = (f"{flags['dataset']}; FID from {flags['samples']:,} samples, {flags['sampler']} "
                f"with {flags['nfe']} evaluations; means over seeds.")
        draw(table, path + ".png", note)
    shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in table]
    print(charts.text_table(HEADER, shown), "", charts.text_table(GAPS, gaps), "", LEGEND,
          f"{path}.csv, .json, .png", sep="\n")


if __name__ == "__main__":
    main()
