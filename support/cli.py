"""Command lines: flags and their defaults, mistakes in one line, which device and precision to use.

Imports no torch until a device is asked for, so that `--help` and a mistyped flag answer at once.
"""
import argparse
import contextlib
import math
import os
import sys

DATASETS = {  # name -> ((channels, height, width), number of classes)
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}

# What each data set is trained with unless flags say otherwise, sized for two CPU cores and chosen
# on seeds that no table uses: python -m checks.defaults, results/defaults_*.csv. With v and min-SNR
# weights fid_domain of dense digits is 3.5 (3 seeds, 500 samples), with eps 10.6 (one seed). 25
# ancestral evaluations: one network of MNIST, 1,000 samples, 7.5; 50 evaluations 7.2, DPM++ 20 9.6.
USUAL = dict(prediction="v", weighting="min-snr", batch=32, lr=4e-3, beta2=0.95, ema=0.995,
             sampler="ddpm", nfe=25, samples=2000)
CIFAR = USUAL | dict(preset="cifar-small", steps=8000)
LARGE = USUAL | dict(preset="cifar", steps=4000, batch=64, lr=1e-3, beta2=0.999, ema=0.999)
DEFAULTS = {
    "digits": USUAL | dict(preset="tiny", steps=560, lr=9e-3, ema=0.99, samples=500),
    "mnist": USUAL | dict(preset="mnist", steps=2000),
    "fashion": USUAL | dict(preset="mnist", steps=2000),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
}
PAPER = dict(prediction="eps", weighting="plain")  # of --preset paper: 2006.11239, section 3.2
# Where --rounds is not 10: (rounds, final sparsity). CIFAR: two hours on two cores (estimate).
ROUNDS = {"digits": (2, 0.9), "cifar10": (4, 0.9), "cifar100": (4, 0.9)}
DEMO = dict(rounds=1, final_sparsity=0.8, controls=["reinit"], samples=200, out="runs/demo")
SCORE = "normalized"  # of --scope global: |w| empties layers that start at zero (pilots, as above)
RESCALED = "normalized", "lamp"  # scores that order a layer as magnitude does
SAMPLERS = "ddpm", "ddim", "dpm"
SAMPLE = 5  # bytes a pixel of a sample: its float32 noise and its uint8 result


class Mistake(ValueError):
    """Something a user typed or named that cannot work: shown in one line, with exit code 2."""


class OutOfMemory(RuntimeError):
    """A phase of the run that did not fit into memory; the message names its flag."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text; takes whole flag names only."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (flags: --help)\n")


@contextlib.contextmanager
def one_line(parser, out=None):
    """End whatever a user can mend in one line and an exit code; bars in a log become lines.

    2: a mistake. 1: a run that diverged or did not fit into memory. 130: Ctrl-C.
    out: the folder that keeps finished work, for a run that can be resumed.
    """
    from support import screen  # here, so that this file alone will do for the flags
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a character must not end a run
        sys.stdout.reconfigure(errors="replace")
    kept = f" Finished work is kept in {out}." if out else ""
    try:
        with screen.lines():
            yield
    except BrokenPipeError:  # the reader of `| head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        again = " The same command goes on from here." if out else ""
        parser.exit(1, f"stdout was closed.{kept}{again}\n")
    except (OSError, Mistake) as error:
        parser.error(str(error))
    except (FloatingPointError, OutOfMemory) as error:
        parser.exit(1, f"{error}.{kept}\n")
    except KeyboardInterrupt:
        again = " The same command goes on from here." if out else ""
        parser.exit(130, f"\nstopped.{kept}{again}\n")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "lower --batch or --samples, or choose a smaller --preset"
        parser.exit(1, f"out of memory ({first_line(error)}): {hint}.{kept}\n")


def first_line(error):
    """The first line of an error's message, at most 160 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def is_out_of_memory(error):
    """Whether an error says that memory ran out, whichever library raised it."""
    words = "out of memory", "can't allocate memory", "not enough memory", "Unable to allocate"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def memory_for(phase, flags):
    """Turn running out of memory in this block into OutOfMemory that names the phase's flags."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise OutOfMemory(f"out of memory while {phase} ({reason}): {flags}") from error


def training_memory():
    """memory_for a training run."""
    return memory_for("training", "lower --batch, or choose a smaller --preset")


def sampling_memory():
    """memory_for drawing samples."""
    return memory_for("sampling", "lower --samples, or choose a smaller --preset")


def refuse(flag, why):
    """Raise the Mistake that names a flag."""
    raise Mistake(f"argument --{flag}: {why}")


def physical_memory():
    """Bytes of memory this machine has, or infinity where it does not say."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


