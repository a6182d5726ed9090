"""Does the lottery ticket hold for latent diffusion, where the network denoises codes of images?

    python -m studies.latent                     # digits: makes or takes runs/digits, then minutes
    python -m studies.latent --from runs/mnist   # the latents of that run's data, with its flags

A small convolutional autoencoder turns 28 x 28 pixels into a 14 x 14 code and back. It is trained
once, on the training images alone. Rombach et al., High-Resolution Image Synthesis with Latent
Diffusion Models, 2022, 2112.10752, regularise the code by a KL term. Here a little noise on the
code takes its place, and a normalisation keeps the code from growing until the noise is negligible.
The codes over their standard deviation (appendix G there) then replace the images in the whole
experiment of lth_diffusion.py, in runs/NAME_latent, with the flags of the run in pixels. The U-Net
does not fold pixels (`patch`): it works at 14 x 14 in both spaces where the preset folds 2 x 2.

Samples are not clipped, since a code has no range, and are decoded before they are measured: all
quality is that of pixels. No ticket can regain what the autoencoder loses, so the fid_domain of
reconstructed test images is in the table; this loss makes ratios to dense look milder in latent
space. CIFAR is refused: its runs flip images, and a flipped code is not that of a flipped image.
Winning is what it is in the main job, by fid_domain and by val_loss, at the last round.

What would change our mind about 'tickets exist in latent space as well': a ticket that loses to
reinit or to the random mask there in every seed, while the pixel ticket of the same seeds wins.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.latent")

import argparse
import os
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lth_diffusion as lth
import metrics
from ddpm import check_finite, learning_rate, to_float, to_uint8
from studies.common import (JUDGED, Study, add_run_flag, deviation, judged, open_run,
                            rounded)
from support import charts, cli, report, runs
from support.words import counted

# Of the autoencoder: about a minute on two cores.
STEPS, BATCH, LR, WIDTH = 1500, 64, 2e-3, 32
CODE = 1  # channels of a code
NOISE = 0.1  # on a code of unit variance: small against it, large against 8-bit steps


# --------------------------------------------------------------------------- the autoencoder

def convolutions(first, last):
    """Layers from (N, first, H, W) to (N, last, H, W)."""
    widths, layers = (first, WIDTH, WIDTH, last), []
    for inp, out in zip(widths, widths[1:]):
        layers += nn.Conv2d(inp, out, 3, padding=1), nn.SiLU()
    return layers[:-1]


class Autoencoder(nn.Module):
    """Images (N, C, H, W) in [-1, 1] <-> code (N, CODE, H/2, W/2) of mean 0 and variance 1."""

    def __init__(self, channels):
        super().__init__()
        # The norm fixes the scale against which NOISE is measured.
        norm = nn.BatchNorm2d(CODE, affine=False)
        inside = convolutions(4 * channels, CODE)
        self.encoder = nn.Sequential(nn.PixelUnshuffle(2), *inside, norm)
        inside = convolutions(CODE, 4 * channels)
        self.decoder = nn.Sequential(*inside, nn.PixelShuffle(2))

    def fit(self, images):
        """Train on uint8 images (N, C, H, W) by the squared error of the reconstruction."""
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(self.parameters(), LR)
        steps = tqdm(range(STEPS), "autoencoder", leave=False, disable=None)
        for step in steps:
            rate = learning_rate(step, STEPS, LR, "cosine", STEPS // 20)
            optimizer.param_groups[0]["lr"] = rate
            pick = torch.randint(len(images), (BATCH,), generator=generator)
            x = to_float(images[pick.to(images.device)])
            code = self.encoder(x)
            noise = torch.randn(code.shape, generator=generator)
            code = code + NOISE * noise.to(code.device)
            loss = F.mse_loss(self.decoder(code), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        check_finite(self, STEPS, "autoencoder")

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (N, C, H, W) -> codes (N, CODE, H/2, W/2), float32, on the CPU."""
        device, codes = next(self.parameters()).device, []
        for part in images.split(500):
            x = to_float(part.to(device))
            codes.append(self.encoder(x).cpu())
        return torch.cat(codes)

    @torch.no_grad()
    def decode(self, code):
        """Codes -> uint8 images, on the same device."""
        images = [self.decoder(part) for part in code.split(500)]
        return to_uint8(torch.cat(images))


