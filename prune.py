"""Pruning masks: choose which weights to keep, go back to step k with them, keep the rest at zero.

    masks = dense_masks(model)                            # {"conv1.weight": bool tensor, ...}
    masks = prune_magnitude(model, masks, fraction=0.2)   # removes exactly 20 % of what is left
    start = rewind(model, masks, checkpoint)              # the state of step k, under the masks
    train(model, ..., state=start, **mask_hooks(model, masks))  # pruned weights stay exactly 0.0

checkpoint: all that training goes on from (see rewind), or a copy of model.state_dict() alone.
Masks are {parameter name: bool tensor of its shape}, True where a weight lives. They cover Conv2d
and Linear weights: no biases, norms, embeddings, or attention weights outside Linear layers. Works
on any nn.Module; this file can be copied alone. In a training loop of your own, call the hooks of
mask_hooks: after_backward(step, model), and after_step(step, model, None, None) after the update.
"""
import copy
import math
import zipfile

import numpy as np
import torch
from torch import nn

# Against layer collapse: a layer keeps this share of the overall density, and at least one weight.
MINIMUM = 0.1


def prunable(model):
    """{name: Parameter} of every Conv2d and Linear weight, in the order of named_parameters()."""
    names = {f"{name}.weight".lstrip(".") for name, module in model.named_modules()
             if isinstance(module, (nn.Conv2d, nn.Linear))}
    return {name: p for name, p in model.named_parameters() if name in names}


def dense_masks(model):
    """Masks under which every prunable weight lives."""
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model).items()}


def live_counts(masks):
    """{name: number of live weights}."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def live_total(masks):
    """Number of live weights of the network."""
    return sum(live_counts(masks).values())


def density(masks):
    """Live weights over all prunable weights, between 0 and 1."""
    return live_total(masks) / sum(mask.numel() for mask in masks.values())


# --------------------------------------------------------------------------- choosing
def prune_magnitude(model, masks, fraction, scope="global", layer_fractions=None,
                    score="magnitude"):
    """New masks without the live weights of smallest |w| (Frankle and Carbin, The Lottery Ticket
    Hypothesis, 2019, 1803.03635, section 1), or of another of SCORES; scope: "ramp", or any that
    prune_scores takes. ValueError for an unknown score."""
    if score not in SCORES:
        raise ValueError(f"score={score!r}: choose {', '.join(SCORES)}")
    layers = prunable(model)
    if any(name not in masks or masks[name].shape != p.shape for name, p in layers.items()):
        raise ValueError("these masks are of another network")
    scores = {name: SCORES[score](p.detach(), masks[name]) for name, p in layers.items()}
    if scope == "ramp" and layer_fractions is None:
        layer_fractions = ramp_rates(model, fraction)
    return prune_scores(scores, masks, fraction, scope, layer_fractions)


def magnitude(w, mask):
    """|w|. Ranked over the network, it empties layers that start at zero and stay small."""
    return w.abs()


def normalized(w, mask):
    """|w| over the root mean square of the live weights of its layer."""
    return w.abs() / w[mask].double().square().mean().sqrt().clamp(min=1e-30)


def lamp(w, mask):
    """w^2 over the sum of squares of its layer's live weights that are no smaller (Lee et al.,
    Layer-adaptive Sparsity for the Magnitude-based Pruning, 2021, 2010.07611, eq. 4)."""
    squares = w.double().square().masked_fill(~mask, 0.0).flatten()
    ranked, order = squares.sort(descending=True, stable=True)
    scores = torch.empty_like(ranked)
    scores[order] = ranked / ranked.cumsum(0).clamp(min=1e-300)
    return scores.view(w.shape)


# --score: from a layer's weights and mask to scores, the lowest of which go. Add your own.
SCORES = dict(magnitude=magnitude, normalized=normalized, lamp=lamp)


def prune_scores(scores, masks, fraction, scope="global", layer_fractions=None):
    """New masks without the live weights of lowest score; ties break by position: exact counts.

    scope "global": exactly round(fraction * live) weights go, wherever they are. "layer": exactly
    that many of each layer. "erk": the global total, layer densities in the proportions
    sum(shape) / prod(shape), at most what lives (Evci et al., RigL, 2020, 1911.11134, section 3).
    layer_fractions {name: relative rate}: the global total, layer rates in these proportions. Each
    layer keeps at least max(1, 0.1 * d * n) of its n weights, d being the density aimed at; what
    that saves is cut elsewhere. ValueError for a fraction outside [0, 1) or one that would cut
    into these minima, FloatingPointError for a score that is not finite.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1)")
    if not scores:
        raise ValueError("there are no Conv2d or Linear weights to prune")
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise FloatingPointError(f"{name} has scores that are not finite: cannot rank them")
    live, total = live_counts(masks), live_total(masks)
    cut = round(fraction * total)
    if scope == "global" and layer_fractions is None:
        return cut_global(scores, masks, cut)
    if scope == "erk":
        size = {name: sum(mask.shape) for name, mask in masks.items()}
        least = minima(masks, total - cut)
        return keep_largest(scores, masks, allocate(size, total - cut, least, live))
    if layer_fractions is not None:
        rates = {name: layer_fractions[name] * n for name, n in live.items()}
    elif scope == "layer":
        rates = {name: round(fraction * n) for name, n in live.items()}
        cut = sum(rates.values())
    else:
        raise ValueError(f"scope={scope!r}: choose global, layer, erk, or give layer_fractions")
    least = minima(masks, total - cut)
    most = {name: n - least[name] for name, n in live.items()}
    gone = allocate(rates, cut, dict.fromkeys(live, 0), most)
    return keep_largest(scores, masks, {name: n - gone[name] for name, n in live.items()})


