"""How fast is it: against other packages, against the machine's limit, with tickets, as sizes grow?

    python -m checks.speed tickets    # sampling with channel tickets and with masked networks
    python -m checks.speed peers      # diffusers, denoising-diffusion-pytorch, pytorch-fid
    python -m checks.speed limit      # the share of a matmul's rate that a training step reaches
    python -m checks.speed cost       # masks, pruning and rewinding; what torch.compile gains
    python -m checks.speed            # these four: five minutes
    python -m checks.speed scaling    # exponents of seconds and memory over size: ten minutes

What is compared is timed in turns within one process, A, B, A, B, so that a slow minute slows both.
A ratio is the median of --turns ratios, with the smallest and the largest. Peers that are not
installed are named and left out. Seconds belong to the machine named in the .json file; ratios
travel better, not perfectly.

What would change our mind about costs that grow in proportion: an exponent above 1 by more than
twice its standard error.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m checks.speed")

import contextlib
import copy
import importlib
import io
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lth_diffusion as lth
import metrics
from ddpm import LAST, Diffusion, denoiser, sample, to_uint8, train
from methods.channels import dense_channels, prune_channels, shrink
from prune import apply_masks, dense_masks, mask_hooks, prunable, prune_magnitude, rewind
from studies.common import Study
from support import charts, cli, data, runs
from unet import PRESETS, UNet

HEADER = ["section", "what", "seconds", "against", "its seconds", "ratio",
          "smallest", "largest", "turns"]
BATCH, STEPS = 64, 10  # of the comparison with peers
PRECISIONS = "fp32", "bf16"


def row(args, what, ours, against, theirs, factor=1.0):
    """Values of HEADER: how many times as fast ours() is as theirs(), whose seconds are scaled."""
    times = runs.seconds_in_turns((ours, theirs), args.turns, device=args.device)
    times[:, 1] *= factor
    ratios = times[:, 1] / times[:, 0]
    mine, other = np.median(times, axis=0)
    middle, low, high = np.median(ratios), ratios.min(), ratios.max()
    print(f"{what}: {mine:.4g} s; {against}: {other:.4g} s; ratio {middle:.3g} "
          f"[{low:.3g}, {high:.3g}]", flush=True)
    return [what, mine, against, other, middle, low, high, args.turns]


def network(preset, batch, args, **config):
    """(U-Net of a preset, also random where it starts at zero; images x; time steps t)."""
    channels, side = (1, 28) if preset == "mnist" else (3, 32)
    torch.manual_seed(0)
    config = PRESETS[preset] | config
    model = UNet(channels, image_size=side, **config).to(args.device)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, 0.0, 0.02)
    x = torch.randn(batch, channels, side, side, device=args.device)
    t = torch.full((batch,), 500, device=args.device)
    return model.to(memory_format=LAST), x.contiguous(memory_format=LAST), t


def macs_of(model, x):
    """Multiply-accumulates of one image like those of x [N, C, H, W], by torch's counter."""
    t = torch.zeros(1, dtype=torch.int64, device=x.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1], t)
    return counter.get_total_flops() / 2


# --------------------------------------------------------------------------- tickets

def ticket_rows(args):
    """Network evaluations of channel tickets, and of masked networks, against the dense one."""
    for preset, batch, precision in (
            ("paper", 8, "fp32"), ("paper", 8, "bf16"), ("mnist", 256, "bf16")):
        model, x, t = network(preset, batch, args)
        dense, name = denoiser(model, precision), f"{preset} in {precision}"

        def against_dense(other, what):
            predict = denoiser(other, precision)
            return row(args, f"{name}, {what}, evaluation of {batch}",
                       lambda: predict(x, t), "dense", lambda: dense(x, t))
        for share in 0.75, 0.875:
            channels = dense_channels(model)
            small = shrink(model, prune_channels(model, channels, share, "layer"))
            small = small.to(memory_format=LAST)
            fewer = macs_of(model, x) / macs_of(small, x)
            yield against_dense(small, f"{100 * share:g} % of hidden channels cut "
                                f"({fewer:.2f} times fewer MACs)")
        masked, _, _ = network(preset, batch, args)
        masks = prune_magnitude(masked, dense_masks(masked), 0.9)
        apply_masks(masked, masks)
        yield against_dense(masked, "90 % of weights masked")


