"""Does the lottery ticket hold for latent diffusion, where the network denoises an autoencoder's code?

    python -m studies.latent                       # digits: makes or takes runs/digits, then minutes more
    python -m studies.latent --from runs/mnist     # latents of that run's data, with that run's flags

A small convolutional autoencoder folds 28 x 28 pixels into 14 x 14 x c and back. It is trained once on the
training images alone, with a little noise on the code in the place of a KL term: the noise keeps the code
smooth, and the code's normalisation keeps it from escaping the noise by growing. The latents, divided by
their standard deviation (2112.10752, appendix G), then take the images' place in the whole experiment of
lth_diffusion.py: the same rounds, arms, steps, batches, seeds and sampler as the run in pixels beside it. The
U-Net is the same one without its folding of pixels (`patch`), so that it works at 14 x 14 in both spaces when
the preset folds 2 x 2; the multiply-accumulates of both are printed. Samples are not clipped, since a code
has no range, and are decoded before anything measures them: every quality figure is of pixels. What the
autoencoder loses no ticket can win back, so the reconstruction's own fid_domain stands in the table as the
floor of latent space; it makes ratios to dense look milder there. val_loss is in units of its own space and
is left out. Not for CIFAR: those runs flip images, and a flipped code is not the code of a flipped image.

What would change our mind about 'tickets exist in latent space as well': a ticket that loses to reinit or to
random there in every seed, while the pixel ticket of the same seeds wins.
"""
import argparse
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lth_diffusion as lth
import metrics
from ddpm import check_finite, learning_rate, positive_int, seed_number, to_float, to_uint8

STEPS, BATCH, LR, WIDTH = 1500, 64, 2e-3, 32  # of the autoencoder: about a minute on two cores
NOISE = 0.1  # on the code, which has unit variance: small against it, large against 8-bit steps
ARMS = dict(dense="dense", twin="twin", rewind="ticket", reinit="reinit", random="random", small="small",
            finetune="finetune")
HEADER = ["space", "arm", "sparsity", "seeds", "fid_domain", "sd", "over own dense", "sd of that",
          "live MMACs"]


