"""The studies, each through its command line."""
import collections
import contextlib
import csv
import functools
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import lth_diffusion as lth
import metrics
from ddpm import Diffusion, denoiser, load_images, train
from prune import apply_masks, dense_masks, live_counts, mask_hooks, prunable, prune_magnitude
from studies import (budget, fid_bias, methods, parity, positive_control, robustness, samplers, scaling,
                     speed, tickets)
from unet import UNet

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_parity_with_every_peer(tmp_path):
    missing = parity.missing_peers()
    if missing:
        pytest.skip(f"needs  pip install {' '.join(missing)} ({'; '.join(missing.values())})")
    done = subprocess.run([sys.executable, "-m", "studies.parity", "--out", str(tmp_path)], cwd=HERE,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "parity.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 and {row["verdict"] for row in rows} == {"ok", "for information"}
    source = json.load(open(tmp_path / "parity.json"))
    assert set(source["peers"]) == set(parity.PEERS) and source["seconds"] > 0
    assert (tmp_path / "parity.md").read_text().count("\n| ") == len(rows) + 1


def test_parity_without_peers_names_them_and_writes_nothing(monkeypatch, capsys, tmp_path):
    for module in parity.PEERS.values():
        monkeypatch.setitem(sys.modules, module, None)  # import fails as if it were not installed
    assert parity.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "pip install pytorch-fid torch-fidelity diffusers" in said and "MACs" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ours, theirs, verdict", [
    (1.0, 1.0, "ok"), (1.0, 1.0005, "ok"), (1.0, 1.1, "DIFFERS"), (float("nan"), 1.0, "DIFFERS"),
    ([1.0, 2.0], [1.0, 2.0], "ok"), ([1.0, 2.0], [1.0, 2.1], "DIFFERS"), (1.0, 0.0, "DIFFERS"),
    ([1.0, float("nan")], [1.0, 2.0], "DIFFERS"), (0.0, 0.0, "ok"),
])
def test_parity_verdict(ours, theirs, verdict):
    assert parity.compare("x", ours, theirs, 1e-3).verdict == verdict


def test_parity_exits_1_on_a_difference(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "missing_peers", dict)
    monkeypatch.setattr(parity, "write", lambda *_: None)
    monkeypatch.setattr(parity, "SECTIONS", ((lambda: [parity.compare("x", 1.0, 2.0, 0.1)], None),))
    assert parity.main([]) == 1


def test_parity_race_counts_ratios_and_calls():
    calls = []
    slow = lambda: (calls.append("theirs"), time.sleep(0.02))
    row = parity.race("x", lambda: calls.append("ours"), slow, 5, n=2)
    assert calls == ["ours", "theirs"] * 3 and row.verdict == "ok" and "n=2" in row.quantity
    assert parity.race("x", lambda: time.sleep(0.01), lambda: time.sleep(0.01), 50, n=2).verdict == "SLOWER"


def test_jackknife_of_fid():
    reference, draw = (torch.zeros(8).double(), torch.eye(8).double()), torch.Generator().manual_seed(0)
    for shift, scale, most in ((0.5, 1.2, 1.5), (0.0, 1.0, 1.6)):  # the second: no slope, sqrt(2) too much
        draws = shift + scale * torch.randn(200, 300, 8, generator=draw, dtype=torch.float64)
        spread = np.std([metrics.fid(x, reference) for x in draws], ddof=1)
        errors = [fid_bias.fid_jackknife(x, reference) for x in draws[:10]]
        assert 1 / 1.5 < np.mean(errors) / spread < most


# --- methods, tickets: real runs, as small as they can be