# --------------------------------------------------------------------------- types of flags

def checked(kind, fits, what):
    """A flag type for argparse: kind(text), where that exists and fits."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return convert


positive_int = checked(int, lambda n: n >= 1, "a positive whole number")
natural = checked(int, lambda n: n >= 0, "a whole number, 0 or more")
positive_float = checked(float, lambda x: 0 < x < math.inf, "a positive number")
fraction = checked(float, lambda x: 0 <= x < 1, "in [0, 1)")
# Above 999 the seeds of masks and of batches would meet.
seed_number = checked(int, lambda n: 0 <= n <= 999, "a whole number from 0 to 999")
# With 600 evaluations the chain would begin at t = 599.
evaluations = checked(int, lambda n: 1 <= n <= 1000 and 1000 // n * n >= 950,
                      "a number that 1000 steps can be spread over: choose a divisor of 1000")


def path(text):
    """A path as users write it: ~ and $VARIABLES are expanded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expandvars(os.path.expanduser(text))


def once(values):
    """The values of a list flag, each once, in the order given."""
    return list(dict.fromkeys(values))


# --------------------------------------------------------------------------- shared flags

def add_data_flags(parser):
    """Where data comes from and what computes."""
    parser.add_argument("--data-dir", type=path, default=os.environ.get("LTH_DATA") or "data",
                        help="folder of the data sets (default: $LTH_DATA or data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")


def add_training_flags(parser, presets):
    """What is trained, on what, for how long; None stands for the data set's default."""
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), help="default: digits, which are drawn on the spot")
    add("--images", metavar="PATH", type=path,
        help="your own instead: a folder of PNG and JPEG files (subfolders: classes), or an .npz "
             "of uint8 [N, H, W, C]")
    add("--image-size", metavar="N", type=positive_int,
        help="pixels that --images are resized to (default: as they are, at most 64)")
    add("--preset", choices=presets, help="which U-Net (default: by data set)")
    add("--steps", type=positive_int, help="training steps of a dense run")
    add("--batch", type=positive_int, help="images per step")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine",
        help="after the warm-up (default: cosine)")
    add("--warmup", type=natural, metavar="STEPS",
        help="steps in which the rate rises to its peak (default: a twentieth of --steps)")
    add("--optimizer", choices=["adam", "sgd"], default="adam", help="default: adam")
    add("--beta2", type=fraction, help="decay of Adam's second moment")
    add("--ema", type=fraction, help="decay of the averaged weights, which are sampled")
    add("--schedule", choices=["linear", "cosine"], default="linear",
        help="noise schedule (default: linear)")
    add("--prediction", choices=["eps", "v"],
        help="what the network predicts (default: by data set; eps with --preset paper)")
    add("--weighting", choices=["plain", "min-snr"],
        help="of the loss by noise level (default: by data set; plain with --preset paper)")
    add("--samples", type=positive_int, metavar="N", help="images drawn per measurement")
    add("--sampler", choices=SAMPLERS, help="default: by data set")
    add("--nfe", type=evaluations, help="network evaluations per sample (default: by data set)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 where the hardware has units for it")
    add("--out", type=path, help="folder of the results (default: runs/...)")
    add_data_flags(parser)