class Autoencoder(nn.Module):
    """Images (N, C, H, W) in [-1, 1] <-> code (N, code, H/2, W/2) of zero mean and unit variance."""

    def __init__(self, channels, code):
        super().__init__()
        def convolution(inp, out):
            return nn.Conv2d(inp, out, 3, padding=1)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), convolution(4 * channels, WIDTH), nn.SiLU(),  # (N, WIDTH, H/2, W/2)
            convolution(WIDTH, WIDTH), nn.SiLU(), convolution(WIDTH, code),
            nn.BatchNorm2d(code, affine=False))  # fixes the code's scale, against which NOISE is measured
        self.decoder = nn.Sequential(
            convolution(code, WIDTH), nn.SiLU(), convolution(WIDTH, WIDTH), nn.SiLU(),
            convolution(WIDTH, 4 * channels), nn.PixelShuffle(2))

    def fit(self, images):
        """Train on uint8 images (N, C, H, W) by the squared error of what comes back."""
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(self.parameters(), LR)
        for step in tqdm(range(STEPS), desc="autoencoder", unit="step", leave=False, disable=None):
            optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, LR, "cosine", STEPS // 20)
            x = to_float(images[torch.randint(len(images), (BATCH,), generator=generator).to(images.device)])
            code = self.encoder(x)
            code = code + NOISE * torch.randn(code.shape, generator=generator).to(code.device)
            loss = F.mse_loss(self.decoder(code), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        check_finite(self, STEPS, "autoencoder")

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (N, C, H, W) -> codes (N, code, H/2, W/2), float32, on the CPU."""
        device = next(self.parameters()).device
        return torch.cat([self.encoder(to_float(part.to(device))).cpu() for part in images.split(500)])

    @torch.no_grad()
    def decode(self, code):
        """Codes -> uint8 images, on the same device."""
        return to_uint8(torch.cat([self.decoder(part) for part in code.split(500)]))


class LatentExperiment(lth.Experiment):
    """The experiment on codes of its images; args.code is their number of channels."""

    def __init__(self, args):
        if args.dataset.startswith("cifar"):
            raise ValueError(f"--from: {args.dataset} is trained with flips, which do not commute with the "
                             "encoder; name a run on digits, mnist or fashion")
        super().__init__(args)  # the rulers see pixels
        self.coder = Autoencoder(self.images.shape[1], args.code)
        codes = self.load_coder(f"{args.out}/autoencoder.pt")
        self.coder.to(self.device).requires_grad_(False).eval()
        self.scale = codes[0].std().item()
        self.pixels = self.test
        self.images, self.test = (code / self.scale for code in codes)
        self.images, self.decode = self.images.to(self.device), self.from_latents

    def load_coder(self, path):
        """Codes of the training and of the test images. The file keeps them beside the autoencoder: encoded
        anew on other cores they would differ in a last bit, and a run that goes on would take them for other
        data."""
        key = f"{metrics.images_hash(self.images)} {self.args.code} {STEPS} {BATCH} {LR} {WIDTH} {NOISE}"
        if os.path.exists(path):
            state = lth.load_state(path, ("key", "model", "train", "test"))
            if state["key"] == key:
                self.coder.load_state_dict(state["model"])
                return state["train"].float(), state["test"].float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.coder = Autoencoder(self.images.shape[1], self.args.code).to(self.device)
        self.coder.fit(self.images)
        self.coder.eval()
        codes = [self.coder.encode(images).half() for images in (self.images, self.test)]
        lth.save_state(path, dict(key=key, model=self.coder.state_dict(), train=codes[0], test=codes[1]))
        return [code.float() for code in codes]

    def from_latents(self, x):
        """uint8 images of latents, as the samplers make them."""
        return self.coder.decode(x * self.scale)

    def new_model(self, seed, **config):
        """The preset's U-Net without folding: the encoder has halved the resolution already."""
        return super().new_model(seed, **dict(patch=1) | config)

    def reconstruct(self, images):
        """uint8 images, encoded and decoded."""
        return self.coder.decode(self.coder.encode(images).to(self.device)).cpu()

    def reconstruction(self):
        """Facts of the autoencoder on test images: error in [-1, 1], PSNR, fid_domain of as many as are drawn
        from a model, and the decoder's multiply-accumulates an image."""
        mse = F.mse_loss(to_float(self.reconstruct(self.pixels)), to_float(self.pixels)).item()
        macs = metrics.count_macs(self.coder.decoder, self.images[:1])
        return dict(mse=mse, psnr=10 * math.log10(4 / mse),  # 4 is the squared range
                    fid_domain=self.quality(self.reconstruct(self.real))["fid_domain"],
                    decoder_macs=sum(dense for dense, _ in macs.values()))


def latent_run(exp, args, parser):
    """(LatentExperiment, rows): the run on latents with the flags of a run in pixels."""
    out = args.runs or os.path.join("runs", f"latent_{os.path.basename(os.path.normpath(exp.args.out))}")
    seeds = args.seeds or exp.args.seeds
    if absent := set(seeds) - set(exp.args.seeds):
        raise ValueError(f"argument --seeds: {min(absent)} is not among the run's, {exp.args.seeds}")
    settings = argparse.Namespace(**vars(exp.args) | dict(out=out, code=args.code, seeds=seeds))
    return lth.run_alone(settings, parser, experiment=LatentExperiment)


def ratios(rows):
    """{(arm, round): {seed: (fid_domain, over the same seed's dense)}}."""
    found = {}
    for job, row in rows.items():
        if job.arm in ARMS and (dense := rows.get(lth.Job(job.seed, 0, "dense"))):
            value = row["fid_domain"]
            found.setdefault((job.arm, job.round), {})[job.seed] = (value, value / dense["fid_domain"])
    return found


def lines(space, rows, seeds):
    """Rows of HEADER of one space: means over the seeds that both have."""
    for (arm, round), values in ratios(rows).items():
        if some := [seed for seed in seeds if seed in values]:
            row, (fid, over) = rows[lth.Job(some[0], round, arm)], zip(*(values[seed] for seed in some))
            yield [space, ARMS[arm], row["sparsity"], len(some), float(np.mean(fid)), metrics.deviation(fid),
                   float(np.mean(over)), metrics.deviation(over), row["macs_live"] / 1e6]


def draw(table, path, note):
    """fid_domain over that of its own dense against sparsity: tickets as lines, controls as single marks."""
    series = []
    for space, colour in zip(("pixel", "latent"), lth.PALETTE):
        for arm, shape in zip(("ticket", "reinit", "random"), lth.SHAPES):
            mine = [row for row in table if row[0] == space and row[1] == arm]
            y, sd = (np.array([row[k] or np.nan for row in mine], float) for k in (6, 7))
            if mine:
                series.append(dict(label=f"{space}, {arm}", x=[100 * row[2] for row in mine], y=y,
                                   y_low=y - sd, y_high=y + sd, colour=colour, shape=shape,
                                   style="solid" if arm == "ticket" else "points"))
    lth.line_chart(series, path, "Tickets in pixel space and in latent space", "weights pruned (%)",
                   "fid_domain over own dense (log)", log_y=True, hlines=[("dense", 1.0, "dashed")],
                   note=f"{note} Bars: standard deviation over seeds.")


def draw_samples(exp, rows, path, note):
    """Real images, the same reconstructed, and what the dense network and the last ticket draw."""
    seed, last, real = exp.args.seeds[0], exp.args.rounds, metrics.random_draw(exp.pixels, 12)
    pictures = {arm: exp.load(lth.Job(seed, round, arm))["pictures"][:12]
                for arm, round in (("dense", 0), ("rewind", last))}
    pruned = 100 * rows[lth.Job(seed, last, "rewind")]["sparsity"]
    lth.sample_rows([("real", real), ("reconstructed", exp.reconstruct(real)),
                     ("dense, latent", pictures["dense"]), (f"ticket, latent\n{pruned:.0f} % pruned",
                                                            pictures["rewind"])],
                    path, "Latent diffusion and its lottery ticket", f"The last two rows share x_T. {note}")


def conclude(pixel, latent, seeds):
    """Of each space the ticket over its dense and controls, and the two spaces' difference, by seed."""
    said, over = [], {}
    for space, rows in (("pixel", pixel), ("latent", latent)):
        found, last = ratios(rows), max(job.round for job in rows)
        over[space] = {arm: np.array([found[arm, round][seed][0] for seed in seeds])
                       for arm, round in found if round == (0 if arm == "dense" else last)}
        ticket = over[space]["rewind"]
        parts = [f"{name} {np.mean(ticket / over[space][arm]):.2f}{interval(ticket - over[space][arm])}"
                 for arm, name in ARMS.items() if arm in ("dense", "reinit", "random") and arm in over[space]]
        said.append(f"{space}: ticket over {', '.join(parts)}")
    more = np.log(over["latent"]["rewind"] / over["latent"]["dense"]) - np.log(
        over["pixel"]["rewind"] / over["pixel"]["dense"])
    n = len(seeds)
    return (f"fid_domain of the last round's {'; '.join(said)}. What pruning multiplies fid_domain by is "
            f"{np.exp(more.mean()):.2f} times as large in latent space{interval(more, 'log ')}; n={n} "
            f"seed{'s' * (n > 1)}{', no verdict' if n < 3 else ', 90 % intervals of differences'}.")


def interval(differences, what=""):
    """ [low, high] of the mean of paired differences at 90 %; nothing below three seeds."""
    _, low, high = metrics.over_seeds(differences)
    return "" if low is None else f" ({what}difference {low:+.2f} to {high:+.2f})"


def main(argv=None):
    """The command line."""
    study = lth.Study("latent", __doc__)
    add = study.add_argument
    add("--from", dest="run", metavar="runs/NAME", help="a finished run in pixels (default: one on digits)")
    add("--seeds", nargs="+", type=seed_number, help="which of the run's (default: all)")
    add("--code", type=positive_int, default=1, help="channels of a latent pixel (default: 1)")
    add("--runs", metavar="FOLDER", help="of the run on latents (default: runs/latent_NAME)")
    with study.arguments(argv) as args:
        pixel_exp, pixel = lth.open_run(args.run)
        exp, latent = latent_run(pixel_exp, args, study)
        seeds = [seed for seed in exp.args.seeds if lth.Job(seed, exp.args.rounds, "rewind") in pixel]
        if not seeds:
            raise ValueError(f"--from: {pixel_exp.args.out} has no ticket of its last round yet")
        back, path = exp.reconstruction(), os.path.join(args.out, f"latent_{exp.args.dataset}")
        table = [*lines("pixel", pixel, seeds), *lines("latent", latent, seeds),
                 ["latent", "reconstruction", None, None, back["fid_domain"], *[None] * 4],
                 ["pixel", "real images", None, None, exp.floor["fid_domain"], *[None] * 4]]
        study.save(path, HEADER, table, exp.device, n=exp.args.samples, seeds=seeds, code=args.code,
                   reconstruction=back, flags=vars(exp.args))
        note = (f"{exp.args.dataset}, {exp.args.steps:,} steps of {exp.args.batch}, n={exp.args.samples:,} "
                f"samples, seeds {seeds}.")
        draw(table, path + ".png", note)
        draw_samples(exp, latent, path + "_samples.png", note)
    dense = [rows[lth.Job(seeds[0], 0, "dense")]["macs_dense"] / 1e6 for rows in (pixel, latent)]
    print(f"\n{lth.text_table(HEADER, table)}\n\nThe autoencoder, on test images: error {back['mse']:.4f} in "
          f"[-1, 1], PSNR {back['psnr']:.1f} dB. MMACs of a dense evaluation: {dense[0]:.2f} in pixels, "
          f"{dense[1]:.2f} on latents, and {back['decoder_macs'] / 1e6:.2f} once an image to decode it.\n"
          f"{conclude(pixel, latent, seeds)}\n{path}.csv, .json, .png, _samples.png")


if __name__ == "__main__":
    main()
