"""Does this repository compute what the established packages compute? Same inputs, same weights, one run.

    pip install pytorch-fid torch-fidelity diffusers    # the peers: for this check alone
    python -m studies.parity                            # results/parity.csv, .md and .json
    python -m studies.parity --speed                    # ... and the speed of the ruler: minutes more

Exits 1 where a difference is above its tolerance. A peer that is missing is named and its rows are left out.
"""
import collections
import importlib
import importlib.metadata
import io
import os
import re
import sys
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm
import metrics
import unet
from lth_diffusion import Study, markdown_table, text_table

PEERS = {"pytorch-fid": "pytorch_fid.inception", "torch-fidelity": "torch_fidelity", "diffusers": "diffusers"}
MEANING = """Tensors are shown by their mean absolute value; their difference is that of the worst element, in
units of the peer's spread over the batch. The difference of two numbers is relative to the peer's. A row with
no tolerance compares two conventions, which are meant to differ."""
Row = collections.namedtuple("Row", "quantity ours theirs difference tolerance verdict")  # all of them text


def compare(quantity, ours, theirs, tolerance=None):
    """Row for two numbers or two tensors [N, ...] of equal shape; NaN is within no tolerance."""
    ours, theirs = (torch.as_tensor(v, dtype=torch.float64) for v in (ours, theirs))
    if ours.shape != theirs.shape:
        raise ValueError(f"{quantity}: shapes {list(ours.shape)} and {list(theirs.shape)}")
    # The spread over the batch: what a random network says of every input alike would drown a difference.
    scale = theirs.std(0).mean() if theirs.dim() else theirs.abs()
    worst = (ours - theirs).abs().max()
    difference = float(worst / scale) if worst else 0.0
    verdict = "for information" if tolerance is None else "ok" if difference <= tolerance else "DIFFERS"
    shown = (f"{v.abs().mean() if v.dim() else v:.8g}" for v in (ours, theirs))
    return Row(quantity, *shown, f"{difference:.1e}", "" if tolerance is None else f"{tolerance:g}", verdict)


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal noise [*shape], the same on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomise(model):
    """model, in eval mode, with every parameter and batch statistic random: a zero or a one would agree
    whatever became of it. Activations neither die nor explode."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif re.search(r"(bn|norm\w*)\.weight$|running_var$", name):
            value.uniform_(0.8, 1.2, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, 0.1, generator=generator)
    return model.eval()


def pictures(n):
    """uint8 [n, 3, 32, 32], smooth: white noise would all look the same to a random network."""
    coarse = 128 + 80 * normal(n, 3, 4, 4, dtype=torch.float32)
    return F.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)


def feature_sets(n, d):
    """Correlated features, real [n, d] and fake [n - 50, d], that overlap in part; few directions matter."""
    mix = torch.linalg.qr(normal(d, d)).Q * torch.logspace(0, -1, d, dtype=torch.float64)[:, None]
    return normal(n, d, seed=1) @ mix, (0.9 * normal(n - 50, d, seed=2) + 0.1) @ mix


def pytorch_fid_network(state):
    """(pytorch-fid's feature extractor, its whole network with the fc layer) with the weights of state."""
    from pytorch_fid import inception as peer
    with mock.patch.object(peer, "load_state_dict_from_url", lambda *_, **__: state):  # instead of a download
        network = peer.fid_inception_v3().eval()
    with mock.patch.object(peer, "fid_inception_v3", lambda: network):
        return peer.InceptionV3().eval(), network


def moments(sets):
    """[mu, sigma, mu, sigma] of two feature sets, as the peers take them."""
    return [moment for x in sets for moment in (np.mean(x.numpy(), 0), np.cov(x.numpy(), rowvar=False))]


@torch.no_grad()
def pytorch_fid_rows():
    from pytorch_fid.fid_score import calculate_frechet_distance
    model, images = randomise(metrics.InceptionV3()), pictures(4)
    extractor, network = pytorch_fid_network(model.state_dict())
    pool, logits = model(images)
    theirs = extractor(images.float() / 255)[0].flatten(1)
    yield compare("Inception pool, pytorch-fid, uint8 32x32 in, float32", pool, theirs, 1e-4)
    yield compare("Inception logits, pytorch-fid, by its own fc, float32", logits, network.fc(theirs), 1e-4)
    sets = feature_sets(600, 64)
    theirs = calculate_frechet_distance(*moments(sets))
    yield compare("Frechet distance, pytorch-fid, D=64, n=600 and 550", metrics.fid(*sets), theirs, 1e-8)


@torch.no_grad()
def torch_fidelity_inception():
    from torch_fidelity import feature_extractor_inceptionv3 as peer
    model, images, file = randomise(metrics.InceptionV3()), pictures(4), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    network = peer.FeatureExtractorInceptionV3("random", ["2048", "logits"], file)
    # We follow pytorch-fid: torch's bilinear resize, then x/127.5 - 1, since most figures in papers are its.
    # torch-fidelity resizes as TensorFlow 1 did and scales by (x - 128)/128, which is another ruler. So the
    # networks are compared behind that step, on one prepared tensor put in the place of that resize.
    prepared = 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    resize = "interpolate_bilinear_2d_like_tensorflow1x"
    with mock.patch.object(peer, resize, lambda *_, **__: prepared * 128 + 128):
        theirs = network(images)
    for name, mine, other in zip(("pool", "logits"), model(images), theirs):
        yield compare(f"Inception {name}, torch-fidelity, prepared tensor in, float32", mine, other, 1e-4)
    yield compare("... with torch-fidelity's own resize and scale", model(images)[0], network(images)[0])


def torch_fidelity_scores():
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    # With fewer images than features the covariances are singular, and theirs keeps half its digits.
    for n, d, tolerance in ((600, 64, 1e-8), (150, 256, 1e-5)):
        sets = feature_sets(n, d)
        theirs = metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, sets), False)
        yield compare(f"Frechet distance, torch-fidelity, D={d}, n={n} and {n - 50}", metrics.fid(*sets),
                      theirs["frechet_inception_distance"], tolerance)
    real, fake = feature_sets(600, 64)
    # Subsets come from different generators; where a subset is the whole set there is nothing to draw.
    ours = metrics.kid(real[:550], fake, subsets=1, subset_size=550)[0]
    options = dict(kid_subsets=1, kid_subset_size=550, verbose=False)
    theirs = metric_kid.kid_features_to_metric(real[:550], fake, **options)["kernel_inception_distance_mean"]
    yield compare("KID, torch-fidelity, D=64, one subset of all 550", ours, theirs, 1e-9)
    logits = 4 * real
    ours = metrics.inception_score(logits.softmax(1), splits=10)  # theirs would shuffle, ours never does
    theirs = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False).values()
    for name, mine, other in zip(("mean", "deviation"), ours, theirs):
        yield compare(f"Inception score, torch-fidelity, {name} over 10 splits, n=600", mine, other, 1e-9)
    theirs = metric_prc.prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)  # fake first
    for name, mine in zip(("precision", "recall"), metrics.precision_recall(real, fake, k=3)):
        # One point more or less would be 2e-3; theirs is a share in float32.
        yield compare(f"{name}, torch-fidelity, k=3, n=600 and 550", mine, theirs[name], 1e-6)


