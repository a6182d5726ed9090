"""Where in the U-Net do tickets live, and how alike are they?

    python -m studies.layers                        # a small run on digits: minutes
    python -m studies.layers --from runs/mnist      # a finished run, all its seeds
    python -m studies.layers --from runs/mnist --beside runs/mnist_rigl runs/mnist_oneshot

Jiang et al., Successfully Applying Lottery Ticket Hypothesis to Diffusion Model, 2023 (2310.18823),
report that two winning tickets agree more upstream than downstream, and prune later blocks more.
They compare weights by HSIC with an RBF kernel, without normalisation or a stated bandwidth.

agreement  Two networks are trained from step k on different data orders: dense networks, and
           tickets with one mask. By residual block: CKA of the weights (methods/cka.py), and
           1 - R2, the share of the variance of the second network's activations on held-out images
           that linear regression on the first network's leaves unexplained. Null pairs: the mask
           on new weights, and the ticket of another seed. The claim is a CKA that falls with depth
           and a 1 - R2 that rises, where those of the null pairs do not.
masks      Density by block; intersection over union of two masks (IoU), over that of random masks
           of the same layer densities: tickets of this run and of the runs named by --beside.
survival   Of each tenth of a layer's |w| at the start, the share that survives, over the layer's
           density (Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, 1803.03635, figure 15).
           Null: the weights of another seed. Layers that start at 0 have no order: left out.

A slope is the change from the first block to the last, with a 95 % interval over three or more
seeds. What would change our mind about 'depth needs no pruning schedule': slopes as claimed, with
intervals that exclude 0 and the slopes of the null pairs. Depth, width and resolution change
together in a U-Net: a slope does not show which of them caused it. Whether rates that vary with
depth give better tickets is a question for studies/comparison.py.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.layers")

import itertools
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import as_input
from lth_diffusion import Job
from methods.cka import PROBE_SEED, block_similarity
from prune import density, live_counts, prunable
from studies.common import (Study, add_run_flag, checkpoint, density_by_block, fit,
                            open_run, over_seeds, overlap, rounded, slope)
from support import charts, cli, runs
from support.words import seeds_of
from unet import ResBlock

TIMES = 50, 150, 300, 500, 800  # from almost an image to almost noise
IMAGES = 200  # behind a 1 - R2: one half fits, one measures
TENTHS = 10
NULLS = "ticket, new weights", "ticket, other seed", "theta_0, other seed"
HEADER = ["seed", "quantity", "pair", "block", "value"]
OVERLAP = ["ticket", "other", "IoU", "by chance", "times chance"]
SLOPES = ["quantity", "pair", "seeds", "mean", "slope", "low", "high"]


def pairs(exp, rows, seed, other):
    """(name, network, network) of each pair that there is; other: seed of the null pair."""
    mine = Job(seed, exp.args.rounds, "ticket")
    dense, ticket = exp.load(Job(seed, 0, "dense")), exp.load(mine)
    for name, first in ("dense", dense), ("ticket", ticket):
        file = f"layers_{name}_seed{seed}"
        second = fit(exp, file, seed, exp.new_model(seed), first.masks, checkpoint(exp, seed),
                     seed=PROBE_SEED + seed)
        yield f"{name}, two orders", first.ema, second
    jobs = mine._replace(arm="reinit"), mine._replace(seed=other)
    for name, job in zip(NULLS, jobs):
        if job in rows and job != mine:
            yield name, ticket.ema, exp.load(job).ema


@torch.no_grad()
def activations(exp, model, x0, seed):
    """{residual block: its outputs float64 [rows, C]} at every fourth pixel, over TIMES."""
    found, hooks = {}, []
    for name, module in model.eval().named_modules():
        def keep(module, given, out, name=name):
            rows = out[:, :, ::4, ::4].movedim(1, -1).flatten(0, -2)
            found.setdefault(name, []).append(rows.cpu().double())
        if isinstance(module, ResBlock):
            hooks.append(module.register_forward_hook(keep))
    generator = torch.Generator().manual_seed(seed)
    for time in TIMES:
        t = torch.full((len(x0),), time)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = exp.diffusion.q_sample(x0, t, noise).float()
        model(x_t.to(exp.device), t.to(exp.device))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def unexplained(a, b, new_a, new_b):
    """1 - R2 of new_b [n, C], predicted from new_a by least squares fitted on a, b."""
    x, new_x = (torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
                for rows in (a, new_a))
    error = new_b - new_x @ torch.linalg.lstsq(x, b, driver="gelsd").solution
    spread = new_b - new_b.mean(0)
    return float(error.square().sum() / spread.square().sum())


def reconstruction(exp, a, b):
    """{block: 1 - R2 of b's activations from a's}; both see the same images, t and noise."""
    images = as_input(metrics.random_draw(exp.test, IMAGES))
    # Each half has its own noise: at large t, noise is nearly all there is.
    parts = [activations(exp, model, x0, lth.EVAL_SEED + half)
             for half, x0 in enumerate(images.chunk(2))
             for model in (a, b)]
    return {block: unexplained(*(part[block] for part in parts))
            for block in parts[0]}


def agreement(exp, rows, seed, other):
    """Rows of HEADER: CKA and 1 - R2 by block."""
    for pair, a, b in pairs(exp, rows, seed, other):
        for block, value in block_similarity(a, b).items():
            yield [seed, "CKA", pair, block, value]
        for block, value in reconstruction(exp, a, b).items():
            yield [seed, "1 - R2", pair, block, value]


def tickets_of(exp, folders, seeds):
    """{(run, seed): masks} of the tickets of the last round of `exp` that are there."""
    found, last = {}, exp.args.rounds
    shapes = [p.shape for p in prunable(exp.new_model(0)).values()]
    for folder, seed in itertools.product(folders, seeds):
        path = Job(seed, last, "ticket").path(folder)
        if os.path.exists(path):
            state = runs.load_state(path, lth.FINISHED)
            _, masks = exp.rebuild(state)
            if [mask.shape for mask in masks.values()] != shapes:
                cli.refuse("beside", f"{folder}: another network")
            found[folder, seed] = masks
    for folder in set(folders) - {run for run, _ in found}:
        cli.refuse("beside", f"{folder} has no ticket of round {last} "
                   f"and {seeds_of(seeds)}")
    left = {run: density(masks) for (run, _), masks in found.items()}
    for folder, one in left.items():
        if abs(one - left[folders[0]]) > 0.01:
            cli.refuse("beside", f"{folder} keeps {one:.1%} of the weights in round {last}, "
                       f"{folders[0]} {left[folders[0]]:.1%}: name runs of one sparsity")
    return found


def densities(exp, tickets):
    """Rows of HEADER: density by block."""
    model = exp.new_model(0)
    for (run, seed), masks in tickets.items():
        found = density_by_block(model, live_counts(masks))
        for block, value in found.items():
            yield [seed, "density", run, block, value]


def overlaps(tickets):
    """Rows of OVERLAP: every ticket with every ticket."""
    for one, other in itertools.product(tickets, repeat=2):
        names = [f"{run}, seed {seed}" for run, seed in (one, other)]
        iou, chance = overlap(tickets[one], tickets[other])
        yield [*names, iou, chance, iou / chance]


def survival(mask, start):
    """Of each tenth of |start|, smallest first: the share that survives, over the density."""
    order = start.detach().abs().flatten().argsort()
    live = mask.flatten()[order].double()
    tenths = live.tensor_split(TENTHS)
    return [float(part.mean() / live.mean()) for part in tenths]


def survivors(exp, seed, masks):
    """Rows of HEADER: survival by tenth, mean over the layers that do not start at 0."""
    theta_0 = exp.new_model(seed)
    theta_k = exp.new_model(seed)
    theta_k.load_state_dict(checkpoint(exp, seed)["model"])
    starts = {"theta_0": theta_0, "theta_k": theta_k,
              NULLS[2]: exp.new_model(lth.REINIT_SEED + seed)}
    layers = [name for name, p in prunable(theta_0).items()
              if p.any() and p.numel() >= TENTHS]
    for start, model in starts.items():
        weights = prunable(model)
        rates = [survival(masks[name], weights[name]) for name in layers]
        for tenth, rate in enumerate(np.mean(rates, 0), 1):
            yield [seed, "survival", start, tenth, float(rate)]


def grids(table, quantity):
    """{pair: values [seeds, blocks]} of one quantity."""
    found = {}
    for seed, name, pair, _, value in table:
        if name == quantity:
            by_seed = found.setdefault(pair, {})
            by_seed.setdefault(seed, []).append(value)
    return {pair: np.array(list(by_seed.values()))
            for pair, by_seed in found.items()}


def slopes(table):
    """Rows of SLOPES: slopes over blocks or tenths, means and intervals over seeds."""
    for quantity in "CKA", "1 - R2", "density", "survival":
        for pair, grid in grids(table, quantity).items():
            each = [slope(values)[0] for values in grid]
            start = quantity, pair, len(grid), float(np.nanmean(grid))
            yield [*start, *over_seeds(each, 0.025)]


def ways(lines):
    """{quantity: a sentence on how it goes with depth, for two tickets}, from rows of SLOPES."""
    said = {}
    for quantity, pair, n, _, value, low, high in lines:
        if pair == "ticket, two orders":
            shown = n > 2 and low * high > 0
            way = f"{'rises' if value > 0 else 'falls'} with depth" if shown else "slope not shown"
            said[quantity] = f"{quantity} of two tickets: {way} ({value:+.3f})"
    return said


def conclude(lines):
    """What rows of SLOPES say about the claim."""
    n = lines[0][2]
    return f"{'; '.join(ways(lines).values())}. n={n}{', no verdict' * (n < 3)}."


def draw_lines(table, quantity, labels, path, title, note, x_label=""):
    """One quantity, a line per pair: means over seeds."""
    series = []
    for pair, grid in grids(table, quantity).items():
        line = dict(label=pair, x=range(len(labels)), y=grid.mean(0))
        line["style"] = "dashed" if pair in NULLS else "solid"
        line["dots"] = grid.T.tolist() if len(grid) > 1 else ()
        series.append(line)
    charts.line_chart(series, path, title, x_label, quantity,
                      x_ticks=list(enumerate(labels)), note=note)


def draw(table, said, path, note):
    """Agreement and survival as lines, density as a heat map. said: of ways()."""
    names = [row[3] for row in table if row[1] == "density"]
    blocks = list(dict.fromkeys(names))
    short = [block.replace(".blocks", "") for block in blocks]
    draw_lines(table, "CKA", short, path + "_cka.png", said["CKA"],
               f"{note} A gap: a layer was pruned away.")
    draw_lines(table, "1 - R2", short, path + "_error.png", said["1 - R2"],
               f"{note} 1 - R2: how badly one network's activations predict another's.")
    tenths = [str(k + 1) for k in range(TENTHS)]
    draw_lines(table, "survival", tenths, path + "_survival.png",
               "Which weights survive, by their size at the start: "
               "share of each tenth over the layer's density", note,
               "tenth of the layer's weights, smallest first")
    found = grids(table, "density")
    means = [grid.mean(0) for grid in found.values()]
    folders = [os.path.basename(os.path.normpath(run)) for run in found]
    columns = [name.replace("_", "\n") for name in folders]
    charts.heat_map(np.transpose(means), blocks, columns,
                    path + "_density.png",
                    "Where tickets live: density by block", note)


def draw_overlap(shared, path, note):
    """Rows of OVERLAP as a heat map."""
    names = list(dict.fromkeys(row[0] for row in shared))
    labels = [f"{k}: {name}" for k, name in enumerate(names)]
    numbers = [str(k) for k in range(len(names))]
    times = np.reshape([row[-1] for row in shared], (len(names), -1))
    np.fill_diagonal(times, np.nan)
    charts.heat_map(times, labels, numbers, path,
                    "Overlap of masks: IoU over that of random masks",
                    note, log=True, bar_label="times chance")


def main(argv=None):
    """The command line."""
    study = Study("studies.layers", __doc__)
    add_run_flag(study)
    add = study.add_argument
    add("--seeds", nargs="+", type=cli.seed_number,
        help="which of its seeds (default: all)")
    add("--beside", nargs="+", default=[], type=cli.path,
        metavar="runs/NAME", help="runs to compare its masks with")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        out, last = exp.args.out, exp.args.rounds
        seeds = cli.once(args.seeds or exp.args.seeds)
        for seed in seeds:
            if Job(seed, last, "ticket") not in rows:
                cli.refuse("seeds", f"{out} has no ticket of seed {seed} "
                           f"in round {last}")
        tickets = tickets_of(exp, cli.once([out, *args.beside]), seeds)
        path = os.path.join(args.out, f"layers_{exp.args.dataset}")
        facts = dict(seeds=seeds, times=TIMES, images=IMAGES, run=out)
        table = list(densities(exp, tickets))
        for other, seed in zip([seeds[-1], *seeds], seeds):
            table += agreement(exp, rows, seed, other)
            table += survivors(exp, seed, tickets[out, seed])
            study.save(path, HEADER, table, exp.device, **facts)
            print(f"seed {seed}: done", flush=True)
        note = f"{exp.args.dataset}, round {last}, {seeds_of(seeds)}."
        lines = list(slopes(table))
        study.save(path + "_slopes", SLOPES, lines, exp.device, **facts)
        draw(table, ways(lines), path, note)
        if len(tickets) > 1:
            shared = list(overlaps(tickets))
            study.save(path + "_overlap", OVERLAP, shared, exp.device, **facts)
            draw_overlap(shared, path + "_overlap.png", note)
    print(f"\n{charts.text_table(SLOPES, rounded(lines))}\n")
    print(f"{conclude(lines)}\n{path}*")


if __name__ == "__main__":
    main()
