"""studies.variants: the noise levels of score-based models, two variants end to end, arithmetic by hand."""
import csv
import json
import math
import types

import pytest
import torch

import lth_diffusion as lth
from ddpm import Diffusion, sample
from studies import variants
from support import runs

SMALL = ("--seeds 0 --rounds 1 --prune-rate 0.5 --steps 8 --rewind 0.25 --batch 8 --samples 8 --nfe 10 "
         "--precision fp32").split()


def read(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- the noise levels

def test_sigma_schedule():
    """Noise levels from 0.01 to 50, evenly in their logarithm (2011.13456); the network is told of t up
    to 1000."""
    diffusion, told = variants.SigmaDiffusion(), []
    sigma = (1 / diffusion.alphas_bar - 1).sqrt()
    assert diffusion.T == 1_000_000
    assert sigma[[0, -1]].tolist() == pytest.approx([0.01, 50], rel=1e-6)
    ratio = sigma[1:] / sigma[:-1]
    assert ratio.min() > 1 and ratio.max() - ratio.min() < 1e-6

    def network(x, t):
        told.append(t[0].item())
        return x
    x = sample(network, diffusion, torch.ones(2, 1, 2, 2), "ddim", 50)
    assert x.shape == (2, 1, 2, 2) and bool(x.isfinite().all())
    assert told == [20 * k for k in reversed(range(50))]
    image, t = torch.zeros(1, 1, 2, 2), torch.tensor([500_000])
    diffusion.loss(network, image, t, image)
    assert told[-1] == 500


def test_predict_undoes_the_parametrisation():
    """A network that predicts v, or eps, of a known x_0 exactly: loss 0, and the same eps from both."""
    torch.manual_seed(0)
    x0, noise = torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    for prediction in ("eps", "v"):
        diffusion = variants.SigmaDiffusion(prediction)
        t = torch.linspace(0, diffusion.T - 1, 6).long()
        abar = diffusion.alphas_bar[t].float()[:, None, None, None]
        truth = noise if prediction == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        assert diffusion.loss(lambda x, t: truth, x0, t, noise).item() < 1e-12
        assert diffusion.loss(lambda x, t: truth + 1, x0, t, noise).item() == pytest.approx(1, rel=1e-6)
        eps = diffusion.predict(lambda x, t: truth, diffusion.q_sample(x0, t, noise), t)
        torch.testing.assert_close(eps, noise, atol=1e-5, rtol=0)


def test_only_this_study_has_them(capsys):
    with pytest.raises(ValueError, match="sigma"):
        Diffusion(schedule="sigma")
    with pytest.raises(SystemExit) as stop:
        lth.parse_args(["--schedule", "sigma"])
    assert stop.value.code == 2 and "--schedule" in capsys.readouterr().err


# --- the study

def test_variants(tiny, tmp_path, monkeypatch, capsys):
    command = [*SMALL, "--only", "linear/v/plain", "sigma/eps/plain", "--runs", str(tmp_path / "runs"), "--out",
               str(tmp_path)]
    variants.main(command)
    assert "no verdict" in capsys.readouterr().out
    rows = read(tmp_path / "variants_digits.csv")
    assert [(row["variant"], row["arm"]) for row in rows] == [
        (name, arm) for name in ("linear/v/plain", "sigma/eps/plain") for arm in variants.SHOWN]
    fid = {(row["variant"], row["arm"]): float(row["fid_domain"]) for row in rows}
    for row in rows:
        name, arm = row["variant"], row["arm"]
        pruned = 0.5 if arm in ("ticket", "reinit", "random") else 0
        assert float(row["sparsity"]) == pytest.approx(pruned, abs=1e-4)
        if arm != "ticket":
            assert float(row["difference"]) == pytest.approx(fid[name, "ticket"] - fid[name, arm], abs=1e-2)
    config = runs.read_config(tmp_path / "runs" / "sigma-eps-plain")
    assert config["experiment"] == "ScoreBased" and config["args"]["prediction"] == "eps"
    assert runs.read_config(tmp_path / "runs" / "linear-v-plain")["args"]["prediction"] == "v"
    assert (tmp_path / "variants_digits.png").stat().st_size > 10_000
    before = (tmp_path / "variants_digits.csv").read_bytes()
    monkeypatch.setattr(lth, "train", None)  # all that is trained is kept
    variants.main(command)
    assert (tmp_path / "variants_digits.csv").read_bytes() == before


def test_a_variant_that_diverges_leaves_the_others_their_table(tmp_path, monkeypatch):
    """The second run ends as one whose loss is no number does; what the first found is there."""
    arms = dict(dense=(10.0, 10, 10), ticket=(9.0, 8, 7), reinit=(11.0, 11, 11), random=(20.0, 20, 20))
    rows = {lth.Job(seed, 0 if arm == "dense" else 2, arm): dict(fid_domain=v, sparsity=0.5, val_loss=v, arm=arm,
                                                                 seed=seed, round=0 if arm == "dense" else 2)
            for arm, values in arms.items() for seed, v in zip((10, 11, 12), values)}

    def run(args, parser, experiment):
        if args.prediction == "eps":
            raise SystemExit(1)
        return types.SimpleNamespace(rows=rows, args=args)
    monkeypatch.setattr(lth, "run", run)
    variants.main(["--only", "linear/v/plain", "linear/eps/plain", "--out", str(tmp_path)])
    assert [row["variant"] for row in read(tmp_path / "variants_digits.csv")] == ["linear/v/plain"] * 4
    said = {row["variant"]: row["answer"] for row in read(tmp_path / "variants_digits_verdicts.csv")}
    assert said == {"linear/v/plain": "winning", "linear/eps/plain": "no verdict: it diverged"}
    facts = json.loads((tmp_path / "variants_digits.json").read_text())
    assert facts["seeds"] == [10, 11, 12] and "steps" in facts["flags"] and "prediction" not in facts["flags"]
    before = (tmp_path / "variants_digits.csv").read_bytes()
    with pytest.raises(SystemExit) as stop:
        variants.main(["--only", "linear/eps/plain", "--out", str(tmp_path)])
    assert stop.value.code == 1 and (tmp_path / "variants_digits.csv").read_bytes() == before  # nothing to put there


def test_differences_by_hand():
    fid = dict(dense=(10, 10, 10), ticket=(9, 8, 7), reinit=(8, 8, 8), random=(20, 20, 20))
    rows = {lth.Job(seed, 0 if arm == "dense" else 2, arm): dict(fid_domain=v, sparsity=0.5, val_loss=1.0)
            for arm, values in fid.items() for seed, v in enumerate(values)}
    exp = types.SimpleNamespace(rows=rows, args=types.SimpleNamespace(rounds=2))
    table = list(variants.arm_rows("a", exp, [0, 1, 2]))
    assert [row.arm for row in table] == list(fid)  # k = 0: no rewound dense network
    assert [row.difference for row in table] == [-2, None, 0, -12]
    half = 2.919986 / math.sqrt(3)  # t of 2 degrees of freedom at 95 %, times sd 1 over the root of 3
    assert (table[0].low, table[0].high) == pytest.approx((-2 - half, -2 + half), abs=1e-5)
    row, by_loss = variants.verdict_rows("a", exp, [0, 1, 2])
    at = variants.VERDICTS.index("answer")
    assert row[:7] == ["a", "fid_domain", 3, 10, 8, 8, 20] and row[at] == "not shown"  # no better than reinit
    assert by_loss[:7] == ["a", "val_loss", 3, 1, 1, 1, 1] and by_loss[at] == "not shown"
    assert variants.title_of([[*row[:at], "winning"], by_loss]) == (
        "Of 1 variant tickets win in 1 by fid_domain, 0 by val_loss")


def test_every_variant_gets_its_own_run():
    folders = set()
    for name in variants.VARIANTS:
        args, _ = variants.parse(name, ["--seeds", "0", "1"])
        assert f"{args.schedule}/{args.prediction}/{args.weighting}" == name.replace("sigma", "linear")
        assert args.rounds == 2 and args.seeds == [0, 1]
        folders.add(args.out)
    assert len(folders) == 6
    assert variants.parse("linear/v/plain", ["--rounds", "3"])[0].prune_rate == pytest.approx(0.2)


@pytest.mark.parametrize("flags, reason", [
    (["--controls", "small"], "reinit and random"), (["--rounds", "3", "--control-rounds", "1"], "the last round"), (["--fast"], "--fast"), (["--only", "cubic"], "cubic"),
    (["--schedule", "cosine"], "--schedule"), (["--only", "sigma/eps/plain", "--nfe", "4"], "--nfe")])
def test_mistakes_end_in_one_line(flags, reason, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        variants.main([*flags, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and reason in said and said.count("\n") == 1
