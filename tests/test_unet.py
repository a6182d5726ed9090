"""unet.py: parameters and MACs of the published network, shapes, initialisation, attention, folding,
narrower networks.

Exact unless a tolerance is written beside the comparison.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metrics
import unet
from unet import PRESETS, Attention, Downsample, GroupNorm, ResBlock, UNet, Upsample, narrower

SMALL = dict(channels=1, base=8, mults=(1, 2), image_size=8)


def small(seed=0, **changes):
    """A tiny network in eval mode whose weights are all random: a new one computes 0 whatever it is given."""
    torch.manual_seed(seed)
    model = UNet(**SMALL | changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def inputs(n=3, channels=1, size=8, seed=1):
    """x (n, C, size, size) and n different t."""
    x = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(n) * 300 + 5


@pytest.fixture
def meta(monkeypatch):
    """Shapes without numbers: networks are built and run in no time, so the big one may be too."""
    monkeypatch.setattr(UNet, "_initialise", lambda self: None)  # nothing to fill
    with torch.device("meta"):
        yield


# -------------------------------------------------------------------------------------- the published network

def test_paper_has_35_746_307_parameters(meta):
    model = UNet(channels=3, **PRESETS["paper"])
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


def test_paper_macs(meta):
    model = UNet(channels=3, **PRESETS["paper"])
    macs = metrics.count_macs(model, torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    products = sum(dense for name, (dense, _) in macs.items() if name.endswith("products"))
    total = sum(dense for dense, _ in macs.values())
    assert total == 6_221_856_768
    assert round((total - products) / 1e9, 2) == 6.05
    # 2 blocks down, 3 up at 16x16, 1 in the middle at 4x4: 2 products of N*N*C each
    assert products == 2 * 256 * (5 * 256 ** 2 + 16 ** 2)


def test_paper_hidden_convolutions_hold_73_6_percent_of_the_macs(meta):
    model = UNet(channels=3, **PRESETS["paper"])
    macs = metrics.count_macs(model, torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    hidden = sum(d for name, (d, _) in macs.items() if name.endswith((".conv1", ".conv2")))
    share = hidden / sum(d for d, _ in macs.values())
    assert share == pytest.approx(0.736, abs=5e-4)
    assert 1 / (1 - 0.75 * share) == pytest.approx(2.23, abs=5e-3)
    assert 1 / (1 - 0.875 * share) == pytest.approx(2.81, abs=5e-3)


# ----------------------------------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_output_shape_of_every_preset(meta, preset, channels, size):
    sizes = PRESETS[preset]
    if size % (sizes.get("patch", 1) * 2 ** (len(sizes["mults"]) - 1)):
        with pytest.raises(ValueError, match=f"image_size={size}"):
            UNet(channels, image_size=size, **sizes)
        return
    model = UNet(channels, image_size=size, **sizes)
    x = torch.zeros(2, channels, size, size)
    assert model(x, torch.zeros(2, dtype=torch.int64)).shape == x.shape


def test_small_presets_fit_28_pixels_and_every_preset_fits_32(meta):
    assert all(UNet(1, image_size=28, **PRESETS[name]) for name in ("tiny", "mnist"))
    assert all(UNet(3, image_size=32, **PRESETS[name]) for name in PRESETS)


@pytest.mark.parametrize("changes", [
    dict(blocks=2), dict(mults=(1,)), dict(mults=(1, 2, 4), attention=(4, 2)), dict(mults=(2, 1)),
    dict(base=20), dict(channels=3, patch=2), dict(channels=3, patch=4),
    dict(blocks=3, attention=(8,), dropout=0.5)])
def test_output_shape(changes):
    model = small(**changes)
    channels = changes.get("channels", 1)
    with torch.no_grad():
        out = model(*inputs(channels=channels))
    assert out.shape == (3, channels, 8, 8) and out.dtype == torch.float32
    assert bool(torch.isfinite(out).all()) and float(out.abs().max()) > 0


def test_resampling_halves_and_doubles():
    x = torch.randn(2, 4, 6, 6)
    down, up = Downsample(4), Upsample(4)
    assert down(x).shape == (2, 4, 3, 3) and up(x).shape == (2, 4, 12, 12)
    padded = torch.zeros(2, 4, 7, 7)
    padded[..., :6, :6] = x  # zeros on the right and below only
    assert torch.equal(down(x), F.conv2d(padded, down.weight, down.bias, stride=2))
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(up(x), F.conv2d(repeated, up.weight, up.bias, padding=1))


# --------------------------------------------------------------------------------------------- initialisation

@pytest.mark.parametrize("changes", [dict(), dict(attention=(8, 4), blocks=2), dict(patch=2, channels=3)])
def test_output_is_zero_at_initialisation(changes):
    model = UNet(**SMALL | changes)
    x, t = inputs(channels=changes.get("channels", 1))
    assert torch.equal(model(x, t), torch.zeros_like(x))


def test_the_last_layer_of_every_branch_starts_at_zero_and_no_other():
    model = UNet(**SMALL | dict(attention=(8,), blocks=2))
    zero = {f"{name}.conv2" for name, m in model.named_modules() if isinstance(m, ResBlock)}
    zero |= {f"{name}.out" for name, m in model.named_modules() if isinstance(m, Attention)} | {"conv_out"}
    assert len(zero) == (4 + 2 + 6) + (2 + 1 + 3) + 1
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert bool((m.weight == 0).all()) == (name in zero), name
            assert not m.bias.any(), name
            fan = (m.weight.shape[0] + m.weight.shape[1]) * m.weight[0, 0].numel()
            assert float(m.weight.detach().abs().max()) <= math.sqrt(6 / fan), name  # Glorot-uniform
        elif isinstance(m, nn.GroupNorm):
            assert bool((m.weight == 1).all()) and not m.bias.any(), name


def test_every_weight_is_wired_in():
    model = small(attention=(8,), blocks=2)
    model(*inputs()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---------------------------------------------------------------------------------------- attention and norms

@pytest.mark.parametrize("attention, expected", [
    ((), [4]), ((16,), [16, 4, 16, 16]), ((8,), [8, 4, 8, 8]), ((16, 4), [16, 4, 4, 4, 4, 16, 16])])
def test_attention_runs_exactly_where_asked(attention, expected):
    """At 16, 8, 4 pixels and one block a level: once down, twice up, and always once in the middle."""
    model, seen = small(mults=(1, 2, 2), image_size=16, attention=attention), []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[-1]))
    model(*inputs(size=16))
    assert seen == expected


def test_attention_resolutions_count_after_folding(meta):
    model = UNet(3, **PRESETS["cifar"])  # patch 2: levels at 16, 8, 4
    places = [name for name, m in model.named_modules() if isinstance(m, Attention)]
    assert places == ["down.1.attention.0", "down.1.attention.1", "mid.1",
                      "up.1.attention.0", "up.1.attention.1", "up.1.attention.2"]


def test_attention_equals_torch():
    torch.manual_seed(0)
    layer, x = Attention(16), torch.randn(2, 16, 4, 6)
    nn.init.normal_(layer.out.weight)
    nn.init.normal_(layer.qkv.bias)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # 3 x (B, N, C)
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 16, 4, 6)
    torch.testing.assert_close(layer(x), x + layer.out(h), rtol=0, atol=1e-5)
    assert layer.product_macs(x) == 2 * 2 * 16 * 24 ** 2


def test_norms_have_min_32_or_a_quarter_of_the_channels_as_groups(meta):
    for preset in PRESETS:
        norms = [m for m in UNet(3, **PRESETS[preset]).modules() if isinstance(m, nn.GroupNorm)]
        assert all(m.num_groups == min(32, m.num_channels // 4) and m.eps == 1e-6 for m in norms)
    norms = [m for m in UNet(3, **PRESETS["paper"]).modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {32}
    assert GroupNorm(24).num_groups == 6 and GroupNorm(24, 3).num_groups == 3


def test_norm_computes_in_float32():
    x, norm = 100 + torch.randn(2, 8, 4, 4).bfloat16(), GroupNorm(8)  # bfloat16 knows 100 to 0.5 alone
    wanted = norm(x.float())
    assert torch.equal(norm(x), wanted.bfloat16())
    with torch.inference_mode():
        found = norm(x.contiguous(memory_format=torch.channels_last))
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), wanted, rtol=2 ** -8, atol=2 ** -8)  # one rounding


# ------------------------------------------------------------------------------------------- time and batches

def test_time_features():
    t, dim = torch.tensor([0, 1, 999]), 8
    wanted = [[f(step * 10_000 ** (-i / 3)) for f in (math.sin, math.cos) for i in range(4)]
              for step in t.tolist()]
    torch.testing.assert_close(unet.time_features(t, dim), torch.tensor(wanted), rtol=0, atol=1e-4)


def test_time_changes_the_output():
    model, (x, _) = small(), inputs()
    a, b = (model(x, torch.full((3,), t)).detach() for t in (10, 11))
    assert float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize("changes", [dict(), dict(patch=2), dict(attention=(8, 4), blocks=2)])
def test_images_of_a_batch_do_not_see_each_other(changes):
    model, (x, t) = small(**changes), inputs(4)
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, t), alone, rtol=0, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order], t[order]), alone[order], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ folding of pixels

def test_patch_is_exact_folding():
    """A network with patch=2 is the one without, on images whose 2x2 tiles became channels, as here."""
    folded, plain = small(channels=3, image_size=16, patch=2), small(channels=12, image_size=8)
    plain.load_state_dict(folded.state_dict())
    x, t = inputs(channels=3, size=16)
    tiles = x.reshape(3, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(3, 12, 8, 8)
    out = plain(tiles, t).reshape(3, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(3, 3, 16, 16)
    assert torch.equal(folded(x, t), out)


# -------------------------------------------------------------------------------------- sizes that do not fit

@pytest.mark.parametrize("changes, word", [
    (dict(image_size=10, mults=(1, 2, 2)), "image_size=10"), (dict(image_size=12, patch=8), "image_size=12"),
    (dict(base=6), "width 6"), (dict(base=5, mults=(1,)), "width 5"), (dict(base=0), "width 0"),
    (dict(base=100), "width 200"), (dict(base=3), "width 3"), (dict(blocks=0), "blocks"),
    (dict(mults=()), "mults"), (dict(patch=0), "patch"), (dict(image_size=0), "image_size"),
    (dict(hidden={"down.0.blocks.0": 6}), "hidden=6"), (dict(hidden={"mid.0": 0}), "hidden=0")])
def test_sizes_that_do_not_fit_are_one_line(changes, word):
    with pytest.raises(ValueError) as caught:
        UNet(**SMALL | changes)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_concatenated_widths_that_do_not_fit_are_one_line():
    with pytest.raises(ValueError) as caught:
        UNet(**SMALL | dict(base=36, mults=(1, 2)))  # 72 + 72 channels are not 32 groups
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- shrunk networks

def test_hidden_narrows_one_block_only():
    full, thin = small(base=16), small(base=16, hidden={"up.0.blocks.1": 8})
    changed = {name for name, p in full.state_dict().items() if p.shape != thin.state_dict()[name].shape}
    block = "up.0.blocks.1."
    assert changed == {block + n for n in ("conv1.weight", "conv1.bias", "time.weight", "time.bias",
                                           "norm2.weight", "norm2.bias", "conv2.weight")}
    block = thin.up[0].blocks[1]
    assert block.conv1.weight.shape[0] == block.norm2.num_channels == block.conv2.weight.shape[1] == 8
    assert block.norm2.num_groups == 2  # of 4 channels, as 8 groups of 32 were
    assert thin(*inputs()).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("out", [16, 256])
def test_hidden_equals_the_masked_block(out):
    """Whole groups gone: the narrow block is the wide one with its conv2 blind to those channels."""
    torch.manual_seed(0)
    size = out // min(32, out // 4)  # channels of a group: 4 up to a width of 128, then more
    wide, thin = ResBlock(8, out, 12), ResBlock(8, out, 12, hidden=2 * size)
    live = torch.arange(out).view(-1, size)[[0, 3]].flatten()  # groups 0 and 3
    with torch.no_grad():
        for p in wide.parameters():
            p.normal_()
        keep = {"conv1.weight": 0, "conv1.bias": 0, "time.weight": 0, "time.bias": 0,
                "norm2.weight": 0, "norm2.bias": 0, "conv2.weight": 1}
        thin.load_state_dict({n: p.index_select(keep[n], live) if n in keep else p
                              for n, p in wide.state_dict().items()})
        dead = torch.ones(out, dtype=torch.bool)
        dead[live] = False
        wide.conv2.weight[:, dead] = 0
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 12)
    assert thin.norm2.num_groups == 2
    torch.testing.assert_close(thin(x, emb), wide(x, emb), rtol=0, atol=1e-4)  # values of size 10


def test_config_rebuilds_the_network(meta):
    model = UNet(3, **PRESETS["cifar"], hidden={"mid.0": 64})
    again = UNet(**model.config)
    assert again.config == model.config
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


# ------------------------------------------------------------------------------------------ narrower networks

def size_of(config):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**config).parameters())


@pytest.mark.parametrize("base", [4, 16, 32])
def test_narrower_finds_a_plain_network_again(meta, base):
    config = UNet(**SMALL | dict(base=32)).config
    wanted = size_of({**config, "base": base})
    found = narrower(config, wanted)
    assert found["base"] == base and size_of(found) == wanted
    whole = UNet(**{**config, "base": base})
    blocks = {name: m.conv1.out_channels for name, m in whole.named_modules() if isinstance(m, ResBlock)}
    assert found["hidden"] == blocks  # of networks of equal size, the one with whole blocks


@pytest.mark.parametrize("wanted", [20_000, 60_000])
def test_narrower_meets_counts_in_between_by_the_hidden_widths(meta, wanted):
    config = UNet(**SMALL | dict(base=32)).config
    found = narrower(config, wanted)
    assert abs(size_of(found) / wanted - 1) < 0.2
    assert {**found, "base": 0, "hidden": 0} == {**config, "base": 0, "hidden": 0}  # all else stays


def test_narrower_leaves_the_random_state_alone():
    config, before = UNet(**SMALL).config, torch.random.get_rng_state()
    narrower(config, 1000)
    assert torch.equal(before, torch.random.get_rng_state())
