"""How stable are tickets, and does a stable start make a good one?

    python -m studies.stability                       # a small run on digits: minutes
    python -m studies.stability --from runs/mnist     # a finished run, all its seeds

Two copies are trained on from step k with two data orders, for several steps k of one
dense run: the instability analysis of Frankle, Dziugaite, Roy and Carbin, Linear Mode Connectivity
and the Lottery Ticket Hypothesis, 2020 (1912.05671, section 2).

masks    Both copies are cut once to the density of the run's last tickets. Reported: intersection
         over union (IoU) of the two masks, beside that of random masks of the same layer densities.
         For scale: the IoU of tickets of two seeds, whose weights do not correspond.
barrier  The most by which val_loss at (1 - a) A + a B lies above the straight line between its
         values at A and at B, over 11 points a. A and B are averaged weights (EMA), as in sampling.
         Margin, from section 3 of the paper: a start is stable where it is below 2 % of A's.
ticket   The dense network is cut once to the same density; the mask is laid over the state of each
         step k, and trained on. Copy A is the dense network itself, which sees the same batches.
         Copy B shows how large a difference the data order alone makes.

From a larger k fewer steps are left: compare a ticket with the copies from its own k, never across
k. The barrier falls with k, and a ticket's distance from copy A may do so for reasons of its own: a
rank correlation over k shows no cause. All k of a seed share a dense run and a mask, so the seeds
are the replicates; intervals of 90 % are over them. There is no shuffled mask: whether any mask
would do at that k is not shown.

What would change our mind about 'choose k where the barrier is about zero': seeds in which tickets
with a small barrier lose as much to the dense copy as those with a large one.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.stability")

import copy
import itertools
import math
import os

import numpy as np
from scipy.stats import spearmanr

from ddpm import train
from lth_diffusion import Job
from methods.cka import PROBE_SEED
from prune import dense_masks, density, prune_magnitude
from studies.common import (Study, add_run_flag, fit, open_run, over_seeds,
                            overlap, ticket_masks)
from support import charts, cli
from support.words import counted, seeds_of

SHARES = 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5  # of the steps
STABLE = 0.02  # of the val_loss of copy A: a barrier below it counts as none
ALPHAS = np.linspace(0, 1, 11)
EXCESS = {"excess loss": "val_loss", "excess fid": "fid_domain"}  # ticket over copy A


def dense_run(exp, seed, steps):
    """(the dense network of a seed, trained once more; its EMA; {k: its state after k steps})."""
    model, states = exp.new_model(seed), {}

    def checkpoint(step, get_state):
        if step in steps:
            states[step] = copy.deepcopy(get_state())
    options = exp.options(Job(seed, 0, "dense"))
    ema, _ = train(model, exp.diffusion, exp.images, checkpoint=checkpoint, **options)
    return model, ema.model, states


def build(exp, weights):
    """A dense U-Net with these weights."""
    model = exp.new_model(0)
    model.load_state_dict(weights)
    return model


def path_losses(exp, a, b):
    """val_loss at every point ALPHAS of the way from model a to model b."""
    start, end, losses = a.state_dict(), b.state_dict(), []
    for alpha in ALPHAS:
        between = {name: value.lerp(end[name], float(alpha))
                   for name, value in start.items()}
        losses.append(exp.errors(build(exp, between))["val_loss"])
    return losses


def barrier(losses):
    """The most by which losses at ALPHAS lie above the line from the first to the last."""
    line = (1 - ALPHAS) * losses[0] + ALPHAS * losses[-1]
    return float(np.max(losses - line))


def one_cut(exp, model, left):
    """Masks of one cut to density `left`, as the run ranks weights (a ramp: over the network)."""
    ramp = exp.args.scope == "ramp"
    scope, score = ("global", "magnitude") if ramp else (exp.args.scope, exp.args.score)
    return prune_magnitude(model, dense_masks(model), 1 - left, scope, score=score)


def one_start(exp, seed, dense, ema, state, masks):
    """(row of the table, val_loss on the way from A, the dense network, to B) for the training
    state of one step k."""
    nets, k, left = dict(A=ema), state["step"], density(masks)
    cuts = [one_cut(exp, dense, left)]
    for name, order in dict(B=PROBE_SEED + seed, ticket=seed).items():
        model = exp.new_model(seed)
        file = f"stability_seed{seed}_k{k}_{name}"
        its = masks if name == "ticket" else None
        nets[name] = fit(exp, file, seed, model, its, state, seed=order)
        cuts.append(one_cut(exp, model, left))
    losses = path_losses(exp, nets["A"], nets["B"])
    iou, chance = overlap(*cuts[:2])
    row = {"seed": seed, "k": k, "IoU": iou, "by chance": chance}
    row["barrier"] = barrier(losses)
    for name, net in nets.items():
        samples = exp.draw(net, seed, label=f"k={k}: sample")
        row[f"val_loss {name}"] = exp.errors(net)["val_loss"]
        row[f"fid_domain {name}"] = exp.quality(samples)["fid_domain"]
    for excess, column in EXCESS.items():
        ticket, dense = row[f"{column} ticket"], row[f"{column} A"]
        row[excess] = ticket / dense - 1
    return row, losses


def across_seeds(exp, rows):
    """(mean IoU, by chance) of the run's last tickets of every two seeds; None of one seed."""
    last = exp.args.rounds
    there = [job.seed for job in rows if job[1:] == (last, "ticket")]
    masks = [ticket_masks(exp, seed) for seed in there]
    found = [overlap(a, b) for a, b in itertools.combinations(masks, 2)]
    return np.mean(found, axis=0).tolist() if found else None