def load_coder(path, images, test, device):
    """(Autoencoder, codes of the training images, codes of the test images), trained once.

    The file keeps the codes too: encoded anew on other cores they would differ in a last bit, and a
    run that goes on would see other data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        coder = Autoencoder(images.shape[1]).to(device)
    if os.path.exists(path):
        state = runs.load_state(path, ("model", "codes"))
        coder.load_state_dict(state["model"])
        codes = state["codes"]
    else:
        coder.fit(images)
        coder.eval()
        codes = [coder.encode(part).half() for part in (images, test)]
        runs.save_state(path, model=coder.state_dict(), codes=codes)
    return coder.eval(), *(code.float() for code in codes)


# --------------------------------------------------------------------------- the experiment

class LatentExperiment(lth.Experiment):
    """The experiment on the codes of its images."""

    def __init__(self, args, guard=None):
        if args.dataset.startswith("cifar"):
            cli.refuse("from", "CIFAR is trained with flips; name a run on "
                       "digits, mnist or fashion")
        super().__init__(args, guard)  # the feature extractors see pixels
        self.pixels = self.test
        path = os.path.join(args.out, "autoencoder.pt")
        coder, *codes = load_coder(path, self.images, self.test, self.device)
        self.coder, scale = coder, codes[0].std().item()
        self.images, self.test = (code / scale for code in codes)
        self.images = self.images.to(self.device)
        self.decode = lambda x: coder.decode(x * scale)

    def new_model(self, seed, **config):
        """The U-Net of the preset without folding: the encoder has halved the resolution."""
        return super().new_model(seed, **dict(patch=1) | config)

    def reconstruct(self, images):
        """uint8 images, encoded and decoded."""
        code = self.coder.encode(images).to(self.device)
        return self.coder.decode(code).cpu()

    def reconstruction(self):
        """Squared error and fid_domain of reconstructed test images."""
        back = to_float(self.reconstruct(self.pixels))
        mse = F.mse_loss(back, to_float(self.pixels)).item()
        quality = self.quality(self.reconstruct(self.real))
        return dict(mse=mse, fid_domain=quality["fid_domain"])


def finished_seeds(args, rows):
    """The seeds whose training runs are all done; Mistake where there is none."""
    missing = {job.seed for job in lth.jobs(args) if job not in rows}
    if set(args.seeds) <= missing:
        cli.refuse("from", f"{args.out} has no finished seed")
    return [seed for seed in args.seeds if seed not in missing]


def latent_run(args, seeds, parser):
    """The LatentExperiment with the flags of a run in pixels."""
    changed = dict(out=os.path.normpath(args.out) + "_latent", seeds=seeds, dense_from=None,
                   workers=1)  # helpers of a run know images alone
    settings = argparse.Namespace(**vars(args) | changed)
    return lth.run(settings, parser, experiment=LatentExperiment)


# --------------------------------------------------------------------------- what came out

Line = namedtuple("Line", "space arm sparsity seeds fid_domain sd over_dense "
                  "sd_over_dense val_loss live_mmacs", defaults=[None] * 5)
VERDICTS = ["space", "metric", *JUDGED]


def lines(space, rows, seeds):
    """The Lines of one space, means over seeds; over_dense: over the same seed's dense."""
    def values(column, r, arm):
        return np.array([rows[lth.Job(seed, r, arm)][column] for seed in seeds])

    dense = values("fid_domain", 0, "dense")
    for _, r, arm in [job for job in rows if job.seed == seeds[0]]:
        fid, first = values("fid_domain", r, arm), rows[lth.Job(seeds[0], r, arm)]
        over, loss = fid / dense, values("val_loss", r, arm).mean()
        yield Line(space, arm, first["sparsity"], len(seeds), fid.mean(), deviation(fid),
                   over.mean(), deviation(over), loss, first["macs_live"] / 1e6)


def verdict_rows(space, rows, seeds, last):
    """Rows of VERDICTS: what is shown of the last ticket by each metric."""
    mine = {job: row for job, row in rows.items() if job.seed in seeds}
    for metric in lth.MARGINS:
        yield [space, metric, *judged(report.arms_of(mine, last, metric), metric)]


