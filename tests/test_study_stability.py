"""The study of stable tickets: identities of its copies, barriers and overlaps by hand."""
import csv
import json

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from prune import dense_masks, density, live_counts, random_masks
from studies import stability
from unet import UNet


@pytest.fixture(scope="module", autouse=True)
def small():
    """The network that the compared runs are of, and few images behind a val_loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "VAL_IMAGES", 100)
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        yield


@pytest.fixture(scope="module")
def studied(compared):
    """The folder of a whole run of the study, and what it printed is checked where it is needed."""
    stability.main(["--from", str(compared / "runs" / "imp"), "--shares", "0", "0.5", "--out", str(compared)])
    return compared


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_every_start_has_its_copies_and_its_ticket(studied):
    rows = table(studied / "stability_digits.csv")
    assert [(row["k"], row["steps left"]) for row in rows] == [("0", "16"), ("1", "15"), ("8", "8")]
    assert all(float(row["barrier"]) >= 0 for row in rows)
    for row in rows:
        excess = float(row["val_loss ticket"]) / float(row["val_loss A"]) - 1
        assert float(row["ticket's excess loss"]) == pytest.approx(excess, abs=1e-4)
    source = json.load(open(studied / "stability_digits.json"))
    assert len(source["paths"]) == 3 and all(len(losses) == 11 for losses in source["paths"].values())
    for row in rows:  # the way begins at A and ends at B
        losses = source["paths"][f"seed 0, k={row['k']}"]
        assert losses[0] == pytest.approx(float(row["val_loss A"]), rel=1e-5)
        assert losses[-1] == pytest.approx(float(row["val_loss B"]), rel=1e-5)
    for ending in ("", "_paths", "_masks"):
        assert (studied / f"stability_digits{ending}.png").stat().st_size > 5_000


def test_copies_are_what_the_run_itself_trained(studied):
    """The dense run comes out again to the bit, so does theta_k, and copy A from the run's k is its twin."""
    exp, rows = lth.open_run(str(studied / "runs" / "imp"))
    dense = stability.dense_run(exp, 0, [0, 1, 8])
    for name, value in exp.load(lth.Job(0, 0, "dense"))["ema"].items():
        assert torch.equal(value, dense["ema"][name])
    for name, value in exp.theta(0).state_dict().items():
        assert torch.equal(value, dense["thetas"][exp.k][name])
    model, ema = stability.copies(exp, 0, exp.k, exp.theta(0).state_dict(), dense)[0]
    for name, value in exp.load(lth.Job(0, 0, "twin"))["ema"].items():
        assert torch.equal(value, ema.state_dict()[name])
    row = next(row for row in table(studied / "stability_digits.csv") if row["k"] == "1")
    assert float(row["fid_domain A"]) == pytest.approx(rows[lth.Job(0, 0, "twin")]["fid_domain"], rel=1e-4)


def test_overlaps_of_a_run(studied):
    rows = table(studied / "stability_digits_masks.csv")
    layers = len(dense_masks(lth.open_run(str(studied / "runs" / "imp"))[0].new_model(0)))
    # orders from three k, one cut beside the run's, rounds 1 and 2; one seed, so none across seeds
    assert len(rows) == (3 + 1 + 1) * (1 + layers)
    live = {(row["live of one"], row["live of other"]) for row in rows if row["layer"] == "all"
            and row["across"] != "rounds"}
    assert len(live) == 1 and len(set(live.pop())) == 1  # one cut goes to IMP's density, to the weight
    nested = [row for row in rows if row["across"] == "rounds"]
    for row in nested:
        assert float(row["IoU"]) == float(row["must be"])
    assert float(nested[0]["IoU"]) == pytest.approx(0.8, abs=1e-3)


def test_masks_that_are_not_nested_are_found_out():
    masks = dense_masks(UNet(base=8, mults=(1,)))
    few = {name: torch.rand(mask.shape) < 0.5 for name, mask in masks.items()}
    assert next(stability.compare("", "", "", masks, few, nested=True))[-1] == density(few)
    with pytest.raises(AssertionError, match="not nested"):
        list(stability.compare("", "", "", few, random_masks(few, torch.Generator()), nested=True))


