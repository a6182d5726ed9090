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
space. CIFAR is refused: its runs flip images, and a flipped code is not the code of a flipped image.

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
from studies.common import Study, add_run_flag, deviation, open_run, over_seeds
from support import charts, cli, runs

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
        for step in tqdm(range(STEPS), "autoencoder", leave=False, disable=None):
            rate = learning_rate(step, STEPS, LR, "cosine", STEPS // 20)
            optimizer.param_groups[0]["lr"] = rate
            pick = torch.randint(len(images), (BATCH,), generator=generator)
            x = to_float(images[pick.to(images.device)])
            code = self.encoder(x)
            noise = torch.randn(code.shape, generator=generator).to(code.device)
            loss = F.mse_loss(self.decoder(code + NOISE * noise), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        check_finite(self, STEPS, "autoencoder")

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (N, C, H, W) -> codes (N, CODE, H/2, W/2), float32, on the CPU."""
        device, codes = next(self.parameters()).device, []
        for part in images.split(500):
            codes.append(self.encoder(to_float(part.to(device))).cpu())
        return torch.cat(codes)

    @torch.no_grad()
    def decode(self, code):
        """Codes -> uint8 images, on the same device."""
        parts = [self.decoder(part) for part in code.split(500)]
        return to_uint8(torch.cat(parts))


def load_coder(path, images, test, device):
    """(Autoencoder, codes of the training images, codes of the test images), trained once.

    The file keeps the codes too: encoded anew on other cores they would differ in a last bit, and a
    run that goes on would see other data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        coder = Autoencoder(images.shape[1]).to(device)
    if os.path.exists(path):
        state = runs.load_state(path, ("model", "train", "test"))
        coder.load_state_dict(state["model"])
        return coder.eval(), state["train"].float(), state["test"].float()
    coder.fit(images)
    coder.eval()
    train, test = coder.encode(images).half(), coder.encode(test).half()
    runs.save_state(path, model=coder.state_dict(), train=train, test=test)
    return coder, train.float(), test.float()


# --------------------------------------------------------------------------- the experiment

class LatentExperiment(lth.Experiment):
    """The experiment on the codes of its images."""

    def __init__(self, args, guard=None):
        if args.dataset.startswith("cifar"):
            cli.refuse("from", f"{args.dataset} is trained with flips; name a run on "
                       "digits, mnist or fashion")
        super().__init__(args, guard)  # the feature extractors see pixels
        self.pixels = self.test
        path = os.path.join(args.out, "autoencoder.pt")
        coder, train, test = load_coder(path, self.images, self.test, self.device)
        self.coder, scale = coder, train.std().item()
        self.images, self.test = (train / scale).to(self.device), test / scale
        self.decode = lambda x: self.coder.decode(x * scale)

    def new_model(self, seed, **config):
        """The preset's U-Net without folding: the encoder has halved the resolution already."""
        return super().new_model(seed, **dict(patch=1) | config)

    def reconstruct(self, images):
        """uint8 images, encoded and decoded."""
        return self.coder.decode(self.coder.encode(images).to(self.device)).cpu()

    def reconstruction(self):
        """Error and fid_domain of reconstructed test images; the decoder's MACs per image."""
        back = to_float(self.reconstruct(self.pixels))
        mse = F.mse_loss(back, to_float(self.pixels)).item()
        fid = self.quality(self.reconstruct(self.real))["fid_domain"]
        layers = metrics.count_macs(self.coder.decoder, self.images[:1])
        macs = sum(dense for dense, _ in layers.values())
        return dict(mse=mse, fid_domain=fid, decoder_macs=macs)


def finished_seeds(args, rows, asked):
    """The seeds asked for, by default all, if their training runs are done."""
    missing = {job.seed for job in lth.jobs(args) if job not in rows}
    done = [seed for seed in args.seeds if seed not in missing]
    seeds = cli.once(asked or done)
    if not seeds or set(seeds) - set(done):
        flag = "seeds" if asked else "from"
        cli.refuse(flag, f"{args.out} has finished seeds {done}")
    return seeds


def latent_run(args, seeds, parser):
    """The LatentExperiment with the flags of a run in pixels."""
    out = os.path.normpath(args.out) + "_latent"
    settings = argparse.Namespace(**vars(args) | dict(out=out, seeds=seeds))
    return lth.run(settings, parser, experiment=LatentExperiment)


# --------------------------------------------------------------------------- what came out

Line = namedtuple("Line", "space arm sparsity seeds fid_domain sd over_dense "
                  "sd_over_dense live_mmacs", defaults=[None] * 4)


def values_of(rows, seeds):
    """{(arm, round): fid_domain of the seeds}."""
    found = {}
    for seed in seeds:
        for job, row in rows.items():
            if job.seed == seed:
                group = found.setdefault((job.arm, job.round), [])
                group.append(row["fid_domain"])
    return {key: np.array(group) for key, group in found.items()}


def lines(space, rows, seeds):
    """The Lines of one space, means over seeds; over_dense: over the same seed's dense."""
    found = values_of(rows, seeds)
    for (arm, r), fid in found.items():
        row, over = rows[lth.Job(seeds[0], r, arm)], fid / found["dense", 0]
        yield Line(space, arm, row["sparsity"], len(seeds), fid.mean(),
                   deviation(fid), over.mean(), deviation(over),
                   row["macs_live"] / 1e6)


def draw(table, path, note):
    """fid_domain over that of dense against sparsity: tickets as lines, controls as marks."""
    styles, series = dict(ticket="solid", reinit="points", random="points"), []
    for space, colour in zip(("pixel", "latent"), charts.PALETTE):
        for arm, style in styles.items():
            mine = [line for line in table if line[:2] == (space, arm)]
            y = np.array([line.over_dense for line in mine])
            sd = np.array([line.sd_over_dense for line in mine], float)
            series.append(dict(label=f"{space}, {arm}", colour=colour, style=style,
                               x=[100 * line.sparsity for line in mine],
                               y=y, y_low=y - sd, y_high=y + sd))
    charts.line_chart([line for line in series if line["x"]], path,
                      "Tickets in pixel space and in latent space", "weights pruned (%)",
                      "fid_domain over that of dense (log)", log_y=True,
                      hlines=[("dense", 1.0, "dashed")], note=note)


def draw_samples(exp, path, note):
    """Test images, the same reconstructed, samples of the dense network and of the last ticket."""
    seed, last = exp.args.seeds[0], exp.args.rounds
    real = metrics.random_draw(exp.pixels, 12)
    rows = [("real", real), ("reconstructed", exp.reconstruct(real))]
    for job in lth.Job(seed, 0, "dense"), lth.Job(seed, last, "ticket"):
        pictures = runs.load_state(job.path(exp.args.out))["pictures"]
        pruned = 100 * exp.rows[job]["sparsity"]
        rows.append((f"{job.arm}, latent\n{pruned:.0f} % pruned", pictures[:12]))
    charts.sample_rows(rows, path, "Latent diffusion and its lottery ticket",
                       f"The last two rows share x_T. {note}")


def conclude(pixel, latent, seeds, last):
    """The last ticket over dense and its controls in each space; how the spaces differ."""
    said, loss, n = [], {}, len(seeds)
    for space, rows in (("pixel", pixel), ("latent", latent)):
        found, parts = values_of(rows, seeds), []
        ticket = found["ticket", last]
        for arm, r in ("dense", 0), ("reinit", last), ("random", last):
            if (arm, r) in found:
                over = np.mean(ticket / found[arm, r])
                ends = interval(ticket - found[arm, r])
                parts.append(f"{arm} {over:.2f}{ends}")
        said.append(f"{space}: ticket over {', '.join(parts)}")
        loss[space] = np.log(ticket / found["dense", 0])
    more = loss["latent"] - loss["pixel"]
    ends = interval(more, "log ")
    certain = "no verdict" if n < 3 else "90 % intervals of differences"
    return (f"fid_domain of the last round, {'; '.join(said)}. The ratio to dense is "
            f"{np.exp(more.mean()):.2f} times as large in latent space{ends}; n={n} "
            f"seed(s), {certain}.")


def interval(differences, what=""):
    """The interval of the mean paired difference as text; nothing below three seeds."""
    _, low, high = over_seeds(differences)
    return "" if low is None else f" ({what}difference {low:+.2f} to {high:+.2f})"


def main(argv=None):
    """The command line."""
    study = Study("studies.latent", __doc__)
    add_run_flag(study)
    study.add_argument("--seeds", nargs="+", type=cli.seed_number,
                       help="which of the run's (default: all)")
    with study.arguments(argv) as args:
        pixel_exp, pixel = open_run(args.run)
        seeds = finished_seeds(pixel_exp.args, pixel, args.seeds)
        exp = latent_run(pixel_exp.args, seeds, study)
        a, latent, back = exp.args, exp.rows, exp.reconstruction()
        table = [*lines("pixel", pixel, seeds), *lines("latent", latent, seeds)]
        for space, name, scores in (("latent", "reconstruction", back),
                                    ("pixel", "real images", exp.reference)):
            table.append(Line(space, name, None, None, scores["fid_domain"]))
        path = os.path.join(args.out, f"latent_{a.dataset}")
        study.save(path, Line._fields, table, exp.device, n=a.samples, seeds=seeds,
                   reconstruction=back, flags=vars(a))
        note = (f"{a.dataset}, {a.steps:,} steps of {a.batch}, n={a.samples:,} samples, "
                f"seeds {', '.join(map(str, seeds))}.")
        draw(table, path + ".png", f"{note} Bars: standard deviation over seeds.")
        draw_samples(exp, path + "_samples.png", note)
    print(f"\n{charts.text_table(Line._fields, table)}\n\n"
          f"Squared error of reconstructed test images in [-1, 1]: {back['mse']:.4f}. MMACs "
          f"to decode one: {back['decoder_macs'] / 1e6:.2f}.\n"
          f"{conclude(pixel, latent, seeds, a.rounds)}\n"
          f"{path}.csv, .json, .png, _samples.png")


if __name__ == "__main__":
    main()
