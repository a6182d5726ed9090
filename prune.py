"""Which weights live: masks, the ways to choose them, the ways to restart from them, shrinking for real.

    masks = dense_masks(model)                                # {"conv_in.weight": bool tensor, ...}
    masks = prune_magnitude(model, masks, fraction=0.2)       # exactly 20 % of the live weights fewer
    rewind(model, masks, theta_k)                             # weights = mask * theta_k
    train(..., **mask_hooks(model, masks))                    # pruned weights stay exactly 0.0

A mask is a dict from parameter name to a bool tensor of the parameter's shape, True where the weight lives.
Masks cover the weights of Conv2d and Linear layers, never biases or norms. Nothing here knows of training.
"""
import contextlib
import itertools
import math
import zipfile

import numpy as np
import torch
from torch import nn

from unet import ResBlock, UNet

FLOOR = 0.1  # against layer collapse a layer keeps at least this share of the overall density, and one weight


def prunable(model):
    """{name: Parameter} of every Conv2d and Linear weight, named and ordered as in named_parameters()."""
    layers = (nn.Conv2d, nn.Linear)
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}
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


def overlap(a, b):
    """(IoU of two masks over the layers of `a`, that of random masks of the same layer densities)."""
    both, by_chance, either = 0, 0.0, 0
    for name, mask in a.items():
        live, others = int(mask.sum()), int(b[name].sum())
        both, either = both + int((mask & b[name]).sum()), either + live + others
        by_chance += live * others / mask.numel()
    return both / (either - both), by_chance / (either - by_chance)


# ------------------------------------------------------------------------------------- choosing what to cut

def prune_magnitude(model, masks, fraction, scope="global", layer_fractions=None):
    """New masks with the smallest |w| of the live weights gone (1803.03635, section 1): see prune_scores."""
    scores = {name: p.detach().abs() for name, p in prunable(model).items()}
    return prune_scores(scores, masks, fraction, scope, layer_fractions)


