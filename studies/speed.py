"""How fast is it: against what people would use instead, against the machine's limit, and with tickets?

    python -m studies.speed tickets      # sampling with channel tickets and masked ones: about five minutes
    python -m studies.speed steps        # training, sampling against diffusers, denoising-diffusion-pytorch
    python -m studies.speed limit        # the share of the measured matmul rate that a training step reaches
    python -m studies.speed cost         # masks, pruning and rewinding
    python -m studies.speed              # all of them

Everything is timed in turns within one process: A, B, A, B, so that a slow minute slows both. A figure is the
median of --turns such ratios with the smallest and the largest. Peers that are not installed are named and
left out. Seconds belong to the machine named in results/speed.json; ratios travel better, not perfectly.
"""
import contextlib
import importlib.metadata
import os
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lth_diffusion as lth
import metrics
from ddpm import Diffusion, denoiser, pick_device, pick_precision, positive_int, sample
from prune import (apply_masks, dense_channels, dense_masks, mask_hooks, prunable, prune_channels,
                   prune_magnitude, rewind, shrink)
from unet import PRESETS, UNet

HEADER = ["what", "seconds", "against", "its seconds", "ratio", "smallest", "largest", "turns"]
BATCH, STEPS, PRECISIONS = 64, 10, ("fp32", "bf16")


def row(what, ours, against, theirs, args):
    """A line of HEADER: how many times as fast ours() is as theirs()."""
    times = metrics.seconds_in_turns((ours, theirs), args.turns, device=args.device)  # (turns, 2)
    ratios = times[:, 1] / times[:, 0]
    seconds = np.median(times, axis=0)
    return [what, seconds[0], against, seconds[1], np.median(ratios), ratios.min(), ratios.max(), args.turns]


def network(preset, args):
    """(U-Net of a preset with random weights, where it starts with zeros too; the shape of its images)."""
    shape = (1, 28, 28) if preset in ("tiny", "mnist") else (3, 32, 32)
    torch.manual_seed(0)
    model = UNet(shape[0], image_size=shape[1], **PRESETS[preset]).to(args.device)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.02) if not p.any() else None
    return model.to(memory_format=torch.channels_last), shape


# --- tickets: what a smaller network saves, and what a mask does not

def ticket_rows(args):
    """Network evaluations of channel tickets, and of masked ones, against the dense network."""
    for preset, batch, precision in (("paper", 8, "fp32"), ("paper", 8, "bf16"), ("mnist", 256, "bf16")):
        model, shape = network(preset, args)
        x, t = torch.randn(batch, *shape, device=args.device), torch.full((batch,), 500, device=args.device)
        dense, what = denoiser(model, precision), f"{preset} in {precision}"
        for share in (0.75, 0.875):
            channels = prune_channels(model, dense_channels(model), share, "layer")
            small = shrink(model, channels).to(memory_format=torch.channels_last)
            macs = [sum(d for d, _ in metrics.count_macs(m, x[:1], t[:1]).values()) for m in (model, small)]
            fast = denoiser(small, precision)
            yield row(f"{what}, {100 * share:g} % of hidden channels gone ({macs[0] / macs[1]:.2f} times "
                      f"fewer MACs), evaluation of {batch}", lambda: fast(x, t), "dense", lambda: dense(x, t),
                      args)
        masked, _ = network(preset, args)
        apply_masks(masked, prune_magnitude(masked, dense_masks(masked), 0.9))
        zeros = denoiser(masked, precision)
        yield row(f"{what}, 90 % of weights masked, evaluation of {batch}", lambda: zeros(x, t), "dense",
                  lambda: dense(x, t), args)


# --- peers: what people would use instead, at about equal multiply-accumulates