def title_of(verdicts, sparsity):
    """What the verdicts by fid_domain say, for the picture."""
    answers = {row[0]: row[VERDICTS.index("answer")] for row in verdicts if row[1] == "fid_domain"}
    won = [space for space, answer in answers.items() if answer == "winning"]
    if set(answers.values()) == {"no verdict"}:
        return "Latent and pixel space: fewer than three seeds, no verdict"
    if not won:
        return f"At {100 * sparsity:.0f} % sparsity tickets are shown to win in neither space"
    return f"At {100 * sparsity:.0f} % sparsity tickets win in {' and in '.join(won)} space"


def draw(table, title, path, note):
    """fid_domain over that of dense against sparsity: tickets as lines, controls as marks."""
    series, arms = [], ("ticket", "reinit", "random")
    for space, colour in zip(("pixel", "latent"), charts.PALETTE):
        for arm, shape in zip(arms, charts.SHAPES):
            mine = [line for line in table if line[:2] == (space, arm)]
            y = np.array([line.over_dense for line in mine])
            sd = [line.sd_over_dense for line in mine]
            sd = np.array(sd, float)  # None becomes NaN
            series.append(dict(
                label=f"{space}, {arm}", colour=colour, shape=shape,
                style="solid" if arm == "ticket" else "points",
                x=[100 * line.sparsity for line in mine],
                y=y, y_low=y - sd, y_high=y + sd))
    series = [one for one in series if one["x"]]
    charts.line_chart(series, path, title,
                      "weights pruned (%)", "fid_domain over that of dense (log)",
                      log_y=True, hlines=[("dense", 1.0, "dashed")], note=note)


def draw_samples(exp, path, note):
    """Test images, the same reconstructed, samples of the dense network and of the last ticket."""
    seed, last = exp.args.seeds[0], exp.args.rounds
    real = metrics.random_draw(exp.pixels, 12)
    rows = [("real", real), ("reconstructed", exp.reconstruct(real))]
    for job in lth.Job(seed, 0, "dense"), lth.Job(seed, last, "ticket"):
        state = runs.load_state(job.path(exp.args.out))
        label = f"{job.arm}, latent\n{100 * state['row']['sparsity']:.0f} % pruned"
        rows.append((label, state["pictures"][:12]))
    charts.sample_rows(rows, path, "Latent diffusion and its lottery ticket",
                       f"Seed {seed}. The last two rows share x_T. {note}")


def main(argv=None):
    """The command line."""
    study = Study("studies.latent", __doc__)
    add_run_flag(study)
    with study.arguments(argv) as args:
        there, pixel = open_run(args.run)
        seeds = finished_seeds(there.args, pixel)
        exp = latent_run(there.args, seeds, study)
        a, back = exp.args, exp.reconstruction()
        table, verdicts = [], []
        for space, rows in (("pixel", pixel), ("latent", exp.rows)):
            table += lines(space, rows, seeds)
            verdicts += verdict_rows(space, rows, seeds, a.rounds)
        scores = {("latent", "reconstruction"): back,
                  ("pixel", "real images"): exp.reference}
        for names, score in scores.items():
            fid = score["fid_domain"]
            table.append(Line(*names, None, None, fid))
        path = os.path.join(args.out, f"latent_{a.dataset}")
        study.save(path, Line._fields, table, exp.device, n=a.samples,
                   seeds=seeds, reconstruction=back, flags=vars(a))
        study.save(path + "_verdicts", VERDICTS, verdicts, exp.device, n=a.samples, seeds=seeds)
        note = (f"{a.dataset}, {a.steps:,} steps of {a.batch}, "
                f"n={a.samples:,} samples.")
        last = max(line.sparsity for line in table if line.sparsity is not None)
        draw(table, title_of(verdicts, last), path + ".png",
             f"{note} Means over {counted(len(seeds), 'seed')}; bars: standard deviation.")
        draw_samples(exp, path + "_samples.png", note)
    print(f"\n{charts.text_table(Line._fields, rounded(table))}\n\n"
          f"{charts.text_table(VERDICTS, rounded(verdicts))}\n\n"
          f"Squared error of reconstructed test images in [-1, 1]: {back['mse']:.4f}.\n"
          f"{path}*.csv, .json, .png, _samples.png")


if __name__ == "__main__":
    main()
