"""The denoiser eps(x, t): the U-Net of Ho, Jain and Abbeel, Denoising Diffusion Probabilistic
Models, 2020 (arXiv 2006.11239, appendix B).

    model = UNet(channels=3, **PRESETS["paper"])        # 35,746,307 parameters
    eps = model(x, t)                                   # x (B, C, H, W), t (B,) -> (B, C, H, W)

Going down, each level runs its residual blocks, then halves the resolution. Going up, each block
reads the matching activation of the way down (a skip connection), and each level but the last
doubles the resolution. Attention sits in the middle and where asked for. Needs torch only.
"""
import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

# patch: p x p pixels are folded into channels first (pixel unshuffle). On small cores the same
# seconds buy a much better model at 14x14 than at 28x28. `paper` is Ho et al.'s CIFAR-10 network.
PRESETS = {
    "tiny": dict(base=24, mults=(1, 2), blocks=1, patch=2),
    "mnist": dict(base=32, mults=(1, 2), blocks=1, patch=2),
    "cifar-small": dict(base=32, mults=(1, 2, 2), blocks=1, patch=2),
    "cifar": dict(base=64, mults=(1, 2, 2), blocks=2, attention=(8,), dropout=0.1, patch=2),
    "paper": dict(base=128, mults=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1),
}


class GroupNorm(nn.GroupNorm):
    """GroupNorm with min(32, C//4) groups unless told otherwise; statistics in float32.

    The bfloat16 kernel of CPUs is fast for contiguous tensors only, and its backward pass is slow.
    """

    def __init__(self, channels, groups=None):
        super().__init__(groups or min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x):
        cpu_bf16 = x.device.type == "cpu" and x.dtype == torch.bfloat16
        if cpu_bf16 and not torch.is_grad_enabled():
            out = super().forward(x.contiguous())
            return out.contiguous(memory_format=torch.channels_last)
        return super().forward(x.float()).to(x.dtype)


