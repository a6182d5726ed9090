"""What does a ticket save: bytes, memory, multiply-accumulates, seconds?

    python -m studies.efficiency                                # the dense networks of a small run
    python -m studies.efficiency --from results/replication/v   # MNIST, no training

The dense networks of a run are made sparse in one cut, in three ways:

masked    Weights are pruned by the run's ranking and stay in place as zeros, as in tickets.
channels  Hidden channels of residual blocks are cut out (methods/channels.py): a smaller network.
small     A narrower dense network with as many weights as the masked one has left.

Nothing is trained, for nothing here depends on what the weights are, but for the layers they are
in. A file is that of prune.save_ticket. Live MACs count no multiplication by a pruned weight, done
MACs all that the machine does: millions per image and evaluation. Seconds are of a training step
and of one evaluation, all networks of the first seed in turns; the ratio is dense over other, the
median of --turns, with the smallest (low) and the largest (high). Memory is the peak of a fresh
process over what it held before. Bytes and MACs are means over seeds.

What would change our mind about 'a mask saves no seconds': a ratio of a masked network whose
smallest value is above 1.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.efficiency")

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

import metrics
from ddpm import Diffusion, denoiser, train
from lth_diffusion import Job
from methods.channels import dense_channels, prune_channels, shrink
from prune import apply_masks, dense_masks, live_total, mask_hooks, prune_magnitude, save_ticket
from studies.common import Study, add_run_flag, open_run, rounded
from support import charts, cli, runs
from unet import UNet, narrower

CUTS = 0.5, 0.75, 0.9  # shares of weights, and of hidden channels
HEADER = ["network", "cut", "weights left", "file kB", "live MACs", "done MACs", "step s",
          "step ratio", "step low", "step high", "evaluation s", "evaluation ratio",
          "evaluation low", "evaluation high", "training MiB", "sampling MiB"]


class Network(NamedTuple):
    """A network to be measured; masks: None where nothing is masked."""
    kind: str
    cut: float
    model: torch.nn.Module
    masks: dict = None


def networks(exp, seed):
    """The Networks of a seed's dense network, which comes first."""
    def dense():
        return exp.load(Job(seed, 0, "dense")).ema.cpu().requires_grad_(True)
    yield Network("dense", 0.0, dense())
    for cut in CUTS:
        model = dense()
        masks = prune_magnitude(model, dense_masks(model), cut, exp.args.scope,
                                score=exp.args.score)
        apply_masks(model, masks)
        yield Network("masked", cut, model, masks)
        channels = prune_channels(model, dense_channels(model), cut, "layer")
        yield Network("channels", cut, shrink(dense(), channels))
        total = sum(p.numel() for p in model.parameters())
        left = total - live_total(dense_masks(model)) + live_total(masks)
        yield Network("small", cut, UNet(**model.config | narrower(model.config, left)))


def counts(network, folder):
    """[weights left, file kB, live MACs, done MACs] of a network; MACs in millions."""
    model, masks = network.model, network.masks or dense_masks(network.model)
    path = os.path.join(folder, "network.ticket")
    save_ticket(path, model, masks)
    x = torch.zeros(1, model.config["channels"], *[model.config["image_size"]] * 2)
    macs = metrics.count_macs(model, x, torch.zeros(1), masks).values()
    done, live = (sum(one[i] for one in macs) / 1e6 for i in (0, 1))
    return [live_total(masks), os.path.getsize(path) / 1e3, live, done]


def works(network, args):
    """{"training": a step, "sampling": an evaluation} as functions of no arguments."""
    config, model = network.model.config, network.model
    shape = config["channels"], config["image_size"], config["image_size"]
    images = torch.randint(0, 256, (args.batch, *shape), dtype=torch.uint8)
    hooks = mask_hooks(model, network.masks) if network.masks else {}
    predict, x = denoiser(model, "fp32"), torch.randn(args.batch, *shape)

    def step():
        train(model, Diffusion(), images, steps=args.steps, batch=args.batch, **hooks)
    return dict(training=step, sampling=lambda: predict(x, torch.full((args.batch,), 500)))


def peaks(config, is_masked, args):
    """MiB of each work at its peak, above what the process held before; sampling, which takes less,
    comes first."""
    model, found = UNet(**config), {}
    network = Network("", 0.0, model, dense_masks(model) if is_masked else None)
    with runs.PeakMemory() as before:
        pass
    for what in "sampling", "training":
        with runs.PeakMemory() as most:
            works(network, args)[what]()
        found[what] = (most.bytes - before.bytes) / 2 ** 20 if most.bytes else float("nan")
    return found


def ratios(found, what, args):
    """(seconds, [ratio, smallest, largest]) of each network, dense first."""
    times = runs.seconds_in_turns([works(one, args)[what] for one in found], args.turns)
    times = times / (args.steps if what == "training" else 1)
    over = times[:, :1] / times
    return np.median(times, 0), np.stack([np.median(over, 0), over.min(0), over.max(0)], 1)


def measure(exp, seeds, args):
    """Rows of HEADER."""
    with tempfile.TemporaryDirectory() as folder:
        every = [[counts(one, folder) for one in networks(exp, seed)] for seed in seeds]
    found = list(networks(exp, seeds[0]))
    timed = {what: ratios(found, what, args) for what in ("training", "sampling")}
    spawn = multiprocessing.get_context("spawn")
    # A process per measurement: an allocator keeps what another network took.
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        for i, one in enumerate(found):
            memory = fresh.submit(peaks, one.model.config, one.masks is not None, args).result()
            row = [one.kind, one.cut, *np.mean([mine[i] for mine in every], 0).tolist()]
            for seconds, over in timed.values():
                row += [float(seconds[i]), *over[i].tolist()]
            yield row + [memory[what] for what in timed]


def draw(table, path, note):
    """Seconds against weights left, both over those of dense."""
    dense, series = table[0], []
    for what, style in ("evaluation", "solid"), ("step", "dashed"):
        for kind in dict.fromkeys(row[0] for row in table[1:]):
            mine = [dense] + [row for row in table if row[0] == kind]
            series.append(dict(label=f"{kind}, {what}", style=style,
                               x=[100 * (1 - row[2] / dense[2]) for row in mine],
                               y=[row[HEADER.index(f"{what} ratio")] for row in mine]))
    best = max(row[HEADER.index("evaluation ratio")] for row in table if row[0] == "masked")
    title = (f"Masks save hardly any time (at best {best:.2f} times as fast as dense)"
             if best < 1.1 else "How much faster sparse networks are")
    charts.line_chart(series, path, title, "weights gone, %", "times as fast as dense", note=note)


def main(argv=None):
    """The command line."""
    study = Study("studies.efficiency", __doc__)
    add_run_flag(study)
    add = study.add_argument
    add("--batch", type=cli.positive_int, default=32, help="images at once (default: 32)")
    add("--steps", type=cli.positive_int, default=20, help="training steps timed together, with "
        "the start of training (default: 20)")
    add("--turns", type=cli.positive_int, default=9, help="how often all are timed (default: 9)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run, networks=True)
        seeds = sorted({job.seed for job in rows if job.arm == "dense"})
        table, path = list(measure(exp, seeds, args)), f"{args.out}/efficiency_{exp.args.dataset}"
        study.save(path, HEADER, table, seeds=seeds, turns=args.turns, batch=args.batch)
        draw(table, path + ".png", f"U-Net {exp.args.preset}, fp32, {torch.get_num_threads()} "
             f"threads of {runs.processor_name('cpu')}, {args.batch} images at once.")
    print(f"\n{charts.text_table(HEADER, rounded(table))}\n\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