def add_pruning_flags(parser, controls, scores):
    """How tickets are found, what they are compared with, and how often."""
    add = parser.add_argument
    add("--demo", action="store_true",
        help="a first look: drawn digits, one ticket of 80 %% sparsity, reinit")
    add("--rounds", type=positive_int,
        help="prune-and-retrain rounds (default: 10; on digits 2 and on CIFAR 4, to 90 %% "
             "sparsity)")
    add("--prune-rate", type=fraction,
        help="share of the live weights pruned per round (default: 0.2)")
    add("--final-sparsity", type=fraction,
        help="choose the rate instead so that the last round ends here")
    add("--scope", choices=["global", "layer", "ramp", "erk"], default="global",
        help="rank weights over the network (global), within each layer (layer), with rates that "
             "grow with depth (ramp) or follow layer shape (erk)")
    add("--score", choices=scores,
        help="what is ranked: |w| (magnitude), |w| over its layer's root mean square (normalized), "
             f"LAMP, or a score of one's own (default: {SCORE}; within layers, where the first "
             "three rank alike: magnitude)")
    add("--controls", nargs="*", choices=controls,
        help="compare tickets with: the same mask on new weights (reinit), a random mask, "
             "fine-tuning, a narrower dense network (small) (default: reinit random; without a "
             "name after it: none)")
    add("--dense-from", type=path, metavar="runs/NAME",
        help="take over the dense networks of a run that differs in how it prunes only")
    add("--control-rounds", nargs="+", type=positive_int, metavar="R",
        help="rounds at which controls are trained (default: the last, and the one whose sparsity "
             "is nearest two thirds)")
    add("--rewind", type=fraction, default=0.05,
        help="go back to this share of the steps; 0: the original hypothesis (default: 0.05)")
    add("--inception", metavar="PATH", type=path,
        help="the FID checkpoint, if not in the data folder")
    add("--workers", type=positive_int, default=1, metavar="N",
        help="processes that share the training runs; the same command started again, also on "
             "another machine with the same --out, shares them too (default: 1)")
    add("--seeds", nargs="+", type=seed_number, default=[0],
        help="three or more give a verdict (default: 0)")


def parse(parser, argv, name, fixed, check):
    """The flags of a pruning run, completed and checked. name: of a method, for its folder. fixed:
    {flag: the only value that the method takes}. check(args): more checks."""
    parser.set_defaults(**fixed)
    parser.argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    with one_line(parser):
        for flag, value in fixed.items():
            if getattr(args, flag) != value:
                refuse(flag, f"{parser.prog} fixes it at {value}")
        complete(args, name)
        check(args)
    return args


def complete(args, name=""):
    """Check and complete the flags of a pruning run; name: of a method, for its folder."""
    for flag, value in DEMO.items() if args.demo else ():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    fill_defaults(args)
    settle_rounds(args)
    if args.images:
        from support import own
        own.check_measurable(args)
    if args.score is None:
        args.score = SCORE if args.scope == "global" else "magnitude"
    elif args.score in RESCALED and args.scope != "global":
        refuse("score", f"{args.score} ranks as magnitude does within layers; it needs --scope "
               "global")
    if round(args.rewind * args.steps) >= args.steps:
        refuse("rewind", f"{args.rewind} of {args.steps} steps leaves none to train")
    if args.samples < 4:
        refuse("samples", "precision and recall use 3 neighbours and need at least 4 samples")
    args.out = args.out or f"runs/{folder_name(args)}{name}"
    check_memory(args)


def settle_rounds(args):
    """Rounds, the rate of each, and which of them have which controls."""
    if [args.rounds, args.prune_rate, args.final_sparsity] == [None] * 3:
        args.rounds, args.final_sparsity = ROUNDS.get(args.dataset, (10, None))
    args.rounds = args.rounds or 10
    if args.final_sparsity is not None:
        if args.prune_rate is not None:
            refuse("prune-rate", "--final-sparsity sets it; give one of them")
        args.prune_rate = 1 - (1 - args.final_sparsity) ** (1 / args.rounds)
    elif args.prune_rate is None:
        args.prune_rate = 0.2  # Frankle and Carbin 2019, 1803.03635, section 3
    if args.prune_rate <= 0:
        flag = "prune-rate" if args.final_sparsity is None else "final-sparsity"
        refuse(flag, "0 prunes nothing")
    args.seeds = once(args.seeds)
    args.controls = once(["reinit", "random"] if args.controls is None else args.controls)
    if args.control_rounds is None:
        left = {r: (1 - args.prune_rate) ** r for r in range(1, args.rounds + 1)}
        args.control_rounds = min(left, key=lambda r: abs(left[r] - 1 / 3)), args.rounds
    args.control_rounds = sorted(set(args.control_rounds))
    if args.control_rounds[-1] > args.rounds:
        refuse("control-rounds", f"{args.control_rounds[-1]} is beyond --rounds {args.rounds}")


