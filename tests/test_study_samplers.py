"""studies/samplers.py: every sampler on a run as small as it can be; the front by hand."""
import csv

import pytest
import torch

import lth_diffusion as lth
from ddpm import Diffusion
from studies import samplers

SMALL = "--rounds 2 --steps 8 --batch 8 --samples 8 --nfe 4 --controls --control-rounds 1 2".split()


@pytest.fixture
def finished(tiny, tmp_path, monkeypatch):
    """The folder of a finished run."""
    monkeypatch.setattr(samplers, "STEPS", dict(ddpm=(4,), ddim=(4, 8), dpm=(4,), heun=(5,)))
    lth.main([*SMALL, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def test_samplers(finished, tmp_path, capsys):
    samplers.main(["--from", str(finished), "--samples", "8", "--out", str(tmp_path)])
    with open(tmp_path / "samplers_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5  # dense and the tickets of rounds 1 and 2
    work = {(row["round"], row["evaluations"]): float(row["GMACs per sample"]) for row in rows}
    assert work["0", "8"] == pytest.approx(2 * work["0", "4"], rel=1e-4)
    assert work["2", "8"] < work["1", "8"] < work["0", "8"]
    best = {row["evaluations"] for row in rows if row["front of work"]}
    assert "4" in best and "Front of work" in capsys.readouterr().out
    pictures = [(tmp_path / f"samplers_digits{ending}.png").read_bytes() for ending in ("", "_seconds")]
    assert min(map(len, pictures)) > 10_000 and pictures[0] != pictures[1]
    for flags, said in (("--rounds 3", "argument --rounds: no runs of round 3"),
                        ("--samples 3", "argument --samples: 3 is not 4 or more")):
        with pytest.raises(SystemExit) as stop:
            samplers.main(["--from", str(finished), "--out", str(tmp_path), *flags.split()])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_front_by_hand():
    points = [("a", 1, 9), ("b", 2, 5), ("c", 3, 5), ("d", 2, 7), ("e", 4, 1)]
    means = {name: dict(work=work, fid_domain=fid) for name, work, fid in reversed(points)}
    assert samplers.front(means, "work") == ["a", "b", "e"]


def test_the_title_counts_tickets_on_the_front_of_seconds():
    points = {(0, "dense", "ddim", 50): (4, 1), (5, "ticket", "ddim", 50): (3, 2), (5, "ticket", "ddim", 5): (1, 3),
              (0, "dense", "ddim", 5): (1, 4)}
    means = {setting: {"s/1000": seconds, "fid_domain": fid} for setting, (seconds, fid) in points.items()}
    assert samplers.title_of_front(means, [["not shown"]]).startswith("Of 3 settings that no other beats in seconds and "
                                                                    "FID, 2 are tickets")
    assert "?" in samplers.title_of_front(means, [["no verdict"]])


def test_means_are_over_seeds_of_one_setting():
    def row(seed, steps, fid):
        return dict(zip(samplers.HEADER, [seed, 0, "dense", "ddim", steps, 0.0, 1.0, 2.0, fid]))
    means = samplers.means_of([row(0, 5, 9.0), row(1, 5, 7.0), row(0, 10, 4.0)])
    assert [line["fid_domain"] for line in means.values()] == [8.0, 4.0]


@pytest.mark.parametrize("schedule, fewest", [("linear", 5), ("cosine", 20)])
def test_settings_begin_at_noise(schedule, fewest):
    found = [steps for name, steps in samplers.settings(Diffusion(schedule=schedule)) if name == "ddim"]
    assert min(found) == fewest


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_heun_is_of_second_order(schedule):
    """Pixels of standard deviation 0.5: eps is known, and y(0) = y(sigma) s / sqrt(s^2 + sigma^2). Rounding of EDM's
    levels to steps of the chain only moves them."""
    diffusion, s, calls = Diffusion(schedule=schedule), 0.5, []

    def ideal(x, t):
        calls.append(int(t[0]))
        abar = diffusion.alphas_bar[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * x / (abar * s ** 2 + 1 - abar)
    x_T, errors = torch.randn(4, 1, 2, 2, dtype=torch.float64), []
    sigma, scale = samplers.sigmas_of(diffusion)[-1], diffusion.alphas_bar[-1].sqrt()
    exact = x_T / scale * s / (s ** 2 + sigma ** 2).sqrt()
    for evaluations in (19, 39, 79):
        calls.clear()
        found = samplers.heun(ideal, diffusion, x_T, evaluations)
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
        assert len(calls) == evaluations and calls[0] == diffusion.T - 1 and calls[-1] == 0
    assert errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5  # 4 for steps of one size
    assert errors[2] < 0.1


@pytest.mark.parametrize("ticket, said", [(8.0, "ticket"), (12.0, "dense"), (10.5, "not shown")])
def test_paired_answers_with_a_margin(ticket, said):
    values = [(arm, seed, value + 0.1 * seed * (arm == "ticket")) for arm, value in (("dense", 10.0), ("ticket", ticket))
              for seed in range(3)]
    table = [dict(seed=seed, round=5 * (arm == "ticket"), arm=arm, sampler="ddim", evaluations=5, fid_domain=value)
             for arm, seed, value in values]
    row, = samplers.paired(table)
    assert row[:6] == [5, "ddim", 5, 3, 10.0, pytest.approx(ticket + 0.1)] and row[-1] == said


def test_heun_is_left_out_where_its_levels_repeat():
    """Steps of size 0 would be billed as work: with the cosine schedule most of its levels round to the same t."""
    def heuns(schedule):
        return [steps for name, steps in samplers.settings(Diffusion(schedule=schedule)) if name == "heun"]
    assert heuns("linear") == [9, 19, 39] and heuns("cosine") == [9]