def rank_correlation(table, column):
    """{seed: Spearman's rho over k of the barrier and `column`}, NaN where it is not defined."""
    found = {}
    for seed in dict.fromkeys(row["seed"] for row in table):
        mine = [row for row in table if row["seed"] == seed]
        x = [row["barrier"] for row in mine]
        y = [row[column] for row in mine]
        known = len(x) > 2 and min(len(set(x)), len(set(y))) > 1
        found[seed] = float(spearmanr(x, y).statistic) if known else math.nan
    return found


def stable_from(table):
    """The smallest k from which on no seed has a barrier of STABLE or more; None: there is none."""
    low = None
    for k in sorted({row["k"] for row in table}, reverse=True):
        if any(row["barrier"] >= STABLE * row["val_loss A"] for row in table if row["k"] == k):
            break
        low = k
    return low


def conclude(table, strangers):
    """What the figures say, with their n."""
    k, seeds = stable_from(table), {row["seed"] for row in table}
    said = [f"Barrier below {STABLE:.0%} of val_loss in {counted(len(seeds), 'seed')}: "
            + ("not even from the largest k." if k is None else f"from step {k} on.")]
    if strangers:
        said.append("IoU of tickets of two seeds: {:.3f}, by chance {:.3f}.".format(*strangers))
    for column in EXCESS:
        each = list(rank_correlation(table, column).values())
        rhos = ", ".join(f"{rho:.2f}" for rho in each)
        mean, low, high = over_seeds(each)
        ends = "no verdict" if low is None else f"mean {mean:.2f} [{low:.2f}, {high:.2f}]"
        said.append(f"Spearman's rho of the barrier and the ticket's {column}, "
                    f"by seed: {rhos} (n={len(each)}, {ends}).")
    return "\n".join(said)


def draw_over_k(table, columns, path, title, y_label, **options):
    """A line per column over k: means and, from two seeds on, each seed."""
    ks, series = sorted({row["k"] for row in table}), []
    for column in columns:
        dots = [[row[column] for row in table if row["k"] == k] for k in ks]
        means = [np.mean(values) for values in dots]
        series.append(dict(label=column, x=range(len(ks)), y=means,
                           dots=dots if len(dots[0]) > 1 else ()))
    charts.line_chart(series, path, title, "k, the step of the start (equally spaced)", y_label,
                      x_ticks=[(i, str(k)) for i, k in enumerate(ks)], **options)


def draw(table, paths, strangers, path, note):
    """Losses, and overlap of masks, over k."""
    worst = "worst between A and B"
    rows = [row | {worst: max(paths[row["seed"], row["k"]])} for row in table]
    columns = worst, "val_loss A", "val_loss B", "val_loss ticket"
    k = stable_from(table)
    title = ("Even from the largest k the data order matters in some seed" if k is None else
             f"From step {k} on the barrier between A and B is below {STABLE:.0%} in every seed")
    draw_over_k(rows, columns, path + ".png", title, "val_loss",
                log_y=True, note=f"A, B: dense, two data orders from step k. {note}")
    levels = [("tickets of two seeds", strangers[0], "dotted")] if strangers else ()
    draw_over_k(table, ("IoU", "by chance"), path + "_masks.png",
                "Overlap of the masks of copies A and B", "IoU",
                hlines=levels, note=note)


def starts(args, exp, rows):
    """(seeds, steps k), checked."""
    last, steps = exp.args.rounds, exp.args.steps
    seeds = cli.once(args.seeds or exp.args.seeds)
    for seed in seeds:
        if Job(seed, last, "ticket") not in rows:
            cli.refuse("seeds", f"{exp.args.out} has no ticket of "
                       f"seed {seed} in round {last}")
    ks = sorted({round(share * steps) for share in args.shares} | {exp.k})
    if ks[-1] >= steps:
        cli.refuse("shares", f"{max(args.shares)} of {steps} steps leaves none")
    return seeds, ks


def main(argv=None):
    """The command line."""
    study = Study("studies.stability", __doc__)
    add_run_flag(study)
    add = study.add_argument
    add("--seeds", nargs="+", type=cli.seed_number,
        help="which of its seeds (default: all)")
    add("--shares", nargs="+", type=cli.fraction, default=SHARES,
        metavar="SHARE", help="k as shares of the steps, beside the run's "
        "own k (default: 0 0.01 0.02 0.05 0.1 0.2 0.5)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        seeds, ks = starts(args, exp, rows)
        path = os.path.join(args.out, f"stability_{exp.args.dataset}")
        strangers, table, paths = across_seeds(exp, rows), [], {}
        for seed in seeds:
            dense, ema, states = dense_run(exp, seed, ks)
            left = density(ticket_masks(exp, seed))
            masks = one_cut(exp, dense, left)
            for k in ks:
                row, paths[seed, k] = one_start(exp, seed, dense, ema, states[k], masks)
                table.append(row)
                cells = [list(row.values()) for row in table]
                ways = {f"seed {s}, k={at}": way for (s, at), way in paths.items()}
                study.save(path, list(row), cells, exp.device, n=exp.args.samples,
                           density=left, paths=ways, two_seeds=strangers)
                print(f"seed {seed}, k={k}: done", flush=True)
        said = conclude(table, strangers)
        study.save(path, list(row), cells, exp.device, n=exp.args.samples, density=left,
                   paths=ways, two_seeds=strangers, said=said.split("\n"))
        note = (f"{exp.args.dataset}, {exp.args.steps:,} steps, tickets at "
                f"{100 * left:.1f} % of the weights, {seeds_of(seeds)}.")
        draw(table, paths, strangers, path, note)
    print(f"\n{charts.text_table(list(row), cells)}\n")
    print(f"{said}\n{path}*")


if __name__ == "__main__":
    main()