def prune_scores(scores, masks, fraction, scope="global", layer_fractions=None):
    """New masks without the live weights of the lowest scores; ties are broken, never all cut together.

    scope "global": exactly round(fraction * live) weights go, wherever they are. "layer": exactly that many
    of each layer. layer_fractions {name: relative rate}: the layers' rates keep these proportions and the
    total is exactly round(fraction * live). "erk": the same total, the layers' densities in the proportions
    sum(shape) / prod(shape), no layer above what lives in it (1911.11134, section 3). In every case a layer
    keeps at least max(1, 0.1 * d * n) of its n weights, d being the density aimed at; what that saves is cut
    elsewhere. Raises ValueError for a fraction outside [0, 1) or one that leaves less than the floors,
    FloatingPointError for a score that is not finite.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1)")
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise FloatingPointError(f"{name} has weights that are not finite: nothing to rank")
    live = live_counts(masks)
    if scope == "global" and layer_fractions is None:
        return cut_global(scores, masks, round(fraction * sum(live.values())))
    if scope == "erk":
        target = sum(live.values()) - round(fraction * sum(live.values()))
        size = {name: sum(mask.shape) for name, mask in masks.items()}
        return keep_largest(scores, masks, allocate(size, target, floors(masks, target), live))
    if layer_fractions is not None:
        cut = round(fraction * sum(live.values()))
        rates = {name: layer_fractions[name] * n for name, n in live.items()}
    elif scope == "layer":
        rates = {name: round(fraction * n) for name, n in live.items()}
        cut = sum(rates.values())
    else:
        raise ValueError(f"scope={scope!r}: choose global, layer or erk")
    floor = floors(masks, sum(live.values()) - cut)
    gone = allocate(rates, cut, {n: 0 for n in live}, {n: live[n] - floor[n] for n in live})
    return keep_largest(scores, masks, {name: live[name] - gone[name] for name in live})


def floors(masks, target):
    """{name: the least a layer keeps} when `target` weights live in all; never more than live there now."""
    d = target / sum(mask.numel() for mask in masks.values())
    least = {name: max(1, math.ceil(FLOOR * d * mask.numel())) for name, mask in masks.items()}
    return {name: min(least[name], live) for name, live in live_counts(masks).items()}


def cut_global(scores, masks, cut):
    """Masks with the `cut` lowest-scored live weights of the whole network gone, floors respected."""
    floor = floors(masks, sum(live_counts(masks).values()) - cut)
    if cut > sum(live_counts(masks).values()) - sum(floor.values()):
        raise ValueError(f"cannot cut {cut} weights and keep one in every layer")
    ranks = []
    for name, mask in masks.items():
        rank, dead = scores[name].float().flatten(), ~mask.flatten()
        best = lowest((-rank).masked_fill_(dead, torch.inf), floor[name])  # of each layer: these may not go
        ranks.append(rank.masked_fill(best | dead, torch.inf))  # and the dead cannot go again
    gone = lowest(torch.cat(ranks), cut).split([mask.numel() for mask in masks.values()])
    return {name: mask & ~piece.view(mask.shape) for (name, mask), piece in zip(masks.items(), gone)}


def lowest(ranks, k):
    """Bool tensor like ranks (n,): exactly k are True, the lowest, among equals the first. Millions are
    partitioned by numpy several times as fast as by topk on a CPU."""
    values = ranks.cpu().numpy()
    last = np.partition(values, k - 1)[k - 1] if k else -np.inf
    low = values < last
    low[np.flatnonzero(values == last)[:k - np.count_nonzero(low)]] = True
    return torch.from_numpy(low).to(ranks.device)


def keep_largest(scores, masks, keep):
    """Masks with exactly keep[name] live weights in each layer: the largest scores among the live."""
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
    if not np.isfinite(rate).all():
        raise ValueError("the rates of the layers must be finite numbers")
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


# ---------------------------------------------------------------------------- other scores, other proportions

def random_scores(model, generator):
    """Scores that know nothing: the masks of method `random`."""
    return {name: torch.rand(p.shape, generator=generator).to(p.device)
            for name, p in prunable(model).items()}


def init_scores(model, generator):
    """|theta_0|, for pruning before any training. The zero-initialised layers have no ranking: random there.

    Use with scope "layer": a global ranking would empty exactly those layers.
    """
    random = random_scores(model, generator)
    return {name: p.detach().abs() if bool(p.any()) else random[name] for name, p in prunable(model).items()}


def taylor_scores(model, losses, stop=0.05):
    """|w * gradient|, the gradient summed over the losses of successive time steps (2305.10924, section 3).

    losses: an iterable of scalar losses L_t, made one by one. The sum stops at the first L_t below `stop`
    times the largest so far: where x_t is nearly pure noise, eps is easy and its gradients say little.
    """
    model.zero_grad()
    largest = 0.0
    for loss in losses:
        largest = max(largest, loss.item())
        if loss.item() < stop * largest:
            break
        loss.backward()
    scores = {name: (p * p.grad).detach().abs() for name, p in prunable(model).items()}
    model.zero_grad()
    return scores


def blocks_of(model):
    """{name of a prunable weight: name of the residual block it belongs to}, in U-Net order.

    Layers outside of the blocks (stem, time embedding, attention, changes of resolution, head) belong to the
    block before them, the first ones to the first block.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, ResBlock)]
    current, owner = blocks[0], {}
    for name in prunable(model):
        current = next((block for block in blocks if name.startswith(block + ".")), current)
        owner[name] = current
    return owner


def density_by_block(model, live):
    """{residual block: live weights over all} from {name: live weights}, of this model or of what is left of
    it when its channels have been cut."""
    left, size, weights = {}, {}, prunable(model)
    for name, block in blocks_of(model).items():
        left[block] = left.get(block, 0) + live[name]
        size[block] = size.get(block, 0) + weights[name].numel()
    return {block: left[block] / size[block] for block in size}


def ramp_rates(model, p=0.2, q=0.01):
    """layer_fractions that grow with depth: block j of J loses (p + j q) a round (2310.18823, algorithm 1).

    Taken literally this empties the late blocks; prune_scores multiplies the rates by one constant so that
    the requested overall density holds, and keeps its floor.
    """
    owner = blocks_of(model)
    number = {block: j for j, block in enumerate(dict.fromkeys(owner.values()))}
    return {name: p + q * number[block] for name, block in owner.items()}