def least_kept(n, d):
    """The least that a layer of n weights keeps at overall density d."""
    return max(1, math.ceil(MINIMUM * d * n))


def at_minimum(masks):
    """The names of layers with no more live weights than the minimum: pruning emptied them."""
    d = density(masks)
    return [name for name, live in live_counts(masks).items()
            if live <= least_kept(masks[name].numel(), d)]


def minima(masks, target):
    """{name: the least a layer keeps} when `target` weights live in all; at most what lives now."""
    d = target / sum(mask.numel() for mask in masks.values())
    return {name: min(least_kept(masks[name].numel(), d), live)
            for name, live in live_counts(masks).items()}


def cut_global(scores, masks, cut):
    """Masks without the `cut` lowest-scored live weights of the whole network, minima respected."""
    total = live_total(masks)
    least = minima(masks, total - cut)
    if cut > total - sum(least.values()):
        raise ValueError(f"cannot cut {cut} of {total} weights and keep one in every layer")
    open_to = []
    for name, mask in masks.items():
        score, dead = scores[name].float().flatten(), ~mask.flatten()
        best = lowest((-score).masked_fill_(dead, torch.inf), least[name])  # these may not go
        open_to.append(score.masked_fill(best | dead, torch.inf))  # and the dead cannot go again
    gone = lowest(torch.cat(open_to), cut).split([mask.numel() for mask in masks.values()])
    return {name: masks[name] & ~one.view_as(masks[name]) for name, one in zip(masks, gone)}


def lowest(scores, k):
    """Bool tensor like scores (n,): exactly k are True, the lowest; among equals, the first."""
    values = scores.cpu().numpy()  # which partitions millions several times as fast as topk
    last = np.partition(values, k - 1)[k - 1] if k else -np.inf
    low = values < last
    low[np.flatnonzero(values == last)[:k - np.count_nonzero(low)]] = True
    return torch.from_numpy(low).to(scores.device)


