"""methods/: other ways to choose what is pruned, on tiny networks.

RigL keeps its counts, RST squeezes out what it will cut, shrunk networks equal masked ones, scores and
similarities equal their formulas. Exact unless a tolerance is written beside the comparison.
"""
import importlib
import math

import pytest
import torch
from torch import nn

import lth_diffusion as lth
from ddpm import Diffusion, train
from methods import channels, early_bird, oneshot, taylor
from methods.channels import dense_channels, prune_channels, shrink
from methods.cka import block_similarity, cka, cka_rates, shuffle, u_centred
from methods.magnitude_init import init_scores
from methods.random_pruning import random_scores
from methods.rigl import RigL, rigl_hooks
from methods.rst import rst_hooks
from methods.taylor import taylor_scores
from prune import (apply_masks, blocks_of, dense_masks, live_counts, live_total, mask_hooks, prunable,
                   prune_magnitude, prune_scores)
from unet import PRESETS, ResBlock, UNet

METHODS = "channels cka early_bird magnitude_init oneshot random_pruning rigl rst taylor".split()


def net(seed=0, **config):
    """A tiny U-Net as it is initialised: its last convolutions hold zeros."""
    torch.manual_seed(seed)
    return UNet(**dict(channels=1, base=16, mults=(1, 2), image_size=8) | config)


def images(n=32):
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blocks(model):
    return [name for name, m in model.named_modules() if isinstance(m, ResBlock)]


# ----------------------------------------------------------------------------------- RigL, SET

@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_rigl_keeps_every_count_and_starts_grown_weights_anew(grow):
    model, steps, every = net(), 24, 4
    masks = prune_magnitude(model, dense_masks(model), 0.8, scope="erk")
    apply_masks(model, masks)
    first, moving = dict(masks), RigL(model, masks, steps, every=every, grow=grow)
    counts, moves = live_counts(masks), []

    def after_backward(step, model):
        values, old = {n: p.detach().clone() for n, p in prunable(model).items()}, dict(masks)
        dense = {n: p.grad.clone() for n, p in prunable(model).items()}
        skipped = moving.after_backward(step, model)
        if skipped:
            moves.append(step)
            for name, p in prunable(model).items():
                stayed = old[name] & masks[name]
                assert torch.equal(p[stayed], values[name][stayed])  # kept, or dropped and grown again
                grown, dropped = masks[name] & ~old[name], old[name] & ~masks[name]
                assert not p[grown].any() and grown.sum() == dropped.sum()
                if grow == "gradient" and grown.any():  # none left out has a larger dense gradient
                    assert dense[name].abs()[grown].min() >= dense[name].abs()[~masks[name]].max()
        return skipped

    def after_step(step, model, optimizer, ema):
        fresh, average = dict(moving.fresh), dict(ema.model.named_parameters())
        moving.after_step(step, model, optimizer, ema)
        assert live_counts(masks) == counts
        for name, p in prunable(model).items():
            assert not p[~masks[name]].any() and not average[name][~masks[name]].any()
            if name in fresh and optimizer.state.get(p):
                assert not optimizer.state[p]["exp_avg"][fresh[name]].any()
                assert not optimizer.state[p]["exp_avg_sq"][fresh[name]].any()
    train(model, Diffusion(), images(), steps=steps, batch=8, lr=1e-3, warmup=0,
          after_backward=after_backward, after_step=after_step)
    assert moves == [4, 8, 12, 16]  # every 4 steps, before three quarters of 24
    assert any(bool((masks[n] != first[n]).any()) for n in masks)  # the dict given follows along


def test_rigl_drops_the_weakest_of_each_layer():
    """At step 4 of 8, until=1: 0.3/2 (1 + cos(pi/2)) = 15 % of 40 live weights are 6, the smallest |w|."""
    model = nn.Sequential(nn.Linear(10, 8, bias=False))
    masks = {"0.weight": torch.zeros(8, 10, dtype=torch.bool)}
    masks["0.weight"][:4] = True
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1, 81).view(8, 10))
    model[0].weight.grad = torch.zeros(8, 10)
    model[0].weight.grad[5, :6] = torch.arange(1.0, 7)  # where the dense gradient is largest
    assert RigL(model, masks, 8, every=4, until=1.0).after_backward(4, model)
    alive = masks["0.weight"]
    assert not alive[0, :6].any() and alive[0, 6:].all() and alive[1:4].all()
    assert alive[5, :6].all() and live_total(masks) == 40