def cka_rates(model, similarity, p=0.2, q=0.01):
    """layer_fractions from measured similarity {block: CKA}: blocks that agree more are pruned less.

    The rates spread linearly over as wide a range, q * (J - 1), as the ramp's, around p.
    """
    values = list(similarity.values())
    middle, width = sum(values) / len(values), max(max(values) - min(values), 1e-12)
    span = q * (len(values) - 1)
    rate = {block: p + span * (middle - value) / width for block, value in similarity.items()}
    return {name: max(rate[block], 0.0) for name, block in blocks_of(model).items()}


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
    def after_step(step, model, optimizer, ema):
        torch._foreach_mul_(weights, factors)

    return dict(after_backward=after_backward, after_step=after_step)


# ----------------------------------------------------------------------------- masks that move while training

class RigL:
    """Dynamic sparse training (1911.11134, section 3) as the two hooks of ddpm.train; `masks` follows along.

    Every `every` steps while step < until * steps, each layer drops the share alpha/2 * (1 + cos(pi step /
    T_end)) of its live weights with the smallest |w| and grows as many where the dense gradient is largest
    among all that were not kept. What was not alive before starts at 0 with fresh moments; a weight dropped
    and grown in one go keeps its value. The update of the masks takes the place of that step's update of the
    weights. grow="random" is SET (1707.04780). Every layer's count of live weights stays what it was.
    """

    def __init__(self, model, masks, steps, every=100, alpha=0.3, until=0.75, grow="gradient", seed=0):
        self.weights, self.masks = prunable(model), {name: mask.clone() for name, mask in masks.items()}
        self.every, self.alpha, self.end, self.grow = every, alpha, until * steps, grow
        self.seed, self.fresh = seed, {}

    def after_backward(self, step, model):
        moves = step > 0 and step % self.every == 0 and step < self.end
        if moves:
            self.move(step)
        for name, p in self.weights.items():
            p.grad.mul_(self.masks[name])
        return moves

    @torch.no_grad()
    def move(self, step):
        """Drop and grow in every layer; remember in self.fresh what starts anew."""
        share = self.alpha / 2 * (1 + math.cos(math.pi * step / self.end))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for name, p in self.weights.items():
            before, count = self.masks[name], int(self.masks[name].sum())
            moved = math.floor(share * count)
            kept = keep_largest({name: p.abs()}, {name: before}, {name: count - moved})[name]
            wish = (p.grad.abs() if self.grow == "gradient" else
                    torch.rand(p.shape, generator=generator).to(p.device))
            grown = keep_largest({name: wish}, {name: ~kept}, {name: moved})[name]
            self.masks[name], self.fresh[name] = kept | grown, grown & ~before
            p.masked_fill_(~self.masks[name], 0.0)

    @torch.no_grad()
    def after_step(self, step, model, optimizer, ema):
        """Zeros stay zeros after the update; what has just grown starts with fresh moments."""
        for name, p in self.weights.items():
            p.masked_fill_(~self.masks[name], 0.0)
            for moment in optimizer.state.get(p, {}).values():
                if torch.is_tensor(moment) and moment.shape == p.shape and name in self.fresh:
                    moment.masked_fill_(self.fresh[name], 0.0)
        if self.fresh:
            apply_masks(ema.model, self.masks)
            self.fresh = {}


