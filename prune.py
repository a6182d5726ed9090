"""Which weights live: masks, the ways to choose them, the ways to restart from them, shrinking for real.

    masks = dense_masks(model)                                # {"conv_in.weight": bool tensor, ...}
    masks = prune_magnitude(model, masks, fraction=0.2)       # exactly 20 % of the live weights fewer
    rewind(model, masks, theta_k)                             # weights = mask * theta_k
    train(..., **mask_hooks(model, masks))                    # pruned weights stay exactly 0.0

A mask is a dict from parameter name to a bool tensor of the parameter's shape, True where the weight lives.
Masks cover the weights of Conv2d and Linear layers, never biases or norms. Nothing here knows of training.
"""
import math
import zipfile

import numpy as np
import torch
from torch import nn

from unet import UNet

FLOOR = 0.1  # against layer collapse every layer keeps at least a tenth of the overall density, and one weight


def prunable(model):
    """{name: Parameter} of every Conv2d and Linear weight, named and ordered as in named_parameters()."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    return {name: p for name, p in model.named_parameters() if name in names}


def dense_masks(model):
    """Masks under which every prunable weight lives."""
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model).items()}


def live_counts(masks):
    """{name: number of live weights}."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def density(masks):
    """Live weights over all prunable weights, between 0 and 1."""
    return sum(live_counts(masks).values()) / sum(mask.numel() for mask in masks.values())


# ------------------------------------------------------------------------------------- choosing what to cut

def prune_magnitude(model, masks, fraction, scope="global", layer_fractions=None):
    """New masks with the smallest |w| of the live weights gone (1803.03635, section 1): see prune_scores."""
    scores = {name: p.detach().abs() for name, p in prunable(model).items()}
    return prune_scores(scores, masks, fraction, scope, layer_fractions)


def prune_scores(scores, masks, fraction, scope="global", layer_fractions=None):
    """New masks without the live weights of the lowest scores; ties are broken, never all cut together.

    scope "global": exactly round(fraction * live) weights go, wherever they are. "layer": exactly that many of
    each layer. layer_fractions {name: relative rate}: the layers' rates keep these proportions and the total is
    exactly round(fraction * live). In every case a layer keeps at least max(1, 0.1 * d * n) of its n weights,
    d being the density aimed at; what that saves is cut elsewhere. Raises ValueError for a fraction outside
    [0, 1) or one that leaves less than the floors, FloatingPointError for a score that is not finite.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1)")
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise FloatingPointError(f"{name} has weights that are not finite: nothing to rank")
    live = live_counts(masks)
    if scope == "global" and layer_fractions is None:
        return cut_global(scores, masks, round(fraction * sum(live.values())))
    if layer_fractions is not None:
        cut = round(fraction * sum(live.values()))
        rates = {name: layer_fractions[name] * n for name, n in live.items()}
    elif scope == "layer":
        rates = {name: round(fraction * n) for name, n in live.items()}
        cut = sum(rates.values())
    else:
        raise ValueError(f"scope={scope!r}: choose global or layer")
    floor = floors(masks, sum(live.values()) - cut)
    gone = allocate(rates, cut, {n: 0 for n in live}, {n: live[n] - floor[n] for n in live})
    return keep_largest(scores, masks, {name: live[name] - gone[name] for name in live})


def floors(masks, target):
    """{name: the least a layer keeps} when `target` weights live in all; never more than live there now."""
    d = target / sum(mask.numel() for mask in masks.values())
    return {name: min(int(mask.sum()), max(1, math.ceil(FLOOR * d * mask.numel()))) for name, mask in masks.items()}


def cut_global(scores, masks, cut):
    """Masks with the `cut` lowest-scored live weights of the whole network gone, floors respected."""
    floor = floors(masks, sum(live_counts(masks).values()) - cut)
    ranks = []
    for name, mask in masks.items():
        rank = scores[name].float().masked_fill(~mask, -1.0).flatten()
        rank[rank.topk(floor[name], sorted=False).indices] = torch.inf  # the best of each layer may not go
        ranks.append(rank.masked_fill_(~mask.flatten(), torch.inf))  # and the dead cannot go again
    ranks = torch.cat(ranks)
    if cut > int(torch.isfinite(ranks).sum()):
        raise ValueError(f"cannot cut {cut} weights and keep one in every layer")
    alive = torch.cat([mask.flatten() for mask in masks.values()])
    alive[ranks.topk(cut, largest=False, sorted=False).indices] = False
    pieces = alive.split([mask.numel() for mask in masks.values()])
    return {name: piece.view(mask.shape).clone() for (name, mask), piece in zip(masks.items(), pieces)}


def keep_largest(scores, masks, keep):
    """Masks with exactly keep[name] live weights in each layer: those of the largest scores among the live."""
    new = {}
    for name, mask in masks.items():
        rank = scores[name].float().masked_fill(~mask, -torch.inf).flatten()
        alive = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
        alive[rank.topk(keep[name], sorted=False).indices] = True
        new[name] = alive.view(mask.shape)
    return new


def allocate(rates, total, low, high):
    """Integers near c * rates[name], each within [low, high], whose sum is exactly `total`.

    c is found by bisection; what rounding leaves goes to the largest remainders. Raises ValueError when
    `total` lies outside what the bounds allow.
    """
    if not sum(low.values()) <= total <= sum(high.values()):
        raise ValueError(f"cannot place {total} weights between {sum(low.values())} and {sum(high.values())}")
    names = list(rates)
    rate, lo, hi = (np.array([float(d[name]) for name in names]) for d in (rates, low, high))
    some = rate > 0  # a layer of rate 0 takes only what the others cannot
    left, right = 0.0, float((hi[some] / rate[some]).max(initial=1.0))
    for _ in range(200):
        middle = (left + right) / 2
        left, right = (middle, right) if np.clip(middle * rate, lo, hi).sum() < total else (left, middle)
    share = np.clip(right * rate, lo, hi)
    counts = np.floor(share + 1e-6)
    order = np.argsort(-(share - counts), kind="stable")
    while counts.sum() != total:
        sign = 1 if counts.sum() < total else -1
        for i in order[::sign]:
            if counts.sum() != total and lo[i] <= counts[i] + sign <= hi[i]:
                counts[i] += sign
    return {name: int(count) for name, count in zip(names, counts)}


def random_masks(masks, generator):
    """The control `random`: as many live weights in every layer, in places drawn by a CPU generator."""
    shuffled = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.flatten()[order].view(mask.shape)
    return shuffled


# ----------------------------------------------------------------------------------------------- restarting

@torch.no_grad()
def apply_masks(model, masks):
    """Set the pruned weights of `model` to exactly 0.0, in place."""
    for name, p in prunable(model).items():
        p.masked_fill_(~masks[name].to(p.device), 0.0)


def rewind(model, masks, state):
    """Weights = mask * state, biases and norms = state: the ticket's restart (1912.05671, section 3)."""
    model.load_state_dict(state)
    apply_masks(model, masks)


