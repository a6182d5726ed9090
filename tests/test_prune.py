"""prune.py: exact counts, per-layer minimum, zeros that stay zero, rewinding to the bit, ticket files.

Exact unless a tolerance is written beside the comparison.
"""
import copy
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import prune
from ddpm import Diffusion, batch_at, train
from prune import (allocate, apply_masks, at_minimum, blocks_of, dense_masks, density, keep_largest, least_kept,
                   live_counts, live_total as total, load_ticket, mask_hooks, pack_masks, prunable,
                   prune_magnitude, prune_scores, ramp_rates, random_masks, rewind, save_ticket, unpack_masks)
from unet import PRESETS, ResBlock, UNet

FRACTIONS = (0.0, 0.001, 0.1, 0.2, 1 / 3, 0.5, 0.77, 0.9)


def net(seed=0, **changes):
    """A tiny U-Net with all its weights (and biases) random normal: new ones hold zeros."""
    torch.manual_seed(seed)
    model = UNet(**dict(channels=1, base=8, mults=(1, 2), image_size=8, attention=(4,)) | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def images(n=16):
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def nested(new, old):
    return all(bool((old[name] | ~new[name]).all()) for name in old)


def copies(state):
    return {name: value.clone() for name, value in state.items()}


# ------------------------------------------------------------------------------------------- what masks cover

def test_masks_cover_conv_and_linear_weights_only():
    model = net()
    weights = prunable(model)
    assert list(weights) == [n for n, p in model.named_parameters() if p.dim() > 1]
    assert {p.dim() for p in weights.values()} == {2, 4}
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    assert norms and not any(n.endswith("bias") or n.rsplit(".", 1)[0] in norms for n in weights)
    assert all(p is dict(model.named_parameters())[n] for n, p in weights.items())


def test_dense_masks_density_and_counts():
    model = net()
    masks = dense_masks(model)
    n = sum(p.numel() for p in prunable(model).values())
    assert all(m.dtype == torch.bool and m.shape == prunable(model)[k].shape for k, m in masks.items())
    assert density(masks) == 1.0 and total(masks) == n
    masks["conv_in.weight"][0] = False
    assert total(masks) == n - 9 and density(masks) == (n - 9) / n
    assert live_counts(masks)["conv_in.weight"] == 63


# ----------------------------------------------------------------------------------------------- exact counts

@pytest.mark.parametrize("equal", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_global_cut_is_exact(fraction, equal):
    model = net()
    if equal:
        for p in prunable(model).values():
            nn.init.constant_(p, 0.5)
    masks = dense_masks(model)
    new = prune_magnitude(model, masks, fraction)
    assert total(masks) - total(new) == round(fraction * total(masks))
    again = prune_magnitude(model, new, fraction)
    assert total(new) - total(again) == round(fraction * total(new)) and nested(again, new)
    assert all(bool(m.all()) for m in masks.values())  # what came in is left as it was


@pytest.mark.parametrize("equal", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_layer_cut_is_exact_in_every_layer(fraction, equal):
    model = net()
    if equal:
        for p in prunable(model).values():
            nn.init.constant_(p, -0.5)
    new = prune_magnitude(model, dense_masks(model), fraction, scope="layer")
    for name, mask in new.items():
        assert mask.numel() - int(mask.sum()) == round(fraction * mask.numel()), name
    again = prune_magnitude(model, new, fraction, scope="layer")
    for name, mask in again.items():
        live = int(new[name].sum())
        assert live - int(mask.sum()) == round(fraction * live), name
    assert nested(again, new)


def test_layer_cut_with_a_layer_too_small_to_lose_any():
    """round(0.2 * 2) = 0 weights of one layer go, and exactly round(0.2 n) of the others all the same."""
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.9, scope="layer")
    masks["conv_in.weight"][:] = False
    masks["conv_in.weight"][:2, 0, 0, 0] = True  # and the minimum, one at this density, would let one go
    new = prune_magnitude(model, masks, 0.2, scope="layer")
    for name, live in live_counts(masks).items():
        assert live - int(new[name].sum()) == round(0.2 * live), name


@pytest.mark.parametrize("fraction", FRACTIONS[1:6])
def test_layer_fractions_keep_the_total_and_the_proportions(fraction):
    """Rates from 1 to 1.5 by layer: the total is exact, each layer within one weight of its share."""
    model = net()
    masks = dense_masks(model)
    rates = {name: 1 + 0.5 * j / len(masks) for j, name in enumerate(masks)}
    new = prune_magnitude(model, masks, fraction, layer_fractions=rates)
    cut = round(fraction * total(masks))
    assert total(masks) - total(new) == cut
    c = cut / sum(rates[n] * m.numel() for n, m in masks.items())
    for name, mask in new.items():
        assert abs(mask.numel() - int(mask.sum()) - c * rates[name] * mask.numel()) <= 1, name


def test_layer_fractions_of_zero_spare_a_layer():
    model = net()
    masks = dense_masks(model)
    rates = {name: 0.0 if name == "conv_in.weight" else 0.3 for name in masks}
    new = prune_magnitude(model, masks, 0.2, layer_fractions=rates)
    cut = round(0.2 * total(masks))
    assert bool(new["conv_in.weight"].all()) and total(masks) - total(new) == cut
    for name in masks:
        if name != "conv_in.weight":
            share = cut * masks[name].numel() / (total(masks) - 72)
            assert abs(masks[name].numel() - int(new[name].sum()) - share) <= 1, name


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_ten_rounds_are_nested(scope):
    """n_r = n_{r-1} - round(0.2 n_{r-1}), of the total or of every layer; weights change in between."""
    model = net()
    masks = dense_masks(model)
    for r in range(10):
        new = prune_magnitude(model, masks, 0.2, scope)
        if scope == "global":
            assert total(new) == total(masks) - round(0.2 * total(masks))
        else:
            assert live_counts(new) == {k: n - round(0.2 * n) for k, n in live_counts(masks).items()}
        assert nested(new, masks)
        masks = new
        apply_masks(model, masks)
        with torch.no_grad():
            for name, p in prunable(model).items():
                p.add_(0.1 * torch.randn(p.shape) * masks[name])
    assert density(masks) == pytest.approx(0.8 ** 10, abs=2e-3)


def test_the_dead_are_not_cut_again_when_they_are_not_zero():
    """A mask decides what is live, not the weight: large values under a dead mask change nothing, not even in
    a layer of small weights, which the minimum protects."""
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.5, scope="layer")
    with torch.no_grad():
        prunable(model)["mid.0.conv1.weight"].mul_(1e-6)
    wanted = prune_magnitude(model, masks, 0.3)
    with torch.no_grad():
        for name, p in prunable(model).items():
            p[~masks[name]] = 100.0
    got = prune_magnitude(model, masks, 0.3)
    assert all(torch.equal(got[name], wanted[name]) for name in masks)


# --------------------------------------------------------------- which ones go, and what every layer keeps

@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_the_smallest_go(fraction):
    """All layers alike, so none is at its minimum: the largest |w| cut is below the smallest |w| kept."""
    model = net()
    for scope in ("global", "layer"):
        new = prune_magnitude(model, dense_masks(model), fraction, scope)
        gone = {n: p[~new[n]].abs() for n, p in prunable(model).items()}
        kept = {n: p[new[n]].abs() for n, p in prunable(model).items()}
        if scope == "global":
            gone, kept = {"": torch.cat(list(gone.values()))}, {"": torch.cat(list(kept.values()))}
        assert all(float(gone[n].detach().max()) < float(kept[n].detach().min()) for n in gone)


def test_sign_does_not_matter():
    model = net()
    before = prune_magnitude(model, dense_masks(model), 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()
    after = prune_magnitude(model, dense_masks(model), 0.5)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_of_small_weights_keeps_its_minimum():
    """Its whole layer is the smallest of all: it keeps exactly ceil(0.1 d n), and the best of its own; the
    total stays exact and the next smallest go instead."""
    model, name = net(), "mid.0.conv1.weight"
    with torch.no_grad():
        prunable(model)[name].mul_(1e-6)
    masks = dense_masks(model)
    new = prune_magnitude(model, masks, 0.5)
    assert total(new) == total(masks) - round(0.5 * total(masks))
    w, alive = prunable(model)[name].detach().abs(), new[name]
    assert int(alive.sum()) == math.ceil(0.1 * density(new) * alive.numel())
    assert float(w[alive].min()) > float(w[~alive].max())
    others = [p.detach().abs() for n, p in prunable(model).items() if n != name]
    rest = [new[n] for n in masks if n != name]
    kept, gone = (torch.cat([p[m == alive] for p, m in zip(others, rest)]) for alive in (True, False))
    assert float(gone.max()) < float(kept.min())


@pytest.mark.parametrize("scope", ["global", "layer_fractions"])
def test_no_layer_is_emptied_by_a_cut_of_99_9_percent(scope):
    """Every layer keeps at least max(1, 0.1 d n) of its n weights, however unequal they are."""
    model = net(base=24)
    with torch.no_grad():
        for j, p in enumerate(prunable(model).values()):
            p.mul_(10.0 ** -j)
    masks = dense_masks(model)
    rates = {name: 1.0 + j for j, name in enumerate(masks)} if scope == "layer_fractions" else None
    new = prune_magnitude(model, masks, 0.999, layer_fractions=rates)
    assert total(new) == total(masks) - round(0.999 * total(masks))
    for name, mask in new.items():
        assert int(mask.sum()) >= max(1, 0.1 * density(new) * mask.numel()), name
    assert min(live_counts(new).values()) == 1


def test_the_minimum_never_asks_for_more_than_lives():
    model = net()
    masks = dense_masks(model)
    masks["conv_in.weight"][:] = False
    masks["conv_in.weight"][0, 0, 0, 0] = True
    new = prune_magnitude(model, masks, 0.3)
    assert total(new) == total(masks) - round(0.3 * total(masks)) and int(new["conv_in.weight"].sum()) == 1


def test_zero_initialised_layers_survive_magnitude_at_init():
    """Their weights all tie at 0, the smallest there is: the minimum is what keeps them."""
    torch.manual_seed(0)
    model = UNet(channels=1, base=8, mults=(1, 2), image_size=8)
    new = prune_magnitude(model, dense_masks(model), 0.5)
    n = sum(m.numel() for m in new.values())
    assert total(new) == n - round(0.5 * n)
    for name in ("conv_out.weight", "mid.0.conv2.weight", "mid.1.out.weight"):
        assert int(new[name].sum()) == math.ceil(0.1 * density(new) * new[name].numel())


def test_more_than_the_minimum_allows_is_refused():
    model = net()
    for scope in ("global", "layer"):
        with pytest.raises(ValueError) as caught:
            prune_magnitude(model, dense_masks(model), 0.9999, scope)
        assert "cannot" in str(caught.value) and "\n" not in str(caught.value)


def test_other_scores():
    """prune_scores ranks whatever it is given: the smallest position number goes first."""
    model = net()
    masks = dense_masks(model)
    scores = {name: torch.arange(mask.numel()).float().view(mask.shape) for name, mask in masks.items()}
    new = prune_scores(scores, masks, 0.25, scope="layer")
    for name, mask in new.items():
        cut = round(0.25 * mask.numel())
        assert torch.equal(mask.flatten(), torch.arange(mask.numel()) >= cut)


@pytest.mark.parametrize("fraction", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_fractions_outside_0_to_1_raise(fraction):
    model = net()
    with pytest.raises(ValueError, match="fraction="):
        prune_magnitude(model, dense_masks(model), fraction)


def test_unknown_scope_raises():
    model = net()
    with pytest.raises(ValueError, match="scope='row'"):
        prune_magnitude(model, dense_masks(model), 0.1, scope="row")


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_raise(value, scope):
    model = net()
    with torch.no_grad():
        prunable(model)["mid.0.conv1.weight"][0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match="mid.0.conv1.weight"):
        prune_magnitude(model, dense_masks(model), 0.1, scope)


def test_keep_largest():
    scores, masks = {"a": torch.tensor([5.0, 1.0, 9.0, 7.0])}, {"a": torch.tensor([True, True, False, True])}
    assert keep_largest(scores, masks, {"a": 2})["a"].tolist() == [True, False, False, True]
    assert keep_largest(scores, masks, {"a": 0})["a"].tolist() == [False] * 4


# --------------------------------------------------------------------------------------------------- allocate

def test_allocate_hits_totals_and_bounds():
    """300 seeded cases: the sum is exact, every count within its bounds."""
    rng = np.random.default_rng(0)
    for case in range(300):
        names = [f"layer{j}" for j in range(rng.integers(1, 12))]
        low = {n: int(rng.integers(0, 20)) for n in names}
        high = {n: low[n] + int(rng.integers(0, 200)) for n in names}
        rates = {n: float(rng.choice([0.0, 1e-9, rng.random(), 1e4])) for n in names}
        wanted = int(rng.integers(sum(low.values()), sum(high.values()) + 1))
        got = allocate(rates, wanted, low, high)
        assert list(got) == names and sum(got.values()) == wanted, case
        assert all(type(v) is int and low[n] <= v <= high[n] for n, v in got.items()), case


def test_allocate_keeps_proportions():
    """Between its bounds every count is within one of c * rate with one c for all."""
    rng = np.random.default_rng(1)
    for case in range(100):
        rates = {n: float(rng.random() + 0.01) for n in range(8)}
        low, high = {n: 5 for n in range(8)}, {n: int(rng.integers(20, 400)) for n in range(8)}
        got = allocate(rates, int(rng.integers(40, sum(high.values()))), low, high)
        free = [n for n in got if low[n] < got[n] < high[n]]
        least, most = max((got[n] - 1) / rates[n] for n in free), min((got[n] + 1) / rates[n] for n in free)
        assert least <= most + 1e-9, case
        assert all(least * rates[n] <= low[n] + 1 for n in got if got[n] == low[n]), case
        assert all(most * rates[n] >= high[n] - 1 for n in got if got[n] == high[n]), case


def test_allocate_exact_rates_are_returned():
    """Rates that already sum to the total come back as they are, a rate of 0 among them."""
    rates, high = dict(a=0, b=20, c=10, d=7), dict(a=2, b=90, c=40, d=7)
    assert allocate(rates, 37, dict.fromkeys(rates, 0), high) == rates
    none, high = dict(a=0, b=0), dict(a=3, b=4)
    assert allocate(none, 0, none, high) == none and sum(allocate(none, 5, none, high).values()) == 5


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_allocate_refuses_rates_that_are_not_finite(rate):
    with pytest.raises(ValueError, match="finite"):
        allocate(dict(a=1.0, b=rate), 5, dict(a=0, b=0), dict(a=10, b=10))


@pytest.mark.parametrize("wanted", [3, 21])
def test_allocate_refuses_what_the_bounds_forbid(wanted):
    with pytest.raises(ValueError, match=f"cannot place {wanted} weights between 4 and 20"):
        allocate(dict(a=1, b=1), wanted, dict(a=2, b=2), dict(a=10, b=10))


# ----------------------------------------------------------------------------------------------- other scopes

def test_erk_against_two_layers_solved_by_hand():
    """Linear 4x4 (sum 8) and conv 8x8x3x3 (sum 22): of 60 weights the first takes 8/30 = 16, all it has."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(8, 8, 3))
    masks, n = dense_masks(model), 16 + 576
    new = prune_magnitude(model, masks, 1 - 60 / n, scope="erk")
    assert live_counts(new) == {"0.weight": 16, "1.weight": 44}
    new = prune_magnitude(model, masks, 1 - 30 / n, scope="erk")
    assert live_counts(new) == {"0.weight": 8, "1.weight": 22}  # 30 * 8/30 and 30 * 22/30


def test_ramp_rates_grow_by_block():
    model = net(base=16)
    rates = ramp_rates(model, 0.2, 0.01)
    values, owner = list(rates.values()), blocks_of(model)
    assert list(rates) == list(prunable(model)) and values[0] == 0.2
    blocks = [name for name, m in model.named_modules() if isinstance(m, ResBlock)]
    assert list(dict.fromkeys(owner.values())) == blocks
    assert {name: 0.2 + 0.01 * blocks.index(block) for name, block in owner.items()} == rates
    assert owner["conv_in.weight"] == "down.0.blocks.0" and owner["conv_out.weight"] == blocks[-1]


def test_blocks_of_a_model_without_blocks_are_its_layers():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert blocks_of(model) == {"0.weight": "0.weight", "2.weight": "2.weight"}
    assert list(ramp_rates(model, 0.2, 0.01).values()) == pytest.approx([0.2, 0.21])


def test_ramp_loses_more_with_depth_and_keeps_the_total():
    """The first round's shares are in the proportions of the rates, to one weight of each layer."""
    model = net(base=16)
    masks, rates = dense_masks(model), ramp_rates(model, 0.2)
    for r in range(12):
        new = prune_magnitude(model, masks, 0.2, scope="ramp")
        assert total(new) == total(masks) - round(0.2 * total(masks)) and nested(new, masks)
        if r == 0:
            c = round(0.2 * total(masks)) / sum(rates[name] * mask.numel() for name, mask in masks.items())
            for name, mask in new.items():
                assert abs(mask.numel() - int(mask.sum()) - c * rates[name] * mask.numel()) <= 1, name
        masks = new
    assert min(live_counts(masks).values()) >= 1  # taken literally, late blocks would be empty by now


@pytest.mark.parametrize("scope", ["global", "layer", "ramp", "erk"])
@pytest.mark.parametrize("preset", ["tiny", "mnist"])
def test_fifteen_rounds_fit_small_presets(preset, scope):
    """To 96.5 % in a network whose last convolutions hold zeros: nobody is below the minimum."""
    torch.manual_seed(0)
    model = UNet(1, image_size=28, **PRESETS[preset])
    masks = dense_masks(model)
    for _ in range(15):
        masks = prune_magnitude(model, masks, 0.2, scope)
    assert density(masks) == pytest.approx(0.8 ** 15, rel=0.01)
    for name, live in live_counts(masks).items():
        assert live >= least_kept(masks[name].numel(), density(masks)), name


# -------------------------------------------------------------------------------------------------- rewinding

def test_rewind_is_mask_times_theta_to_the_bit():
    theta, model = copies(net(1).state_dict()), net(2)
    masks = random_masks(prune_magnitude(model, dense_masks(model), 0.7), torch.Generator().manual_seed(0))
    kept = copies(theta)
    rewind(model, masks, theta)
    for name, value in model.state_dict().items():
        wanted = torch.where(masks[name], kept[name], torch.zeros(())) if name in masks else kept[name]
        assert torch.equal(value, wanted), name
        assert torch.equal(theta[name], kept[name]), name  # theta serves the next round too
    assert any(name.endswith("bias") and value.any() for name, value in model.state_dict().items())


def test_rewind_with_full_masks_is_theta():
    model, theta = net(2), net(1).state_dict()
    rewind(model, dense_masks(model), theta)
    assert all(torch.equal(value, theta[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_rewind_lays_the_masks_over_the_whole_state(optimizer):
    """Weights, average and moments are masked, the rest is as it was; the state given is left alone."""
    model, states = net(), []
    train(model, Diffusion(), images(), steps=3, batch=4, optimizer=optimizer,
          checkpoint=lambda step, get: states.append(copy.deepcopy(get())))
    state, names = states[2], [name for name, _ in model.named_parameters()]
    kept, masks = copy.deepcopy(state), prune_magnitude(model, dense_masks(model), 0.6)
    back = rewind(model, masks, state)
    assert back["step"] == 2 and back["ema_updates"] == 2 and back["losses"] == kept["losses"]
    for part in ("model", "ema"):
        for name, value in back[part].items():
            mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, torch.where(mask, kept[part][name], 0.0)), (part, name)
            assert torch.equal(state[part][name], kept[part][name])
    assert all(torch.equal(value, back["model"][name]) for name, value in model.state_dict().items())
    found, old = back["optimizer"]["state"], kept["optimizer"]["state"]
    assert found.keys() == old.keys() == set(range(len(names)))
    for i, name in enumerate(names):
        for key, value in old[i].items():
            mask = masks.get(name)
            if value is not None and mask is not None and value.shape == mask.shape:
                assert torch.equal(found[i][key], torch.where(mask, value, 0.0)) and value[~mask].any()
            else:
                assert value is None or torch.equal(found[i][key], value)  # step counts, biases, norms
    assert back["optimizer"]["param_groups"] == kept["optimizer"]["param_groups"]


def test_a_state_under_masks_trains_on_sparse_and_leaves_the_state_alone():
    """Zeros in weights, average and moments from the first step on, without a word from the hooks' start."""
    model, states, seen = net(), [], []
    train(model, Diffusion(), images(), steps=2, batch=4,
          checkpoint=lambda step, get: states.append(copy.deepcopy(get())))
    masks = prune_magnitude(model, dense_masks(model), 0.6)
    back = rewind(model, masks, states[1])
    kept = copy.deepcopy(back)

    def checkpoint(step, get):
        state = get()
        names = [name for name, _ in model.named_parameters()]
        for i, name in enumerate(names):
            if name in masks:
                parts = state["model"][name], state["ema"][name], *state["optimizer"]["state"][i].values()
                assert not any(part[~masks[name]].any() for part in parts if part.shape == masks[name].shape)
        seen.append(step)
    train(model, Diffusion(), images(), steps=4, batch=4, state=back, checkpoint=checkpoint,
          **mask_hooks(model, masks))
    assert seen == [1, 2, 3, 4]
    for part in ("model", "ema"):
        assert all(torch.equal(value, kept[part][name]) for name, value in back[part].items())
    for one, other in zip(back["optimizer"]["state"].values(), kept["optimizer"]["state"].values()):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_apply_masks_zeroes_even_what_is_not_finite():
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.5)
    name = "conv_in.weight"
    with torch.no_grad():
        prunable(model)[name][~masks[name]] = math.nan
    before = copies(model.state_dict())
    apply_masks(model, masks)
    for name, value in model.state_dict().items():
        live = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value[live], before[name][live]) and not value[~live].any(), name


def test_random_masks():
    """As many live weights in every layer, elsewhere; the generator decides all of it."""
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.6)
    kept = copies(masks)
    a, b, c = (random_masks(masks, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for name, mask in masks.items():
        assert a[name].shape == mask.shape and a[name].dtype == torch.bool
        assert int(a[name].sum()) == int(mask.sum()), name
        assert torch.equal(a[name], b[name]) and torch.equal(mask, kept[name])
        assert not torch.equal(a[name], c[name]) and not torch.equal(a[name], mask), name
    overlap = sum(int((a[n] & masks[n]).sum()) for n in masks) / total(masks)
    chance = sum(int(m.sum()) ** 2 / m.numel() for m in masks.values()) / total(masks)
    assert overlap == pytest.approx(chance, abs=0.03)  # more than 5 standard errors


# ----------------------------------------------------------------------------- a ticket stays one in training

@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_pruned_weights_are_zero_after_every_step(optimizer):
    """In the online model, in the EMA and in the optimizer's moments; the live ones move."""
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.8)
    rewind(model, masks, net(5).state_dict())
    start, hooks, steps = copies(model.state_dict()), mask_hooks(model, masks), []

    def after_step(step, model, opt, *rest):
        hooks["after_step"](step, model, opt, *rest)
        for name, p in prunable(model).items():
            dead = ~masks[name]
            assert not p[dead].any(), (step, name)
            moments = [v for v in opt.state[p].values() if isinstance(v, torch.Tensor) and v.shape == p.shape]
            assert moments and not any(bool(v[dead].any()) for v in moments), (step, name)

    def checkpoint(step, get_state):
        state = get_state()
        for part in ("model", "ema"):
            alive = [name for name, mask in masks.items() if state[part][name][~mask].any()]
            assert not alive, (part, state["step"])
        assert state["step"] == step
        steps.append(step)
    ema, _ = train(model, Diffusion(), images(), steps=5, batch=4, optimizer=optimizer, warmup=0,
                   lr=dict(adam=1e-2, sgd=0.5)[optimizer], ema_decay=0.9, checkpoint=checkpoint,
                   after_backward=hooks["after_backward"], after_step=after_step)
    assert steps == [0, 1, 2, 3, 4, 5]
    for name, p in model.state_dict().items():
        live = masks.get(name, torch.ones_like(p, dtype=torch.bool))
        moved = float((p[live] != start[name][live]).float().mean())
        assert moved > 0.3, name  # rounding hides some
        if name in masks:
            assert p.count_nonzero() == ema.model.state_dict()[name].count_nonzero() == live.sum(), name


def test_without_hooks_the_dead_come_back():
    """What the hooks are for: else the test above would pass with nothing to keep."""
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.8)
    apply_masks(model, masks)
    train(model, Diffusion(), images(), steps=1, batch=4, lr=1e-2, warmup=0)
    assert all(bool(p[~masks[name]].any()) for name, p in prunable(model).items())


def test_gradients_are_masked_before_clipping():
    """The first SGD step is lr * g * clip/|g| with g the masked gradient, to 1e-4 of it: dead weights, whose
    gradients are most of the norm, must not eat the clip norm."""
    model, lr, clip = net(), 0.5, 1e-3
    masks = prune_magnitude(model, dense_masks(model), 0.9)
    apply_masks(model, masks)
    before = copies(model.state_dict())
    x0, t, noise = batch_at(images(), 0, 11, 4, False, 1000, torch.Generator())
    Diffusion().loss(model, x0, t, noise).backward()
    gradient = {name: p.grad * masks.get(name, 1) for name, p in model.named_parameters()}
    whole, live = (math.sqrt(sum(float(g.square().sum()) for g in gradients))
                   for gradients in ([p.grad for p in model.parameters()], gradient.values()))
    model.zero_grad()
    assert whole > 1.2 * live > 1.2 * clip
    train(model, Diffusion(), images(), steps=1, batch=4, lr=lr, warmup=0, optimizer="sgd", clip=clip,
          seed=11, **mask_hooks(model, masks))
    moved = {name: before[name] - value for name, value in model.state_dict().items()}
    norm = math.sqrt(sum(float(m.square().sum()) for m in moved.values()))
    assert norm == pytest.approx(lr * clip, rel=1e-3)
    for name in gradient:  # float32 differences of weights of size 0.2: 3e-8 absolute
        torch.testing.assert_close(moved[name], lr * clip / live * gradient[name], rtol=1e-3, atol=6e-8)


def test_full_masks_change_nothing():
    """Training with all-ones masks is dense training, to the bit."""
    a, b = net(), net()
    train(a, Diffusion(), images(), steps=3, batch=4)
    train(b, Diffusion(), images(), steps=3, batch=4, **mask_hooks(b, dense_masks(b)))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


# ----------------------------------------------------------------------------------------------- ticket files

def ticket(path, fraction, **changes):
    """A pruned net and its masks, written to path."""
    model = net(**changes)
    masks = prune_magnitude(model, dense_masks(model), fraction)
    apply_masks(model, masks)
    save_ticket(path, model, masks)
    return model, masks


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.95])
def test_ticket_round_trip(tmp_path, fraction):
    path = tmp_path / "a.ticket"
    model, masks = ticket(path, fraction, hidden={"mid.0": 8}, patch=2)
    again, again_masks = load_ticket(path)
    assert again.config == model.config
    assert list(again_masks) == list(masks) and list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(again_masks[name], masks[name]) for name in masks)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_ticket_is_smaller_when_sparser(tmp_path):
    """Four bytes a live weight, to 1 % of the difference; the rest of the file stays the same size."""
    sizes, lives = [], []
    for fraction in (0.0, 0.5, 0.9):
        path = tmp_path / f"{fraction}.ticket"
        _, masks = ticket(path, fraction, base=16)
        sizes.append(os.path.getsize(path))
        lives.append(total(masks))
    assert sizes[0] > sizes[1] > sizes[2]
    for i in (1, 2):
        assert sizes[0] - sizes[i] == pytest.approx(4 * (lives[0] - lives[i]), rel=0.01)


