"""studies/stability.py: identities of its copies on a real run; barriers, overlaps and rho by hand."""
import csv
import json

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from prune import dense_masks, density, live_total
from studies import common, stability
from unet import UNet

FLAGS = "--rounds 1 --final-sparsity 0.5 --steps 16 --batch 8 --samples 8 --nfe 4 --controls"


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A folder with a finished run of two seeds of a tiny network, and the study of its first."""
    folder = tmp_path_factory.mktemp("stability")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "VAL_IMAGES", 100)
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        lth.main([*FLAGS.split(), "--seeds", "0", "1", "--out", str(folder / "run")])
        stability.main(["--from", str(folder / "run"), "--seeds", "0", "--shares", "0", "0.5", "--out", str(folder)])
        yield folder


@pytest.fixture
def exp(studied):
    return common.open_run(str(studied / "run"))[0]


@pytest.fixture(scope="module")
def table(studied):
    """The rows of the study's table: figures by column."""
    with open(studied / "stability_digits.csv", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_every_start_has_its_copies_and_its_ticket(studied, table):
    assert [row["k"] for row in table] == [0, 1, 8]
    with open(studied / "stability_digits.json", encoding="utf-8") as file:
        facts = json.load(file)
    assert facts["density"] == pytest.approx(0.5, abs=1e-3)
    for row in table:
        assert row["barrier"] >= 0 and row["by chance"] < row["IoU"] < 1
        for excess, column in ("excess loss", "val_loss"), ("excess fid", "fid_domain"):
            assert row[excess] == pytest.approx(row[f"{column} ticket"] / row[f"{column} A"] - 1, abs=1e-4)
        losses = facts["paths"][f"seed 0, k={row['k']:.0f}"]  # from A to B
        assert len(losses) == 11 and losses[0] == pytest.approx(row["val_loss A"], rel=1e-5)
        assert losses[-1] == pytest.approx(row["val_loss B"], rel=1e-5)
    for ending in "", "_masks":
        assert (studied / f"stability_digits{ending}.png").stat().st_size > 5_000


def test_masks_of_two_seeds_overlap_as_random_ones_do(studied):
    with open(studied / "stability_digits.json", encoding="utf-8") as file:
        iou, chance = json.load(file)["two_seeds"]
    assert 1 / 3 < chance < 0.6  # half of the weights each; more where layer densities differ
    assert iou == pytest.approx(chance, rel=0.05)


def test_copies_are_what_the_run_itself_trained(exp, table):
    """The dense run is repeated to the bit, its states too; trained on from any of them it is itself."""
    model, ema, states = stability.dense_run(exp, 0, [0, 1, 8])
    dense = exp.load(lth.Job(0, 0, "dense"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.model.parameters()))
    for k, start in (exp.k, common.checkpoint(exp, 0)["model"]), (0, exp.new_model(0).state_dict()):
        assert all(torch.equal(value, states[k]["model"][name]) for name, value in start.items())
    for k in states:
        again = common.fit(exp, f"again_{k}", 0, exp.new_model(0), None, states[k])
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), dense.ema.parameters())), k
    assert exp.k == 1 and all(row["fid_domain A"] == pytest.approx(dense.row["fid_domain"], rel=1e-4)
                              for row in table)


def test_barrier_by_hand():
    assert stability.barrier(np.linspace(3, 5, 11)) == pytest.approx(0)
    assert stability.barrier(np.square(stability.ALPHAS - 0.5)) == 0  # a valley: no barrier, none below 0
    hill = np.linspace(3, 5, 11)
    hill[5] += 2
    assert stability.barrier(hill) == pytest.approx(2)


def test_the_way_between_two_copies():
    """val_loss replaced by a known function of the weights: 1 less the square of one bias."""
    class Fake:
        new_model = staticmethod(lambda seed: UNet(base=8, mults=(1,)))
        errors = staticmethod(lambda model: dict(val_loss=1 - model.conv_out.bias[0].item() ** 2))
    a, b = Fake.new_model(0), Fake.new_model(0)
    torch.nn.init.constant_(a.conv_out.bias, -1.0)
    torch.nn.init.constant_(b.conv_out.bias, 1.0)
    losses = stability.path_losses(Fake, a, b)
    assert losses[0] == losses[-1] == 0 and stability.barrier(losses) == pytest.approx(1)
    assert stability.barrier(stability.path_losses(Fake, a, a)) == 0


@pytest.mark.parametrize("scope", ["global", "layer", "ramp"])
def test_one_cut_leaves_what_was_asked_for(exp, scope):
    exp.args.scope = scope
    model = exp.new_model(0)
    total, masks = live_total(dense_masks(model)), stability.one_cut(exp, model, 0.25)
    if scope == "layer":  # each layer to a quarter of its own
        for mask in masks.values():
            assert int(mask.sum()) == mask.numel() - round(0.75 * mask.numel())
    else:
        assert live_total(masks) == total - round(0.75 * total)
    again = stability.one_cut(exp, model, density(masks))  # copies are cut to the ticket's density, exactly
    assert live_total(again) == live_total(masks)


def rows(seed, barriers, excess):
    return [{"seed": seed, "k": k, "barrier": barrier, "val_loss A": 100.0, "excess loss": value, "excess fid": 1.0}
            for k, (barrier, value) in enumerate(zip(barriers, excess))]


def test_rank_correlation_by_hand():
    found = stability.rank_correlation(rows(0, [3, 2, 1], [30, 20, 10]) + rows(1, [3, 2, 1], [1, 2, 3]),
                                       "excess loss")
    assert found == {0: pytest.approx(1), 1: pytest.approx(-1)}
    for flat in rows(0, [1, 1, 1], [1, 2, 3]), rows(0, [1, 2], [1, 2]):
        assert np.isnan(stability.rank_correlation(flat, "excess loss")[0])


def test_a_start_is_stable_where_no_later_one_has_a_barrier():
    """2 % of 100; every seed counts, and a barrier at a later k undoes an earlier one."""
    assert stability.stable_from(rows(0, [3, 1, 1], [0, 0, 0])) == 1
    assert stability.stable_from(rows(0, [3, 1, 1], [0, 0, 0]) + rows(1, [3, 2, 1], [0, 0, 0])) == 2
    assert stability.stable_from(rows(0, [1, 1, 3], [0, 0, 0])) is None


def test_conclusions_say_their_n():
    one = rows(0, [3, 2, 1], [30, 20, 10])
    said = stability.conclude(one, None)
    assert "excess loss, by seed: 1.00 (n=1, no verdict)" in said and "two seeds" not in said
    three = one + rows(1, [3, 2, 1], [3, 2, 1]) + rows(2, [3, 2, 1], [9, 8, 7])
    said = stability.conclude(three, [0.25, 0.2])
    assert "IoU of tickets of two seeds: 0.250, by chance 0.200." in said
    assert "1.00, 1.00, 1.00 (n=3, mean 1.00 [1.00, 1.00])" in said
    assert "excess fid, by seed: nan, nan, nan" in said  # the same at every k: no order


@pytest.mark.parametrize("flags, said", [("--seeds 7", "no ticket of seed 7"),
                                         ("--shares 0.99", "argument --shares: 0.99 of 16 steps")])
def test_a_mistake_ends_in_one_line(studied, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        stability.main(["--from", str(studied / "run"), *flags.split(), "--out", str(studied)])
    assert stop.value.code == 2 and said in capsys.readouterr().err