RENAMES = (  # our parameter names -> diffusers'
    (r"^(down|up)\.", r"\1_blocks."), (r"\.blocks\.", ".resnets."), (r"\.attention\.", ".attentions."),
    (r"^(down|up)(.*)\.resample\.", r"\1\2.\1samplers.0.conv."), (r"^mid\.1\.", "mid_block.attentions.0."),
    (r"^mid\.0\.", "mid_block.resnets.0."), (r"^mid\.2\.", "mid_block.resnets.1."),
    (r"\.time\.", ".time_emb_proj."), (r"\.skip\.", ".conv_shortcut."), (r"\.norm\.", ".group_norm."),
    (r"\.out\.", ".to_out.0."), (r"^time_in\.", "time_embedding.linear_1."),
    (r"^time_out\.", "time_embedding.linear_2."), (r"^norm_out\.", "conv_norm_out."))


def diffusers_state(model, like):
    """The weights of our `paper` U-Net under diffusers' names and in the shapes of its state `like`."""
    state = {}
    for name, value in model.state_dict().items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if ".qkv." in name:  # one 1x1 convolution here, three linear layers there
            state.update({name.replace("qkv", f"to_{part}"): v for part, v in zip("qkv", value.chunk(3))})
        else:
            state[name] = value
    return {name: value.reshape(like[name].shape) for name, value in state.items()}


