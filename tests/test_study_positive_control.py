"""studies.positive_control: a short run on digits; exact densities; the conclusion by hand."""
import csv

import pytest
import torch

from prune import dense_masks, live_counts
from studies import positive_control
from studies.positive_control import Row
from support import data


def test_a_short_run(monkeypatch, capsys, tmp_path):
    images, labels = (part[:1120] for part in data.load_images("digits", "data"))
    sets = [(images[a:b].float() / 255, labels[a:b]) for a, b in ((0, 1000), (1000, 1060), (1060, 1120))]
    monkeypatch.setattr(positive_control, "load", lambda folder: sets)
    positive_control.main([*"--nets lenet conv --seeds 0 --steps 40 --rounds 1 --out".split(), str(tmp_path)])
    tables = {}
    for net in ("lenet", "conv"):
        with open(tmp_path / f"positive_control_{net}.csv", encoding="utf-8") as file:
            tables[net] = list(csv.DictReader(file))
        for name in ("accuracy", "speed"):
            assert (tmp_path / f"positive_control_{net}_{name}.png").stat().st_size > 5_000
    first = (0.8 * 235_200 + 0.8 * 30_000 + 0.9 * 1000) / 266_200  # the last layer at half the rate
    assert float(tables["lenet"][1]["weights_left"]) == pytest.approx(first, abs=1e-5)
    for rows in tables.values():
        assert [row["arm"] for row in rows] == ["dense", "ticket", "reinit", "random", "oneshot"]
        assert float(rows[0]["accuracy"]) > 0.6
        assert len({row["weights_left"] for row in rows[1:4]}) == 1
        # after one round the single cut is the ticket
        assert rows[1]["accuracy"] == rows[4]["accuracy"]
    said = capsys.readouterr().out
    assert f"lenet, {100 * first:.1f} % of the weights, 1 seed:" in said and "no verdict" in said


@pytest.mark.parametrize("k", [0, 7])
def test_a_ticket_that_prunes_nothing_is_the_dense_network(k):
    """Weights, Adam's moments and data of step k: from there on nothing differs."""
    images, labels = (part[:300] for part in data.load_images("digits", "data"))
    sets = [(images.float() / 255, labels)] * 3
    dense, again = (positive_control.build("lenet", 0) for _ in range(2))
    masks = dense_masks(dense)
    found, state = positive_control.fit(dense, masks, sets, 20, 0, "dense", keep=k)
    assert state["step"] == k
    repeated, _ = positive_control.fit(again, masks, sets, 20, 0, "ticket", state)
    assert repeated == found
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), dense.parameters()))


def test_one_cut_is_as_deep_as_its_rounds():
    model = positive_control.build("conv", 0)
    every = dense_masks(model)
    assert sum(live_counts(every).values()) == 206_736
    masks, once = every, positive_control.cut(model, every, 5)
    for _ in range(5):
        masks = positive_control.cut(model, masks)
    rounds, direct = live_counts(masks), live_counts(once)
    for name, n in live_counts(every).items():
        rate = 0.1 if n == 1280 else 0.2
        assert rounds[name] == pytest.approx(n * (1 - rate) ** 5, abs=3)
        assert direct[name] == pytest.approx(rounds[name], abs=3)
    assert all(torch.equal(masks[name], once[name]) for name in masks if rounds[name] == direct[name])


def test_a_stop_near_the_last_step_is_a_lower_bound():
    rows = [Row("lenet", 0, r, arm, 0.8, step, 0.9) for r, arm, step in (
        (0, "dense", 95), (1, "ticket", 40), (1, "reinit", 90), (1, "random", 100), (1, "oneshot", 60))]
    said, = positive_control.conclude(rows, 100)
    assert "dense >= 95, ticket 40, reinit 90, random >= 100, oneshot 60" in said


def test_differences_are_paired_by_seed():
    rows = [Row("conv", seed, r, arm, 0.1, 10, base + gain) for seed, base in enumerate((0.5, 0.6, 0.7))
            for r, arm, gain in ((0, "dense", 0), (1, "ticket", 0.02), (1, "reinit", 0.01),
                                 (1, "random", 0), (1, "oneshot", 0.02))]
    said, = positive_control.conclude(rows, 100)
    assert "3 seeds: ticket less dense +2.00 [+2.00, +2.00] (better), reinit +1.00" in said
    assert "oneshot +0.00 [+0.00, +0.00] (as good)" in said and "90 % intervals" in said
    assert "tickets beat reinit and random mask at 10 %" in positive_control.title_of(rows)


def test_missing_data_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def absent(*_):
        raise OSError("no MNIST here")
    monkeypatch.setattr(data, "load_images", absent)
    monkeypatch.setenv("LTH_DATA", "")  # as if it were not set
    with pytest.raises(SystemExit) as stop:
        positive_control.main(["--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "no MNIST here" in said and said.count("\n") == 1