def test_rigl_between_moves_is_static_training():
    results = []
    for static in (False, True):
        model = net()
        masks = prune_magnitude(model, dense_masks(model), 0.5)
        apply_masks(model, masks)
        hooks = mask_hooks(model, masks) if static else rigl_hooks(model, masks, steps=10, every=100)
        train(model, Diffusion(), images(), steps=5, batch=4, lr=1e-3, warmup=0, **hooks)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


# ----------------------------------------------------------------------------------- RST

def test_rst_squeezes_out_what_it_will_cut():
    """Outside the mask w(S) = w(0) e**-10 at most, the gradient left out; inside it trains."""
    model, steps = net(), 60
    masks = prune_scores(random_scores(model, generator()), dense_masks(model), 0.8, scope="layer")
    start = {n: p.detach().clone() for n, p in prunable(model).items()}
    train(model, Diffusion(), images(), steps=steps, batch=4, lr=1e-3, warmup=0,
          **rst_hooks(model, masks, steps))
    for name, p in prunable(model).items():
        gone = ~masks[name]
        assert bool((p[gone].abs() <= 1e-4 * start[name][gone].abs()).all())  # e**-10 = 4.5e-5
        assert bool((p[~gone] != start[name][~gone]).any())


@pytest.mark.parametrize("steps", [1, 5])
def test_rst_refuses_too_few_steps(steps):
    model = net()
    with pytest.raises(ValueError, match=f"{steps} steps"):
        rst_hooks(model, dense_masks(model), steps)


# ----------------------------------------------------------------------------------- scores

def test_taylor_score_is_weight_times_summed_gradient_and_stops_late():
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    weight, x = model[0].weight, torch.tensor([[1.0, 2.0, 3.0]])
    scales, seen = [1.0, 2.0, 0.05, 9.0], []  # the third loss lies below 5 % of the largest: stop there

    def losses():
        for scale in scales:
            seen.append(scale)
            square = (weight * x).pow(2).sum()
            yield scale * square / square.item()
    scores = taylor_scores(model, losses())["0.weight"]
    wx = (weight * x).detach()
    expected = 3.0 * 2 * wx.pow(2) / wx.pow(2).sum()  # w * d/dw of (1 + 2) sum((w x)^2) / constant
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)
    assert seen == scales[:3] and weight.grad is None


def test_scores_before_training_rank_zero_layers_at_random():
    model = net()
    scores = init_scores(model, generator())
    assert list(scores) == list(prunable(model))
    assert torch.equal(scores["conv_in.weight"], model.conv_in.weight.detach().abs())
    assert not model.conv_out.weight.any() and scores["conv_out.weight"].unique().numel() > 100


def test_random_scores_are_the_generators():
    model = net()
    a, b, c = (random_scores(model, generator(seed)) for seed in (0, 0, 1))
    for name, p in prunable(model).items():
        assert a[name].shape == p.shape and torch.equal(a[name], b[name])
        assert not torch.equal(a[name], c[name])
    masks = prune_scores(a, dense_masks(model), 0.75, "layer")  # and layers lose no certain places
    share = torch.stack([masks["mid.0.conv1.weight"][:, :, 0, j].float().mean() for j in range(3)])
    assert share.sub(0.25).abs().max() < 0.06  # 1024 weights each: 4 standard errors


# ----------------------------------------------------------------------------------- CKA

def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def test_cka():
    a, b = (gaussian(64, 72, seed).reshape(64, 8, 3, 3) for seed in (0, 1))
    assert cka(a, a) == pytest.approx(1, abs=1e-9)
    assert cka(a, 3 * a + 2) == pytest.approx(1, abs=1e-6)  # scale and shift do not count
    assert abs(cka(a, b)) < 0.1
    assert abs(cka(a, a[torch.randperm(64, generator=generator())])) < 0.15  # rows are matched by index
    assert 0.3 < cka(a, a + 0.5 * b) < 1
    assert math.isnan(cka(a, torch.zeros_like(a)))
    for few in (b[:10], b[:3]):
        with pytest.raises(ValueError):
            cka(a[:len(few)] if len(few) < 4 else a, few)