def rst_hooks(model, masks, steps, total=10.0):
    """Dual lottery ticket (2203.04248, section 4): hooks of the transformation that squeezes a random mask's
    complement out of the network before it is cut.

    The weights that will go get no gradient, only a decoupled shrinkage w <- w * (1 - lr * lambda): a
    gradient term would be normalised away by Adam. The product lr * lambda, whatever the rate does, grows
    linearly over the first 5/9 of the steps and is then held (the authors' 50,000 and 40,000), scaled so that
    its sum is `total`: what is left is about e**-total.
    """
    shape = [min(1.0, (step + 1) / max(1, 5 * steps // 9)) for step in range(steps)]
    rates = [total * value / sum(shape) for value in shape]
    if max(rates) >= 1:
        raise ValueError(f"{steps} steps are too few to shrink weights by a sum of {total}")

    @torch.no_grad()
    def after_step(step, model, optimizer, ema):
        for name, p in prunable(model).items():
            p.mul_(torch.where(masks[name], 1.0, 1.0 - rates[step]))

    return mask_hooks(model, masks) | dict(after_step=after_step)


# -------------------------------------------------------------------------- channel tickets: smaller for real

def dense_channels(model):
    """{block name: bool (hidden,)}: all channels between conv1 and conv2 of every residual block."""
    return {name: torch.ones(block.conv1.out_channels, dtype=torch.bool)
            for name, block in model.named_modules() if isinstance(block, ResBlock)}


def channel_scores(block):
    """Root mean square of the weights that a GroupNorm group of hidden channels is made of: conv1's rows and
    conv2's columns, (groups,); a mean, so that blocks of different widths can be ranked together."""
    groups = block.norm2.num_groups
    rows = block.conv1.weight.detach().pow(2).reshape(groups, -1)  # (groups, size*in*9)
    columns = block.conv2.weight.detach().transpose(0, 1).pow(2).reshape(groups, -1)  # (groups, size*out*9)
    return torch.cat([rows, columns], dim=1).mean(1).sqrt()


def prune_channels(model, channel_masks, fraction, scope="global"):
    """New channel masks without the weakest round(fraction * live) GroupNorm groups, of the network or, with
    scope "layer", of each block; every block keeps one group.

    Whole groups only: then norm2 of the shrunk block has fewer groups of the same size and equals the masked
    one. Raises ValueError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1)")
    blocks, size = dict(model.named_modules()), {}
    scores, masks = {}, {}
    for name, mask in channel_masks.items():
        scores[name] = channel_scores(blocks[name]).cpu()
        masks[name] = mask.view(len(scores[name]), -1)[:, 0]
        size[name] = len(mask) // len(scores[name])
    live = live_counts(masks)
    cut = {name: round(fraction * n) for name, n in live.items()}
    if scope == "global":
        ranked = sorted((score, name) for name in masks  # the best group of a block is not up for it
                        for score in scores[name][masks[name]].sort().values[:-1].tolist())
        cut = dict.fromkeys(masks, 0)
        for _, name in ranked[:round(fraction * sum(live.values()))]:
            cut[name] += 1
    kept = keep_largest(scores, masks, {name: max(1, n - cut[name]) for name, n in live.items()})
    return {name: mask.repeat_interleave(size[name]) for name, mask in kept.items()}


def random_channels(channel_masks, model, generator):
    """The control: as many groups live in every block, chosen at random."""
    blocks, new = dict(model.named_modules()), {}
    for name, mask in channel_masks.items():
        groups = blocks[name].norm2.num_groups
        new[name] = mask.view(groups, -1)[torch.randperm(groups, generator=generator)].flatten()
    return new


def shrink(model, channel_masks):
    """A smaller UNet, without the pruned hidden channels, with the outputs of one in which they are all 0.

    The widths of the residual stream, of its skips and of attention stay as they are, because every block of
    a level writes into the same stream; `small`, a narrower network, is the control that shrinks those too.
    """
    hidden = {name: int(mask.sum()) for name, mask in channel_masks.items()}
    small = UNet(**{**model.config, "hidden": hidden}).to(next(model.parameters()).device)
    state = model.state_dict()
    for block, mask in channel_masks.items():
        for part in ("conv1.weight", "conv1.bias", "time.weight", "time.bias", "norm2.weight", "norm2.bias",
                     "conv2.weight"):
            name, axis = f"{block}.{part}", int(part == "conv2.weight")  # conv2 reads them: its columns
            state[name] = state[name].index_select(axis, mask.nonzero().flatten().to(state[name].device))
    small.load_state_dict(state)
    return small


def narrower(config, parameters):
    """UNet arguments of the narrower dense network of about `parameters` parameters: the control `small`.

    `base` steps by 4, to what GroupNorm can split, and at each the hidden widths of all residual blocks by
    quarters, in whole groups; the nearest count wins, of equals the one with the widest hidden layers.
    """
    sizes = []
    for base, share in itertools.product(range(4, config["base"] + 1, 4), (1.0, 0.75, 0.5, 0.25)):
        with contextlib.suppress(ValueError), torch.device("meta"):  # for a width that GroupNorm cannot split
            full, hidden = UNet(**{**config, "base": base}), {}
            for name, block in full.named_modules():
                if isinstance(block, ResBlock):
                    groups = block.norm2.num_groups
                    hidden[name] = max(1, round(share * groups)) * (block.conv1.out_channels // groups)
            found = {**config, "base": base, "hidden": hidden}
            sizes.append((sum(p.numel() for p in UNet(**found).parameters()), found))
    return min(sizes, key=lambda size: abs(size[0] - parameters))[1]


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
        raise OSError(f"{path} is not a whole ticket file ({type(error).__name__}); "
                      "run again to write it anew")
    return model, masks
