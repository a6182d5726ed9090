"""The study of transferred tickets: what is copied where, by hand, and rows that must agree to the bit."""
import collections
import csv
import shutil

import pytest
import torch

import lth_diffusion as lth
from prune import dense_masks, density, prunable, random_masks
from studies import transfer
from unet import UNet

SHAPE = dict(base=8, mults=(1, 2), image_size=8)
MADE = "--rounds 1 --final-sparsity 0.5 --arms rewind --rewind 0.25 --batch 4 --samples 8 --nfe 2".split()


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# --- what goes where

PAIRS = {  # of 2 blocks a level, by hand: the last skip made is the first read
    "up.0.blocks.0": "down.1.blocks.1", "up.0.blocks.1": "down.1.blocks.0",
    "up.0.blocks.2": "down.0.resample", "up.1.blocks.0": "down.0.blocks.1",
    "up.1.blocks.1": "down.0.blocks.0", "up.1.blocks.2": "conv_in",
}


def test_partners_by_hand():
    assert transfer.partners(UNet(**SHAPE, blocks=2)) == PAIRS


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_partners_are_what_the_network_reads(blocks):
    """What a block on the way up gets beside h is, number for number, what its partner gave."""
    model, gave, read = UNet(**SHAPE, blocks=blocks), {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: gave.update({name: out}))
        module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    model(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3]))
    for up, down in transfer.partners(model).items():
        skip = gave[down]
        assert torch.equal(read[up][:, -skip.shape[1]:], skip), (up, down)


@pytest.mark.parametrize("blocks, there", [
    (3, {"down.0.blocks.0": "down.0.blocks.0", "down.0.blocks.1": "down.0.blocks.0",
         "down.0.blocks.2": "down.0.blocks.1", "up.1.blocks.2": "up.1.blocks.1",
         "up.1.blocks.1": "up.1.blocks.1", "up.1.blocks.0": "up.1.blocks.0",
         "up.1.blocks.3": "up.1.blocks.2",
         "down.1.blocks.0": "down.1.blocks.0", "down.1.blocks.1": "down.1.blocks.1",
         "down.1.blocks.2": "down.1.blocks.1", "up.0.blocks.2": "up.0.blocks.1",
         "up.0.blocks.1": "up.0.blocks.0", "up.0.blocks.0": "up.0.blocks.0",
         "up.0.blocks.3": "up.0.blocks.2"}),
    (1, {"down.0.blocks.0": "down.0.blocks.1", "up.1.blocks.0": "up.1.blocks.0",
         "up.1.blocks.1": "up.1.blocks.2", "down.1.blocks.0": "down.1.blocks.0",
         "up.0.blocks.0": "up.0.blocks.1", "up.0.blocks.1": "up.0.blocks.2"}),
])
def test_map_by_hand(blocks, there):
    """Widths 8 and 16. Of level 0 the block that reads level 1's output (24 channels) is the second unit's;
    of level 1 the one that widens (8 to 16) is the first unit's."""
    assert transfer.block_map(UNet(**SHAPE, blocks=2), UNet(**SHAPE, blocks=blocks)) == there


def test_first_units_stay_where_shapes_leave_a_choice():
    """One width: every unit of the level has the same shapes."""
    three, two = (UNet(base=8, mults=(1,), image_size=8, blocks=n) for n in (3, 2))
    assert transfer.block_map(three, two) == {
        "down.0.blocks.0": "down.0.blocks.0", "up.0.blocks.1": "up.0.blocks.2",
        "down.0.blocks.1": "down.0.blocks.1", "up.0.blocks.0": "up.0.blocks.1",
        "up.0.blocks.2": "up.0.blocks.3"}


def test_a_source_of_one_block_has_no_unit_to_repeat():
    with pytest.raises(ValueError, match="no unit of the source fits down.0.blocks.0 and up.1.blocks.1"):
        transfer.block_map(UNet(**SHAPE, blocks=1), UNet(**SHAPE, blocks=2))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_elastic_copies_weights_and_masks_together(blocks):
    generator = torch.Generator().manual_seed(0)
    shape = SHAPE | dict(attention=(8, 4))
    source, target = UNet(**shape, blocks=2), UNet(**shape, blocks=blocks)
    for p in source.parameters():
        torch.nn.init.normal_(p, generator=generator)
    masks = {name: torch.rand(mask.shape, generator=generator) < 0.3
             for name, mask in dense_masks(source).items()}
    state, elastic = transfer.elastic(source, masks, target)
    target.load_state_dict(state)  # every name and every shape
    assert list(elastic) == list(prunable(target))
    if blocks == 2:
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in state.items())
        assert all(torch.equal(mask, masks[name]) for name, mask in elastic.items())
    if blocks == 3:
        for ours, theirs in (("down.1.blocks.2.conv1", "down.1.blocks.1.conv1"),
                             ("mid.0.conv1", "mid.0.conv1"), ("up.1.blocks.3.conv2", "up.1.blocks.2.conv2"),
                             ("down.0.resample", "down.0.resample"),
                             ("down.0.attention.1.qkv", "down.0.attention.0.qkv")):
            assert torch.equal(state[f"{ours}.weight"], source.state_dict()[f"{theirs}.weight"])
            assert torch.equal(elastic[f"{ours}.weight"], masks[f"{theirs}.weight"])
            assert torch.equal(state[f"{ours}.bias"], source.state_dict()[f"{theirs}.bias"])


