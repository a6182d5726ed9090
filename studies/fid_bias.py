"""How much of a FID is the number of images? That of real images against their number, 100 to 10,000.

    python -m studies.fid_bias                    # digits, and MNIST where --data-dir has it: about a minute

FID of n images is too large by about c / n, for the sample covariance of few images strays from the true one
and every stray counts up. A percentile bootstrap takes n of the n images with replacement and so adds that
bias once more: its interval lies above the estimate, often without holding it. Hence, for the spread, draws
that share no image, and a jackknife (metrics.fid_jackknife), whose leave-outs all have the same bias.
"""
import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np
import scipy
import torch

import lth_diffusion as lth
import metrics
from ddpm import atomic, draw_digits, load_images

IMAGES = (100, 200, 500, 1000, 2000, 5000, 10_000)  # behind a FID
DRAWS = 10  # at most; fewer where the test images run out, since draws share none
HEADER = ["dataset", "n", "draws", "fid_domain", "sd_over_draws", "jackknife_se", "bootstrap_mean"]


def measure(name, data_dir):
    """Rows of HEADER, one for each n, of a data set's unseen images; and the classifier's hash."""
    model, train = metrics.load_classifier(name), load_images(name, data_dir)[0]
    test = new_digits(max(IMAGES)) if name == "digits" else load_images(name, data_dir, "test")[0]
    reference = metrics.reference_statistics(model, train, name)
    random = torch.Generator().manual_seed(0)
    feats = metrics.features(model, test)[torch.randperm(len(test), generator=random)]  # (N, 64)
    return [[name, *spread(feats, n, reference, random)] for n in IMAGES], metrics.weights_hash(model)


def new_digits(n):
    """n digits uint8 [n, 1, 28, 28] of random classes: the test split has only 2,000, every class 200 times.

    No sampler balances its classes so, and a balanced set scores several times lower than a random one.
    """
    images, labels = draw_digits(n + n // 5, 3)  # a seed of neither training nor test
    counts = np.random.default_rng(0).multinomial(n, [0.1] * 10)
    return torch.from_numpy(np.concatenate([images[labels == k][:count] for k, count in enumerate(counts)]))


def spread(feats, n, reference, random):
    """(n, draws, mean FID, its sd over draws, mean jackknife error, mean FID of a resample of each draw)."""
    parts = feats.split(n)[:min(DRAWS, len(feats) // n)]
    values = [metrics.fid(part, reference) for part in parts]
    again = [metrics.fid(part[torch.randint(n, (n,), generator=random)], reference) for part in parts]
    return (n, len(parts), np.mean(values), np.std(values, ddof=1) if len(parts) > 1 else None,
            np.mean([metrics.fid_jackknife(part, reference) for part in parts]), np.mean(again))


def draw(rows, path):
    """FID against n on log scales: a solid line a data set, a dashed one for its bootstrap."""
    curves = []
    for name, colour in zip(dict.fromkeys(row[0] for row in rows), lth.PALETTE):
        _, n, _, mean, _, error, again = zip(*(row for row in rows if row[0] == name))
        x = np.multiply(n, 0.97 if name == "digits" else 1.03)  # bars side by side
        curves += [dict(label=name, x=x, y=mean, colour=colour, shape="circle",
                        y_low=np.subtract(mean, error), y_high=np.add(mean, error)),
                   dict(label=f"{name}, resampled", x=x, y=again, colour=colour, shape="square",
                        style="dashed")]
    lth.line_chart(curves, path, "FID of real images: the fewer, the larger", "images n (log scale)",
                   "fid_domain (log scale)", log_x=True, log_y=True, x_ticks=[(n, f"{n:,}") for n in IMAGES],
                   note="Real images that the classifier never saw, against all training images: means of up "
                        f"to {DRAWS} draws that share no image. Bars: jackknife standard error of one draw. "
                        "Dashed: the same draws resampled with replacement, as a percentile bootstrap does.")


def save(args, name, header, rows, began, **facts):
    """name.csv, and name.json with where its figures come from."""
    commit = subprocess.run(["git", "-C", metrics.HERE, "describe", "--always", "--dirty", "--abbrev=12"],
                            capture_output=True, text=True).stdout.strip() or None
    facts |= dict(command=args.command, commit=commit, device="cpu", threads=torch.get_num_threads(),
                  processor=lth.processor_name(torch.device("cpu")),
                  seconds=round(time.monotonic() - began, 1),
                  versions=dict(python=platform.python_version(), torch=torch.__version__,
                                numpy=np.__version__, scipy=scipy.__version__))
    with atomic(os.path.join(args.out, name + ".csv")) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header] + [[f"{v:.6g}" if isinstance(v, float) else v for v in row]
                                               for row in rows])
    with atomic(os.path.join(args.out, name + ".json")) as temporary:
        metrics.write_text(temporary, json.dumps(facts, indent=1))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="studies.fid_bias", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="results", help="folder of fid_bias.csv, .json and .png (default: results)")
    add("--data-dir", default=os.environ.get("LTH_DATA", "data"), help="default: $LTH_DATA or data")
    args = parser.parse_args(argv)
    args.command = " ".join(["python -m studies.fid_bias", *(sys.argv[1:] if argv is None else argv)])
    names = ["digits"] + ["mnist"] * os.path.isdir(os.path.join(args.data_dir, "mnist"))
    try:
        began, (tables, hashes) = time.monotonic(), zip(*(measure(name, args.data_dir) for name in names))
        rows = sum(tables, [])
        os.makedirs(args.out, exist_ok=True)
        draw(rows, os.path.join(args.out, "fid_bias.png"))
        save(args, "fid_bias", HEADER, rows, began, n=IMAGES, generator_seed=0,
             classifiers=dict(zip(names, hashes)))
    except (OSError, ValueError) as error:
        parser.exit(2, f"studies.fid_bias: {' '.join(str(error).split())}\n")
    print(lth.text_table(HEADER, rows))


if __name__ == "__main__":
    main()
