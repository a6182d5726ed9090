"""What the replication found: pictures from its committed rows (tables: replication_report).

    python -m studies.replication_pictures results/replication/* --out results

Of each part: quality by sparsity; val_loss by range of t; val_loss on the way. Where .ticket files
lie beside the rows, also samples of their networks, and how these come out of noise, a GIF.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.replication_pictures")

import glob
import os
import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import torch

import ddpm
import prune
from lth_diffusion import MARGINS, X_T_SEED
from studies.common import Study
from studies.replication_report import control_rounds, finding, read
from support import charts, cli, report, runs
from support.words import ARMS, seeds_of

SHOWN = 12  # samples of a network
FILE = re.compile(r"round(\d+)_(\w+)\.ticket")


def mean_of(rows, number, arm, column):
    """Over seeds; None where there is no such run."""
    found = [row[column] for (_, r, its), row in rows.items() if (r, its) == (number, arm)]
    return float(np.mean(found)) if found else None


def pruned(rows, number, arm="ticket"):
    """90 %"""
    return f"{100 * mean_of(rows, number, arm, 'sparsity'):.3g} %"


def lines_of(part):
    """The line of part `dense`: as many steps as finding the 90 % ticket took."""
    config, rows, _ = part
    return [(f"dense, {config['args']['steps']:,} steps", mean_of(rows, 0, "dense", "fid_domain"),
             "dashed")]


def draw_part(part, config, rows, curves, path, note, longer=()):
    """The three charts of a part: path_quality.png, path_ranges.png, path_curves.png."""
    last = max(r for _, r, _ in rows)
    ticks = [(0, "dense")] + [(r, pruned(rows, r)) for r in range(1, last + 1)]
    draw_quality(config, rows, path, finding(part, rows), ticks, note, longer)
    draw_ranges(rows, path, ticks, f"Part {part}. {note}")
    draw_curves(rows, curves, path, f"Part {part}. {note}")


def draw_quality(config, rows, path, title, ticks, note, longer):
    """fid_domain by sparsity: a dot per seed, a line through the means of tickets; longer: lines
    (label, value, style) of dense networks that were trained for longer."""
    series = []
    for arm in [arm for arm in ARMS if any(its == arm for _, _, its in rows)]:
        found = {r: [row["fid_domain"] for (_, number, its), row in rows.items()
                     if (number, its) == (r, arm)]
                 for r in sorted({r for _, r, its in rows if its == arm})}
        series.append(dict(label=ARMS[arm], x=list(found), dots=list(found.values()),
                           y=[np.mean(one) for one in found.values()],
                           style="solid" if arm == "ticket" else "points",
                           **report.look_of(arm)))
    dense, real = mean_of(rows, 0, "dense", "fid_domain"), config["reference"]["fid_domain"]
    charts.line_chart(series[1:], f"{path}_quality.png", title, "weights pruned",
                      "fid_domain (lower is better)", x_ticks=ticks, note=note, log_y=True,
                      hlines=[("dense", dense, "dashed"), *longer, ("real images", real, "dotted")])


def draw_ranges(rows, path, ticks, note):
    """val_loss of tickets over that of dense, by range of t."""
    series, below = [], []
    for i in range(5):
        column = f"val_loss_t{i}"
        dense = {seed: row[column] for (seed, r, _), row in rows.items() if r == 0}
        excess = [np.mean([row[column] / dense[seed] - 1 for (seed, number, arm), row in
                           rows.items() if (number, arm) == (r, "ticket")])
                  for r, _ in ticks[1:]]
        series.append(dict(label=f"t = {200 * i} to {200 * i + 199}", x=[r for r, _ in ticks[1:]],
                           y=[100 * value for value in excess]))
        below.append(max((r for (r, _), value in zip(ticks[1:], excess)
                          if value <= MARGINS["val_loss"]), default=0))
    low, high = min(below), max(below)
    def where(number):
        start = 200 * below.index(number)
        return f"{pruned(rows, number)} sparsity at t = {start} to {start + 199}"
    title = (f"Means within 3 % of dense up to {where(low)}, {where(high)}" if low else
             "In some range of t no ticket's mean is within 3 % of dense")
    charts.line_chart(series, f"{path}_ranges.png", title, "weights pruned",
                      "val_loss, % over that of dense", x_ticks=ticks[1:], note=note,
                      hlines=[("dense", 0.0, "dashed")])


def draw_curves(rows, curves, path, note):
    """val_loss on the way, dense and the tickets that have controls."""
    series, final = [], {}
    for number, arm in [(0, "dense")] + [(r, "ticket") for r in control_rounds(rows)]:
        found = [curve for (_, r, its), curve in curves.items() if (r, its) == (number, arm)]
        steps = sorted(set.intersection(*map(set, found)))
        label = ARMS[arm] + ("" if arm == "dense" else f" {pruned(rows, number)}")
        series.append(dict(label=label, x=steps,
                           y=[np.mean([curve[step] for curve in found]) for step in steps]))
        final[label] = series[-1]["y"][-1]
    sooner = [label for label, y in final.items() if y < final["dense"]]
    title = (f"Held-out error: {' and '.join(sooner)} end below dense" if sooner else
             "Held-out error: no ticket ends below dense")
    charts.line_chart(series, f"{path}_curves.png", title, "training step",
                      "val_loss of averaged weights", log_y=True, note=note)


# --------------------------------------------------------------------------- samples

def draw_networks(folder, args, rows, path, note):
    """Of the networks whose .ticket files lie in the folder: path_samples.png, and those of dense
    and of one round with its controls in path_denoising.gif."""
    args, tiles, blocks, seeds = Namespace(**args), [], [], set()
    for seed, number, arm, file in networks(folder):
        row = rows[seed, number, arm]
        label = f"{ARMS[arm]}\n{100 * row['sparsity']:.1f} % pruned"
        frames = frames_of(file, args, seed)  # (frames, SHOWN, C, H, W)
        tiles.append((f"{label}\nfid_domain {row['fid_domain']:.1f}", frames[-1]))
        seeds.add(seed)
        if number in (0, control_round(folder)):
            blocks.append((label, frames[:, :report.NOISES]))
    if tiles:
        shown = f" Shown: seed {', '.join(map(str, sorted(seeds)))}. {note}"
        charts.sample_rows(tiles, f"{path}_samples.png",
                           "The same starting noise, network by network",
                           f"Each column starts from the same noise.{shown}")
        times = [f"{k} of {args.nfe} evaluations" for k in report.moments(args.nfe)]
        charts.animation(blocks, times, f"{path}_denoising.gif", "From noise to image",
                         f"The same starting noise for every network.{shown}")


def networks(folder):
    """(seed, round, arm, file) of the .ticket files, by round and arm, of the seed with most."""
    found = []
    for file in glob.glob(os.path.join(folder, "seed*", "*.ticket")):
        number, arm = FILE.fullmatch(os.path.basename(file)).groups()
        seed = int(os.path.basename(os.path.dirname(file)).removeprefix("seed"))
        found.append((seed, int(number), arm, file))
    most = max(found, key=lambda one: sum(other[0] == one[0] for other in found), default=[None])
    return sorted((one for one in found if one[0] == most[0]),
                  key=lambda one: (one[1], list(ARMS).index(one[2])))


def control_round(folder):
    """The first round of which a control is there."""
    return min((r for _, r, arm, _ in networks(folder) if arm in ("reinit", "random")), default=0)


def frames_of(file, args, seed):
    """uint8 [frames, SHOWN, C, H, W]: the samples that the run measured first, on their way."""
    model, _ = prune.load_ticket(file)
    diffusion = ddpm.Diffusion(1000, args.schedule, args.prediction)

    def draw(model, seed, x_T, share):
        return ddpm.draw_samples(model, diffusion, x_T, args.precision, args.sampler, args.nfe,
                                 batch=len(x_T), seed=seed)
    shape = model.config["channels"], model.config["image_size"], model.config["image_size"]
    noise = torch.Generator().manual_seed(X_T_SEED + seed)
    x_T = torch.randn(args.samples, *shape, generator=noise)[:128]  # the first batch
    run = SimpleNamespace(args=args, decode=None, draw=draw)
    return report.frames_of(run, model, x_T, seed, ddpm.to_uint8)[:, :SHOWN]


def main(argv=None):
    """The command line."""
    study = Study("studies.replication_pictures", __doc__)
    study.add_argument("folders", nargs="+", metavar="results/replication/NAME", type=cli.path,
                       help="folders that studies.replication wrote, in whole or in part")
    with study.arguments(argv) as args:
        found = read(args.folders)
        for part, (config, rows, curves) in found.items():
            flags, path = config["args"], os.path.join(args.out, f"replication_{part}")
            note = (f"MNIST, {flags['steps']:,} steps, predicts {flags['prediction']}, "
                    f"{flags['samples']:,} samples, {seeds_of(sorted({key[0] for key in rows}))}.")
            if control_rounds(rows):  # part `dense` has no tickets
                draw_part(part, config, rows, curves, path, note,
                          lines_of(found["dense"]) if part == "v" and "dense" in found else ())
            for folder in args.folders:
                if runs.read_config(folder)["args"]["part"] == part:
                    draw_networks(folder, flags, rows, path, note)
            print(f"{path}_*.png")


if __name__ == "__main__":
    main()
