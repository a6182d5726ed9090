"""studies.transfer_depth: what is copied where, by hand, and a run whose parts must agree."""
import csv

import pytest
import torch

import lth_diffusion as lth
from prune import dense_masks, density, prunable
from studies import transfer_depth
from studies.common import checkpoint, open_run, ticket_masks
from support import report, runs
from unet import PRESETS, UNet

SHAPE = dict(base=8, mults=(1, 2), image_size=8)
MADE = ("--rounds 1 --final-sparsity 0.5 --rewind 0.25 --batch 4 --samples 8 --nfe 4 "
        "--precision fp32").split()


def read(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- what goes where

PAIRS = {  # of 2 blocks per level, by hand: the last skip made is the first read
    "up.0.blocks.0": "down.1.blocks.1", "up.0.blocks.1": "down.1.blocks.0",
    "up.0.blocks.2": "down.0.resample", "up.1.blocks.0": "down.0.blocks.1",
    "up.1.blocks.1": "down.0.blocks.0", "up.1.blocks.2": "conv_in",
}


def test_partners_by_hand():
    assert transfer_depth.partners(UNet(**SHAPE, blocks=2)) == PAIRS


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_partners_are_what_the_network_reads(blocks):
    """What a block on the way up gets beside h is, number for number, what its partner gave."""
    model, gave, given = UNet(**SHAPE, blocks=blocks), {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: gave.update({name: out}))
        module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
    model(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3]))
    for up, down in transfer_depth.partners(model).items():
        skip = gave[down]
        assert torch.equal(given[up][:, -skip.shape[1]:], skip), (up, down)


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
    assert transfer_depth.block_map(UNet(**SHAPE, blocks=2), UNet(**SHAPE, blocks=blocks)) == there


def test_first_units_stay_where_shapes_leave_a_choice():
    """One width: every unit of the level has the same shapes."""
    three, two = (UNet(base=8, mults=(1,), image_size=8, blocks=n) for n in (3, 2))
    assert transfer_depth.block_map(three, two) == {
        "down.0.blocks.0": "down.0.blocks.0", "up.0.blocks.1": "up.0.blocks.2",
        "down.0.blocks.1": "down.0.blocks.1", "up.0.blocks.0": "up.0.blocks.1",
        "up.0.blocks.2": "up.0.blocks.3"}


def test_a_source_of_one_block_has_no_unit_to_repeat():
    with pytest.raises(ValueError, match="no unit of the source fits down.0.blocks.0 and up.1.blocks.1"):
        transfer_depth.block_map(UNet(**SHAPE, blocks=1), UNet(**SHAPE, blocks=2))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_elastic_copies_weights_and_masks_together(blocks):
    generator = torch.Generator().manual_seed(0)
    source, target = UNet(**SHAPE, blocks=2), UNet(**SHAPE, blocks=blocks)
    for p in source.parameters():
        torch.nn.init.normal_(p, generator=generator)
    masks = {name: torch.rand(mask.shape, generator=generator) < 0.3
             for name, mask in dense_masks(source).items()}
    opt = torch.optim.Adam(source.parameters())
    for p in source.parameters():
        p.grad = 3 * p.detach()
    opt.step()  # exp_avg is a tenth of it
    whole = dict(step=1, model=source.state_dict(), ema=source.state_dict(), optimizer=opt.state_dict())
    found, moved = transfer_depth.elastic(source, whole, masks, target)
    state = found["model"]
    target.load_state_dict(state)  # every name and every shape
    before = {name: moment["exp_avg"] for name, moment in zip(state, found["optimizer"]["state"].values())}
    old = dict(zip(source.state_dict(), (one["exp_avg"] for one in opt.state_dict()["state"].values())))
    copies = torch.optim.Adam(target.parameters())
    copies.load_state_dict(found["optimizer"])
    assert all(torch.equal(value, found["ema"][name]) for name, value in state.items())
    assert list(moved) == list(prunable(target))
    if blocks == 2:
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in state.items())
        assert all(torch.equal(mask, masks[name]) for name, mask in moved.items())
    if blocks == 3:
        for ours, theirs in (("down.1.blocks.2.conv1", "down.1.blocks.1.conv1"),
                             ("mid.0.conv1", "mid.0.conv1"), ("up.1.blocks.3.conv2", "up.1.blocks.2.conv2"),
                             ("down.0.resample", "down.0.resample")):
            assert torch.equal(state[f"{ours}.weight"], source.state_dict()[f"{theirs}.weight"])
            assert torch.equal(moved[f"{ours}.weight"], masks[f"{theirs}.weight"])
            assert torch.equal(state[f"{ours}.bias"], source.state_dict()[f"{theirs}.bias"])
            assert torch.equal(before[f"{ours}.weight"], old[f"{theirs}.weight"])


# --- the study

def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dict(base=8, mults=(1, 2), blocks=1, patch=2))
    monkeypatch.setattr(lth, "VAL_IMAGES", 100)
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    flags = [*MADE, "--seeds", "0", "--steps", "4", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    transfer_depth.main(flags)
    said, rows = capsys.readouterr().out, read(tmp_path / "transfer_depth_digits.csv")
    assert "2 blocks to 3" in said and "no verdict" in said
    assert [row["way"] for row in rows] == ["2 blocks to 3"] * 5 + ["2 blocks to 1"] * 5
    for row in rows:
        k = 0 if row["network"] in ("dense", "elastic mask, new init") else 1
        assert int(row["steps"]) == 4 - k
        assert 0.4 < float(row["sparsity"]) < 0.6 or "dense" in row["network"]
    source, _ = open_run(str(tmp_path / "runs" / "transfer_depth_digits_4_2_blocks"))
    target, _ = open_run(str(tmp_path / "runs" / "transfer_depth_digits_4_3_blocks"))
    state, masks = transfer_depth.elastic(source.new_model(0), checkpoint(source, 0), ticket_masks(source, 0),
                                    target.new_model(0))
    names = [name for name, _ in target.new_model(0).named_parameters()]
    moments = state["optimizer"]["state"]  # of as many steps as the weights, in their places
    assert len(moments) == len(names) and state["step"] == 1
    assert all(moments[i]["exp_avg"].shape == state["model"][n].shape and moments[i]["exp_avg"].any() ==
               moments[i]["exp_avg_sq"].any() for i, n in enumerate(names))
    for row in rows[2:5]:  # one mask, three times
        assert float(row["sparsity"]) == pytest.approx(1 - density(masks), rel=1e-5)
    path = next((tmp_path / "runs").glob("*_3_blocks/studies/*elastic-ticket*"))
    trained = runs.load_state(path)["ema"]
    assert all(not trained[name][~mask].any() for name, mask in masks.items())
    assert (tmp_path / "transfer_depth_digits.png").stat().st_size > 5_000


def test_the_preset_is_the_studys_own(capsys):
    with pytest.raises(SystemExit) as stop:
        transfer_depth.main(["--preset", "mnist"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--preset" in said and said.count("\n") == 1
