"""Do tickets fit a network of another depth? Elastic tickets, stretched and squeezed.

    python -m studies.transfer_depth                           # drawn digits, three seeds
    python -m studies.transfer_depth --dataset mnist --steps 560

Elastic tickets (Chen et al., The Elastic Lottery Ticket Hypothesis, 2021, 2103.16547) for a U-Net:
from 2 residual blocks per level to 3 and to 1. A unit is a block on the way down with the block on
the way up that reads it through a skip connection. Units are copied, state at step k and mask
together, to places of equal shapes: B1 B1 B2 where there are more places than units, the first
units where there are fewer. All other layers are copied one to one, so the density changes a
little. Other flags go to lth_diffusion.py, which makes these runs.

Compared with the own ticket of that depth: the elastic ticket, its mask on a new initialisation,
and its weights under its mask shuffled within each layer. Intervals, margins and steps are
those of studies/transfer.py.

What would change our mind about 'the mask and its weights belong together': shuffled masks that do
as well as the elastic ticket's.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.transfer_depth")

import os

import lth_diffusion as lth
from studies.common import SMALL, Study, checkpoint, ticket_masks
from studies.transfer import compare, finish, shuffled
from support import cli
from unet import PRESETS, Downsample, ResBlock

SOURCE, TARGETS = 2, (3, 1)  # residual blocks per level
DEPTH_RUN = [*SMALL, "--controls"]  # no controls
SEEDS = ["--seeds", "10", "11", "12"]
ELASTIC = "elastic ticket"
SHUFFLED = "elastic weights, shuffled mask"


# --------------------------------------------------------------------------- elastic tickets

def partners(model):
    """{block on the way up: the layer whose output it reads as its skip}, as in UNet.forward."""
    stack, found = ["conv_in"], {}
    for name, module in model.named_modules():
        if name.startswith("down") and isinstance(module, (ResBlock, Downsample)):
            stack.append(name)
        if name.startswith("up") and isinstance(module, ResBlock):
            found[name] = stack.pop()
    return found


def units(model):
    """{(level, or layer that is read; shapes): [unit, ...]}, in the order of the way down.

    A unit is (block down, block up), or (block up,) where that reads no block's output.
    """
    modules, found = dict(model.named_modules()), {}
    for up, read in reversed(partners(model).items()):
        paired = isinstance(modules[read], ResBlock)
        unit, shapes = (read, up) if paired else (up,), []
        for name in unit:
            shapes += [tuple(p.shape) for p in modules[name].parameters()]
        place = read.split(".")[1] if paired else read
        found.setdefault((place, *shapes), []).append(unit)
    return found


def block_map(source, target):
    """{block of target: block of source}. ValueError where no unit of the source fits a place."""
    there, found = units(source), {}
    for key, places in units(target).items():
        if key not in there:
            place = " and ".join(places[0])
            raise ValueError(f"no unit of the source fits {place} of the target")
        n = len(there[key])
        for q, place in enumerate(places):
            unit = there[key][q * n // max(n, len(places))]
            found |= zip(place, unit)
    return found


def elastic(source, state, masks, target):
    """(training state, masks) of the network `target` from those of `source`, place by place:
    weights, their average and the optimizer's moments."""
    blocks, origin = block_map(source, target), {}
    for name, _ in target.named_parameters():
        block = ".".join(name.split(".")[:4])
        origin[name] = blocks.get(block, block) + name[len(block):]
    new = dict(state)
    for part in "model", "ema":
        new[part] = {name: state[part][old] for name, old in origin.items()}
    number = {name: i for i, (name, _) in enumerate(source.named_parameters())}
    moments, groups = state["optimizer"]["state"], state["optimizer"]["param_groups"]
    copied = {i: moments[number[old]] for i, old in enumerate(origin.values()) if moments}
    groups = [groups[0] | dict(params=list(range(len(origin))))]
    new["optimizer"] = dict(state=copied, param_groups=groups)
    new_masks = {name: masks[old].clone() for name, old in origin.items() if old in masks}
    return new, new_masks


# --------------------------------------------------------------------------- the study

def stretched(a, b, seed):
    """Networks of b's depth with the ticket of a."""
    model, old_masks = b.new_model(seed), ticket_masks(a, seed)
    state, masks = elastic(a.new_model(seed), checkpoint(a, seed), old_masks, model)
    yield ELASTIC, model, masks, state
    new = b.new_model(lth.REINIT_SEED + seed)
    yield "elastic mask, new init", new, masks, None
    moved = shuffled(masks, seed)
    yield SHUFFLED, b.new_model(seed), moved, state


def main(argv=None):
    """The command line; other flags go to lth_diffusion.py."""
    study = Study("studies.transfer_depth", __doc__)
    study.add_argument("--runs", default="runs", type=cli.path,
                       help="folder of the runs (default: runs)")
    with study.arguments(argv, ("--preset",)) as args:
        made, table = {}, []
        for blocks in SOURCE, *TARGETS:
            preset = f"tiny-{blocks}-blocks"
            PRESETS[preset] = PRESETS["tiny"] | dict(blocks=blocks)
            seeds = [] if any(flag.startswith("--seeds") for flag in args.rest) else SEEDS
            given = [*DEPTH_RUN, *seeds, *args.rest, "--preset", preset]
            flags, parser = lth.parse_args(given)
            seeds = list(flags.seeds)  # a run adds those of its folder
            name = f"transfer_depth_{flags.dataset}_{flags.steps}_{blocks}_blocks"
            flags.out = os.path.join(args.runs, name)
            made[blocks] = lth.run(flags, parser)
        for blocks in TARGETS:
            target, way = made[blocks], f"{SOURCE} blocks to {blocks}"
            for seed in seeds:
                networks = stretched(made[SOURCE], target, seed)
                table += compare(target, seed, way, networks)
        path = os.path.join(args.out, f"transfer_depth_{flags.dataset}")
        finish(study, path, table, ELASTIC, [(ELASTIC, SHUFFLED)], target)


if __name__ == "__main__":
    main()