# --------------------------------------------------------------------------- peers

class Package(NamedTuple):
    """How a package trains and samples: loss() of a batch, draw(precision)."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: object
    draw: object

    def step(self, precision):
        """One training step: loss, gradients, clip, update."""
        device, bf16 = next(self.model.parameters()).device.type, precision == "bf16"
        self.model.train()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def ours(x, model):
    """This repository, without the extras of ddpm.train."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    diffusion = Diffusion()

    def loss():
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        return diffusion.loss(model, x, t, torch.randn_like(x))

    def draw(precision):
        predict = denoiser(model, precision)
        sample(predict, diffusion, x, "ddim", STEPS)
    return Package(model, optimizer, loss, draw)


def diffusers(x):
    """As in its example of unconditional training."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    model = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1,
        norm_num_groups=8, block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    noising, scheduler = DDPMScheduler(), DDIMScheduler()

    def loss():
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        x_t = noising.add_noise(x, noise, t)
        return F.mse_loss(model(x_t, t).sample, noise)

    @torch.no_grad()
    def draw(precision):
        scheduler.set_timesteps(STEPS)
        now, bf16 = x, precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            for t in scheduler.timesteps:
                eps = model(now, t).sample
                now = scheduler.step(eps, t, now).prev_sample
    return Package(model, optimizer, loss, draw)


def denoising_diffusion_pytorch(x):
    """At the width whose multiply-accumulates come nearest to ours."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    model = Unet(dim=24, dim_mults=(1, 2, 2), channels=1, flash_attn=False)
    whole = GaussianDiffusion(
        model, image_size=28, timesteps=1000, sampling_timesteps=STEPS,
        objective="pred_noise").to(x.device)
    optimizer = torch.optim.Adam(whole.parameters(), 1e-4)
    images = torch.rand_like(x)  # it rescales to [-1, 1] itself

    @torch.inference_mode()
    def draw(precision):
        bf16 = precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            whole.ddim_sample(x.shape)
    return Package(model, optimizer, lambda: whole(images), draw)


def peer_rows(args):
    """Training, sampling and the Frechet distance against each package that is installed."""
    x = torch.randn(BATCH, 1, 28, 28, device=args.device)
    torch.manual_seed(0)
    model = UNet(1, base=32, mults=(1, 2, 2), blocks=1, image_size=28)
    model = model.to(args.device, memory_format=LAST)
    mine = ours(x.contiguous(memory_format=LAST), model)
    for peer in diffusers, denoising_diffusion_pytorch:
        with installed(peer.__name__.replace("_", "-")):
            theirs = peer(x)
            scale = macs_of(mine.model, x) / macs_of(theirs.model, x)
            for precision in PRECISIONS:
                against = f"{peer.__name__}, scaled by {scale:.2f} to equal MACs"
                yield row(args, f"training step of {BATCH} in {precision}",
                          lambda: mine.step(precision), against,
                          lambda: theirs.step(precision), scale)
                yield row(args, f"{STEPS} DDIM steps of {BATCH} in {precision}",
                          lambda: mine.draw(precision), against,
                          lambda: theirs.draw(precision), scale)
    with installed("pytorch-fid"):
        from pytorch_fid.fid_score import calculate_frechet_distance
        feats = torch.randn(2, 3000, 2048, dtype=torch.float64)
        moments = [m.numpy() for part in feats for m in metrics.statistics(part)]
        yield row(args, "Frechet distance, D=2048, n=3000",
                  lambda: metrics.frechet_distance(*moments), "pytorch-fid",
                  lambda: calculate_frechet_distance(*moments))