def test_unbiased_hsic_is_the_published_sum():
    n = 9
    k, l = (v @ v.T for v in (gaussian(n, 3, 0), gaussian(n, 3, 1)))
    kt, lt = k - torch.diag(k.diag()), l - torch.diag(l.diag())
    expected = ((kt * lt).sum() + kt.sum() * lt.sum() / ((n - 1) * (n - 2))
                - 2 / (n - 2) * (kt.sum(0) @ lt.sum(0))) / (n * (n - 3))
    found = (u_centred(k) * u_centred(l)).sum() / (n * (n - 3))
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_block_similarity():
    """1 for a network and itself, about 0 for another one; a block of zeros has no similarity."""
    a, b = net(0), net(1)
    for model in (a, b):
        for p in prunable(model).values():
            nn.init.normal_(p)
    assert list(block_similarity(a, b)) == blocks(a)
    assert all(value == pytest.approx(1, abs=1e-9) for value in block_similarity(a, a).values())
    assert max(map(abs, block_similarity(a, b).values())) < 0.25
    nn.init.zeros_(a.mid[0].conv1.weight)
    assert [name for name, value in block_similarity(a, b).items() if math.isnan(value)] == ["mid.0"]


def test_cka_rates_prune_most_where_blocks_agree_least():
    model = net()
    similarity = {block: 0.1 * i for i, block in enumerate(blocks(model))}
    rates, owner = cka_rates(model, similarity, 0.2, 0.01), blocks_of(model)
    assert list(rates) == list(prunable(model))
    by_block = {owner[name]: rate for name, rate in rates.items()}
    assert [by_block[b] for b in blocks(model)] == sorted(by_block.values(), reverse=True)
    spread = max(by_block.values()) - min(by_block.values())
    assert spread == pytest.approx(0.01 * (len(similarity) - 1), abs=1e-12)  # as wide as the ramp
    alike = cka_rates(model, dict.fromkeys(similarity, 0.7), 0.2)
    assert list(alike.values()) == pytest.approx([0.2] * len(alike), abs=1e-4)


def test_shuffled_similarities_are_the_same_ones_elsewhere():
    similarity = {block: 0.1 * i for i, block in enumerate(blocks(net()))}
    mixed = shuffle(similarity, 3)
    assert mixed == shuffle(similarity, 3) != shuffle(similarity, 4)
    assert mixed != similarity and mixed.keys() == similarity.keys()
    assert sorted(mixed.values()) == sorted(similarity.values())


# ----------------------------------------------------------------------------------- channel tickets

