"""Do the established packages compute the same, from the same inputs and weights?

    pip install pytorch-fid torch-fidelity diffusers    # only this check needs them
    python -m checks.parity                             # results/parity.csv, .md and .json

Exits with 1 where a difference exceeds its tolerance. A package that is missing is named, and its
rows are left out.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m checks.parity")

import collections
import importlib
import importlib.metadata
import os
import re
import sys
import tempfile
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm
import metrics
import unet
from studies.common import Study
from support import charts, measure, runs

PEERS = {  # package -> module
    "pytorch-fid": "pytorch_fid.inception",
    "torch-fidelity": "torch_fidelity",
    "diffusers": "diffusers"}
MEANING = """Tensors are shown by their mean absolute value; their difference is that of the worst
element, in units of the peer's spread over the batch. The difference of two numbers is relative to
the peer's."""
Row = collections.namedtuple(
    "Row", "quantity ours theirs difference tolerance verdict")  # texts


def compare(quantity, ours, theirs, tolerance):
    """Row for two numbers or two tensors [N, ...] of one shape; NaN is within no tolerance."""
    pair = [torch.as_tensor(v, dtype=torch.float64) for v in (ours, theirs)]
    ours, theirs = pair
    if ours.shape != theirs.shape:
        raise ValueError(f"{quantity}: {ours.shape} and {theirs.shape}")
    # The spread over the batch: in what a random network says of every
    # input alike, a difference would drown.
    scale = theirs.std(0).mean() if theirs.dim() else theirs.abs()
    worst = (ours - theirs).abs().max()
    difference = float(worst / scale) if worst else 0.0
    verdict = "ok" if difference <= tolerance else "DIFFERS"
    shown = [f"{v.abs().mean() if v.dim() else v:.8g}" for v in pair]
    return Row(quantity, *shown, f"{difference:.1e}", f"{tolerance:g}",
               verdict)


# --------------------------------------------------------------------------- inputs

def normal(*shape, seed=0):
    """Standard normal noise, float64, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def randomise(model):
    """The model, in eval mode, with random parameters and batch statistics.

    A zero or a one would agree whatever became of it. Activations neither die nor explode.
    """
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            scale = (2 / value[0].numel()) ** 0.5
            value.normal_(0, scale, generator=generator)
        elif re.search(r"(bn|norm\w*)\.weight$|running_var$", name):
            value.uniform_(0.8, 1.2, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, 0.1, generator=generator)
    return model.eval()


def random_images(n):
    """uint8 [n, 3, 32, 32], smooth: a random network sees no difference in white noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = 128 + 80 * torch.randn(n, 3, 4, 4, generator=generator)
    fine = F.interpolate(coarse, (32, 32), mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8)


def feature_sets(n, d):
    """Correlated features, real [n, d] and fake [n - 50, d], that overlap in part."""
    scales = torch.logspace(0, -1, d, dtype=torch.float64)
    mix = torch.linalg.qr(normal(d, d)).Q * scales[:, None]
    fake = 0.9 * normal(n - 50, d, seed=2) + 0.1
    return normal(n, d, seed=1) @ mix, fake @ mix


# --------------------------------------------------------------------------- metrics

FILES = 50  # images in each of two folders: each goes through Inception twice


def their_inception(peer, model):
    """pytorch-fid's network with our weights instead of the download."""
    with mock.patch.object(peer, "load_state_dict_from_url",
                           lambda *_, **__: model.state_dict()):
        return peer.fid_inception_v3().eval()


@torch.no_grad()
def pytorch_fid_rows():
    """Inception and the Frechet distance.

    torch-fidelity resizes images as TensorFlow 1 did, which changes the FID. We follow pytorch-fid,
    as most papers do.
    """
    from pytorch_fid import inception as peer
    from pytorch_fid.fid_score import calculate_frechet_distance
    model = randomise(metrics.InceptionV3())
    images = random_images(4)
    network = their_inception(peer, model)
    with mock.patch.object(peer, "fid_inception_v3", lambda: network):
        extractor = peer.InceptionV3().eval()
    pool, logits = model(images)
    theirs = extractor(images.float() / 255)[0].flatten(1)
    name = "pytorch-fid, uint8 32x32 in, float32"
    yield compare(f"Inception pool, {name}", pool, theirs, 1e-4)
    theirs = network.fc(theirs)
    yield compare(f"Inception logits, {name}", logits, theirs, 1e-4)
    sets, moments = feature_sets(600, 64), []
    for feats in sets:
        moments += [np.mean(feats.numpy(), 0), np.cov(feats.numpy().T)]
    yield compare("Frechet distance, pytorch-fid, D=64, n=600 and 550",
                  metrics.fid(*sets),
                  calculate_frechet_distance(*moments), 1e-8)