def test_shuffled_keeps_the_layers():
    masks = {"w": torch.arange(100) < 10}
    moved = transfer.shuffled(masks, 0)
    assert int(moved["w"].sum()) == 10 and not torch.equal(moved["w"], masks["w"])
    assert torch.equal(moved["w"], random_masks(masks, torch.Generator().manual_seed(lth.MASK_SEED))["w"])


def test_conclusions_are_paired_and_say_n():
    rows = [[seed, "A", "B", network, 0.9, 1, fid, 0, 16] for seed in range(3) for network, fid in (
        (transfer.OWN, 10.0 * seed), ("foreign mask", 10.0 * seed + 2))]
    said, = transfer.conclude(rows)
    assert "own ticket 10.00" in said and "foreign mask +2.00 [+2.00, +2.00]" in said and "n=3 seeds" in said
    assert "no verdict" not in said and "n=1 seed, no verdict" in next(transfer.conclude(rows[:2]))


# --- the two parts

@pytest.fixture(scope="module", autouse=True)
def small():
    """Few images behind a val_loss, no pictures of the runs, no timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "VAL_IMAGES", 100)
        patch.setattr(lth, "draw_everything", lambda *_: None)
        patch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
        patch.setattr(transfer, "RUN", MADE)
        yield patch


def test_across_data(compared, tmp_path, small, capsys):
    """Two runs of one data set that share theta_k: a foreign mask must be the ticket itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        transfer.main(["--part", "data", "--out", str(tmp_path), "--from",
                       *(str(compared / "runs" / name) for name in ("imp", "oneshot"))])
    said, rows = capsys.readouterr().out, table(tmp_path / "transfer_data_imp_oneshot.csv")
    fid = {(row["to"], row["network"]): row["fid_domain"] for row in rows}
    assert fid["oneshot", "foreign mask"] == fid["imp", "own ticket"] == fid["oneshot", "foreign ticket"]
    assert fid["imp", "foreign mask"] == fid["oneshot", "own ticket"] != fid["imp", "own ticket"]
    steps = {(row["to"], row["network"]): row["steps"] for row in rows}
    assert steps["imp", "dense"] == steps["imp", "own mask, new init"] == "16"
    assert steps["imp", "foreign mask, shuffled"] == steps["imp", "own ticket"] == "15"
    assert len({row["sparsity"] for row in rows if "dense" not in row["network"]}) == 1
    masks = table(tmp_path / "transfer_data_imp_oneshot_masks.csv")
    assert masks[0]["layer"] == "all" and float(masks[0]["times chance"]) > 1 and len(masks) > 10
    assert "n=1 seed, no verdict" in said and "one seed overlap" in said
    assert (tmp_path / "transfer_data_imp_oneshot.png").stat().st_size > 5_000


def test_across_depth(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=8, mults=(1, 2), blocks=1, patch=2))
    flags = ["--steps", "4", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    transfer.main(flags)
    said, rows = capsys.readouterr().out, table(tmp_path / "transfer_depth_digits.csv")
    assert "part one is left out" in said and "2 blocks to 3 blocks" in said and "no verdict" in said
    assert [row["to"] for row in rows] == ["3 blocks"] * 6 + ["1 block"] * 6
    for row in rows:
        k = 0 if row["network"] in ("dense", "elastic mask, new init") else 1
        assert int(row["steps"]) == 4 - k
        assert 0.4 < float(row["sparsity"]) < 0.6 or "dense" in row["network"]
    for to in ("3 blocks", "1 block"):  # one mask, thrice
        assert len({row["sparsity"] for row in rows if row["to"] == to and "elastic" in row["network"]}) == 1
    exp, _ = lth.open_run(str(tmp_path / "runs" / "transfer_digits_4_2_blocks"))
    target, _ = lth.open_run(str(tmp_path / "runs" / "transfer_digits_4_3_blocks"))
    _, masks = transfer.elastic(exp.theta(0), transfer.ticket(exp, 0), target.new_model(0))
    assert float(rows[3]["sparsity"]) == pytest.approx(1 - density(masks), rel=1e-5)
    trained = lth.load_state(next((tmp_path / "runs").glob("*_3_blocks/studies/*elastic-ticket*")))["ema"]
    assert all(not trained[name][~mask].any() for name, mask in masks.items())
    assert (tmp_path / "transfer_depth_digits.png").stat().st_size > 5_000


def test_bad_input_ends_in_one_line(compared, tmp_path, capsys):
    imp, other = str(compared / "runs" / "imp"), tmp_path / "imp"
    shutil.copytree(imp, other, ignore=shutil.ignore_patterns("studies"))
    for flags, named in (([], "--part"), (["--from", imp, str(tmp_path)], "config.json"),
                         (["--from", imp, str(other)], "different names")):
        with pytest.raises(SystemExit) as stop:
            transfer.main(["--part", "data", *flags, "--out", str(tmp_path)])
        assert stop.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