@contextlib.contextmanager
def installed(name):
    """Leave the block out, with a line, where a package does not load."""
    with contextlib.suppress(ImportError):
        # Where there is one, it lets torchvision load beside a torch without CUDA.
        importlib.import_module("torchvision_stub")
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        print(f"not compared with {name} ({reason}): pip install {name}")


# --------------------------------------------------------------------------- limit and cost

def limit_rows(args):
    """The rate of multiply-accumulates in a training step, as a share of a matmul's."""
    for preset, batch in ("mnist", 64), ("cifar", 64), ("paper", 16):
        for precision in PRECISIONS:
            model, x, _ = network(preset, batch, args)
            mine = ours(x, model)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            a = torch.randn(2048, 2048, device=args.device, dtype=dtype)
            macs = 3 * batch * macs_of(model, x)  # forward, and twice backward
            yield row(args, f"{preset} in {precision}, training step of {batch}",
                      lambda: mine.step(precision),
                      "as many MACs at the rate of a 2048^3 matmul",
                      lambda: a @ a, macs / 2048 ** 3)


def cost_rows(args):
    """What masks add to a step, one round's pruning and rewinding, what torch.compile gains."""
    model, x, t = network("mnist", BATCH, args)
    mine, masked = ours(x, model), copy.deepcopy(model)
    masks = prune_magnitude(masked, dense_masks(masked), 0.8)
    hooks = mask_hooks(masked, masks)
    for p in masked.parameters():
        p.grad = torch.zeros_like(p)

    def keep():
        hooks["after_backward"](0, masked)
        hooks["after_step"](0, masked, None, None)
    yield row(args, f"mnist, what masks add to a step of {BATCH}", keep,
              "the step", lambda: mine.step(args.precision))
    if shutil.which("c++"):  # which it needs on a CPU
        eager, fast = denoiser(model), denoiser(torch.compile(model))
        yield row(args, f"mnist in fp32, compiled, evaluation of {BATCH}",
                  lambda: fast(x, t), "not compiled", lambda: eager(x, t))
    big, _, _ = network("paper", 1, args)
    dense, state = dense_masks(big), copy.deepcopy(big.state_dict())
    n = sum(p.numel() for p in prunable(big).values())
    yield row(args, f"paper, rank {n:,} weights, cut 20 %, rewind",
              lambda: rewind(big, prune_magnitude(big, dense, 0.2), state),
              "one copy of the weights", lambda: big.load_state_dict(state))


# --------------------------------------------------------------------------- scaling

SIZES = {  # what grows
    "parameters": (16, 32, 64, 128),  # width of the preset mnist
    "images": (500, 1000, 2000, 4000, 8000),
    "rounds": (1, 2, 4, 8)}
SMALL = ("--steps 20 --batch 8 --samples 16 --nfe 5 --final-sparsity 0.9 "
         "--controls --rounds").split()


def of_parameters(base, args):
    """(size, {what: work}) of a width: training, evaluating, pruning and rewinding."""
    model, x, t = network("mnist", 64, args, base=base)
    images, diffusion = to_uint8(x), Diffusion()
    predict = denoiser(model, args.precision)
    dense, state = dense_masks(model), copy.deepcopy(model.state_dict())

    def steps():
        train(model, diffusion, images, steps=2, batch=64,
              precision=args.precision)

    def prune():
        rewind(model, prune_magnitude(model, dense, 0.2), state)
    size = sum(p.numel() for p in prunable(model).values())
    return size, {"two training steps of 64": steps,
                  "one evaluation of 64": lambda: predict(x, t),
                  "prune and rewind": prune}


def of_images(n, args):
    """(size, {what: work}): quality of n images."""
    classifier = metrics.load_classifier("digits").to(args.device)
    images, _ = data.load_images("digits", args.data_dir)
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(8000, 64, generator=generator)
    reference = metrics.statistics(feats)

    def fid():
        metrics.fid(metrics.features(classifier, images[:n]), reference)

    def precision_recall():
        metrics.precision_recall(feats[:n], feats[-n:])
    return n, {"features and FID": fid, "precision and recall": precision_recall}


