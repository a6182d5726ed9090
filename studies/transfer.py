"""Do tickets transfer to another data set?

    python -m studies.transfer --from runs/A runs/B     # two runs with the same flags

Both ways: the ticket of A trains on the images of B as B's own ticket does. Compared on B:

    network                  mask                      state that it goes on from   steps
    own ticket               of B                      of B at step k               k to the end
    own mask, shuffled       of B, moved in its layer  of B at step k               k to the end
    own mask, new init       of B                      new weights                  all
    dense                    none                      new weights                  all
    foreign mask             of A                      of B at step k               k to the end
    foreign ticket           of A                      of A at step k               k to the end
    foreign mask, shuffled   of A, moved in its layer  of B at step k               k to the end

A shuffled mask keeps the densities of the layers alone; a state has its optimizer with it. Runs of
one seed share theta_0, so a place in the network means the same in both. They must be trained and
pruned alike, so that only the data differ (defaults of --lr and --ema do: give them).

Differences are paired by seed, intervals 90 %. Margins, fixed before the run: a network is as good
as another if the interval lies within 10 % of that one's fid_domain, or 3 % of its val_loss, worse
if beyond. Each data set has its own feature extractor: compare fid_domain within a target. The
comparison with dense was added after the first tables had been seen: it is exploratory.

What would change our mind about 'a ticket is more than its layer densities': shuffled foreign masks
that do as well as the foreign mask. About 'it is made for its data': foreign masks that do as well
as the own ticket.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.transfer")

import collections
import itertools
import os

import numpy as np
import torch

import lth_diffusion as lth
from lth_diffusion import Job
from prune import density, random_masks
from studies.common import (Study, against, checkpoint, fit, open_run, overlap, rounded,
                            ticket_masks)
from support import charts, cli
from support.words import counted, seeds_of

FIGURES = "sparsity", "steps", "fid_domain", "val_loss", "n_samples"
Row = collections.namedtuple("Row", ["seed", "way", "network", *FIGURES])  # way: "A to B"
OWN, FOREIGN = "own ticket", "foreign ticket"
ARMS = {OWN: "ticket", "own mask, shuffled": "random",
        "own mask, new init": "reinit",
        "dense": "dense"}  # of the target's run
SHUFFLED = "foreign mask, shuffled"  # as many weights in every layer
ALIKE = ("preset", "rounds", "prune_rate", "scope", "score", "schedule", "prediction", "weighting",
         "steps", "batch", "lr", "lr_schedule", "warmup", "optimizer", "beta2", "ema")  # of both
PAIRED = ["way", "metric", "network", "against", "seeds", "mean", "other mean", "difference", "low",
          "high", "answer"]


# --------------------------------------------------------------------------- what is trained
# A network to train is (its name, the model, masks, the training state it goes on from or None).

def compare(exp, seed, way, networks):
    """Rows of one seed on exp's data: what its run has trained, and the networks."""
    for network, arm in ARMS.items():
        number = 0 if arm == "dense" else exp.args.rounds
        if row := exp.rows.get(Job(seed, number, arm)):
            yield Row(seed, way, network, *map(row.get, FIGURES))
    for network, model, masks, state in networks:
        words = f"{way} {network} seed{seed}"
        label = words.replace(",", "").replace(" ", "-")
        ema = fit(exp, f"transfer-{label}", seed, model, masks, state)
        fid = exp.quality(exp.draw(ema, seed))["fid_domain"]
        print(f"{words}: fid_domain {fid:.2f}", flush=True)
        start = state["step"] if state else 0
        figures = exp.args.steps - start, fid, exp.errors(ema)["val_loss"], exp.args.samples
        yield Row(seed, way, network, 1 - density(masks), *figures)


def shuffled(masks, seed):
    """As many live weights in every layer, elsewhere."""
    generator = torch.Generator().manual_seed(lth.MASK_SEED + seed)
    return random_masks(masks, generator)


def foreign(a, b, seed):
    """Networks that train on b's data with the ticket of a."""
    masks = ticket_masks(a, seed)
    yield "foreign mask", b.new_model(seed), masks, checkpoint(b, seed)
    yield FOREIGN, b.new_model(seed), masks, checkpoint(a, seed)
    moved = shuffled(masks, seed)
    yield SHUFFLED, b.new_model(seed), moved, checkpoint(b, seed)


# --------------------------------------------------------------------------- what it shows

def finish(study, path, table, asked, others, exp, **facts):
    """Save tables and picture of the networks, of which `asked` is in question; print them."""
    pairs = list(paired(table, [(asked, "dense"), *others]))
    for name, header, rows in (path, Row._fields, table), (path + "_paired", PAIRED, pairs):
        study.save(name, header, rows, exp.device, k=exp.k, **facts)
    draw(table, title_of(pairs, asked), path + ".png")
    print("", charts.text_table(Row._fields, rounded(table)), "",
          charts.text_table(PAIRED, rounded(pairs)), "", f"{path}*.csv, .json, .png", sep="\n")