def test_methods_table(compared):
    with open(compared / "methods_digits.csv") as file:
        rows = list(csv.DictReader(file))
    steps = {(row["method"], row["pruned"]): int(row["total steps"]) for row in rows}
    k = 1  # 5 % of 16 steps
    assert steps["dense", "0.0 %"] == 16 and steps["imp", "20.0 %"] == 16 + 16 - k
    assert steps["imp", "36.0 %"] == 16 + 2 * (16 - k) == steps["random, equal cost", "36.0 %"]
    assert steps["oneshot", "36.0 %"] == 16 + 16 - k and steps["random", "36.0 %"] == 16
    assert steps["dense, 46 steps", "0.0 %"] == 16 + 2 * (16 - k)  # what longer training alone does
    assert {"imp, reinit", "imp, random", "imp, small"} < {row["method"] for row in rows}
    live = {row["live weights"] for row in rows if row["pruned"] == "36.0 %"}
    assert len(live - {r["live weights"] for r in rows if "small" in r["method"]}) == 1
    assert json.load(open(compared / "methods_digits.json"))["n"] == 16
    for name in ("methods_digits.png", "methods_digits_rounds.png"):
        assert (compared / name).stat().st_size > 10_000
    with open(compared / "methods_digits_runs.csv") as file:
        fids = {(r["method"], r["round"], r["arm"]): float(r["fid_domain"]) for r in csv.DictReader(file)}
    over = {(row["method"], row["pruned"]): float(row["over dense"]) for row in rows}
    assert over["dense", "0.0 %"] == 0
    ticket, dense = fids["imp", "2", "rewind"], fids["imp", "0", "dense"]
    assert over["imp", "36.0 %"] == pytest.approx(ticket - dense, abs=1e-3)


@pytest.mark.parametrize("flags, said", [
    ("--method random", "argument --method: this study sets it itself"),
    ("--scope=layer", "argument --scope: this study sets it itself"),
    ("--more-seeds 0", "argument --more-seeds: each one once"),
    ("--runs README.md", "choose another --runs"),
    ("--steps 30", "argument --steps: 30 are too few for rst"),
])
def test_methods_says_a_mistake_before_it_runs(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "run", lambda *_: pytest.fail("it began to run"))
    with pytest.raises(SystemExit) as stop:
        methods.main(["--runs", str(tmp_path), "--out", str(tmp_path), *flags.split()])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_methods_share_the_dense_run(compared):
    """One dense network for all that rewind to one step, to the bit."""
    dense = [lth.load_state(compared / "runs" / name / "seed0" / "round00_dense.pt")["row"]
             for name in ("imp", "oneshot")]
    assert dense[0] == dense[1]