def test_ticket_stores_live_values_only(tmp_path):
    """What lies under a dead mask is not written: it comes back as 0."""
    model, path = net(), tmp_path / "a.ticket"
    masks = prune_magnitude(model, dense_masks(model), 0.5)
    save_ticket(path, model, masks)
    assert all(bool(p.any()) for p in prunable(model).values())
    again, _ = load_ticket(path)
    assert all(not p[~masks[name]].any() for name, p in prunable(again).items())


@pytest.mark.parametrize("damage", ["first half", "one byte short", "empty", "text", "missing", "folder",
                                    "other file", "fewer bits", "one value", "other sizes", "no masks"])
def test_damaged_ticket_is_named(tmp_path, damage):
    path = tmp_path / "damaged.ticket"
    ticket(path, 0.5)
    blob, content = path.read_bytes(), torch.load(path, weights_only=True)
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage in ("first half", "one byte short", "empty", "text"):
        size = {"first half": len(blob) // 2, "one byte short": len(blob) - 1}.get(damage, 0)
        path.write_bytes(b"not a ticket\n" if damage == "text" else blob[:size])
    elif damage != "missing":
        name = "mid.0.conv1.weight"
        if damage == "fewer bits":
            content["bits"][name] = content["bits"][name][:-1]
        elif damage == "one value":
            content["values"][name] = content["values"][name][:1]
        elif damage == "other sizes":
            content["config"]["base"] = 16
        elif damage == "no masks":
            del content["bits"]
        torch.save([1, 2] if damage == "other file" else content, path)
    with pytest.raises(OSError) as caught:
        load_ticket(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_values_is_noticed(tmp_path):
    path = tmp_path / "flipped.ticket"
    model, masks = ticket(path, 0.5)
    blob = bytearray(path.read_bytes())
    name = max(masks, key=lambda n: masks[n].sum())
    where = blob.find(prunable(model)[name].detach()[masks[name]].numpy().tobytes())
    assert where > 0
    blob[where + 6] ^= 1
    path.write_bytes(blob)
    with pytest.raises(OSError, match="flipped.ticket"):
        load_ticket(path)


def test_pack_and_unpack():
    """One bit a weight, the last byte padded; the round trip is exact."""
    model = net()
    masks = random_masks(prune_magnitude(model, dense_masks(model), 0.37), torch.Generator().manual_seed(1))
    masks["conv_in.weight"][:] = False
    bits = pack_masks(masks)
    assert all(b.dtype == torch.uint8 and len(b) == -(-masks[n].numel() // 8) for n, b in bits.items())
    again = unpack_masks(model, bits)
    assert list(again) == list(masks)
    assert all(torch.equal(again[n], masks[n]) and again[n].dtype == torch.bool for n in masks)


def test_pack_handles_counts_that_are_no_multiple_of_eight():
    model = nn.Sequential(nn.Linear(3, 1), nn.Conv2d(1, 1, 3), nn.Linear(5, 5))
    masks = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) < 0.5
             for n, p in prunable(model).items()}
    bits = pack_masks(masks)
    assert [len(b) for b in bits.values()] == [1, 2, 4]
    assert all(torch.equal(m, masks[n]) for n, m in unpack_masks(model, bits).items())


class Odd(nn.Module):
    """Not a U-Net: names that begin alike, a batch norm with an integer buffer, no config."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 5, 3)
        self.norm, self.linear = nn.BatchNorm2d(5), nn.Linear(5, 3)


def test_any_module_goes_into_a_ticket(tmp_path):
    path, model = tmp_path / "odd.ticket", Odd()
    model.norm.num_batches_tracked += 3
    masks = prune_magnitude(model, dense_masks(model), 0.5)
    apply_masks(model, masks)
    save_ticket(path, model, masks)
    other = Odd()
    again, again_masks = load_ticket(path, other)
    assert again is other and list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(again_masks[name], masks[name]) for name in masks)
    for wrong in (None, net(), nn.Linear(2, 2)):  # it has no config, and does not fit others
        with pytest.raises(OSError, match="odd.ticket"):
            load_ticket(path, wrong)


# ------------------------------------------------------------------------------------------- other scores

class Layers(nn.Module):
    """Two layers of four weights, of which one is ten times as small."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
            self.b.weight.copy_(torch.tensor([[0.1, 0.2], [0.3, -0.4]]))


def test_scores_by_hand():
    """|w| empties the small layer; |w| over its rms treats both alike; LAMP keeps the largest of each."""
    model = Layers()
    left = {score: prune_magnitude(model, dense_masks(model), 0.5, score=score)
            for score in ("magnitude", "normalized", "lamp")}
    assert live_counts(left["magnitude"]) == {"a.weight": 3, "b.weight": 1}  # 1 is its minimum
    assert live_counts(left["normalized"]) == live_counts(left["lamp"]) == {"a.weight": 2, "b.weight": 2}
    size, mask = model.a.weight.detach(), torch.tensor([[True, True], [False, True]])
    rms = math.sqrt((1 + 4 + 16) / 3)  # of what lives
    assert torch.allclose(prune.normalized(size, mask).float(), size.abs() / rms, rtol=1e-6)
    lamp = prune.lamp(size, mask).flatten()[torch.tensor([0, 1, 3])]
    assert torch.allclose(lamp, torch.tensor([1 / 21, 4 / 20, 1.0], dtype=torch.float64), rtol=1e-12)
    with pytest.raises(ValueError, match="score='x'"):
        prune_magnitude(model, dense_masks(model), 0.5, score="x")


def test_a_score_of_ones_own_is_an_entry_in_a_table(monkeypatch):
    """It sees weights and mask, and ranks within layers too."""
    monkeypatch.setitem(prune.SCORES, "largest go", lambda w, mask: -w.abs() * mask)
    left = prune_magnitude(Layers(), dense_masks(Layers()), 0.5, "layer", score="largest go")
    assert left["a.weight"].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("score", ["magnitude", "normalized", "lamp"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_scores_keep_exact_counts_and_differ_under_the_global_scope_alone(score, scope):
    model = net(base=16)
    masks = plain = dense_masks(model)
    for fraction in (0.5, 0.37, 0.2):
        before = total(masks)
        masks = prune_magnitude(model, masks, fraction, scope, score=score)
        plain = prune_magnitude(model, plain, fraction, scope)
        if scope != "layer":
            assert total(masks) == before - round(fraction * before)
    same = all(torch.equal(masks[name], plain[name]) for name in masks)
    assert same == (scope != "global" or score == "magnitude")


def test_layers_at_their_minimum_are_counted():
    masks = {"a": torch.arange(1000) < 900, "b": torch.arange(1000) < 45, "c": torch.arange(1000) < 46}
    d = (900 + 45 + 46) / 3000  # 0.33: the minimum is 33.03, rounded up
    assert at_minimum(masks) == [] and least_kept(1000, d) == 34
    masks["b"] = torch.arange(1000) < 33
    assert at_minimum(masks) == ["b"]
    model = net()
    nn.init.normal_(model.conv_out.weight, std=1e-4)  # the first to go
    left = prune_magnitude(model, dense_masks(model), 0.8)
    assert "conv_out.weight" in at_minimum(left) and at_minimum(dense_masks(model)) == []
    assert "conv_out.weight" not in at_minimum(prune_magnitude(model, dense_masks(model), 0.8, "layer"))


# ----------------------------------------------------------------------------------- models of other people

def test_a_bare_layer_and_an_unused_one():
    """The root itself may be the layer; a layer that the loss does not reach has no gradient."""
    assert list(prune.prunable(nn.Linear(3, 3))) == ["weight"]

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)
    model = Half()
    masks = prune_magnitude(model, dense_masks(model), 0.5)
    apply_masks(model, masks)
    hooks, opt = prune.mask_hooks(model, masks), torch.optim.Adam(model.parameters(), 0.1)
    for step in range(3):
        model(torch.randn(4, 6)).square().sum().backward()
        hooks["after_backward"](step, model)
        opt.step()
        hooks["after_step"](step, model, None, None)
    for name, p in prune.prunable(model).items():
        assert not p[~masks[name]].any() and p[masks[name]].all()


def test_mistakes_with_models_are_named(tmp_path):
    with pytest.raises(ValueError, match="no Conv2d or Linear weights"):
        prune_magnitude(nn.Sequential(nn.ReLU()), {}, 0.2)
    a, b = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(4, 4))
    for masks in dense_masks(b), {}:
        with pytest.raises(ValueError, match="masks are of another network"):
            prune_magnitude(a, masks, 0.2)
    prune.save_ticket(tmp_path / "a.ticket", a, dense_masks(a))
    with pytest.raises(OSError, match="is not a whole ticket of this network"):
        prune.load_ticket(tmp_path / "a.ticket")
