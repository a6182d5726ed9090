"""Channel tickets: structured pruning, which makes the network smaller and faster for real (after
Fang, Ma and Wang, Structural Pruning for Diffusion Models, 2023, 2305.10924).

    as iterative magnitude pruning, but whole GroupNorm groups of hidden channels go, and the
    network is rebuilt without them; the shrunk network equals the masked one

    python -m methods.channels --dataset mnist [--oneshot]
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m methods.channels")

import copy

import torch

import lth_diffusion as lth
from lth_diffusion import REINIT_SEED, Job
from methods import oneshot
from prune import dense_masks, keep_largest, live_counts, live_total
from unet import ResBlock, UNet

CUT = ("conv1.weight", "conv1.bias", "time.weight", "time.bias", "norm2.weight", "norm2.bias",
       "conv2.weight")  # the parts of a block that hidden channels pass through


def dense_channels(model):
    """{block name: bool (hidden,)}: all channels between conv1 and conv2 of each residual block."""
    return {name: torch.ones(block.conv1.out_channels, dtype=torch.bool)
            for name, block in model.named_modules() if isinstance(block, ResBlock)}


def channel_scores(block):
    """Root mean square of the weights of each GroupNorm group of hidden channels, (groups,):
    conv1's rows and conv2's columns. A mean, so that blocks of all widths rank together."""
    groups = block.norm2.num_groups
    rows = block.conv1.weight.detach().pow(2).reshape(groups, -1)  # (groups, size*in*9)
    columns = block.conv2.weight.detach().transpose(0, 1).pow(2)
    columns = columns.reshape(groups, -1)  # (groups, size*out*9)
    return torch.cat([rows, columns], dim=1).mean(1).sqrt()


def prune_channels(model, channels, fraction, scope="global"):
    """New channel masks without the weakest round(fraction * live) groups, of the network or, with
    scope "layer", of each block; every block keeps one.

    Whole groups only: norm2 of the shrunk block then has fewer groups of the same size and equals
    the masked one. ValueError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1)")
    blocks, scores, masks, size = dict(model.named_modules()), {}, {}, {}
    for name, mask in channels.items():
        scores[name] = channel_scores(blocks[name]).cpu()
        size[name] = len(mask) // len(scores[name])
        masks[name] = mask.view(-1, size[name])[:, 0]
    live = live_counts(masks)
    cut = {name: round(fraction * n) for name, n in live.items()}
    if scope == "global":
        cut, ranked = dict.fromkeys(masks, 0), []
        for name, mask in masks.items():  # each block's best group is never pruned
            ranked += [(score, name) for score in scores[name][mask].sort().values[:-1].tolist()]
        for _, name in sorted(ranked)[:round(fraction * sum(live.values()))]:
            cut[name] += 1
    kept = keep_largest(scores, masks, {name: max(1, n - cut[name]) for name, n in live.items()})
    return {name: mask.repeat_interleave(size[name]) for name, mask in kept.items()}


def random_channels(channels, model, generator):
    """The control: as many groups live in every block, chosen at random."""
    blocks, new = dict(model.named_modules()), {}
    for name, mask in channels.items():
        groups = blocks[name].norm2.num_groups
        order = torch.randperm(groups, generator=generator)
        new[name] = mask.view(groups, -1)[order].flatten()
    return new


def inside(channels, left):
    """Masks `left` of the network that `channels` left, as masks of the dense network."""
    found = {}
    for block, old in channels.items():
        found[block] = old.clone()
        found[block][old] = left[block]
    return found


def shrink(model, channels):
    """A smaller UNet without the pruned hidden channels; it computes what the masked one does.

    The residual stream, skips and attention keep their widths, since every block of a level writes
    into the same stream; the control `small`, a narrower network, shrinks those too.
    """
    hidden = {name: int(mask.sum()) for name, mask in channels.items()}
    device = next(model.parameters()).device
    small, state = UNet(**{**model.config, "hidden": hidden}).to(device), model.state_dict()
    for block, mask in channels.items():
        index = mask.nonzero().flatten().to(device)
        for part in CUT:
            name, axis = f"{block}.{part}", int(part == "conv2.weight")  # conv2 reads them
            state[name] = state[name].index_select(axis, index)
    small.load_state_dict(state)
    return small