def time_features(t, dim):
    """Sinusoids of the time step, t (B,) -> (B, dim); wavelengths from 2 pi to 2 pi * 10,000."""
    place = torch.arange(dim // 2, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * place / (dim // 2 - 1))
    angles = t.float()[:, None] * frequencies[None]  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, dim)


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))): the unit that tickets are made of.

    hidden: the width between the convolutions, smaller than `out` only in a shrunk network, where
    norm2 has fewer groups of the same size: then the shrunk block equals the masked one.
    """

    def __init__(self, inp, out, time_dim, dropout=0.0, hidden=None):
        super().__init__()
        hidden = out if hidden is None else hidden
        size = out // min(32, out // 4)  # channels per group
        if hidden % size or hidden < size:
            raise ValueError(f"hidden={hidden} is not whole GroupNorm groups of {size}")
        self.norm1 = GroupNorm(inp)
        self.conv1 = nn.Conv2d(inp, hidden, 3, padding=1)
        self.time = nn.Linear(time_dim, hidden)
        self.norm2 = GroupNorm(hidden, hidden // size)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(hidden, out, 3, padding=1)
        self.skip = nn.Conv2d(inp, out, 1) if inp != out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, hidden, H, W)
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, out, H, W)
        return self.skip(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions, by explicit products, and a residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).unbind(1)  # 3 x (B, C, N)
        weights = (q.transpose(1, 2) @ k * C ** -0.5).softmax(dim=-1)  # (B, N, N)
        h = v @ weights.transpose(1, 2)  # (B, C, N)
        return x + self.out(h.reshape(B, C, H, W))

    def product_macs(self, x):
        """Multiply-accumulates of the two products without weights: N*N*C each, per image."""
        B, C, H, W = x.shape
        return 2 * B * C * (H * W) ** 2


class Downsample(nn.Conv2d):
    """Halve the resolution by a 3x3 convolution of stride 2, padded on the right and below."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Conv2d):
    """Double the resolution by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0))  # (B, C, 2H, 2W), nearest


class Level(nn.Module):
    """The blocks at one resolution, their attention, and the resampling layer that follows."""

    def __init__(self, blocks, attention, resample):
        super().__init__()
        self.blocks, self.attention = nn.ModuleList(blocks), nn.ModuleList(attention)
        self.resample = resample


class UNet(nn.Module):
    """The denoiser: predicts the noise in x_t (or v), of the same shape as x_t.

    base * mults[i] is the width at level i, whose resolution is image_size / patch / 2**i. blocks:
    residual blocks per level (one more on the way up). attention: resolutions that have it, besides
    the middle. hidden: {block name: width} of a shrunk network. ValueError: sizes that do not fit.
    """

    def __init__(self, channels=1, base=32, mults=(1, 2, 2), blocks=1, attention=(), dropout=0.0,
                 image_size=32, patch=1, hidden=None):
        super().__init__()
        self.config = dict(channels=channels, base=base, mults=tuple(mults), blocks=blocks,
                           attention=tuple(attention), dropout=dropout, image_size=image_size,
                           patch=patch, hidden=dict(hidden or {}))
        self._check(**self.config)
        self.patch = patch
        self.time_in, self.time_out = nn.Linear(base, 4 * base), nn.Linear(4 * base, 4 * base)
        self.conv_in = nn.Conv2d(channels * patch ** 2, base, 3, padding=1)
        skips = self._build_down(base, mults, blocks, image_size // patch)
        w = base * mults[-1]
        self.mid = nn.ModuleList(
            [self._block("mid.0", w, w), Attention(w), self._block("mid.2", w, w)])
        self._build_up(base, mults, blocks, image_size // patch, skips)
        self.norm_out = GroupNorm(base * mults[0])
        self.conv_out = nn.Conv2d(base * mults[0], channels * patch ** 2, 3, padding=1)
        self._initialise()

    @staticmethod
    def _check(base, mults, blocks, image_size, patch, **_):
        if min(len(mults), blocks, image_size, patch) < 1:
            raise ValueError("mults, blocks, image_size and patch must be at least one")
        smallest = patch * 2 ** (len(mults) - 1)
        if image_size % smallest:
            raise ValueError(f"image_size={image_size} must be a multiple of {smallest}")
        for width in [base * m for m in mults]:
            if width < 4 or width % 4 or width % min(32, width // 4):
                raise ValueError(f"width {width} does not split into GroupNorm groups: base "
                                 "must be a multiple of 4, above 128 of 32")

    def _block(self, name, inp, out):
        config = self.config
        return ResBlock(inp, out, 4 * config["base"], config["dropout"], config["hidden"].get(name))

    def _attention(self, resolution, blocks):
        has = resolution in self.config["attention"]
        return [Attention(b.conv2.out_channels) if has else nn.Identity() for b in blocks]

    def _build_down(self, base, mults, blocks, resolution):
        """Fill self.down; return the widths of the skips, in the order they are made."""
        self.down, width, skips = nn.ModuleList(), base, [base]
        for i, mult in enumerate(mults):
            out, made = base * mult, []
            for j in range(blocks):
                made.append(self._block(f"down.{i}.blocks.{j}", width, out))
                width = out
            attention, last = self._attention(resolution >> i, made), i == len(mults) - 1
            self.down.append(Level(made, attention, None if last else Downsample(out)))
            skips += [out] * (blocks + (not last))
        return skips

    def _build_up(self, base, mults, blocks, resolution, skips):
        """Fill self.up, from the lowest resolution to the highest; every block takes one skip."""
        self.up, width = nn.ModuleList(), base * mults[-1]
        for k, i in enumerate(reversed(range(len(mults)))):
            out, made = base * mults[i], []
            for j in range(blocks + 1):
                made.append(self._block(f"up.{k}.blocks.{j}", width + skips.pop(), out))
                width = out
            attention = self._attention(resolution >> i, made)
            self.up.append(Level(made, attention, Upsample(out) if i else None))

    def _initialise(self):
        """Glorot-uniform weights, zero biases; zeros in the last layer of each residual branch and
        in conv_out, so that branches begin as the identity and the network as 0."""
        zero = {self.conv_out}
        for m in self.modules():
            if isinstance(m, (ResBlock, Attention)):
                zero.add(m.conv2 if isinstance(m, ResBlock) else m.out)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(m.bias)
                (nn.init.zeros_ if m in zero else nn.init.xavier_uniform_)(m.weight)

    def forward(self, x, t):
        """x (B, C, H, W) float, t (B,) -> predicted noise (B, C, H, W) in x's dtype."""
        emb = self.time_in(time_features(t, self.config["base"]))
        emb = F.silu(self.time_out(F.silu(emb)))  # (B, 4*base), which every block projects
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (B, base, H/p, W/p)
        skips = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attention):
                h = attention(block(h, emb))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        h = self.mid[2](self.mid[1](self.mid[0](h, emb)), emb)
        for level in self.up:
            for block, attention in zip(level.blocks, level.attention):
                h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
            if level.resample is not None:
                h = level.resample(h)
        h = self.conv_out(F.silu(self.norm_out(h)))  # (B, C*p*p, H/p, W/p)
        return F.pixel_shuffle(h, self.patch).to(x.dtype)  # (B, C, H, W)


def narrower(config, parameters):
    """The arguments of a narrower UNet with about `parameters` parameters.

    `base` steps by 4, the hidden widths of all blocks by quarters, in whole groups. The nearest
    count wins; of equals, the one with the widest hidden layers.
    """
    sizes, bases = [], range(4, config["base"] + 1, 4)
    for base, share in itertools.product(bases, (1, 0.75, 0.5, 0.25)):
        with contextlib.suppress(ValueError), torch.device("meta"):  # no such width
            hidden = {}
            for name, block in UNet(**config | dict(base=base)).named_modules():
                if isinstance(block, ResBlock):
                    groups = block.norm2.num_groups
                    size = block.conv1.out_channels // groups
                    hidden[name] = max(1, round(share * groups)) * size
            found = config | dict(base=base, hidden=hidden)
            sizes.append((sum(p.numel() for p in UNet(**found).parameters()), found))
    return min(sizes, key=lambda size: abs(size[0] - parameters))[1]
