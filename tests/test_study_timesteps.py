"""studies/timesteps.py: equal work, who trains on what, what is paired; one run as small as it can be."""
import csv

import pytest

import lth_diffusion as lth
from prune import dense_masks
from studies import timesteps
from studies.common import Joined, open_run
from support import cli

FLAGS = "--rounds 2 --steps 16 --batch 8 --samples 8 --nfe 4 --prune-rate 0.5 --controls"
ARMS = ["even", "even, by halves", "sparse early", "sparse early, by halves", "dense early", "dense early, by halves"]


@pytest.fixture(scope="module")
def studied(finished):
    """The folder of a finished run of a small network, and of its study."""
    timesteps.main(["--from", str(finished / "run"), "--out", str(finished)])
    return finished


def test_all_arms_do_the_same_work(studied):
    with open(studied / "timesteps_digits.csv", encoding="utf-8") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ARMS
    work = {arm: float(row["million MACs per evaluation"]) for arm, row in rows.items()}
    assert all(value == pytest.approx(work["even"], rel=0.01) for value in work.values())  # 4 evaluations: 2 and 2
    steps = {arm: int(row["training steps"]) for arm, row in rows.items()}
    k = 1  # 5 % of 16
    assert steps["even"] == steps["dense early, by halves"] == 16 - k and steps["sparse early"] == 2 * (16 - k)
    assert len({row["fid_domain"] for row in rows.values()}) == 6  # six different networks
    with open(studied / "timesteps_digits_paired.csv", encoding="utf-8") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == ["no verdict"] * 5  # one seed
    assert (studied / "timesteps_digits.png").stat().st_size > 5_000


def test_cuts_leave_the_work_that_was_asked_for(studied):
    exp, _ = open_run(str(studied / "run"))
    model = exp.load(lth.Job(0, 0, "dense")).model
    whole = timesteps.macs_of(model, dense_masks(model))
    for share in 0.1, 0.5, 0.8:
        masks = timesteps.cut_to(exp, model, share * whole)
        assert timesteps.macs_of(model, masks) == pytest.approx(share * whole, rel=0.01)


def test_sparse_early_is_the_sparser_ticket_at_much_noise(studied):
    exp, _ = open_run(str(studied / "run"))
    found = {arm: model for arm, model, *_ in timesteps.networks(exp, 0)}

    def zeros(model):
        return sum(int((p == 0).sum()) for p in model.parameters())
    sparse, dense = found["sparse early"], found["dense early"]
    assert isinstance(sparse, Joined) and sparse.switch == 500
    assert zeros(sparse.upper) == zeros(dense.lower) > zeros(found["even"]) > zeros(sparse.lower) == zeros(dense.upper)


def test_arms_are_compared_with_even_by_seed():
    table = [[seed, arm, 1e6, 10, value + seed, 0.1] for seed in range(3)
             for arm, value in (("even", 10.0), ("sparse early", 8.0), ("dense early", 10.2))]
    found = {row[0]: row[1:] for row in timesteps.paired(table)}
    assert "even" not in found and found["sparse early"][0] == "even" and found["sparse early"][-1] == "better"
    assert found["dense early"][5] == pytest.approx(0.2) and found["dense early"][-1] == "as good"
    halves = [[*row[:1], row[1] + ", by halves", *row[2:]] for row in table]
    against = {row[0]: row[1] for row in timesteps.paired(table + halves)}
    assert against["even, by halves"] == "even" and against["dense early, by halves"] == "even, by halves"


def test_tickets_that_leave_too_much_are_refused(studied, monkeypatch):
    """Where `denser` would need more work than dense does, the splits would do less than `even`."""
    exp, _ = open_run(str(studied / "run"))
    monkeypatch.setattr(timesteps, "SHARES", dict(sparser=0.5, even=1.0, denser=9.0))
    with pytest.raises(cli.Mistake, match="of the multiply-accumulates; name a run of sparser ones"):
        timesteps.tickets_of(exp, 0)