def shrink_state(model, channels, state):
    """A training state of `model` (see ddpm.capture), cut as shrink cuts the network: weights,
    their average, and the optimizer's moments. The counterpart of prune.rewind."""
    def cut(tensors):
        whole = copy.deepcopy(model)
        whole.load_state_dict(tensors)
        return shrink(whole, channels).state_dict()

    back = state | dict(model=cut(state["model"]), ema=cut(state["ema"]))
    old = state["optimizer"]
    if old is None or not old["state"]:
        return back
    names = [name for name, _ in model.named_parameters()]  # an optimizer numbers them so
    new = {i: dict(one) for i, one in old["state"].items()}
    for key, value in old["state"][0].items():
        if value.dim():  # a moment of every weight, which is cut as if it were the weight
            moments = {name: old["state"][i][key] for i, name in enumerate(names)}
            moments = cut(model.state_dict() | moments)
            for i, name in enumerate(names):
                new[i][key] = moments[name]
    return back | dict(optimizer=old | dict(state=new))


def find_tickets(args, exp):
    """Train, prune channels, rewind, repeat; with --oneshot, one cut per control round."""
    for seed in args.seeds:
        dense = last = exp.train_dense(seed)
        channels = every = dense_channels(dense.model)
        theta = exp.new_model(seed)
        theta.load_state_dict(dense.checkpoint["model"])
        for r in args.control_rounds if args.oneshot else range(1, args.rounds + 1):
            job, fraction, before = Job(seed, r, "ticket"), args.prune_rate, channels
            if args.oneshot:
                last, before, fraction = dense, every, oneshot.cut_at(args, r)
            left = prune_channels(last.model, dense_channels(last.model), fraction, args.scope)
            channels, pruned = inside(before, left), last
            start = shrink_state(theta, channels, dense.checkpoint)
            last = exp.train(job, shrink(theta, channels), state=start, after=pruned.spent)
            given = channels, left, theta, dense, pruned, live_total(last.masks)
            for arm, model, options in controls(exp, job, *given):
                exp.train(job._replace(arm=arm), model, **options)


def controls(exp, job, channels, left, theta, dense, pruned, live):
    """(arm, network, options of Experiment.train) of each control of a channel ticket."""
    arms, seed = lth.controls_at(exp.args, job.round), job.seed
    if "reinit" in arms:
        model = shrink(exp.new_model(REINIT_SEED + seed), channels)
        yield "reinit", model, dict(after=pruned.spent)
    if "random" in arms:
        shuffled = random_channels(channels, theta, lth.generator_of(job))
        state = shrink_state(theta, shuffled, dense.checkpoint)
        yield "random", shrink(theta, shuffled), dict(state=state, after=pruned.spent)
    if "finetune" in arms:
        model, ema = shrink(pruned.model, left), shrink(pruned.ema, left)
        low = exp.finetuning(model, ema, dense_masks(model))
        yield "finetune", model, dict(after=pruned.spent) | low
    if "small" in arms:
        yield "small", exp.narrower_model(seed, live), {}


def plan(args):
    """Every training run."""
    return oneshot.jobs(args) if args.oneshot else lth.jobs(args)


def main(argv=None):
    """The command line: the flags of lth_diffusion.py and --oneshot; --scope global or layer."""
    parser = lth.make_parser(prog="methods.channels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--oneshot", action="store_true", help="one cut per control round")
    args, parser = lth.parse_args(argv, parser, "_channels", score="magnitude")
    if args.scope not in ("global", "layer"):
        parser.error(f"argument --scope: {args.scope} ranks weights; choose global or layer")
    lth.run(args, parser, find_tickets, plan)


if __name__ == "__main__":
    main()