@pytest.mark.parametrize("preset", list(PRESETS))
def test_shrunk_network_equals_the_masked_one(preset):
    """To 1e-5 of its output: nothing comes out of a dead channel, whatever conv2 makes of it."""
    size = 32 if preset.startswith(("cifar", "paper")) else 28
    config = PRESETS[preset] | dict(base=min(PRESETS[preset]["base"], 64), dropout=0.0)
    model = net(image_size=size, **config).eval()
    for p in model.parameters():  # the zero-initialised layers would hide a mistake
        nn.init.normal_(p, std=0.1)
    left = prune_channels(model, dense_channels(model), 0.75)
    small, x, t = shrink(model, left).eval(), torch.randn(1, 1, size, size), torch.tensor([300])
    with torch.no_grad():
        for name, mask in left.items():
            block = model.get_submodule(name)
            for p in (block.norm2.weight, block.norm2.bias, block.conv1.weight, block.conv1.bias,
                      block.time.weight, block.time.bias):
                p[~mask] = 0.0
        expected = model(x, t)
        assert (small(x, t) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_channel_counts_are_exact_whole_groups_and_nested():
    model = net(base=32)
    masks = dense_channels(model)
    groups = {name: model.get_submodule(name).norm2.num_groups for name in masks}
    live = sum(groups.values())
    for _ in range(6):
        new = prune_channels(model, masks, 0.2)
        kept = {name: mask.view(groups[name], -1) for name, mask in new.items()}
        assert all(bool((m.all(1) | ~m.any(1)).all()) and m.any() for m in kept.values())
        assert sum(int(m.any(1).sum()) for m in kept.values()) == live - round(0.2 * live)
        assert all(bool((new[n] <= masks[n]).all()) for n in masks)
        masks, live = new, live - round(0.2 * live)
    layer = prune_channels(model, dense_channels(model), 0.75, scope="layer")
    assert all(int(m.sum()) == len(m) // 4 for m in layer.values())
    every = prune_channels(model, dense_channels(model), 0.999, scope="layer")
    assert all(int(m.sum()) == len(m) // groups[name] for name, m in every.items())  # one group stays
    for fraction in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="fraction="):
            prune_channels(model, masks, fraction)


def test_the_weakest_group_goes_first():
    model = net(base=32)
    block = model.mid[0]
    nn.init.normal_(block.conv2.weight)
    with torch.no_grad():
        block.conv1.weight[4:8] *= 1e-3  # the second group of four channels
        block.conv2.weight[:, 4:8] *= 1e-3
    left = prune_channels(model, {"mid.0": torch.ones(64, dtype=torch.bool)}, 1 / 16)["mid.0"]
    assert (~left).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_shrinking_twice_is_shrinking_by_both():
    """Pruning a shrunk network is pruning the dense one: `inside` says which channels are left of it."""
    model = net(base=32)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    first = prune_channels(model, dense_channels(model), 0.3)
    small = shrink(model, first)
    second = prune_channels(small, dense_channels(small), 0.3)
    both, twice = shrink(model, channels.inside(first, second)), shrink(small, second)
    assert both.config == twice.config
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in both.state_dict().items())


def test_random_channels_keep_the_counts_of_every_block():
    model = net(base=32)
    masks = prune_channels(model, dense_channels(model), 0.5)
    a, b, c = (channels.random_channels(masks, model, generator(seed)) for seed in (0, 0, 1))
    for name, mask in masks.items():
        groups = a[name].view(model.get_submodule(name).norm2.num_groups, -1)
        assert int(a[name].sum()) == int(mask.sum()) and bool((groups.all(1) | ~groups.any(1)).all())
        assert torch.equal(a[name], b[name])
    assert any(not torch.equal(a[name], c[name]) for name in masks)


# ----------------------------------------------------------------------------------- the command lines

def test_one_shot_cuts_what_the_rounds_would():
    args, _ = lth.parse_args(["--prune-rate", "0.2", "--rounds", "10"])
    assert oneshot.cut_at(args, 1) == pytest.approx(0.2)
    assert oneshot.cut_at(args, 10) == pytest.approx(1 - 0.8 ** 10)


@pytest.mark.parametrize("name, flags, said", [
    ("rigl", "--scope global", "--scope"), ("rigl", "--rewind 0.1", "--rewind"),
    ("rigl", "--grow more", "--grow"), ("rst", "--steps 30", "--steps"),
    ("rst", "--scope erk", "--scope"), ("cka", "--scope layer", "--scope"),
    ("channels", "--scope erk", "--scope"), ("channels", "--scope ramp", "--scope"),
    ("magnitude_init", "--scope global", "--scope"), ("random_pruning", "--rewind 0.05", "--rewind"),
    ("taylor", "--rounds 0", "--rounds"), ("oneshot", "--nfe 3", "--nfe")])
def test_mistakes_end_in_one_line(name, flags, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"methods.{name}").main([*flags.split(), "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and f"argument {said}" in lines[0], lines
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- early-bird tickets

def test_distance_of_masks_by_hand():
    """0 for one and the same, 1 for two that share as little as they can, at any density."""
    def masks(*live):
        return {"w": torch.isin(torch.arange(8), torch.tensor(live))}
    assert early_bird.distance(masks(0, 1), masks(0, 1)) == 0
    assert early_bird.distance(masks(0, 1), masks(2, 3)) == 1
    assert early_bird.distance(masks(0, 1), masks(1, 2)) == 0.5
    assert early_bird.distance(masks(0, 1, 2, 3, 4, 5), masks(2, 3, 4, 5, 6, 7)) == 1


def test_early_bird_stops_once_five_masks_agree(tiny, monkeypatch, tmp_path):
    """At the first draw that is near the five before; with another threshold never, and then half-way."""
    args, _ = lth.parse_args("--rounds 2 --final-sparsity 0.9 --steps 100 --batch 4 --samples 8 --nfe 4 "
                             f"--out {tmp_path}".split())
    exp, seen = lth.Experiment(args), []
    for near, step in (1.1, 12), (1e-9, 50):  # 5 masks at steps 2 to 10; the sixth is compared
        monkeypatch.setattr(early_bird, "NEAR", near)
        found = early_bird.search(args, exp, 0, lambda *told: seen.append(told))
        assert {r: state["step"] for r, (_, state) in found.items()} == {r: step for r in args.control_rounds}
        for r, (masks, state) in found.items():
            total = sum(mask.numel() for mask in masks.values())
            assert live_total(masks) == total - round(oneshot.cut_at(args, r) * total)
            again = exp.new_model(0)
            again.load_state_dict(state["model"])  # the mask is that of the state, by the run's own score
            cut = prune_magnitude(again, dense_masks(again), oneshot.cut_at(args, r), score=args.score)
            assert all(torch.equal(cut[name], mask) for name, mask in masks.items())
    assert [len(distances) for *_, distances in seen[:12:2]] == [0, 1, 2, 3, 4, 5]
    assert all(0 <= one <= 1 for *_, distances in seen for one in distances)


def test_an_early_bird_costs_what_dense_costs(tiny, monkeypatch, tmp_path):
    """Search and training together take the steps of the dense network, and fewer multiplications."""
    monkeypatch.setattr(early_bird, "NEAR", 1.1)
    early_bird.main("--rounds 2 --final-sparsity 0.9 --steps 100 --batch 4 --samples 8 --nfe 4 --controls "
                    f"--out {tmp_path}".split())
    args, _ = lth.parse_args("--rounds 2 --final-sparsity 0.9 --steps 100 --out x".split())
    states = {job: torch.load(job.path(str(tmp_path)), weights_only=True) for job in oneshot.jobs(args)
              if job.arm in ("dense", "ticket")}
    dense, *tickets = (state["row"] for state in states.values())
    for row in tickets:
        assert row["steps"] == 88 and row["train_steps_total"] == dense["train_steps_total"] == 100
        assert row["train_macs_total"] < dense["train_macs_total"]


def test_an_early_bird_and_its_random_mask_start_alike(tiny, monkeypatch, tmp_path):
    """From the state at which the mask settled, also when the controls are made by a later command."""
    monkeypatch.setattr(early_bird, "NEAR", 1.1)
    flags = f"--rounds 1 --final-sparsity 0.9 --steps 100 --batch 4 --samples 8 --nfe 4 --out {tmp_path}"
    started, train = {}, lth.train
    monkeypatch.setattr(lth, "train", lambda *a, **k: started.update({k["label"]: k.get("state")}) or train(*a, **k))
    early_bird.main([*flags.split(), "--controls", "random"])
    ticket, control = (started[f"seed 0 round 1 {arm}"] for arm in ("ticket", "random"))
    assert ticket["step"] == control["step"] == 12 and ticket["ema_updates"] == control["ema_updates"]
    both = [name for name in ticket["model"] if name.endswith("bias")]
    assert all(torch.equal(ticket["model"][name], control["model"][name]) for name in both)
    job = lth.Job(0, 1, "random")
    once = torch.load(job.path(str(tmp_path)), weights_only=True)["model"]
    (tmp_path / "seed0" / "round01_random.pt").unlink()
    early_bird.main([*flags.split(), "--controls", "random"])
    again = torch.load(job.path(str(tmp_path)), weights_only=True)["model"]
    assert all(torch.equal(again[name], one) for name, one in once.items())


class Dry(lth.Experiment):
    """Trains nothing, and remembers in order what it was asked for."""

    def __init__(self, args):
        super().__init__(args)
        self.asked = {}

    def train(self, job, model, masks=None, state=None, **options):
        assert job not in self.asked
        for p in prunable(model).values():  # as after training: no layer holds nothing but zeros
            if not p.any():
                nn.init.normal_(p)
        row, state = dict(train_steps_total=1, train_macs_total=1, steps=1, macs_dense=1), None
        if job.arm == "dense":
            state = dict(step=self.k, model=model.state_dict(), ema=model.state_dict(), optimizer=None)
        self.asked[job] = lth.Trained(model, model, masks or dense_masks(model), row, state)
        return self.asked[job]

    def load(self, job):
        return self.asked[job]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_what_it_plans(name, monkeypatch, tmp_path):
    """Two seeds, two rounds, every control: the runs that are planned, each once and in their order."""
    method, ran = importlib.import_module(f"methods.{name}"), []

    def run(args, parser, find, plan):
        exp = Dry(args)
        find(args, exp)
        ran.extend(exp.asked)
        assert ran == plan(args)
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(taylor, "TIMES", 4)
    for module in (lth, method):
        monkeypatch.setattr(module, "run", run, raising=False)
    method.main("--rounds 2 --control-rounds 1 2 --seeds 0 1 --steps 40 --batch 4 --controls reinit random "
                f"finetune small --out {tmp_path}".split())
    tickets = [(job.seed, job.round) for job in ran if job.arm == "ticket"]
    assert tickets == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert {job.arm for job in ran} >= {"dense", "reinit", "random", "finetune", "small"}