def paired(table, others):
    """Rows of PAIRED: every network against the own ticket; others: further pairs of networks."""
    for way in cli.once(row.way for row in table):
        for metric, margin in lth.MARGINS.items():
            values = {}
            for row in table:
                if row.way == way:
                    values.setdefault(row.network, {})[row.seed] = getattr(row, metric)
            pairs = [(network, OWN) for network in values if network != OWN]
            for network, other in [*pairs, *others]:
                if {network, other} <= set(values):
                    found = against(values[network], values[other], margin)
                    yield [way, metric, network, other, *found]


def title_of(pairs, asked):
    """How the network in question compares with the own ticket by fid_domain, either way."""
    said = [f"{row[-1]} ({row[0]})" for row in pairs if row[1:4] == ["fid_domain", asked, OWN]]
    return f"{asked.capitalize()} against own ticket: {', '.join(said)}"


def draw(table, title, path):
    """fid_domain by network, a series for each way."""
    networks, series = cli.once(row.network for row in table), []
    for way in cli.once(row.way for row in table):
        dots = [[row.fid_domain for row in table if (row.way, row.network) == (way, network)]
                for network in networks]
        y = [np.mean(group) if group else np.nan for group in dots]
        line = dict(label=way, x=range(len(y)), y=y, style="points")
        series.append(line | dict(dots=dots if max(map(len, dots)) > 1 else ()))
    ticks = [name.replace(" ", "\n") for name in networks]
    n = " or ".join(cli.once(f"{row.n_samples:,}" for row in table))
    seeds = seeds_of(cli.once(row.seed for row in table))
    charts.line_chart(
        series, path, title, "", "fid_domain (lower is better)", x_ticks=[*enumerate(ticks)],
        note=f"FID from {n} samples; {seeds}. Compare marks of one shape.")


# --------------------------------------------------------------------------- the study

def open_pair(folders):
    """{name: experiment} of two runs, and the seeds whose tickets both have."""
    found, facts, seeds = {}, [], []
    for folder in folders:
        exp, exp.rows = open_run(folder)
        found[os.path.basename(os.path.normpath(folder))] = exp
        last = exp.args.rounds, "ticket"
        seeds.append({job.seed for job in exp.rows if job[1:] == last})
        settings = {name: getattr(exp.args, name) for name in ALIKE}
        shape = exp.images.shape[1:]
        facts.append(settings | {"step k": exp.k, "image shape": shape})
    if len(found) < 2:
        cli.refuse("from", "name two runs, in folders of different names")
    differ = [name for name, value in facts[0].items() if facts[1][name] != value]
    if differ:
        cli.refuse("from", f"these runs differ in {', '.join(differ)}")
    if not seeds[0] & seeds[1]:
        cli.refuse("from", "these runs have no finished ticket of a common seed")
    return found, sorted(seeds[0] & seeds[1])


def overlaps(a, b, seeds):
    """{kind of pair: [IoU of a mask of a and one of b, over that of random masks]}."""
    ratios = {"one seed": [], "different seeds": []}
    for one, other in itertools.product(seeds, seeds):
        iou, chance = overlap(ticket_masks(a, one), ticket_masks(b, other))
        kind = "one seed" if one == other else "different seeds"
        ratios[kind].append(iou / chance)
    return ratios


def main(argv=None):
    """The command line."""
    study = Study("studies.transfer", __doc__)
    study.add_argument("--from", dest="pair", nargs=2, type=cli.path, metavar="runs/NAME",
                       required=True, help="two finished runs of lth_diffusion.py")
    with study.arguments(argv) as args:
        found, seeds = open_pair(args.pair)
        (a, exp_a), (b, exp_b) = found.items()
        ratios, table = overlaps(exp_a, exp_b, seeds), []
        for seed in seeds:
            networks = foreign(exp_a, exp_b, seed)
            table += compare(exp_b, seed, f"{a} to {b}", networks)
            networks = foreign(exp_b, exp_a, seed)
            table += compare(exp_a, seed, f"{b} to {a}", networks)
        path = os.path.join(args.out, f"transfer_{a}_{b}")
        masks = [("foreign mask", SHUFFLED)]
        finish(study, path, table, FOREIGN, masks, exp_a, overlap_over_chance=ratios)
        for kind, values in ratios.items():
            if values:
                print(f"Masks of {kind} overlap {np.mean(values):.2f} times as much as "
                      f"random masks ({counted(len(values), 'pair')}).")


if __name__ == "__main__":
    main()