@torch.no_grad()
def unet_rows():
    from diffusers import UNet2DModel
    theirs = UNet2DModel(  # the configuration of google/ddpm-cifar10-32
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False,
        freq_shift=1, norm_eps=1e-6, norm_num_groups=32, attention_head_dim=None, act_fn="silu").eval()
    ours = randomise(unet.UNet(channels=3, **unet.PRESETS["paper"]))
    counts = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    yield compare("parameters of `paper`, diffusers' UNet2DModel", *counts, 0)
    theirs.load_state_dict(diffusers_state(ours, theirs.state_dict()), strict=True)
    x, t, features = normal(2, 3, 32, 32), torch.tensor([3, 741]), unet.time_features
    eps = ours(x.float(), t), theirs(x.float(), t).sample
    yield compare("eps of `paper`, diffusers' UNet2DModel, float32", *eps, 1e-4)
    # In float64 rounding vanishes and a real difference stays. Our norms and time features insist on float32.
    with mock.patch.object(unet.GroupNorm, "forward", nn.GroupNorm.forward), \
            mock.patch.object(unet, "time_features", lambda t, dim: features(t, dim).double()):
        eps = ours.double()(x, t), theirs.double()(x, t).sample
    yield compare("eps of `paper`, diffusers' UNet2DModel, float64", *eps, 1e-10)


def torch_rows():
    """What needs no peer: a route to the Frechet distance that is exact for any n, and torch's own count."""
    for n, d in ((600, 64), (150, 256)):
        real, fake = feature_sets(n, d)
        x, y = ((feats - feats.mean(0)) / (len(feats) - 1) ** 0.5 for feats in (real, fake))
        trace = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
        truth = (real.mean(0) - fake.mean(0)).square().sum() + trace
        name = f"Frechet distance, nuclear norm by SVD, D={d}, n={n} and {n - 50}"
        yield compare(name, metrics.fid(real, fake), truth, 1e-11)
    model = unet.UNet(channels=3, **unet.PRESETS["paper"]).eval()
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)  # explicit products in attention: scaled_dot_product_attention would read 0 on a CPU
    ours = sum(dense for dense, _ in metrics.count_macs(model, x, t).values())
    theirs = counter.get_total_flops() / 2
    yield compare("MACs of `paper` at 32x32, attention included, torch's flop counter", ours, theirs, 0)


def their_sample(scheduler, model, x, abar, steps, **options):
    """diffusers' sampling loop from x [N, ...], on our time grid and our float64 table of alphas_bar."""
    scheduler.alphas_cumprod = abar  # theirs is the same table in float32
    if hasattr(scheduler, "sigmas"):  # DPM-Solver's 'leading' divides T by steps + 1: it is given our grid
        scheduler.set_timesteps(timesteps=[i * (1000 // steps) for i in reversed(range(steps))])
        scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt()[scheduler.timesteps], abar.new_zeros(1)])
    else:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def sampler_rows():
    import diffusers
    diffusion, x_T = ddpm.Diffusion(), normal(8, 3, 8, 8)

    def model(x, t):  # smooth, with an x0 of up to 1.3, so that clipping has work to do
        abar = diffusion.alphas_bar[t].reshape(-1, 1, 1, 1)
        return (x - abar.sqrt() * 1.3 * torch.tanh(x)) / (1 - abar).sqrt()

    def row(scheduler, method, tolerance, steps=50, clip=True, eta=0.0, **options):
        name = f"{type(scheduler).__name__}, {steps} steps, " + (f"eta {eta:g}, " if method == "ddim" else "")
        ours = ddpm.sample(model, diffusion, x_T, method, steps, eta, clip, torch.Generator().manual_seed(6))
        options |= {"eta": eta} if method == "ddim" else {}
        options |= {"generator": torch.Generator().manual_seed(6)} if method != "dpm" else {}
        theirs = their_sample(scheduler, model, x_T, diffusion.alphas_bar, steps, **options)
        return compare(f"{name}clip {'on' if clip else 'off'}", ours, theirs, tolerance)

    for steps in (1000, 50):
        yield row(diffusers.DDPMScheduler(variance_type="fixed_small"), "ddpm", 1e-10, steps)
    for clip, eta in ((True, 0.0), (True, 1.0), (False, 0.0), (False, 1.0)):
        # We derive eps again from the clipped x0; there that is an option.
        yield row(diffusers.DDIMScheduler(clip_sample=clip), "ddim", 1e-10, 50, clip, eta,
                  use_clipped_model_output=clip)
    for clip in (True, False):
        # It has no clip_sample; thresholding with 1 as the ceiling is the same. It casts to float32 inside.
        yield row(diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
            lower_order_final=True, thresholding=clip, sample_max_value=1.0), "dpm", 1e-5, 50, clip)