def our_step(model, x, precision):
    """One training step of a plain loop around `model`: loss, gradients, clip, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    diffusion, t = Diffusion(), torch.randint(0, 1000, (len(x),), device=x.device)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion.loss(model, x, t, torch.randn_like(x))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def ours(args):
    """(model, {precision: training step}, {precision: sampling}) on `batch` images of 28x28."""
    torch.manual_seed(0)
    model = UNet(1, base=32, mults=(1, 2, 2), blocks=1, image_size=28).to(args.device)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(BATCH, 1, 28, 28, device=args.device).contiguous(memory_format=torch.channels_last)
    steps, draws = {}, {}
    for p in PRECISIONS:
        steps[p] = our_step(model, x, p)
        for compile in (False, True) if shutil.which("c++") else (False,):
            draws[p + " compiled" * compile] = lambda p=p, c=compile: sample(
                denoiser(model, p, c), Diffusion(), x, "ddim", STEPS)
    return model, steps, draws


def diffusers(args):
    """The same of its UNet2DModel, as its unconditional training example runs it: DDPM noise, AdamW, clip."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    model = UNet2DModel(sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
                        block_out_channels=(32, 64, 64), down_block_types=("DownBlock2D",) * 3,
                        up_block_types=("UpBlock2D",) * 3).to(args.device)
    scheduler, optimizer = DDPMScheduler(), torch.optim.AdamW(model.parameters(), 1e-4)
    x = torch.randn(BATCH, 1, 28, 28, device=args.device)

    def step(precision):
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (BATCH,), device=args.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.mse_loss(model(scheduler.add_noise(x, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def draw(precision):
        scheduler, now = DDIMScheduler(), x
        scheduler.set_timesteps(STEPS)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            for t in scheduler.timesteps:
                now = scheduler.step(model(now, t).sample, t, now).prev_sample
    return (model, *({p: lambda p=p: work(p) for p in PRECISIONS} for work in (step, draw)))


def denoising_diffusion_pytorch(args):
    """The same of its Unet and GaussianDiffusion, at the width whose MACs are nearest to ours; fp32 alone."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    goal = macs_of(ours(args)[0])
    nets = [Unet(dim=dim, dim_mults=(1, 2, 2), channels=1, flash_attn=False) for dim in range(8, 41, 8)]
    model = min(nets, key=lambda net: abs(macs_of(net) - goal)).to(args.device)
    whole = GaussianDiffusion(model, image_size=28, timesteps=1000, sampling_timesteps=STEPS,
                              objective="pred_noise").to(args.device)
    optimizer = torch.optim.Adam(whole.parameters(), 1e-4)
    x = torch.rand(BATCH, 1, 28, 28, device=args.device)

    def step():
        whole(x).backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def draw():
        with torch.inference_mode():
            whole.ddim_sample((BATCH, 1, 28, 28))
    return model, {"fp32": step}, {"fp32": draw}


def macs_of(model):
    """Multiply-accumulates of one 28x28 image, by torch's own counter."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 28, 28, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    return counter.get_total_flops() / 2


PEERS = (diffusers, denoising_diffusion_pytorch)


def versions():
    """{peer: version} of those that are installed."""
    found = {}
    for name in [peer.__name__.replace("_", "-") for peer in PEERS]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def step_rows(args):
    """Training steps and sampling against each peer that is here, per multiply-accumulate of each."""
    model, steps, draws = ours(args)
    for peer in PEERS:
        name = peer.__name__
        with contextlib.suppress(ImportError):  # where it is, it lets a torchvision load beside a CPU torch
            importlib.import_module("torchvision_stub")
        try:
            theirs, their_steps, their_draws = peer(args)
        except (ImportError, RuntimeError, OSError) as error:  # a broken neighbour of it raises the others
            print(f"not compared with {name}, which does not load ({str(error).splitlines()[0]}); to install "
                  f"it: pip install {name.replace('_', '-')}")
            continue
        weight = macs_of(model) / macs_of(theirs)
        for what, mine, other in (("training step", steps, their_steps),
                                  (f"{STEPS} DDIM steps", draws, their_draws)):
            for precision, fast in ((p, q) for p in other for q in mine if p == q[:4] or "comp" not in q):
                line = row(f"{what} of {BATCH}, ours {fast}", mine[fast], f"{name} {precision}, its time "
                           f"{weight:.2f} times: equal MACs", other[precision], args)
                yield [*line[:3], line[3] * weight, *(ratio * weight for ratio in line[4:7]), line[7]]


# --- the machine's limit, and the cost of masks

def limit_rows(args):
    """The rate of multiply-accumulates of a training step, three network evaluations, over a matmul's."""
    for preset, batch in (("mnist", 64), ("cifar", 64), ("paper", 16)):
        for precision in PRECISIONS:
            model, shape = network(preset, args)
            x = torch.randn(batch, *shape, device=args.device).contiguous(memory_format=torch.channels_last)
            macs = sum(d for d, _ in metrics.count_macs(
                model, x[:1], torch.zeros(1, dtype=torch.int64, device=args.device)).values())
            a = torch.randn(2048, 2048, device=args.device,
                            dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            line = row(f"{preset}, {precision}, rate of a training step of {batch}",
                       our_step(model, x, precision), "2048^3 matmul", lambda: a @ a, args)
            share = 3 * macs * batch / 2048 ** 3  # ratio of times -> share of the matmul's rate
            yield [*line[:4], *(ratio * share for ratio in line[4:7]), line[7]]


def cost_rows(args):
    """What masks add to a step, and one round's pruning and rewinding of the largest preset."""
    (model, shape), (masked, _) = network("mnist", args), network("mnist", args)
    hooks = mask_hooks(masked, prune_magnitude(masked, dense_masks(masked), 0.8))
    for p in masked.parameters():
        p.grad = torch.zeros_like(p)

    def keep():
        hooks["after_backward"](0, masked)
        hooks["after_step"](0, masked, None, None)
    step = our_step(model, torch.randn(BATCH, *shape, device=args.device), args.precision)
    yield row(f"mnist, what masks add to a step of {BATCH}", keep, "the step", step, args)
    big, _ = network("paper", args)
    state, dense = {k: v.clone() for k, v in big.state_dict().items()}, dense_masks(big)
    count = sum(p.numel() for p in prunable(big).values())
    yield row(f"paper, rank {count:,} weights, cut 20 %, rewind",
              lambda: rewind(big, prune_magnitude(big, dense, 0.2), state), "one copy of the weights",
              lambda: big.load_state_dict(state), args)


SECTIONS = dict(tickets=ticket_rows, steps=step_rows, limit=limit_rows, cost=cost_rows)


def main(argv=None):
    """The command line: time the sections named, print and write the table."""
    study, names = lth.Study("speed", __doc__), ", ".join(SECTIONS)
    add = study.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"of {names} (default: all)")
    add("--turns", type=positive_int, default=5, help="pairs behind a figure (default: 5)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    with study.arguments(argv) as args:
        if unknown := set(args.sections) - set(SECTIONS):
            study.error(f"no section {', '.join(sorted(unknown))}: choose from {names}")
        args.device, _ = pick_device(args.device)
        args.precision, _ = pick_precision("auto", args.device)
        rows, path = [], os.path.join(args.out, "_".join(["speed", *args.sections]))
        for name in args.sections or SECTIONS:
            for line in SECTIONS[name](args):
                rows.append([name, *line])
                print(f"{line[0]} | {line[1]:.4g} s | {line[2]} | {line[3]:.4g} s | {line[4]:.3g} "
                      f"[{line[5]:.3g}, {line[6]:.3g}]", flush=True)
            study.save(path, ["section", *HEADER], rows, args.device, precision=args.precision,
                       peers=versions())
    print(f"\n{lth.text_table(['section', *HEADER], rows)}\n\n{path}.csv, .json")


if __name__ == "__main__":
    main()
