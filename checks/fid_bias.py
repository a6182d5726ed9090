"""How much of an FID is due to the number of images? The FID of real images, 100 to 10,000 of them.

    python -m checks.fid_bias     # digits, and MNIST where --data-dir holds it: 15 seconds

The FID of n images is too large by about c / n: the covariance of a small sample strays from the
true one, and every deviation adds to the distance. A percentile bootstrap draws n of the n images
with replacement. That adds the same bias again: its interval lies above the estimate and often
misses it. Two estimates of the spread avoid this: draws that share no image, and a jackknife, all
of whose leave-outs have the same bias.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m checks.fid_bias")

import math
import os

import numpy as np
import torch

import metrics
from studies.common import Study, deviation
from support import charts, cli, data, quality

IMAGES = 100, 200, 500, 1000, 2000, 5000, 10_000
DRAWS = 10  # fewer where the test images run out
HEADER = ["dataset", "n", "draws", "fid_domain",
          "sd_over_draws", "jackknife_se", "bootstrap_mean"]
NOTE = ("Real images that the classifier has not seen, against all training images. "
        f"Means of up to {DRAWS} draws that share no image. Bars: jackknife "
        "standard error of one draw. Dashed: the same draws resampled with "
        "replacement, as in a percentile bootstrap.")


def measure(name, data_dir):
    """(rows of HEADER for each n, hash of the classifier) from held-out images."""
    model = metrics.load_classifier(name)
    train, _ = data.load_images(name, data_dir)
    reference = quality.reference_statistics(metrics, model, train, name)
    if name == "digits":  # its test split has only 2,000
        test = torch.from_numpy(data.draw_digits(max(IMAGES), 3)[0])
    else:
        test, _ = data.load_images(name, data_dir, "test")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(test), generator=generator)
    feats = metrics.features(model, test)[order]  # (N, 64)
    rows = []
    for n in IMAGES:
        values = spread(feats, n, reference, generator)
        rows.append([name, n, *values])
    return rows, metrics.weights_hash(model)


def spread(feats, n, reference, generator):
    """The values of HEADER from "draws" on, from draws of n of the features [N, D]."""
    draws = feats.split(n)[:min(DRAWS, len(feats) // n)]
    fids, errors, resampled = [], [], []
    for draw in draws:
        pick = torch.randint(n, (n,), generator=generator)
        fids.append(metrics.fid(draw, reference))
        errors.append(fid_jackknife(draw, reference))
        resampled.append(metrics.fid(draw[pick], reference))
    return (len(draws), np.mean(fids), deviation(fids),
            np.mean(errors), np.mean(resampled))


def fid_jackknife(feats, reference, groups=20, seed=47):
    """Standard error of the FID of feats [N >= 40, D] from (mu, sigma): delete-a-group jackknife.

    Up to sqrt(2) too large when feats come from the reference's own distribution, where the FID has
    no slope.
    """
    # Groups are random because files have an order: neighbours in MNIST share a writer. The seed is
    # not 0, which shuffles elsewhere: the same permutation twice would deal neighbours out evenly.
    generator = torch.Generator().manual_seed(seed)
    member = torch.randperm(len(feats), generator=generator) % groups
    fids = [metrics.fid(feats[member != group], reference)
            for group in range(groups)]
    return math.sqrt((groups - 1) * np.var(fids))


def draw_chart(rows, path):
    """FID against n: per data set a solid line, and a dashed one for the bootstrap."""
    curves, names = [], dict.fromkeys(row[0] for row in rows)
    for name, colour in zip(names, charts.PALETTE):
        columns = zip(*[row[1:] for row in rows if row[0] == name])
        n, _, mean, _, error, again = map(np.array, columns)
        x = n * (0.97 if name == "digits" else 1.03)  # keeps error bars apart
        curves.append(dict(
            label=name, x=x, y=mean, colour=colour, shape="circle",
            y_low=mean - error, y_high=mean + error))
        curves.append(dict(
            label=f"{name}, bootstrap", x=x, y=again,
            colour=colour, shape="square", style="dashed"))
    charts.line_chart(
        curves, path, "FID of real images: fewer images, larger FID",
        "images n (log)", "fid_domain (log)", log_x=True, log_y=True,
        x_ticks=[(n, f"{n:,}") for n in IMAGES], note=NOTE)


def main(argv=None):
    """The command line."""
    study = Study("checks.fid_bias", __doc__)
    study.add_argument(
        "--data-dir", type=cli.path, default=os.environ.get("LTH_DATA") or "data",
        help="folder of the data sets (default: $LTH_DATA or data)")
    with study.arguments(argv) as args:
        path, rows, hashes = f"{args.out}/fid_bias", [], {}
        names = ["digits"]
        if os.path.isdir(os.path.join(args.data_dir, "mnist")):
            names.append("mnist")
        for name in names:
            found, hashes[name] = measure(name, args.data_dir)
            rows += found
        draw_chart(rows, path + ".png")
        study.save(path, HEADER, rows, n=IMAGES, generator_seed=0,
                   classifiers=hashes)
    print(charts.text_table(HEADER, rows))
    print(f"{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
