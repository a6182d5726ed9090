"""studies.variants: one variant end to end, its arithmetic by hand."""
import collections
import csv

import numpy as np
import pytest

import lth_diffusion as lth
import metrics
from prune import blocks_of, density_by_block, live_counts
from studies import variants
from unet import UNet

SMALL = ("--rounds 1 --prune-rate 0.5 --steps 8 --rewind 0.25 --batch 8 --samples 8 --nfe 2 "
         "--precision fp32").split()


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_variants(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(lth, "draw_everything", lambda *_: None)
    monkeypatch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
    command = [*SMALL, "--only", "linear/v", "sigma/eps", "--runs", str(tmp_path / "runs"), "--out",
               str(tmp_path)]
    variants.main(command)
    said = capsys.readouterr().out
    assert "n=1, no verdict" in said and "not comparable between variants" in said.replace("\n", " ")
    rows = read(tmp_path / "variants_digits.csv")
    assert [(row["variant"], row["arm"]) for row in rows] == [
        (name, arm) for name in ("linear/v", "sigma/eps") for arm in variants.ARMS.values()]
    fid = {(row["variant"], row["arm"]): float(row["fid_domain"]) for row in rows}
    for row in rows:
        name, arm = row["variant"], row["arm"]
        pruned = 0.5 if arm in ("ticket", "reinit", "random") else 0
        assert float(row["sparsity"]) == pytest.approx(pruned, abs=1e-4)
        if arm != "ticket":
            less = fid[name, "ticket"] - fid[name, arm]
            assert float(row["ticket less it"]) == pytest.approx(less, abs=1e-2)
    blocks = read(tmp_path / "variants_digits_blocks.csv")
    assert len(blocks) == 2 * 5  # one level: one block down, two in the middle, two up
    config = lth.read_config(tmp_path / "runs" / "sigma-eps")["args"]
    assert (config["schedule"], config["prediction"]) == ("sigma", "eps")
    for row in blocks:  # 6 steps from one theta_k leave networks alike, another start has nothing in common
        assert float(row["CKA"]) > 0.5 > abs(float(row["CKA null"]))
    assert (tmp_path / "variants_digits_blocks.png").stat().st_size > 10_000
    before = (tmp_path / "variants_digits.csv").read_bytes()
    monkeypatch.setattr(lth, "train", None)  # all that is trained is kept
    variants.main(command)
    assert (tmp_path / "variants_digits.csv").read_bytes() == before


def test_two_seeds_are_each_others_null(compared):
    """The null is the next seed's network; density by block is that of the masks, to the last weight."""
    exp, rows = lth.open_run(str(compared / "runs" / "imp"))
    whole = UNet(**exp.load(lth.Job(0, 0, "dense"))["config"])
    live = live_counts(exp.rebuild(exp.load(lth.Job(0, 2, "rewind")))[1])
    density = density_by_block(whole, live)
    size = collections.Counter()
    for name, block in blocks_of(whole).items():
        size[block] += dict(whole.named_parameters())[name].numel()
    live = sum(density[block] * n for block, n in size.items())
    assert live == pytest.approx(rows[lth.Job(0, 2, "rewind")]["live_weights"], abs=1e-6)
    assert set(density) == set(lth.block_similarity(whole, whole))


def test_slopes_and_differences_by_hand():
    assert metrics.slope([1, 0.75, 0.5, 0.25, 0]) == pytest.approx((-1, 0), abs=1e-12)
    assert metrics.slope([1, np.nan, 1.5, 1.75, 2])[0] == pytest.approx(1)
    assert np.isnan(metrics.slope([1, 2])[0])  # a line through two points has no error
    blocks = [["a", seed, block, value, 0.0, 1 - value] for seed, values in ((0, (0, 1, 2)), (1, (0, 2, 4)))
              for block, value in zip("xyz", values)]
    cka, null, density = variants.slope_lines(blocks)
    assert cka == ["a", "CKA", 2, pytest.approx(3), pytest.approx(0, abs=1e-9), pytest.approx(2 ** 0.5)]
    assert null[3] == 0 and density[3] == pytest.approx(-3)
    fid = dict(dense=(10, 10, 10), rewind=(9, 8, 7), reinit=(8, 8, 8), random=(20, 20, 20))
    rows = {lth.Job(seed, 0 if arm == "dense" else 2, arm): dict(fid_domain=v, sparsity=0.5, val_loss=1.0)
            for arm, values in fid.items() for seed, v in enumerate(values)}
    table = list(variants.arm_lines("a", rows, 2))
    assert [row[6] for row in table] == [-2, None, 0, -12]
    half = 2.919986 * (1 / 3 ** 0.5)  # t of 2 degrees of freedom at 95 %, times sd 1 over the root of 3
    assert table[0][7:9] == pytest.approx([-2 - half, -2 + half], abs=1e-5)
    said = variants.conclude(table, [["a", "CKA", 3, -1.0, 0.1, 0.1], ["a", "CKA null", 3, 0.1, 0.1, 0.1],
                                     ["a", "density", 3, 1.0, 0.1, 0.1]])
    assert "than dense in 1 of 1 variants: a (-2.00); than reinit in 0 of 1 variants" in said
    assert "no verdict" not in said and said.count("1 fall and 0 rise") == 1


def test_the_default_run_is_shared_where_it_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert variants.parse("linear/eps", ["--seeds", "0", "1"], None)[0].out == "runs/digits"
    assert variants.parse("linear/v", [], None)[0].out == "runs/variants_digits/linear-v"
    assert variants.parse("linear/eps", ["--steps", "99"], None)[0].out == "runs/variants_digits/linear-eps"
    (tmp_path / "runs/digits").mkdir(parents=True)
    (tmp_path / "runs/digits/config.json").write_text('{"args": {"seeds": [0], "dataset": "digits", "rounds": 2}, '
                                                      '"commit": "x"}')
    assert variants.parse("linear/eps", [], None)[0].out == "runs/variants_digits/linear-eps"


@pytest.mark.parametrize("flags, reason", [(["--arms", "rewind"], "reinit and random"),
                                           (["--fast"], "--fast"), (["--only", "cubic"], "cubic")])
def test_mistakes_end_in_one_line(flags, reason, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        variants.main([*flags, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and reason in said and said.count("\n") == 1