def keep_largest(scores, masks, keep):
    """Masks with exactly keep[name] live weights in each layer: the largest scores of the live."""
    new = {}
    for name, mask in masks.items():
        score = scores[name].float().masked_fill(~mask, -torch.inf).flatten()
        alive = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
        alive[score.topk(keep[name], sorted=False).indices] = True
        new[name] = alive.view(mask.shape)
    return new


def allocate(rates, total, low, high):
    """Integers near c * rates[name], each within [low, high], whose sum is exactly `total`; c by
    bisection, what rounding leaves to the largest remainders. ValueError beyond the bounds."""
    least, most = sum(low.values()), sum(high.values())
    if not least <= total <= most:
        raise ValueError(f"cannot place {total} weights between {least} and {most}")
    rate, lo, hi = (np.array([float(d[name]) for name in rates]) for d in (rates, low, high))
    if not np.isfinite(rate).all():
        raise ValueError("the rates of the layers must be finite numbers")
    some = rate > 0  # a layer of rate 0 takes only what the others cannot
    left, right = 0.0, float((hi[some] / rate[some]).max(initial=1.0))
    for _ in range(200):
        middle = (left + right) / 2
        enough = np.clip(middle * rate, lo, hi).sum() >= total
        left, right = (left, middle) if enough else (middle, right)
    share = np.clip(right * rate, lo, hi)
    counts = np.floor(share + 1e-6)
    order = np.argsort(-(share - counts), kind="stable")
    while counts.sum() != total:
        sign = 1 if counts.sum() < total else -1
        for i in order[::sign]:
            if counts.sum() != total and lo[i] <= counts[i] + sign <= hi[i]:
                counts[i] += sign
    return {name: int(count) for name, count in zip(rates, counts)}


def random_masks(masks, generator):
    """The control `random`: as many live weights per layer, in places drawn by a CPU generator."""
    shuffled = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.flatten()[order].view(mask.shape)
    return shuffled


def blocks_of(model):
    """{name of a prunable weight: name of its residual block}, in the order of the network.

    Layers outside blocks belong to the block before them, the first ones to the first block.
    Without any ResBlock each layer is its own.
    """
    blocks = [name for name, m in model.named_modules() if type(m).__name__ == "ResBlock"]
    if not blocks:
        return {name: name for name in prunable(model)}
    current, owner = blocks[0], {}
    for name in prunable(model):
        inside = [block for block in blocks if name.startswith(block + ".")]
        current = inside[0] if inside else current
        owner[name] = current
    return owner


def ramp_rates(model, p=0.2, q=0.01):
    """layer_fractions that grow with depth: block j loses (p + j q) a round (Jiang et al. 2023,
    2310.18823, algorithm 1); prune_scores scales them to the density requested."""
    owner = blocks_of(model)
    number = {block: j for j, block in enumerate(dict.fromkeys(owner.values()))}
    return {name: p + q * number[block] for name, block in owner.items()}


# --------------------------------------------------------------------------- going back, keeping
@torch.no_grad()
def apply_masks(model, masks):
    """Set the pruned weights of `model` to exactly 0.0, in place."""
    for name, p in prunable(model).items():
        p.masked_fill_(~masks[name].to(p.device), 0.0)


def rewind(model, masks, state):
    """Go back to step k (Frankle, Dziugaite, Roy and Carbin 2020, 1912.05671, section 3): set the
    model to mask * state, and return a copy of the state with the masks laid over all of it.

    state: the whole training state, as ddpm.capture returns it (weights, their average, Adam's
    moments, step counts), which ddpm.train(state=...) goes on from: a network that prunes nothing
    repeats the run it came from, to the bit. Or a state_dict alone.
    """
    def laid(tensors):
        return {name: covered(value, masks.get(name)) for name, value in tensors.items()}

    if "optimizer" not in state:
        back = laid(state)
        model.load_state_dict(back)
        return back
    back = state | dict(model=laid(state["model"]), ema=laid(state["ema"]))
    if state["optimizer"] is not None:
        names = [name for name, _ in model.named_parameters()]  # it numbers them in this order
        moments = {i: {key: covered(value, masks.get(names[i])) for key, value in one.items()}
                   for i, one in state["optimizer"]["state"].items()}
        back["optimizer"] = state["optimizer"] | dict(state=moments)
    model.load_state_dict(back["model"])
    return back