def of_rounds(rounds, args):
    """(size, {what: work}): a whole run, from the first step to the last picture."""
    def work():
        with tempfile.TemporaryDirectory() as out, \
                contextlib.redirect_stdout(io.StringIO()):
            flags = ["--device", str(args.device), "--data-dir", args.data_dir,
                     "--out", out]
            lth.run(*lth.parse_args([*SMALL, str(rounds), *flags]))
    return rounds, {"a small run": work}


GROWTH = dict(parameters=of_parameters, images=of_images, rounds=of_rounds)


def peak(kind, size, what, args):
    """MB of one work at its peak, above what the process held before."""
    work = GROWTH[kind](size, args)[1][what]
    with runs.PeakMemory(args.device) as before:
        pass
    with runs.PeakMemory(args.device) as most:
        work()
    return (most.bytes - before.bytes) / 1e6 if most.bytes else np.nan


def grow(kind, args):
    """[what, kind, size, median seconds, peak MB] of each work at each size."""
    found = {size: GROWTH[kind](size, args) for size in SIZES[kind]}
    places = [(size, what) for size, (_, works) in found.items() for what in works]
    works = [found[size][1][what] for size, what in places]
    times = runs.seconds_in_turns(works, args.turns, device=args.device)
    table, spawn = [], multiprocessing.get_context("spawn")
    # A process per measurement: an allocator keeps what another size took.
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        for (size, what), seconds in zip(places, np.median(times, axis=0)):
            memory = fresh.submit(peak, kind, size, what, args).result()
            table.append([what, kind, found[size][0], float(seconds), float(memory)])
    return table


def exponents(table):
    """[what, kind, slope of log seconds over log size, its error, the same of memory]."""
    lines = {}
    for what, kind, *values in table:
        lines.setdefault((what, kind), []).append(values)
    found = []
    for key, values in lines.items():
        size, *costs = np.log(np.maximum(values, 1e-9)).T
        line = list(key)
        for cost in costs:
            fit = stats.linregress(size, cost)
            line += [float(fit.slope), float(fit.stderr)]
        found.append(line)
    return found


def scaling(study, args):
    """Measure how costs grow; write scaling.csv and .json, print the exponents."""
    header = ["what", "grows with", "size", "seconds", "peak MB"]
    table, path = [], f"{args.out}/scaling"
    for kind in GROWTH:
        table += grow(kind, args)
    found = exponents(table)
    study.save(path, header, table, args.device, turns=args.turns,
               precision=args.precision, exponents=found)
    names = ["what", "grows with", "exponent of seconds", "standard error",
             "of memory", "standard error"]
    print(charts.text_table(header, table), charts.text_table(names, found),
          f"{path}.csv, .json", sep="\n\n")


# --------------------------------------------------------------------------- command line

ROWS = dict(tickets=ticket_rows, peers=peer_rows, limit=limit_rows, cost=cost_rows)
LONG = dict(scaling=scaling)


def main(argv=None):
    """The command line."""
    study, names = Study("checks.speed", __doc__), [*ROWS, *LONG]
    add = study.add_argument
    add("sections", nargs="*", metavar="SECTION",
        help=f"{', '.join(names)} (default: the first four)")
    add("--turns", type=cli.positive_int, default=5,
        help="measurements per value (default: 5)")
    cli.add_data_flags(study)
    with study.arguments(argv) as args:
        for name in args.sections:
            if name not in names:
                raise cli.Mistake(f"no section {name}: choose from {', '.join(names)}")
        args.device, _ = cli.pick_device(args.device)
        args.precision, _ = cli.pick_precision("auto", args.device)
        path = "_".join([f"{args.out}/speed", *(n for n in args.sections if n in ROWS)])
        rows = []
        for name in args.sections or ROWS:
            if name in LONG:
                LONG[name](study, args)
                continue
            for values in ROWS[name](args):
                rows.append([name, *values])
            study.save(path, HEADER, rows, args.device, precision=args.precision)
        if rows:
            print(charts.text_table(HEADER, rows), f"{path}.csv, .json", sep="\n\n")


if __name__ == "__main__":
    main()