def test_tickets_pictures(compared, capsys):
    runs = [str(compared / "runs" / name) for name in ("imp", "oneshot", "random")]
    tickets.main([*runs, "--out", str(compared)])
    with open(compared / "tickets_overlap.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(0 < float(row["by chance"]) < 1 for row in rows)
    for name in ("density", "overlap", "theta_0", "theta_k", "cka"):
        assert (compared / f"tickets_{name}.png").stat().st_size > 5_000
    for wrong, said in (([str(compared)], "config.json"), ([runs[0], "--round", "9"], "no tickets in")):
        with pytest.raises(SystemExit) as stop:
            tickets.main([*wrong, "--out", str(compared)])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_overlap_and_survival_by_hand():
    model = UNet(base=8, mults=(1,))
    masks, generator = dense_masks(model), torch.Generator().manual_seed(0)
    assert tickets.overlap(masks, masks) == (1.0, 1.0)
    half = {name: torch.rand(mask.shape, generator=generator) < 0.5 for name, mask in masks.items()}
    other = {name: ~mask for name, mask in half.items()}
    assert tickets.overlap(half, half)[0] == 1.0 and tickets.overlap(half, other)[0] == 0.0
    assert tickets.overlap(half, other)[1] == pytest.approx(1 / 3, abs=0.01)  # 1/4 of 3/4
    kept = prune_magnitude(model, masks, 0.5, "layer")
    rates = tickets.survival(kept, model)
    # the largest half of every layer lives, so its upper five tenths live twice as often as the layer
    big = max((n, name) for name, n in live_counts(masks).items() if rates[name][0] == rates[name][0])[1]
    assert rates[big] == pytest.approx([0] * 5 + [2] * 5, abs=0.05)
    assert all(r != r for r in rates["conv_out.weight"])  # it starts at zero: no order to speak of


def test_speed_of_masks(tmp_path):
    speed.main(["cost", "--turns", "1", "--device", "cpu", "--out", str(tmp_path)])
    with open(tmp_path / "speed_cost.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(float(row["seconds"]) > 0 for row in rows)
    with pytest.raises(SystemExit):
        speed.main(["nothing"])


# --- --compile, which the studies of speed time

def test_what_is_compiled_draws_as_what_is_not(monkeypatch):
    """A dense network, then a ticket that meets code compiled for another one's weights. The compiler's own
    kernels take minutes, so its tracing alone is run."""
    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    drawn, compiled = {}, []
    for compile in (True, False):
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = UNet(base=8, mults=(1,), image_size=8)
            masks = dense_masks(model)
            if seed:
                masks = {name: mask * (torch.rand(mask.shape) < 0.2) for name, mask in masks.items()}
            apply_masks(model, masks)
            train(model, Diffusion(), torch.full((8, 1, 8, 8), 200, dtype=torch.uint8), steps=4, batch=4,
                  lr=1e-2, optimizer="sgd", **mask_hooks(model, masks))
            x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            predict = denoiser(model, "fp32", compile)
            drawn[compile, seed] = torch.cat([predict(part, torch.tensor([9] * len(part)))
                                              for part in (x, x[:17])])  # batches of two sizes
    for seed in (0, 1):
        torch.testing.assert_close(drawn[True, seed], drawn[False, seed], rtol=0, atol=1e-6)
    assert (drawn[True, 0] - drawn[True, 1]).abs().max() > 1e-3
    assert len(compiled) == 1


# --- studies of a finished run

def test_robustness(compared, monkeypatch, capsys):
    """Every network, every trouble; no budget changes nothing, PGD is the stronger attack."""
    robustness.main(["--from", str(compared / "runs" / "imp"), "--images", "20", "--samples", "8",
                     "--rounds", "0", "2", "--out", str(compared)])
    said = capsys.readouterr().out
    assert "no verdict" in said
    with open(compared / "robustness_digits.csv") as file:
        rows = list(csv.DictReader(file))
    troubles = len(robustness.NOISE) + 2 * len(robustness.BUDGETS) + len(robustness.STARTS)
    assert len(rows) == 6 * troubles  # dense, twin, rewind, reinit, random, small
    for row in rows:
        if row["size"] in ("0", "1 x_T +0"):
            assert float(row["over its clean"]) == pytest.approx(1, abs=1e-4)
    attack = {(r["arm"], r["trouble"], r["size"]): float(r["error"]) for r in rows}
    assert attack["dense", "PGD", "0.1"] >= attack["dense", "FGSM", "0.1"] > attack["dense", "FGSM", "0"]
    with pytest.raises(AssertionError):
        robustness.check({("noise", 0.0): 1.0} | {(a, b): 1.0 + (a == "FGSM") * b for a in ("FGSM", "PGD")
                                                  for b in robustness.BUDGETS})


def test_pgd_stays_within_its_budget_and_finds_more_on_a_curve():
    """A 'model' whose error has its maximum inside the ball of a far step: PGD must find more than FGSM."""
    def model(x, t):
        return torch.sin(5 * x)
    x, eps, t = torch.full((2, 1, 2, 2), 0.1), torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    moved = robustness.pgd(model, x, t, eps, 0.5)
    assert float((moved - x).abs().max()) <= 0.5 + 1e-6
    near = robustness.fgsm(model, x, t, eps, 0.5)
    weak, strong = (robustness.error(model, v, t, eps) for v in (near, moved))
    assert bool((strong > weak + 0.1).all())


def test_samplers(compared, monkeypatch):
    monkeypatch.setattr(samplers, "STEPS", dict(ddpm=(4,), ddim=(2, 4), dpm=(2,)))
    samplers.main(["--from", str(compared / "runs" / "imp"), "--samples", "8", "--out", str(compared)])
    with open(compared / "samplers_digits.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4  # dense and the tickets of rounds 1 and 2
    work = {(r["round"], r["evaluations"]): float(r["GMACs a sample"]) for r in rows}
    assert work["0", "4"] == pytest.approx(2 * work["0", "2"], rel=1e-4)
    assert work["2", "4"] < work["1", "4"] < work["0", "4"]
    assert any(r["front of work"] for r in rows)


def test_front_by_hand():
    rows = [[None] * 7 + [work, 0, fid] for work, fid in ((1, 9), (2, 5), (3, 5), (2, 7), (4, 1))]
    assert samplers.on_front(rows, 7) == [True, True, False, False, True]


def test_positive_control(monkeypatch, capsys, tmp_path):
    images, labels = (part[:1400] for part in load_images("digits", "data"))
    pairs = [(images[a:b].float() / 255, labels[a:b]) for a, b in ((0, 1000), (1000, 1060), (1060, 1120))]
    monkeypatch.setattr(positive_control, "load", lambda folder: pairs)
    flags = "--nets lenet conv --steps 60 --rounds 1 --out".split()
    positive_control.main([*flags, str(tmp_path)])
    tables = {}
    for net in ("lenet", "conv"):
        with open(tmp_path / f"positive_control_{net}.csv") as file:
            tables[net] = list(csv.DictReader(file))
    first = (0.8 * 235_200 + 0.8 * 30_000 + 0.9 * 1000) / 266_200  # by hand: the last layer at half the rate
    assert float(tables["lenet"][1]["weights left"]) == pytest.approx(first, abs=1e-5)
    for rows in tables.values():
        assert [row["arm"] for row in rows] == ["dense", "rewind", "reinit", "random", "oneshot"]
        assert float(rows[0]["test accuracy"]) > 0.75
        assert len({row["weights left"] for row in rows[1:4]}) == 1
    said = capsys.readouterr().out
    assert f"lenet, {100 * first:.1f} % of the weights, n=1 seed:" in said and "no verdict" in said


def test_a_stop_at_the_last_steps_is_no_stop():
    table = [["lenet", 0, round, arm, 0.8, step, 0.9] for round, arm, step in (
        (0, "dense", 95), (1, "rewind", 40), (1, "reinit", 90), (1, "random", 100), (1, "oneshot", 60))]
    said = positive_control.conclude(table, 100)
    assert "dense >= 95, rewind 40, reinit 90, random >= 100, oneshot 60" in said


# --- what training and sizes cost

def test_budget(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=8, mults=(1,), patch=4))
    flags = "--dataset digits --steps 2 4 --samples 16 --nfe 2 --device cpu"
    budget.main([*flags.split(), "--out", str(tmp_path)])
    with open(tmp_path / "budget_digits.csv") as file:
        rows = [(row["setting"], row["steps"], row["batch"]) for row in csv.DictReader(file)]
    assert rows == [("plain", "2", "64"), ("tuned", "4", "32"), ("plain", "4", "64"), ("tuned", "8", "32")]
    assert (tmp_path / "budget_digits.png").stat().st_size > 10_000 and "n=1 seed" in capsys.readouterr().out


def test_budget_concludes_by_hand():
    table = [["plain", 0, 1, 64, 10.0, 0, 9.0, 9.0], ["plain", 0, 2, 64, 20.0, 0, 5.0, 8.0],
             ["tuned", 0, 2, 32, 10.0, 0, 6.0, 7.0]]
    assert budget.conclude(table) == ("DDIM: tuned has 6.00 after 10 s, plain between 10 and 20 s; "
                                      "ancestral: tuned has 7.00 after 10 s, plain not within 20 s. n=1 "
                                      "seed(s).")


def test_scaling(monkeypatch, tmp_path):
    for name, sizes in dict(BASES=(8, 16), IMAGES=(50, 100), BATCHES=(2, 4), ROUNDS=(1, 2)).items():
        monkeypatch.setattr(scaling, name, sizes)
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(lth, "draw_everything", lambda *_: None)
    monkeypatch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
    # a process of its own would know nothing of these changes
    monkeypatch.setattr(scaling, "ProcessPoolExecutor", lambda *_, **__: contextlib.nullcontext(
        types.SimpleNamespace(map=map)))
    some = tuple(map(torch.from_numpy, scaling.draw_digits(100, 0)))
    for module in (scaling, lth):
        monkeypatch.setattr(module, "load_images", lambda *_: some)
    scaling.main(["--turns", "1", "--device", "cpu", "--out", str(tmp_path)])
    with open(tmp_path / "scaling.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7 and all(float(row["seconds"]) > 0 for row in rows)
    with open(tmp_path / "scaling_exponents.csv") as file:
        assert len(list(csv.DictReader(file))) == 7


def test_exponents_by_hand():
    table = [["a", "n", n, 3 * n ** 1.5, 2.0 * n] for n in (1, 2, 4, 8)]
    (_, _, exponent, error, memory, its_error), = scaling.exponents(table)
    assert (exponent, memory) == pytest.approx((1.5, 1)) and max(error, its_error) < 1e-9
