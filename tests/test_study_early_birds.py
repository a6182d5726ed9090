"""studies/early_birds.py: regions of t, joined networks, what is paired; one run as small as it can be."""
import csv

import pytest
import torch

from ddpm import Diffusion
from studies import common, early_birds

FLAGS = "--rounds 1 --steps 60 --batch 4 --samples 8 --nfe 4 --prune-rate 0.5 --control-rounds 1 --controls reinit"


@pytest.fixture(scope="module")
def studied(finished):
    """The folder of the study of a finished run of a small network."""
    early_birds.main(["--from", str(finished / "run"), "--out", str(finished)])
    return finished


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run(studied):
    rows = {row["arm"]: row for row in rows_of(studied / "early_birds_digits.csv")}
    assert list(rows) == ["dense", "ticket", "reinit", "early bird", "by region", "dense by region"]
    steps = {arm: int(row["training steps"]) for arm, row in rows.items()}
    k = 3  # 5 % of 60
    assert steps["dense"] == steps["early bird"] == steps["by region"] == 60 and steps["ticket"] == 120 - k
    assert 0 < int(rows["early bird"]["settled at"]) <= 30  # half of the steps, at most
    assert all(0 < int(step) <= 15 for step in rows["by region"]["settled at"].split(" and "))
    settling = rows_of(studied / "early_birds_digits_settling.csv")
    assert {row["region"] for row in settling} == {early_birds.ALL, *early_birds.REGIONS}
    assert all(0 <= float(row["distance from the mask before"]) <= 1 for row in settling)
    paired = rows_of(studied / "early_birds_digits_paired.csv")
    assert [row["answer"] for row in paired] == ["no verdict"] * 7  # one seed
    assert [row["against"] for row in paired] == ["ticket"] * 5 + ["dense by region", "early bird"]
    assert (studied / "early_birds_digits.png").stat().st_size > 5_000


@pytest.mark.parametrize("region, wanted", [("upper half", range(500, 1000)), ("lower half", range(0, 500))])
def test_a_region_trains_on_its_steps_alone_and_on_all_of_them(region, wanted):
    whole, seen = Diffusion(prediction="v", weighting="min-snr"), []
    part = common.Region(whole, *common.REGIONS[region])

    def model(x, t):
        seen.extend(t.tolist())
        return torch.zeros_like(x)
    x0, t = torch.zeros(1000, 1, 1, 1), torch.arange(1000)
    part.loss(model, x0, t, torch.randn(1000, 1, 1, 1))
    assert sorted(set(seen)) == list(wanted) and part.weighting == "min-snr" and part.prediction == "v"


def test_joined_networks_answer_for_their_half():
    class Plus(torch.nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c = c

        def forward(self, x, t):
            return x + self.c
    joined = common.Joined(Plus(1), Plus(-1), 500)
    x = torch.zeros(4, 1, 2, 2)
    for t, wanted in (([500] * 4, [1] * 4), ([499] * 4, [-1] * 4), ([0, 999, 499, 500], [-1, 1, -1, 1])):
        assert joined(x, torch.tensor(t))[:, 0, 0, 0].tolist() == wanted


def test_arms_are_compared_with_the_ticket_by_seed():
    table = [[seed, arm, None, steps, value + seed, 0.1] for seed in range(3)
             for arm, steps, value in (("dense", 10, 12.0), ("ticket", 19, 9.0), ("early bird", 10, 9.1))]
    found = {row[0]: row[2:] for row in early_birds.paired(table)}
    assert found["early bird"][:2] == [3, 1.0] and found["early bird"][4] == pytest.approx(0.1)
    assert found["early bird"][-1] == "as good" and found["dense"][-1] == "worse" and "ticket" not in found


def test_title_says_whether_masks_settled():
    assert early_birds.title_of([275, 275, 275], 560) == "The search for masks ends, settled or not, at step 275 of 560"
    assert early_birds.title_of([99, 275, 110], 560) == "Masks are drawn after 99 to 275 of 560 steps"
    assert early_birds.title_of([99], 560) == "Masks are drawn after 99 of 560 steps"
