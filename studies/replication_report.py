"""What the replication found: tables from its committed rows (studies.replication_pictures draws).

    python -m studies.replication_report results/replication/*
    python -m studies.replication_report results/replication/* --out results

Reads results.csv, log.jsonl, curves.jsonl and config.json of each folder that studies.replication
wrote; folders of one part are joined, for each holds other seeds. results/PREREGISTRATION.md says
what is tested and in which order. Nothing is trained: the same files give the same report.

What would change our mind: results/PREREGISTRATION.md, 'For the claim' and 'Against it'.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.replication_report")

import csv
import json
import math
import os
from itertools import groupby

import numpy as np
from scipy import stats

import lth_diffusion as lth
from studies.common import Study, images_to_pay_back, over_seeds, rounded
from support import charts, cli, runs
from support.verdict import verdict
from support.words import ARMS, seeds_of

MARGINS = lth.MARGINS | {f"val_loss_t{i}": 0.03 for i in range(5)}
COMPARED = "dense", "ticket", "reinit", "random"
ALPHA = 0.05
CLAIMED = 0.89  # sparsities that the paper speaks of; 90 % comes out as 0.89999
CLAIM_PARTS = "v", "eps"
LONG = 5  # the round whose ticket took as many steps as part `dense` trains
TESTED = ["part", "metric", "sparsity", "seeds", *COMPARED, "p", "answer", "not shown"]
MEANS = ["part", "round", "arm", "sparsity", "seeds", "fid_domain", "sd", "precision",
         "recall", "val_loss", "sd of val_loss",
         "train_images_loss", "closer_to_train", "steps to match", "training steps / dense",
         "live MACs / dense", "images to pay back", "ticket kB", "training MiB", "sampling MiB"]
CLAIM = ["part", "sparsity", "seeds", "answer", "of ticket - reinit", "low", "high",
         "of ticket - 1.1 dense", "lowest", "highest"]
GAPS = ["part", "difference", "sparsity", "metric", "seeds", "mean", "low", "high"]
WINS = ["part", "sparsity", "seeds", "winning", "share from", "share to"]
FREE = "seeds", "out", "data_dir", "workers", "device", "control_rounds"  # may differ in a part


# --------------------------------------------------------------------------- reading

def read(folders):
    """{part: (config, {(seed, round, arm): row}, {(seed, round, arm): {step: val_loss}})}."""
    found = {}
    for folder in folders:
        config, rows, curves = runs.read_config(folder), read_rows(folder), read_curves(folder)
        part = config["args"].get("part")
        if part is None:
            raise cli.Mistake(f"{folder} is not of studies.replication")
        if part in found:
            check_alike(folder, config, found[part][0])
            if twice := set(rows) & set(found[part][1]):
                raise cli.Mistake(f"{folder}: seed {min(twice)[0]} of part {part} is there twice")
        known = found.setdefault(part, (config, {}, {}))
        known[1].update(rows)
        known[2].update(curves)
    return found


def check_alike(folder, config, other):
    """Mistake where two folders of a part are two experiments."""
    for key in ("threads", "precision", "data_hash", "classifier_hash"):
        if config.get(key) != other.get(key):
            raise cli.Mistake(f"{folder}: {key} is {config.get(key)}, elsewhere {other.get(key)}")
    for flag, value in config["args"].items():
        if flag not in FREE and value != other["args"].get(flag):
            raise cli.Mistake(f"{folder}: --{flag} is {value}, elsewhere "
                              f"{other['args'].get(flag)}")


def key_of(row):
    return int(row["seed"]), int(row["round"]), row["arm"]


def read_rows(folder):
    """{key: row} of results.csv, with what log.jsonl holds beyond it."""
    with open(os.path.join(folder, "results.csv"), encoding="utf-8", newline="") as file:
        rows = {key_of(row): {name: as_number(text) for name, text in row.items()}
                for row in csv.DictReader(file)}
    for line in read_lines(folder, "log.jsonl"):
        if key_of(line) in rows:
            rows[key_of(line)] = line | rows[key_of(line)]
    return rows


def as_number(text):
    """A cell of results.csv."""
    try:
        return float(text)
    except ValueError:
        return text or math.nan


def read_lines(folder, name):
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_curves(folder):
    """{key: {step: val_loss}}; where a stopped run wrote a step twice, the two are equal."""
    curves = {}
    for line in read_lines(folder, "curves.jsonl"):
        curves.setdefault(key_of(line), {})[line["step"]] = line["val_loss"]
    return curves


def values_of(rows, number, arm, column):
    """{seed: value} of an arm at a round (dense: round 0)."""
    number = 0 if arm == "dense" else number
    return {seed: row[column] for (seed, r, its), row in rows.items()
            if (r, its) == (number, arm) and column in row}


def arms_of(rows, number, column):
    """{arm: {seed: value}}: what a verdict needs."""
    return {arm: values_of(rows, number, arm, column) for arm in COMPARED}


def sparsity_of(rows, number, arm="ticket"):
    return float(np.mean(list(values_of(rows, number, arm, "sparsity").values())))


def control_rounds(rows):
    """Rounds that have what a verdict needs."""
    return sorted({r for _, r, arm in rows if arm == "random"})


# --------------------------------------------------------------------------- what was asked

def test(part, rows):
    """Rows of TESTED: the sparsities in their order; what follows a failure is exploratory."""
    order = [r for r in control_rounds(rows)]
    for metric, margin in MARGINS.items():
        confirmatory = "_t" not in metric
        for number in order:
            arms = arms_of(rows, number, metric)
            found = verdict(arms, margin, ALPHA, metric)
            answer = {True: "winning", False: "not shown", None: "no verdict"}[found.winning]
            if len({frozenset(values) for values in arms.values()}) > 1:
                answer = "no verdict: a run is missing"  # a seed is never left out
            lacking = "; ".join(f"{name}: {found.gaps[name]:.3g}" for name, p in
                                found.tests.items() if not p < ALPHA)
            means = [np.mean(list(values.values())) for values in arms.values()]
            yield [part, metric, sparsity_of(rows, number), found.n, *means, found.p,
                   answer + ("" if confirmatory else " (exploratory)"), lacking]
            confirmatory = confirmatory and answer == "winning"


def finding(part, rows):
    """What the confirmatory tests found, in a sentence for a title."""
    said = {}
    for _, metric, sparsity, *_, answer, _ in test(part, rows):
        if metric == "fid_domain" and "exploratory" not in answer:
            said.setdefault(answer.split(":")[0], []).append(f"{100 * sparsity:.3g} %")
    words = dict(winning="tickets win at", **{"not shown": "winning is not shown at"})
    text = "; ".join(f"{words[answer]} {' and '.join(levels)}" if answer in words else
                     "no verdict yet: too few runs" for answer, levels in said.items())
    return f"{text[0].upper()}{text[1:]} (part {part})"


def claims(part, rows):
    """Rows of CLAIM: winning, against the claim, or not shown, as it was preregistered, with the
    90 % intervals that say so. The claim is met where `v` wins and `eps` is not against it."""
    for _, metric, sparsity, *_, answer, _ in test(part, rows) if part in CLAIM_PARTS else ():
        number = next(r for r in control_rounds(rows) if sparsity_of(rows, r) == sparsity)
        if metric != "fid_domain" or sparsity < CLAIMED:
            continue
        arms = arms_of(rows, number, metric)
        behind = [over_seeds([value - factor * arms[arm][seed] for seed, value in
                              sorted(arms["ticket"].items()) if seed in arms[arm]])
                  for arm, factor in (("reinit", 1), ("dense", 1 + MARGINS[metric]))]
        against = any(low is not None and low > 0 for _, low, _ in behind)
        said = "against" if against and not answer.startswith("winning") else answer
        yield [part, sparsity, len(arms["ticket"]), said, *behind[0], *behind[1]]


def wins(part, rows):
    """Rows of WINS: seeds whose ticket passes all three tests by its value, 95 % interval."""
    for number in control_rounds(rows):
        arms = arms_of(rows, number, "fid_domain")
        seeds = set.intersection(*map(set, arms.values()))
        limit = 1 + MARGINS["fid_domain"]
        won = sum(arms["ticket"][seed] < min(limit * arms["dense"][seed], arms["reinit"][seed],
                                             arms["random"][seed]) for seed in seeds)
        between = stats.binomtest(won, len(seeds)).proportion_ci(0.95, "exact")
        yield [part, sparsity_of(rows, number), len(seeds), won, between.low, between.high]


def gaps(part, rows):
    """Rows of GAPS: ticket less another arm, and by how much it differs from dense, paired by seed,
    90 % intervals."""
    for metric in "fid_domain", "val_loss":
        for number in control_rounds(rows):
            ticket = values_of(rows, number, "ticket", metric)
            for arm in "dense", "reinit", "random", "oneshot", "small":
                others = values_of(rows, number, arm, metric)
                seeds = sorted(set(ticket) & set(others))
                if seeds:
                    found = over_seeds([ticket[seed] - others[seed] for seed in seeds])
                    yield [part, f"ticket - {ARMS[arm]}", sparsity_of(rows, number), metric,
                           len(seeds), *found]
    for metric in MARGINS:
        for number in control_rounds(rows):
            dense = values_of(rows, 0, "dense", metric)
            found = [value / dense[seed] - 1 for seed, value in
                     values_of(rows, number, "ticket", metric).items()]
            yield [part, "ticket / dense - 1", sparsity_of(rows, number), metric, len(found),
                   *over_seeds(found)]


def shorter(found):
    """Rows of GAPS: ticket / dense - 1 of `short`, of `v`, and their difference, in the seeds of
    both, by both metrics (the preregistration names none for this)."""
    if not {"v", "short"} <= set(found):
        return
    for metric in "fid_domain", "val_loss":
        for number in control_rounds(found["short"][1]):
            excess = {}
            for part in "v", "short":
                arms = arms_of(found[part][1], number, metric)
                excess[part] = {seed: value / arms["dense"][seed] - 1
                                for seed, value in arms["ticket"].items()}
            seeds = sorted(set(excess["v"]) & set(excess["short"]))
            excess["short - v"] = {seed: excess["short"][seed] - excess["v"][seed]
                                   for seed in seeds}
            for part, values in excess.items():
                yield [part, "ticket / dense - 1, shared seeds", sparsity_of(found["v"][1], number),
                       metric, len(seeds), *over_seeds([values[seed] for seed in seeds])]


def at_cost(found):
    """Rows of GAPS: the ticket that took as many steps as dense has in part `dense`, less that.
    On another kind of device the two share initial weights and x_T, and no batches."""
    if {"v", "dense"} <= set(found):
        for metric in "fid_domain", "val_loss":
            long = values_of(found["dense"][1], 0, "dense", metric)
            ticket = values_of(found["v"][1], LONG, "ticket", metric)
            if seeds := sorted(set(long) & set(ticket)):
                yield ["v - dense", "ticket - dense of as many steps",
                       sparsity_of(found["v"][1], LONG), metric, len(seeds),
                       *over_seeds([ticket[seed] - long[seed] for seed in seeds])]


# --------------------------------------------------------------------------- exploratory

def steps_to_match(curves, number, arm):
    """Text: steps until the arm reaches the final val_loss of its dense network, and in how many
    seeds it does; both on the curves, one point in 20."""
    reached, seeds = [], 0
    for (seed, r, its), curve in curves.items():
        dense = curves.get((seed, 0, "dense"))
        if (r, its) == (number, arm) and dense:
            seeds += 1
            goal = dense[max(dense)]
            reached += [min(step for step, loss in curve.items() if loss <= goal)] \
                if min(curve.values()) <= goal else []
    return f"{np.mean(reached):,.0f} ({len(reached)} of {seeds})" if reached else f"(0 of {seeds})"


def means(part, config, rows, curves):
    """Rows of MEANS. training steps, live MACs: of all runs that it took, over those of dense; live
    MACs count no multiplication by a pruned weight, in training either."""
    dense_macs = np.mean(list(values_of(rows, 0, "dense", "train_macs_total").values()))
    dense_steps = np.mean(list(values_of(rows, 0, "dense", "train_steps_total").values()))
    order = sorted(rows, key=lambda key: (key[1], list(ARMS).index(key[2])))
    for (number, arm), keys in groupby(order, key=lambda key: key[1:]):
        group = [rows[key] for key in keys]

        def mean(column):
            return float(np.mean([row.get(column, math.nan) for row in group]))
        def spread(column):
            values = [row[column] for row in group]
            return float(np.std(values, ddof=1)) if len(values) > 1 else None
        saved = config["args"]["nfe"] * (mean("macs_dense") - mean("macs_live"))
        steps = mean("train_steps_total") / dense_steps
        pays = arm in ("ticket", "oneshot") and saved > 0
        pay = images_to_pay_back(steps, dense_macs, saved) if pays else math.nan
        yield [part, number, arm, mean("sparsity"), len(group), mean("fid_domain"),
               spread("fid_domain"), mean("precision_domain"), mean("recall_domain"),
               mean("val_loss"), spread("val_loss"),
               mean("train_images_loss"), mean("closer_to_train"),
               steps_to_match(curves, number, arm), steps,
               mean("train_macs_total") / dense_macs, pay,
               mean("ticket_bytes") / 1e3, mean("train_memory") / 2**20,
               mean("sample_memory") / 2**20]


# --------------------------------------------------------------------------- the report

def main(argv=None):
    """The command line."""
    study = Study("studies.replication_report", __doc__)
    study.add_argument("folders", nargs="+", metavar="results/replication/NAME", type=cli.path,
                       help="folders that studies.replication wrote, in whole or in part")
    with study.arguments(argv) as args:
        found = read(args.folders)
        path, tables = os.path.join(args.out, "replication"), {}
        for part, (config, rows, curves) in found.items():
            for name, header, made in (("claim", CLAIM, claims(part, rows)),
                                       ("tests", TESTED, test(part, rows)),
                                       ("seeds", WINS, wins(part, rows)),
                                       ("differences", GAPS, gaps(part, rows)),
                                       ("arms", MEANS, means(part, config, rows, curves))):
                tables.setdefault(name, (header, []))[1].extend(made)
        tables["differences"][1].extend([*shorter(found), *at_cost(found)])
        commits = {folder: runs.read_config(folder)["commit"] for folder in args.folders}
        text = []
        for name, (header, table) in tables.items():
            study.save(f"{path}_{name}", header, table, commits=commits)
            text += [f"## {name}", charts.markdown_table(header, rounded(table))]
            print(charts.text_table(header, rounded(table)), end="\n\n")
        runs.write_text(path + ".md", "\n\n".join(["# The replication, from its rows", *text]))
        print(f"{path}.md, {path}_*.csv")


if __name__ == "__main__":
    main()