def covered(value, mask):
    """A copy of a weight, or of a moment of its shape, at exactly 0.0 where it is pruned."""
    if mask is None or getattr(value, "shape", None) != mask.shape:
        return copy.deepcopy(value)
    return value.masked_fill(~mask.to(value.device), 0.0)


def mask_hooks(model, masks):
    """The two hooks of ddpm.train that keep pruned weights at exactly 0.0, as keyword arguments.
    Gradients are masked before clipping, so that pruned weights do not count in the norm; weights
    after the update. Where the gradient is always 0, so are Adam's moments and the EMA."""
    weights = list(prunable(model).values())
    factors = [torch.empty_like(p).copy_(masks[name]) for name, p in prunable(model).items()]

    def after_backward(step, model):
        for p, factor in zip(weights, factors):
            if p.grad is not None:  # a layer that the loss does not reach has none
                p.grad.mul_(factor)

    @torch.no_grad()
    def after_step(step, model, optimizer, ema):
        torch._foreach_mul_(weights, factors)

    return dict(after_backward=after_backward, after_step=after_step)


# --------------------------------------------------------------------------- ticket files
def pack_masks(masks):
    """Masks as one bit per weight: {name: uint8 tensor}."""
    return {name: torch.from_numpy(np.packbits(m.cpu().numpy())) for name, m in masks.items()}


def unpack_masks(model, bits):
    """Undo pack_masks for a model of the same shapes, on the model's device."""
    masks = {}
    for name, p in prunable(model).items():
        flat = np.unpackbits(bits[name].numpy(), count=p.numel()).astype(bool)
        masks[name] = torch.from_numpy(flat).view(p.shape).to(p.device)
    return masks


def save_ticket(path, model, masks, facts=None):
    """Write a ticket: one bit per prunable weight, the values of the live ones, the rest whole.
    facts: a dict of plain values on how to use the model; torch.load(path)["facts"] reads it."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    values = {name: state.pop(name)[mask.cpu()] for name, mask in masks.items()}
    config = getattr(model, "config", None)  # other libraries keep objects there
    ticket = dict(config=dict(config) if isinstance(config, dict) else None, facts=facts)
    with open(path, "wb") as file:  # given a path, torch.save would store its name too
        torch.save(ticket | dict(bits=pack_masks(masks), values=values, rest=state), file)


def load_ticket(path, model=None):
    """(model, masks) of a file of save_ticket, to the bit; without a model, a UNet by its config.

    OSError that names the file when it is not a whole ticket of such a model.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch.load does not compare checksums
                raise ValueError("a flipped bit")
        ticket = torch.load(path, weights_only=True, map_location="cpu")
        if model is None:
            from unet import UNet  # not there: pass your network as model
            if "mults" not in (ticket["config"] or {}):
                raise ValueError("it has no U-Net's config: pass the network as model")
            model = UNet(**ticket["config"])
        state, masks = dict(ticket["rest"]), unpack_masks(model, ticket["bits"])
        for name, p in prunable(model).items():
            values = ticket["values"][name]
            if values.numel() != masks[name].sum():  # a single one would be repeated
                raise ValueError(f"{name} has more or fewer values than live weights")
            state[name] = torch.zeros_like(p.detach(), device="cpu")
            state[name][masks[name].cpu()] = values
        model.load_state_dict(state)
    except OSError:
        raise
    except Exception as error:  # torch.load fails in a dozen ways on a damaged file
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise OSError(f"{path} is not a whole ticket of this network ({why})") from error
    return model, masks
