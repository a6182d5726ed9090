"""Why these defaults? Pilots on seeds that nothing else uses.

    python -m checks.defaults training                    # digits: how a dense network is trained
    python -m checks.defaults training --dataset mnist    # hours
    python -m checks.defaults training --dataset cifar10 --only default "no flips" --samples 500
    python -m checks.defaults scoring                     # digits: how weights are ranked
    python -m checks.defaults scoring --dataset mnist

Other flags go to lth_diffusion.py. What is done is kept in --runs, cell by cell.

training  The default setting and others that differ from it in one thing. A good setting has a low
          fid_domain, a small spread over seeds, samples as bright as real images, and all classes.
          Each network is sampled three ways: a cheap sampler will do if it orders networks alike.
scoring   One chain of three large rounds, through 80, 90 and 95 % sparsity, for each way to rank
          weights over the network (|w|, |w| over its layer's root mean square, LAMP), within
          layers, and by ERK. A third of the weights start at zero, and |w| empties their layers.

What would change our mind: a setting that is better on all seeds at equal cost.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m checks.defaults")

import json
import os
import time

import numpy as np
import torch

import lth_diffusion as lth
from ddpm import Diffusion, train
from lth_diffusion import Job
from prune import prune_magnitude, rewind
from studies.common import Study, take_dense
from support import charts, cli, runs

SEEDS = 900, 901, 902
SAMPLERS = {"ancestral 50": ("ddpm", 50), "ancestral 25": ("ddpm", 25), "DDIM 50": ("ddim", 50),
            "DPM++ 20": ("dpm", 20)}
CUTS = 0.8, 0.5, 0.5  # of what lives, in a round: 80, 90 and 95 % sparsity
SCORING = {"global": ("global", "magnitude"), "global, normalized": ("global", "normalized"),
           "global, LAMP": ("global", "lamp"), "layer": ("layer", "magnitude"),
           "erk": ("erk", "magnitude")}
SCORED = ["sparsity", "layers_at_minimum", "fid_domain", "val_loss", "classes_domain"]


COLOUR = {"no flips": dict(flip=False), "attention at 8": dict(model=dict(attention=(8,)))}


def settings(args):
    """{name: what differs from the default setting, whose loss is on v with min-SNR weights}."""
    return {
        "default": {}, "v, plain": dict(weighting="plain"),
        "eps, min-snr": dict(prediction="eps"),
        "eps, plain": dict(prediction="eps", weighting="plain"),
        "half the rate": dict(lr=args.lr / 2), "twice the rate": dict(lr=args.lr * 2),
        "beta2 0.95": dict(beta2=0.95), "beta2 0.99": dict(beta2=0.99),
        "beta2 0.999": dict(beta2=0.999),
        "longer EMA": dict(ema_decay=1 - (1 - args.ema) / 2),
        "shorter EMA": dict(ema_decay=1 - 2 * (1 - args.ema)),
        "twice the batch, half the steps": dict(batch=2 * args.batch, steps=args.steps // 2),
        "half the batch, twice the steps": dict(batch=args.batch // 2, steps=2 * args.steps),
        "twice the steps": dict(steps=2 * args.steps),
        "two threads": dict(threads=2), "bf16": dict(precision="bf16"),
        "dropout 0.1": dict(model=dict(dropout=0.1)),
    } | (COLOUR if args.dataset.startswith("cifar") else {})


def measure(exp, name, seed, prediction=None, weighting=None, threads=None, model=None, **changed):
    """{column: value} of a dense network of a seed, trained in a setting."""
    a, before, model = exp.args, torch.get_num_threads(), exp.new_model(seed, **model or {})
    torch.set_num_threads(threads or before)
    exp.diffusion = Diffusion(1000, a.schedule, prediction or a.prediction,
                              weighting or a.weighting)
    steps, began = changed.get("steps", a.steps), time.monotonic()
    options = dict(warmup=max(1, steps // 20), label=f"{name}, seed {seed}") | changed
    ema, _ = train(model, exp.diffusion, exp.images,
                   **exp.options(Job(seed, 0, "dense"), **options))
    found = dict(setting=name, seed=seed, commit=runs.commit(), steps=steps,
                 seconds=time.monotonic() - began)
    found |= exp.errors(ema.model)
    for label, (sampler, nfe) in SAMPLERS.items():
        quality = exp.quality(exp.draw(ema.model, seed, sampler=sampler, steps=nfe, label=label))
        found[label] = quality["fid_domain"]
    torch.set_num_threads(before)  # pixels and classes are those of the last sampler
    return found | {column: quality.get(column, np.nan)
                    for column in ("mean_pixel", "classes_domain")}


def training(study, args, common):
    """A row for every setting and seed; the means over seeds."""
    exp, rows = lth.Experiment(common), []
    cells = settings(common)
    names = args.only or list(cells)
    if unknown := [name for name in names if name not in cells]:
        cli.refuse("only", f"{unknown[0]} is none of: {'; '.join(cells)}")
    for seed in args.seeds:
        for name in names:
            path = f"{common.out}/{name.replace(' ', '_').replace(',', '')}_seed{seed}.json"
            if not os.path.exists(path):
                runs.write_text(path, json.dumps(measure(exp, name, seed, **cells[name])))
            with open(path, encoding="utf-8") as file:
                rows.append(json.load(file))
            print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1].values()),
                  flush=True)
    rows.sort(key=lambda row: names.index(row["setting"]))
    means = [[name, len(found), *(spread(found, column) for column in [
        "seconds", "val_loss", *SAMPLERS, "mean_pixel", "classes_domain"])]
        for name in names if (found := [row for row in rows if row["setting"] == name])]
    header = ["setting", "seeds", "train s", "val_loss", *SAMPLERS, "pixel", "classes"]
    reference = exp.reference["fid_domain"], exp.reference["mean_pixel"]
    print(f"\nreal images: fid_domain {reference[0]:.2f}, pixel {reference[1]:.1f}")
    return list(rows[0]), [list(row.values()) for row in rows], header, means


def spread(rows, column):
    """Mean and standard deviation of a column, as text."""
    values, digits = [row[column] for row in rows], 4 if column == "val_loss" else 2
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def chain(args, exp):
    """Iterative pruning in the rounds of CUTS."""
    for seed in args.seeds:
        dense = last = exp.train_dense(seed)
        masks = dense.masks
        for r, cut in enumerate(CUTS, 1):
            masks = prune_magnitude(last.model, masks, cut, args.scope, score=args.score)
            ticket = exp.new_model(seed)
            start = rewind(ticket, masks, dense.checkpoint)
            last = exp.train(Job(seed, r, "ticket"), ticket, masks, start, after=last.spent)


def scoring(study, args, common):
    """A row for every cell, seed and round; the means over seeds."""
    rows, first = [], None
    for name, (scope, score) in SCORING.items():
        if args.only and name not in args.only:
            continue
        out = f"{common.out}/{name.replace(' ', '_').replace(',', '')}"
        flags = ["--rounds", "3", "--final-sparsity", "0.95", "--controls", "--scope", scope,
                 "--score", score, "--out", out, "--seeds", *map(str, args.seeds)]
        run, parser = lth.parse_args([*args.rest, *flags])
        take_dense(first, run)
        first = first or out
        exp = lth.run(run, parser, chain, lth.jobs)
        rows += [[name, job.seed, *(row[column] for column in SCORED)]
                 for job, row in exp.rows.items() if job.seed in args.seeds]
    groups = {}
    for name, _, *values in rows:
        groups.setdefault((name, f"{values[0]:.3f}"), []).append(dict(zip(SCORED, values)))
    means = [[*key, len(found), *(spread(found, column) for column in SCORED[1:])]
             for key, found in groups.items()]
    header = ["ranking", "sparsity", "seeds", "layers at minimum", *SCORED[2:]]
    return ["ranking", "seed", *SCORED], rows, header, means


def main(argv=None):
    """The command line; other flags go to lth_diffusion.py."""
    study = Study("checks.defaults", __doc__)
    add = study.add_argument
    add("section", choices=["training", "scoring"])
    add("--only", nargs="+", metavar="NAME", help="some of the settings")
    add("--runs", type=cli.path, default="runs", help="folder of the runs (default: runs)")
    add("--seeds", nargs="+", type=cli.seed_number, default=SEEDS, help="default: 900 901 902")
    with study.arguments(argv, ("--scope", "--score", "--rounds", "--controls")) as args:
        common, _ = lth.parse_args(args.rest)
        name = f"defaults_{args.section}_{common.dataset}"
        common.out = os.path.join(args.runs, name)
        cli.settle_device(common)
        section = training if args.section == "training" else scoring
        header, rows, short, means = section(study, args, common)
        path = os.path.join(args.out, name)
        device = cli.pick_device(common.device)[0]
        study.save(path, header, rows, device, n=common.samples, seeds=list(args.seeds),
                   precision=common.precision, flags=vars(common))
    print(charts.text_table(short, means), f"{path}.csv, .json", sep="\n\n")


if __name__ == "__main__":
    main()