def folder_rows():
    """The way of `python metrics.py FOLDER FOLDER`, from PNG files to FID, and pytorch-fid's."""
    from pytorch_fid import fid_score
    from pytorch_fid import inception as peer
    model = randomise(metrics.InceptionV3())
    images = random_images(2 * FILES)[..., :28, :28]
    with tempfile.TemporaryDirectory() as root:
        paths = [os.path.join(root, name) for name in ("real", "fake")]
        for path, part in zip(paths, (images[:FILES], images[FILES:] // 2)):
            os.mkdir(path)
            for i, image in enumerate(part.permute(0, 2, 3, 1).numpy()):
                Image.fromarray(image).save(f"{path}/{i:05d}.png")
        network = their_inception(peer, model)
        with mock.patch.object(peer, "fid_inception_v3", lambda: network):
            theirs = fid_score.calculate_fid_given_paths(
                paths, 50, "cpu", 2048, num_workers=0)
        sides = [measure.read(path, "") for path in paths]
        extractor = measure.Extractor("random Inception", model, False)
        rows, _ = measure.compare(*sides, extractor, "", metrics)
    yield compare(
        f"FID of two folders of {FILES} PNGs, metrics.py's command, "
        "pytorch-fid", rows[0][2], theirs, 1e-5)


def torch_fidelity_rows():
    """The Frechet distance, KID, Inception score, precision and recall."""
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    # With fewer images than features the covariances are singular, and
    # torch-fidelity keeps half its digits.
    for n, d, tolerance in (600, 64, 1e-8), (150, 256, 1e-5):
        sets = feature_sets(n, d)
        moments = [metric_fid.fid_features_to_statistics(x) for x in sets]
        theirs = metric_fid.fid_statistics_to_metric(*moments, False)
        yield compare(
            f"Frechet distance, torch-fidelity, D={d}, n={n} and {n - 50}",
            metrics.fid(*sets), theirs["frechet_inception_distance"],
            tolerance)
    real, fake = feature_sets(600, 64)
    # Subsets come from different generators; one of all has nothing to draw.
    ours, _ = metrics.kid(real[:550], fake, subsets=1, subset_size=550)
    theirs = metric_kid.kid_features_to_metric(
        real[:550], fake, kid_subsets=1, kid_subset_size=550, verbose=False)
    yield compare("KID, torch-fidelity, D=64, one subset of all 550", ours,
                  theirs["kernel_inception_distance_mean"], 1e-9)
    logits = 4 * real
    ours = metrics.inception_score(logits.softmax(1), splits=10)
    theirs = metric_isc.isc_features_to_metric(
        logits, splits=10, shuffle=False).values()  # we never shuffle
    for name, mine, other in zip(("mean", "deviation"), ours, theirs):
        yield compare(f"Inception score, torch-fidelity, {name} over 10 "
                      "splits, n=600", mine, other, 1e-9)
    ours = metrics.precision_recall(real, fake, k=3)
    theirs = metric_prc.prc_features_to_metric(
        fake, real, prc_neighborhood=3, verbose=False)  # fake comes first
    for name, mine in zip(("precision", "recall"), ours):
        # One point more or less would be 2e-3; theirs is float32.
        yield compare(f"{name}, torch-fidelity, k=3, n=600 and 550", mine,
                      theirs[name], 1e-6)


# --------------------------------------------------------------------------- network and samplers

RENAMES = (  # our parameter names -> diffusers'
    (r"^(down|up)\.", r"\1_blocks."),
    (r"\.blocks\.", ".resnets."),
    (r"\.attention\.", ".attentions."),
    (r"^(down|up)(.*)\.resample\.", r"\1\2.\1samplers.0.conv."),
    (r"^mid\.1\.", "mid_block.attentions.0."),
    (r"^mid\.0\.", "mid_block.resnets.0."),
    (r"^mid\.2\.", "mid_block.resnets.1."),
    (r"\.time\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.norm\.", ".group_norm."),
    (r"\.out\.", ".to_out.0."),
    (r"^time_in\.", "time_embedding.linear_1."),
    (r"^time_out\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."))


def diffusers_state(model, like):
    """The weights of our `paper` U-Net under the names and in the shapes of diffusers' state."""
    state = {}
    for name, value in model.state_dict().items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if ".qkv." in name:  # one 1x1 convolution here, three layers there
            for part, v in zip("qkv", value.chunk(3)):
                state[name.replace("qkv", f"to_{part}")] = v
        else:
            state[name] = value
    return {k: v.reshape(like[k].shape) for k, v in state.items()}


@torch.no_grad()
def unet_rows():
    """The U-Net of google/ddpm-cifar10-32, our preset `paper`."""
    from diffusers import UNet2DModel
    down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    down[1], up[2] = "AttnDownBlock2D", "AttnUpBlock2D"  # at 16x16
    theirs = UNet2DModel(
        sample_size=32, layers_per_block=2, downsample_padding=0,
        block_out_channels=(128, 256, 256, 256), down_block_types=down,
        up_block_types=up, flip_sin_to_cos=False, freq_shift=1,
        norm_eps=1e-6, norm_num_groups=32, attention_head_dim=None,
        act_fn="silu").eval()
    ours = randomise(unet.UNet(channels=3, **unet.PRESETS["paper"]))
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
    name = "of `paper`, diffusers' UNet2DModel"
    yield compare(f"parameters {name}", *counts, 0)
    theirs.load_state_dict(diffusers_state(ours, theirs.state_dict()))
    x, t = normal(2, 3, 32, 32), torch.tensor([3, 741])
    eps = ours(x.float(), t), theirs(x.float(), t).sample
    yield compare(f"eps {name}, float32", *eps, 1e-4)
    # In float64 rounding vanishes and a real difference stays. Our norms
    # and time features insist on float32.
    features = unet.time_features
    with mock.patch.object(unet.GroupNorm, "forward", nn.GroupNorm.forward), \
            mock.patch.object(unet, "time_features",
                              lambda t, dim: features(t, dim).double()):
        eps = ours.double()(x, t), theirs.double()(x, t).sample
    yield compare(f"eps {name}, float64", *eps, 1e-10)


def their_sample(scheduler, model, x, abar, steps, **options):
    """diffusers' sampling loop from x [N, ...], on our time grid, with our float64 alphas_bar."""
    scheduler.alphas_cumprod = abar  # theirs is the same in float32
    if hasattr(scheduler, "sigmas"):
        # DPM-Solver's own grid divides T by steps + 1.
        grid = [i * (1000 // steps) for i in reversed(range(steps))]
        scheduler.set_timesteps(timesteps=grid)
        sigmas = ((1 - abar) / abar).sqrt()[scheduler.timesteps]
        scheduler.sigmas = torch.cat([sigmas, abar.new_zeros(1)])
    else:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        eps = model(x, t.expand(len(x)))
        x = scheduler.step(eps, t, x, **options).prev_sample
    return x


def sampler_rows():
    """Ancestral sampling, DDIM and DPM-Solver++(2M), with a smooth function as the network."""
    import diffusers
    diffusion, x_T = ddpm.Diffusion(), normal(8, 3, 8, 8)

    def model(x, t):  # its x0 of up to 1.3 gives clipping work to do
        abar = diffusion.alphas_bar[t].reshape(-1, 1, 1, 1)
        return (x - abar.sqrt() * 1.3 * x.tanh()) / (1 - abar).sqrt()

    def row(scheduler, method, tolerance, steps=50, clip=True, eta=0.0, **options):
        name = f"{type(scheduler).__name__}, {steps} steps"
        ours = ddpm.sample(
            model, diffusion, x_T, method, steps, eta, clip,
            torch.Generator().manual_seed(6))
        if method != "dpm":
            options["generator"] = torch.Generator().manual_seed(6)
        if method == "ddim":
            name, options["eta"] = f"{name}, eta {eta:g}", eta
        theirs = their_sample(scheduler, model, x_T, diffusion.alphas_bar,
                              steps, **options)
        name += ", clip on" if clip else ", clip off"
        return compare(name, ours, theirs, tolerance)

    for steps in 1000, 50:
        ancestral = diffusers.DDPMScheduler(variance_type="fixed_small")
        yield row(ancestral, "ddpm", 1e-10, steps)
    for clip in True, False:
        for eta in 0.0, 1.0:
            # We derive eps again from the clipped x0, diffusers on request.
            yield row(diffusers.DDIMScheduler(clip_sample=clip), "ddim", 1e-10,
                      50, clip, eta, use_clipped_model_output=clip)
    for clip in True, False:
        # Thresholding with a ceiling of 1 is clipping. It casts to float32.
        solver = diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_order=2,
            solver_type="midpoint", final_sigmas_type="zero",
            lower_order_final=True, thresholding=clip, sample_max_value=1.0)
        yield row(solver, "dpm", 1e-5, 50, clip)


def torch_rows():
    """Without a peer: a Frechet distance that is exact for any n, and torch's own count of MACs."""
    for n, d in (600, 64), (150, 256):
        real, fake = feature_sets(n, d)
        x, y = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (real, fake))
        nuclear = torch.linalg.svdvals(x @ y.T).sum()
        means = (real.mean(0) - fake.mean(0)).square().sum()
        truth = means + x.square().sum() + y.square().sum() - 2 * nuclear
        yield compare(
            f"Frechet distance, nuclear norm by SVD, D={d}, n={n} and {n - 50}",
            metrics.fid(real, fake), truth, 1e-11)
    model = unet.UNet(channels=3, **unet.PRESETS["paper"]).eval()
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    macs = metrics.count_macs(model, x, t).values()
    ours = sum(dense for dense, _ in macs)
    yield compare("MACs of `paper` at 32x32, attention included, torch's flop "
                  "counter", ours, counter.get_total_flops() / 2, 0)


# --------------------------------------------------------------------------- command line

SECTIONS = ((pytorch_fid_rows, "pytorch-fid"),
            (folder_rows, "pytorch-fid"),
            (torch_fidelity_rows, "torch-fidelity"),
            (unet_rows, "diffusers"),
            (sampler_rows, "diffusers"),
            (torch_rows, None))


def missing_peers():
    """{package: why} of those that cannot be imported; torchvision has to fit torch."""
    missing = {}
    for peer, module in {"": "torchvision_stub", **PEERS}.items():
        try:  # a stub may let torchvision load beside a torch without CUDA
            importlib.import_module(module)
        except (ImportError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            missing[peer] = f"{type(error).__name__}: {reason}"
    missing.pop("", None)
    return missing


def write(study, path, rows):
    """path.csv, .md and .json."""
    peers = {name: importlib.metadata.version(name) for name in PEERS}
    study.save(path, Row._fields, rows, peers=peers)
    table = charts.markdown_table(Row._fields, rows)
    runs.write_text(path + ".md", f"{table}\n\n{MEANING}")


def main(argv=None):
    """Print the table, write a complete one; return 1 where a row exceeds its tolerance."""
    study, rows = Study("checks.parity", __doc__), []
    with study.arguments(argv) as args:
        missing, path = missing_peers(), f"{args.out}/parity"
        for section, peer in SECTIONS:
            rows += section() if peer not in missing else []
        print(f"{charts.text_table(Row._fields, rows)}\n\n{MEANING}\n")
        if missing:
            for peer, why in missing.items():
                print(f"not compared with {peer} ({why})")
            print(f"to compare:  pip install {' '.join(missing)}\n"
                  "nothing is written: the table is incomplete")
        else:
            write(study, path, rows)
            print(f"{path}.csv, .md, .json")
    return int("DIFFERS" in [row.verdict for row in rows])


if __name__ == "__main__":
    sys.exit(main())
