"""studies.transfer: networks paired by hand, and rows that must agree to the bit."""
import csv
import shutil

import pytest
import torch

import lth_diffusion as lth
from prune import random_masks
from studies import transfer
from support import report
from unet import PRESETS

MADE = ("--rounds 1 --final-sparsity 0.5 --rewind 0.25 --batch 4 --samples 8 --nfe 4 "
        "--precision fp32").split()


def read(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
    pairs = list(transfer.paired(table, [("foreign mask", transfer.SHUFFLED), (transfer.FOREIGN, "dense")]))
    found = {tuple(row[1:4]): row[4:] for row in pairs}
    assert len(found) == 8  # by two metrics: three against the own ticket, one against its shuffled mask; there is no dense
    assert found["fid_domain", "foreign mask", transfer.OWN] == [3, 120, 100, 20, 20, 20, "worse"]
    assert found["fid_domain", "foreign mask", "foreign mask, shuffled"][-1] == "worse"
    assert found["val_loss", "foreign mask", transfer.OWN] == [3, 1, 1, 0, 0, 0, "as good"]
    title = transfer.title_of(pairs, transfer.FOREIGN)
    assert title == "Foreign ticket against own ticket: as good (A to B)"


# --- the study

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


def test_across_data(pair, tmp_path, capsys, monkeypatch):
    """The two runs share theta_k and data: a foreign mask must be the ticket itself."""
    monkeypatch.setattr(transfer, "ALIKE", ("preset", "steps", "lr"))  # else their scopes are refused
    transfer.main(["--from", str(pair / "global"), str(pair / "layer"), "--out", str(tmp_path)])
    said, rows = capsys.readouterr().out, read(tmp_path / "transfer_global_layer.csv")
    fid = {(row["way"], row["network"]): row["fid_domain"] for row in rows}
    there, back = "global to layer", "layer to global"
    assert fid[there, "foreign mask"] == fid[back, "own ticket"] == fid[there, "foreign ticket"]
    assert fid[back, "foreign mask"] == fid[there, "own ticket"] != fid[back, "own ticket"]
    steps = {(row["way"], row["network"]): row["steps"] for row in rows}
    assert steps[back, "dense"] == steps[back, "own mask, new init"] == "8"
    assert steps[back, "foreign mask, shuffled"] == steps[back, "own ticket"] == "6"
    pruned = [float(row["sparsity"]) for row in rows if "dense" not in row["network"]]
    assert pruned == pytest.approx([0.5] * len(pruned), abs=1e-3)
    answers = {row["answer"] for row in read(tmp_path / "transfer_global_layer_paired.csv")}
    assert answers == {"no verdict"} and "Masks of one seed overlap" in said
    assert (tmp_path / "transfer_global_layer.png").stat().st_size > 5_000


def test_runs_that_differ_in_more_than_data_are_refused(small, tmp_path, capsys):
    """At another rate a foreign ticket would differ in its recipe too."""
    for name, flags in (("one", []), ("two", ["--lr", "0.001"])):
        lth.main([*MADE, "--steps", "8", *flags, "--out", str(tmp_path / name)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        transfer.main(["--from", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "these runs differ in lr (" in capsys.readouterr().err


def test_mistakes_end_in_one_line(pair, tmp_path, capsys):
    one, same = pair / "global", tmp_path / "global"
    shutil.copytree(one, same, ignore=shutil.ignore_patterns("studies"))
    for flags, named in ((["--from", str(one), str(tmp_path)], "config.json"),
                         (["--from", str(one), str(same)], "different names"),
                         (["--from", str(one), str(one), "--steps", "9"], "--steps"),
                         ([], "--from")):
        with pytest.raises(SystemExit) as stop:
            transfer.main([*flags, "--out", str(tmp_path)])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and named in said and said.count("\n") == 1