def test_compare_counts_by_hand():
    a = {"one": torch.tensor([True, True, False, False]), "two": torch.tensor([True, False])}
    b = {"one": torch.tensor([True, False, True, False]), "two": torch.tensor([True, False])}
    total, one, two = stability.compare("x", "y", "z", a, b)
    assert total[4:7] == [3, 3, 2 / 4] and one[4:8] == [2, 2, 1 / 3, 1 / 3]  # chance: 1 of 3
    assert two[6] == 1 and two[7] == pytest.approx(0.5 / 1.5) and two[8] == pytest.approx(3)


def test_barrier_by_hand():
    assert stability.barrier(np.linspace(3, 5, 11)) == pytest.approx(0)
    assert stability.barrier(np.square(stability.ALPHAS - 0.5)) == 0  # a valley: no barrier, none below 0
    hill = np.linspace(3, 5, 11)
    hill[5] += 2
    assert stability.barrier(hill) == pytest.approx(2)


def test_the_way_between_two_copies():
    """val_loss replaced by a known function of the weights: the square of what conv_out's bias has in it."""
    class Fake:
        new_model = staticmethod(lambda seed: UNet(base=8, mults=(1,)))
        val_loss = staticmethod(lambda model: 1 - model.conv_out.bias[0].item() ** 2)
    a, b = Fake.new_model(0), Fake.new_model(0)
    torch.nn.init.constant_(a.conv_out.bias, -1.0)
    torch.nn.init.constant_(b.conv_out.bias, 1.0)
    losses = stability.path_losses(Fake, a, b)
    assert losses[0] == losses[-1] == 0 and stability.barrier(losses) == pytest.approx(1)
    assert stability.barrier(stability.path_losses(Fake, a, a)) == 0


def test_rank_correlation_by_hand():
    rows = [[seed, k, 0, barrier, *[0] * 7, excess] for seed, k, barrier, excess in (
        (0, 0, 3, 30), (0, 1, 2, 20), (0, 2, 1, 10), (1, 0, 3, 1), (1, 1, 2, 2), (1, 2, 1, 3))]
    found = stability.rank_correlation(rows, 11)
    assert found[0] == pytest.approx(1) and found[1] == pytest.approx(-1) and abs(found["all"]) < 0.5
    flat = stability.rank_correlation([[0, k, 0, 1, *[0] * 7, k] for k in range(4)], 11)
    assert flat[0] != flat[0]


def test_one_cut_leaves_what_was_asked_for(studied):
    exp, _ = lth.open_run(str(studied / "runs" / "imp"))
    model = exp.new_model(0)
    masks = stability.one_cut(exp, model, 0.25)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(live_counts(masks).values()) == total - round(0.75 * total)


def test_overlap_across_seeds_is_of_one_k_and_conclusions_say_n():
    class Exp:
        k, args = 4, type("", (), dict(method="imp", rounds=2))
    one, other = ({"w": torch.tensor(bits, dtype=torch.bool)} for bits in ([1, 1, 0, 0], [1, 0, 1, 0]))
    cuts = {(seed, k): (one, other) for seed in (0, 1) for k in (0, 4)}
    rows = list(stability.of_cuts(Exp, cuts, {(0, 2): one, (1, 2): other}))
    whole = {(row[0], row[2]): row[6] for row in rows if row[3] == "all"}
    assert whole == {("orders, k=0", "seed 0"): 1 / 3, ("orders, k=4", "seed 0"): 1 / 3,
                     ("orders, k=0", "seed 1"): 1 / 3, ("orders, k=4", "seed 1"): 1 / 3,
                     ("cut, run's", "seed 0"): 1, ("cut, run's", "seed 1"): 1 / 3, ("seeds", "seeds 0, 1"): 1}
    table = [[seed, k, 0, -k, *[0] * 7, -k, seed + 1.0] for seed in range(3) for k in range(4)]
    said = stability.conclude(table, rows)
    assert "1.00 over seeds x k, n=12" in said and "mean 1.00 [1.00, 1.00] at 90 %, n=3 seeds" in said
    assert "nan: all alike" in said  # excess fid, the same at every k


@pytest.mark.parametrize("flags, named", [("--seeds 7", "--seeds"), ("--shares 0.99", "--shares")])
def test_bad_input_ends_in_one_line(compared, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        stability.main(["--from", str(compared / "runs" / "imp"), *flags.split(), "--out", str(compared)])
    assert stop.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