def race(quantity, ours, theirs, goal, n):
    """Row of the seconds of ours() and theirs(), called in turns: n pairs after one that does not count."""
    times = metrics.seconds_in_turns((ours, theirs), n)  # (n, 2)
    ratios = times[:, 1] / times[:, 0]
    # A median short of the goal that some pair reaches is noise; when none does, it is a finding.
    verdict = "ok" if np.median(ratios) >= goal else "ok, within spread" if ratios.max() >= goal else "SLOWER"
    medians = (f"{seconds:.3g} s" for seconds in np.median(times, axis=0))
    spread = f"{np.median(ratios):.2f} times as fast [{ratios.min():.2f}, {ratios.max():.2f}]"
    threads = f"{torch.get_num_threads()} threads of torch"
    return Row(f"{quantity}, n={n} pairs in turns, {threads}", *medians, spread, f"at least {goal}", verdict)


@torch.no_grad()
def speed_rows():
    from pytorch_fid.fid_score import calculate_frechet_distance
    stats = moments(feature_sets(3000, 2048))
    yield race("Frechet step at D=2048, pytorch-fid's sqrtm", lambda: metrics.frechet_distance(*stats),
               lambda: calculate_frechet_distance(*stats), goal=5, n=3)
    model, images = randomise(metrics.InceptionV3()), pictures(16)
    extractor, _ = pytorch_fid_network(model.state_dict())
    yield race("Inception of 16 images, pytorch-fid, float32", lambda: model(images),
               lambda: extractor(images.float() / 255), goal=1, n=5)


SECTIONS = ((pytorch_fid_rows, "pytorch-fid"), (torch_fidelity_inception, "torch-fidelity"),
            (torch_fidelity_scores, "torch-fidelity"), (unet_rows, "diffusers"), (sampler_rows, "diffusers"),
            (torch_rows, None))


def missing_peers():
    """{peer: why} of those that cannot be imported; two of them need a torchvision that fits torch."""
    missing = {}
    for peer, module in {"": "torchvision_stub", **PEERS}.items():
        try:  # the stub, where there is one, lets a torchvision for CUDA load beside a CPU torch
            importlib.import_module(module)
        except (ImportError, RuntimeError, OSError) as error:
            missing[peer] = f"{type(error).__name__}: {error}".splitlines()[0]
    missing.pop("", None)
    return missing


def write(study, folder, rows):
    """parity.csv and .md, and parity.json with their provenance."""
    peers = {name: importlib.metadata.version(name) for name in PEERS}
    study.save(os.path.join(folder, "parity"), Row._fields, rows, peers=peers)
    text = f"{markdown_table(Row._fields, rows)}\n\n{MEANING}"
    with ddpm.atomic(os.path.join(folder, "parity.md")) as temporary:
        metrics.write_text(temporary, text)


def main(argv=None):
    """Print the table and write it where it is complete; returns 1 when a row is outside its tolerance."""
    study, rows = Study("parity", __doc__), []
    study.add_argument("--speed", action="store_true", help="also race against pytorch-fid: minutes")
    with study.arguments(argv) as args:
        missing = missing_peers()
        for section, peer in (*SECTIONS, *[(speed_rows, "pytorch-fid")] * args.speed):
            rows += section() if peer not in missing else []
    print(f"{text_table(Row._fields, rows)}\n\n{MEANING}\n")
    if missing:  # and so as not to replace a whole table by a part of one, nothing is written
        print("not compared with", ", ".join(f"{peer} ({why})" for peer, why in missing.items()))
        print(f"install with  pip install {' '.join(missing)}\nnothing written: the table is not complete")
    else:
        write(study, args.out, rows)
        print(f"written: parity.csv, parity.md and parity.json in {args.out}/")
    return int(any(row.verdict in ("DIFFERS", "SLOWER") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