def mask_hooks(model, masks):
    """The two hooks of ddpm.train that keep a ticket a ticket, as keyword arguments.

    Gradients are masked before clipping, so that dead weights do not eat the clip norm; weights after the
    update. Adam's moments of a weight whose gradient is always 0 stay 0, and so does its average in the EMA.
    """
    weights = list(prunable(model).values())
    factors = [torch.empty_like(p).copy_(masks[name]) for name, p in prunable(model).items()]

    def after_backward(step, model):
        torch._foreach_mul_([p.grad for p in weights], factors)

    @torch.no_grad()
    def after_step(step, model, optimizer):
        torch._foreach_mul_(weights, factors)

    return dict(after_backward=after_backward, after_step=after_step)


# --------------------------------------------------------------------------------------------- ticket files

def pack_masks(masks):
    """Masks as one bit a weight: {name: uint8 tensor}."""
    return {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in masks.items()}


def unpack_masks(model, bits):
    """Undo pack_masks for a model of the same shapes, on the model's device."""
    return {name: torch.from_numpy(np.unpackbits(bits[name].numpy(), count=p.numel()).astype(bool))
            .view(p.shape).to(p.device) for name, p in prunable(model).items()}


def save_ticket(path, model, masks):
    """Write a ticket as one bit for every prunable weight and the values of those that live.

    Everything else (biases, norms) is stored whole. load_ticket gives the same model back, to the bit.
    """
    weights = prunable(model)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    torch.save(dict(
        config=model.config,
        bits=pack_masks(masks),
        values={name: state[name][masks[name].cpu()] for name in weights},
        rest={name: value for name, value in state.items() if name not in weights}), path)


def load_ticket(path):
    """(UNet, masks) from a file of save_ticket. Raises OSError naming the file when it is not one."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch.load does not compare checksums
                raise ValueError("a flipped bit")
        ticket = torch.load(path, weights_only=True, map_location="cpu")
        model, state = UNet(**ticket["config"]), dict(ticket["rest"])
        masks = unpack_masks(model, ticket["bits"])
        for name, p in prunable(model).items():
            if ticket["values"][name].numel() != masks[name].sum():  # a single one would be repeated
                raise ValueError(f"{name} has more or fewer values than live weights")
            state[name] = torch.zeros_like(p.detach())
            state[name][masks[name]] = ticket["values"][name]
        model.load_state_dict(state)
    except OSError:
        raise
    except Exception as error:  # torch.load fails in a dozen ways on a damaged file
        raise OSError(f"{path} is not a whole ticket file ({type(error).__name__}); run again to write it anew")
    return model, masks
