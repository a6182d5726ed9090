"""How does the cost grow: with parameters, with images, with rounds? Seconds, memory, and the exponents.

    python -m studies.scaling                # some minutes

Each quantity is measured at four sizes or more, all sizes in turns, and the median taken; the exponent is the
slope of log seconds over log size, with its standard error. Memory is the peak above what was resident
before. Parameters grow by the width of the U-Net, so that multiply-accumulates grow with them; images are
what a figure is made of; rounds are whole small runs on digits, from the first step to the last picture.

What would change our mind about 'costs grow in proportion': an exponent above 1 by more than twice its
error. Below 1 is what a fixed cost beside the growing one looks like.
"""
import contextlib
import io
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from scipy import stats

import lth_diffusion as lth
import metrics
from ddpm import (Diffusion, denoiser, draw_digits, load_images, pick_device, pick_precision, positive_int,
                  train)
from prune import dense_masks, prunable, prune_magnitude, rewind
from unet import PRESETS, UNet

BASES = (16, 32, 64, 128)  # widths of the preset mnist
IMAGES = (500, 1000, 2000, 4000, 8000)
BATCHES = (16, 32, 64, 128)
ROUNDS = (1, 2, 4, 8)
HEADER = ["what", "grows with", "size", "seconds", "peak MB"]
EXPONENTS = ["what", "grows with", "of seconds", "standard error", "of memory", "its standard error"]
SMALL = "--steps 20 --batch 8 --samples 16 --nfe 5 --arms rewind --final-sparsity 0.9".split()


def of_parameters(args):
    """(what, size, work) for every width: a training step, an evaluation, pruning and rewinding."""
    images, diffusion = torch.from_numpy(draw_digits(64, 0)[0]).to(args.device), Diffusion()
    for base in BASES:
        torch.manual_seed(0)
        model = UNet(1, image_size=28, **{**PRESETS["mnist"], "base": base}).to(args.device)
        size = sum(p.numel() for p in prunable(model).values())
        state, dense = {k: v.clone() for k, v in model.state_dict().items()}, dense_masks(model)
        predict, x = denoiser(model, args.precision), torch.randn(64, 1, 28, 28, device=args.device)
        t = torch.full((64,), 500, device=args.device)
        yield "two training steps of 64", size, lambda model=model: train(
            model, diffusion, images, steps=2, batch=64, precision=args.precision)
        yield "one evaluation of 64", size, lambda predict=predict: predict(x, t)
        yield "prune and rewind", size, lambda model=model, state=state, dense=dense: rewind(
            model, prune_magnitude(model, dense, 0.2), state)


def of_batches(args):
    """Training steps of more images."""
    images, diffusion = torch.from_numpy(draw_digits(64, 0)[0]).to(args.device), Diffusion()
    torch.manual_seed(0)
    model = UNet(1, image_size=28, **PRESETS["mnist"]).to(args.device)
    for batch in BATCHES:
        yield "two training steps", batch, lambda batch=batch: train(
            model, diffusion, images, steps=2, batch=batch, precision=args.precision)


def of_images(args):
    """What a quality figure costs: features and Fréchet distance, precision and recall."""
    classifier = metrics.load_classifier("digits").to(args.device)
    images = load_images("digits", args.data_dir)[0]
    feats = torch.randn(max(IMAGES), 64, generator=torch.Generator().manual_seed(0))  # as many as it has
    reference = metrics.statistics(feats)
    for n in IMAGES:
        yield "features and FID", n, lambda n=n: metrics.fid(metrics.features(classifier, images[:n]),
                                                             reference)
        yield "precision and recall", n, lambda n=n: metrics.precision_recall(feats[:n], feats[-n:])


def of_rounds(args):
    """Whole runs of the main job."""
    for rounds in ROUNDS:
        def work(rounds=rounds):
            with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
                where = ["--device", str(args.device), "--data-dir", args.data_dir, "--out", out]
                lth.run(*lth.parse_args([*SMALL, "--rounds", str(rounds), *where]))
        yield "the main job, small", rounds, work


GROWTH = {"parameters": of_parameters, "images of a batch": of_batches, "images": of_images,
          "rounds": of_rounds}


def peak(name, number, args):
    """MB at the peak of one work above what its process held before; NaN where nobody tells."""
    *_, work = list(GROWTH[name](args))[number]
    with metrics.PeakMemory(args.device) as before:
        pass
    with metrics.PeakMemory(args.device) as most:
        work()
    return (most.bytes - before.bytes) / 1e6 if most.bytes else np.nan


def measure(name, args):
    """Rows of HEADER of one kind of growth: median seconds of the turns, and peaks of memory, each in a
    process of its own: an allocator keeps what another size took."""
    works = list(GROWTH[name](args))
    seconds = metrics.seconds_in_turns([work for *_, work in works], args.turns, 1, args.device)
    n, spawn = len(works), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        memory = list(fresh.map(peak, [name] * n, range(n), [args] * n))
    return [[what, name, size, float(s), float(m)] for (what, size, _), s, m in zip(
        works, np.median(seconds, axis=0), memory)]


def exponents(table):
    """Rows of EXPONENTS, from rows of HEADER."""
    found = []
    for what, name in dict.fromkeys((row[0], row[1]) for row in table):
        mine = np.array([row[2:] for row in table if row[:2] == [what, name]], float)  # (sizes, 3)
        size, seconds, memory = np.log(np.maximum(mine, 1e-9)).T
        fits = stats.linregress(size, seconds), stats.linregress(size, memory)
        found.append([what, name, *(float(v) for fit in fits for v in (fit.slope, fit.stderr))])
    return found


def draw(table, path):
    """Seconds over size, each relative to its smallest size."""
    series = []
    for what, name in dict.fromkeys((row[0], row[1]) for row in table):
        mine = [row for row in table if row[:2] == [what, name]]
        series.append(dict(label=f"{what}", x=[row[2] / mine[0][2] for row in mine],
                           y=[row[3] / mine[0][3] for row in mine]))
    top = max(max(s["x"]) for s in series)
    series.append(dict(label="in proportion", x=[1, top], y=[1, top], style="dashed", shape=None,
                       colour="#555555"))
    lth.line_chart(series, path, "How costs grow", "times the smallest size (log)",
                   "times its seconds (log)", log_x=True, log_y=True, height=460,
                   note="Size: parameters (width of the U-Net), images or rounds. Medians of sizes in turns.")


def main(argv=None):
    """The command line."""
    study = lth.Study("scaling", __doc__)
    add = study.add_argument
    add("--turns", type=positive_int, default=5, help="measurements behind a figure (default: 5)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--data-dir", default=os.environ.get("LTH_DATA", "data"), help="default: $LTH_DATA or data")
    with study.arguments(argv) as args:
        args.device, _ = pick_device(args.device)
        args.precision, _ = pick_precision("auto", args.device)
        table, path = [], os.path.join(args.out, "scaling")
        for name in GROWTH:
            table += measure(name, args)
            study.save(path, HEADER, table, args.device, turns=args.turns, precision=args.precision)
        draw(table, path + ".png")
        found = exponents(table)
        study.save(path + "_exponents", EXPONENTS, found, args.device, turns=args.turns)
    print(lth.text_table(HEADER, table), "\n")
    print(lth.text_table(EXPONENTS, found))
    print(f"{path}.csv, .json, .png, {path}_exponents.csv")


if __name__ == "__main__":
    main()
