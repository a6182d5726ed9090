"""How much of a FID is the number of images? That of real images against their number, 100 to 10,000.

    python -m studies.fid_bias                    # digits, and MNIST where --data-dir has it: about a minute

FID of n images is too large by about c / n, for the sample covariance of few images strays from the true one
and every stray counts up. A percentile bootstrap takes n of the n images with replacement and so adds that
bias once more: its interval lies above the estimate, often without holding it. Hence, for the spread, draws
that share no image, and a jackknife, whose leave-outs all have the same bias.
"""
import math
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import draw_digits, load_images

IMAGES = (100, 200, 500, 1000, 2000, 5000, 10_000)  # behind a FID
DRAWS = 10  # at most; fewer where the test images run out, since draws share none
HEADER = ["dataset", "n", "draws", "fid_domain", "sd_over_draws", "jackknife_se", "bootstrap_mean"]


def measure(name, data_dir):
    """Rows of HEADER, one for each n, of a data set's unseen images; and the classifier's hash."""
    model, train = metrics.load_classifier(name), load_images(name, data_dir)[0]
    test = (torch.from_numpy(draw_digits(max(IMAGES), 3)[0]) if name == "digits" else  # as many again, unseen
            load_images(name, data_dir, "test")[0])
    reference = metrics.reference_statistics(model, train, name)
    random = torch.Generator().manual_seed(0)
    feats = metrics.features(model, test)[torch.randperm(len(test), generator=random)]  # (N, 64)
    return [[name, *spread(feats, n, reference, random)] for n in IMAGES], metrics.weights_hash(model)


def spread(feats, n, reference, random):
    """(n, draws, mean FID, its sd over draws, mean jackknife error, mean FID of a resample of each draw)."""
    parts = feats.split(n)[:min(DRAWS, len(feats) // n)]
    values = [metrics.fid(part, reference) for part in parts]
    again = [metrics.fid(part[torch.randint(n, (n,), generator=random)], reference) for part in parts]
    return (n, len(parts), np.mean(values), np.std(values, ddof=1) if len(parts) > 1 else None,
            np.mean([fid_jackknife(part, reference) for part in parts]), np.mean(again))


def fid_jackknife(feats, reference, groups=20, seed=47):
    """Standard error of the FID of feats [N >= 40, D] against (mu, sigma): delete-a-group jackknife, whose
    values share their bias (~ 1/N). Up to sqrt(2) too much when feats come from the reference's distribution:
    FID has no slope there."""
    # At random, since files have an order: neighbours in MNIST share a writer. Not by generator 0, which
    # others shuffle with: the same permutation twice would deal neighbours out evenly again.
    member = torch.randperm(len(feats), generator=torch.Generator().manual_seed(seed)) % groups
    values = np.array([metrics.fid(feats[member != group], reference) for group in range(groups)])
    return float(math.sqrt((groups - 1) * values.var()))


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


def main(argv=None):
    study = lth.Study("fid_bias", __doc__)
    study.add_argument("--data-dir", default=os.environ.get("LTH_DATA", "data"),
                       help="default: $LTH_DATA or data")
    with study.arguments(argv) as args:
        names = ["digits"] + ["mnist"] * os.path.isdir(os.path.join(args.data_dir, "mnist"))
        tables, hashes = zip(*(measure(name, args.data_dir) for name in names))
        rows = sum(tables, [])
        draw(rows, os.path.join(args.out, "fid_bias.png"))
        study.save(os.path.join(args.out, "fid_bias"), HEADER, rows, n=IMAGES, generator_seed=0,
                   classifiers=dict(zip(names, hashes)))
    print(lth.text_table(HEADER, rows))


if __name__ == "__main__":
    main()
