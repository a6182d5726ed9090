"""studies.transfer: what is copied where, by hand, and rows that must agree to the bit."""
import csv
import shutil

import pytest
import torch

import lth_diffusion as lth
from prune import dense_masks, density, prunable, random_masks
from studies import transfer
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
    assert transfer.partners(UNet(**SHAPE, blocks=2)) == PAIRS


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_partners_are_what_the_network_reads(blocks):
    """What a block on the way up gets beside h is, number for number, what its partner gave."""
    model, gave, given = UNet(**SHAPE, blocks=blocks), {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: gave.update({name: out}))
        module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
    model(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3]))
    for up, down in transfer.partners(model).items():
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
    found, elastic = transfer.elastic(source, whole, masks, target)
    state = found["model"]
    target.load_state_dict(state)  # every name and every shape
    before = {name: moment["exp_avg"] for name, moment in zip(state, found["optimizer"]["state"].values())}
    old = dict(zip(source.state_dict(), (one["exp_avg"] for one in opt.state_dict()["state"].values())))
    copies = torch.optim.Adam(target.parameters())
    copies.load_state_dict(found["optimizer"])
    assert all(torch.equal(value, found["ema"][name]) for name, value in state.items())
    assert list(elastic) == list(prunable(target))
    if blocks == 2:
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in state.items())
        assert all(torch.equal(mask, masks[name]) for name, mask in elastic.items())
    if blocks == 3:
        for ours, theirs in (("down.1.blocks.2.conv1", "down.1.blocks.1.conv1"),
                             ("mid.0.conv1", "mid.0.conv1"), ("up.1.blocks.3.conv2", "up.1.blocks.2.conv2"),
                             ("down.0.resample", "down.0.resample")):
            assert torch.equal(state[f"{ours}.weight"], source.state_dict()[f"{theirs}.weight"])
            assert torch.equal(elastic[f"{ours}.weight"], masks[f"{theirs}.weight"])
            assert torch.equal(state[f"{ours}.bias"], source.state_dict()[f"{theirs}.bias"])
            assert torch.equal(before[f"{ours}.weight"], old[f"{theirs}.weight"])


def test_shuffled_keeps_the_layers():
    masks = {"w": torch.arange(100) < 10}
    moved = transfer.shuffled(masks, 0)
    assert int(moved["w"].sum()) == 10 and not torch.equal(moved["w"], masks["w"])
    assert torch.equal(moved["w"], random_masks(masks, torch.Generator().manual_seed(lth.MASK_SEED))["w"])


def test_networks_are_paired_with_the_own_ticket_and_masks_with_shuffled_ones():
    values = {transfer.OWN: (90, 100, 110), "foreign mask": (110, 120, 130), "foreign mask, shuffled": (90, 100, 110),
              transfer.FOREIGN: (90, 100, 110)}
    table = [transfer.Row(seed, "A to B", network, 0.5, 8, value, 1.0, 8)
             for network, three in values.items() for seed, value in enumerate(three)]
    found = {tuple(row[1:4]): row[4:] for row in transfer.paired(table)}
    assert len(found) == 8  # three against the own ticket and one against its shuffled mask, by two metrics
    assert found["fid_domain", "foreign mask", transfer.OWN] == [3, 120, 100, 20, 20, 20, "worse"]
    assert found["fid_domain", "foreign mask", "foreign mask, shuffled"][-1] == "worse"
    assert found["val_loss", "foreign mask", transfer.OWN] == [3, 1, 1, 0, 0, 0, "as good"]
    title = transfer.title_of(list(transfer.paired(table)), transfer.FOREIGN)
    assert title == "Foreign ticket against own ticket: as good (A to B)"


# --- the two studies

@pytest.fixture(scope="module", autouse=True)
def small():
    """Few images behind a val_loss, no pictures of the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "VAL_IMAGES", 100)
        patch.setattr(report, "draw_run", lambda *_: None)
        yield patch


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    """Two runs of one data set that share theta_k and differ in their tickets."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        for scope in ("global", "layer"):
            flags = [*MADE, "--steps", "8", "--scope", scope, "--out", str(folder / scope)]
            lth.main(flags)
        yield folder


def test_across_data(pair, tmp_path, capsys):
    """The two runs share theta_k and data: a foreign mask must be the ticket itself."""
    transfer.main(["--from", str(pair / "global"), str(pair / "layer"), "--out", str(tmp_path)])
    said, rows = capsys.readouterr().out, read(tmp_path / "transfer_data_global_layer.csv")
    fid = {(row["way"], row["network"]): row["fid_domain"] for row in rows}
    there, back = "global to layer", "layer to global"
    assert fid[there, "foreign mask"] == fid[back, "own ticket"] == fid[there, "foreign ticket"]
    assert fid[back, "foreign mask"] == fid[there, "own ticket"] != fid[back, "own ticket"]
    steps = {(row["way"], row["network"]): row["steps"] for row in rows}
    assert steps[back, "dense"] == steps[back, "own mask, new init"] == "8"
    assert steps[back, "foreign mask, shuffled"] == steps[back, "own ticket"] == "6"
    pruned = [float(row["sparsity"]) for row in rows if "dense" not in row["network"]]
    assert pruned == pytest.approx([0.5] * len(pruned), abs=1e-3)
    answers = {row["answer"] for row in read(tmp_path / "transfer_data_global_layer_paired.csv")}
    assert answers == {"no verdict"} and "Masks of one seed overlap" in said
    assert (tmp_path / "transfer_data_global_layer.png").stat().st_size > 5_000


def test_across_depth(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dict(base=8, mults=(1, 2), blocks=1, patch=2))
    flags = [*MADE, "--seeds", "0", "--steps", "4", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    transfer.main(flags)
    said, rows = capsys.readouterr().out, read(tmp_path / "transfer_depth_digits.csv")
    assert "2 blocks to 3" in said and "no verdict" in said
    assert [row["way"] for row in rows] == ["2 blocks to 3"] * 5 + ["2 blocks to 1"] * 5
    for row in rows:
        k = 0 if row["network"] in ("dense", "elastic mask, new init") else 1
        assert int(row["steps"]) == 4 - k
        assert 0.4 < float(row["sparsity"]) < 0.6 or "dense" in row["network"]
    source, _ = open_run(str(tmp_path / "runs" / "transfer_digits_4_2_blocks"))
    target, _ = open_run(str(tmp_path / "runs" / "transfer_digits_4_3_blocks"))
    state, masks = transfer.elastic(source.new_model(0), checkpoint(source, 0), ticket_masks(source, 0),
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


def test_mistakes_end_in_one_line(pair, tmp_path, capsys):
    one, same = pair / "global", tmp_path / "global"
    shutil.copytree(one, same, ignore=shutil.ignore_patterns("studies"))
    for flags, named in ((["--from", str(one), str(tmp_path)], "config.json"),
                         (["--from", str(one), str(same)], "different names"),
                         (["--from", str(one), str(one), "--steps", "9"], "--steps"),
                         (["--preset", "mnist"], "--preset")):
        with pytest.raises(SystemExit) as stop:
            transfer.main([*flags, "--out", str(tmp_path)])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and named in said and said.count("\n") == 1