def fill_defaults(args):
    """Replace every None that DEFAULTS knows by the data set's value; read --images."""
    if args.images is None and args.image_size is not None:
        refuse("image-size", "it is for --images")
    if args.images is not None and args.dataset is not None:
        refuse("images", "not together with --dataset: give one of them")
    if args.images is None:
        args.dataset = args.dataset or "digits"
        usual = DEFAULTS[args.dataset]
    else:
        from support import own
        usual = own.settle(args)
    if usual["preset"] == "cifar-small" and wants_large(args):
        usual = usual | {name: LARGE[name] for name in LARGE if usual[name] == CIFAR[name]}
    paper = PAPER if args.preset == "paper" else {}
    for name, value in (usual | paper).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup is None:
        args.warmup = max(1, args.steps // 20)


def wants_large(args):
    """Whether images as large as CIFAR-10's are to be learned by the network for GPUs: where there
    is one, or where the preset asks for it."""
    if args.preset is not None:
        return args.preset in ("cifar", "paper")
    import torch
    return args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()


def folder_name(args):
    """The data set's name as that of a folder."""
    if args.images is None:
        return args.dataset
    from support import own
    return own.folder_of(args.dataset)


def shape_of(args):
    """(channels, height, width) of the images."""
    if getattr(args, "images", None) is None:  # older runs have no such flag
        return DATASETS[args.dataset][0]
    from support import own
    return tuple(own.of(args).train.shape[1:])


def training_options(args):
    """Keyword arguments of ddpm.train that flags decide."""
    return dict(steps=args.steps, batch=args.batch, lr=args.lr, lr_schedule=args.lr_schedule,
                optimizer=args.optimizer, beta2=args.beta2, ema_decay=args.ema,
                flip=args.dataset.startswith("cifar"), precision=args.precision,
                warmup=args.warmup)


def check_model(args, ddpm):
    """Refuse a sampling grid or a U-Net that does not fit; return the U-Net, without memory. ddpm:
    the module of that name."""
    import torch
    channels, size, _ = shape_of(args)
    try:
        flag = "nfe"
        ddpm.sampling_times(ddpm.Diffusion(1000, args.schedule), args.nfe)
        flag = f"preset: {args.preset} does not fit {args.dataset}"
        with torch.device("meta"):
            return ddpm.UNet(channels, image_size=size, **ddpm.PRESETS[args.preset])
    except ValueError as error:
        refuse(flag, error)


def check_memory(args):
    """Mistake for a batch or samples whose pixels alone exceed this machine's memory."""
    pixels = math.prod(shape_of(args))
    check_fits("samples", args.samples, pixels, SAMPLE)
    check_fits("batch", args.batch, pixels, 12)  # float32 x_0, noise and x_t of each image


def check_fits(flag, count, pixels, size):
    """Mistake for a count of images, of `size` bytes a pixel, beyond this machine's memory."""
    memory, need = physical_memory(), count * pixels * size
    if need > memory:
        refuse(flag, f"{count:,} images of {pixels} values need {need / 2**30:,.0f} GiB, this "
               f"machine has {memory / 2**30:,.0f}")


# --------------------------------------------------------------------------- the machine

def pick_device(name):
    """(torch.device, reason). Mistake when the device asked for does not exist here."""
    import torch
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        kind = next(kind for kind, is_there in there.items() if is_there)
        n = torch.get_num_threads()
        threads = f"{n} thread{'s' * (n > 1)}"
        found = torch.cuda.get_device_name() if kind == "cuda" else threads
        return torch.device(kind), f"best available: {found}"
    if not there.get(name.split(":")[0]):
        found = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise Mistake(f"argument --device: {name} is not here; this machine has {found}")
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:  # cuda:9 of two
        raise Mistake(f"argument --device: {name}: {first_line(error)}") from error
    return torch.device(name), "as asked"


def settle_device(args):
    """Set args.precision to what will be used; return {"device": both, with the reasons}."""
    device, why = pick_device(args.device)
    args.precision, why_precision = pick_precision(args.precision, device)
    if device.type == "cuda" and args.precision == "fp32":
        import torch
        torch.backends.cudnn.allow_tf32 = False  # it would round what convolutions read to 10 bits
    return dict(device=f"{device} ({why}), {args.precision} ({why_precision})")


def cpu_capabilities():
    """What torch knows of this CPU; older versions (2.6) do not say, which counts as nothing."""
    import torch
    return getattr(torch.cpu, "get_capabilities", dict)()


def pick_precision(name, device):
    """("fp32" or "bf16", reason); auto takes bf16 where the hardware multiplies matrices in it."""
    import torch
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "this GPU has bf16 units") if has else ("fp32", "no bf16 units here")
    if device.type == "cpu":
        known = cpu_capabilities()
        has = [unit for unit in ("amx_bf16", "avx512_bf16") if known.get(unit)]
        return ("bf16", f"this CPU has {has[0]}") if has else ("fp32", "no bf16 units found")
    return "fp32", f"{device.type} trains in fp32 here"
