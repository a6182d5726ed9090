"""studies/samplers.py: every sampler on a run as small as it can be; the front by hand."""
import csv

import pytest

import lth_diffusion as lth
from ddpm import Diffusion
from studies import samplers
from support import report

SMALL = "--rounds 2 --steps 8 --batch 8 --samples 8 --nfe 4 --controls --control-rounds 1 2".split()


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a finished run."""
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    monkeypatch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(samplers, "STEPS", dict(ddpm=(4,), ddim=(4, 8), dpm=(4,)))
    lth.main([*SMALL, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def test_samplers(finished, tmp_path, capsys):
    samplers.main(["--from", str(finished), "--samples", "8", "--out", str(tmp_path)])
    with open(tmp_path / "samplers_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4  # dense and the tickets of rounds 1 and 2
    work = {(row["round"], row["evaluations"]): float(row["GMACs per sample"]) for row in rows}
    assert work["0", "8"] == pytest.approx(2 * work["0", "4"], rel=1e-4)
    assert work["2", "8"] < work["1", "8"] < work["0", "8"]
    best = {row["evaluations"] for row in rows if row["front of work"]}
    assert "4" in best and "Front of work" in capsys.readouterr().out
    assert (tmp_path / "samplers_digits.png").stat().st_size > 10_000
    for flags, said in (("--rounds 3", "argument --rounds: no runs of round 3"),
                        ("--samples 3", "argument --samples: 3 is not 4 or more")):
        with pytest.raises(SystemExit) as stop:
            samplers.main(["--from", str(finished), "--out", str(tmp_path), *flags.split()])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_front_by_hand():
    points = [("a", 1, 9), ("b", 2, 5), ("c", 3, 5), ("d", 2, 7), ("e", 4, 1)]
    means = {name: dict(work=work, fid_domain=fid) for name, work, fid in reversed(points)}
    assert samplers.front(means, "work") == ["a", "b", "e"]


def test_means_are_over_seeds_of_one_setting():
    def row(seed, steps, fid):
        return dict(zip(samplers.HEADER, [seed, 0, "dense", "ddim", steps, 0.0, 1.0, 2.0, fid]))
    means = samplers.means_of([row(0, 5, 9.0), row(1, 5, 7.0), row(0, 10, 4.0)])
    assert [line["fid_domain"] for line in means.values()] == [8.0, 4.0]


@pytest.mark.parametrize("schedule, fewest", [("linear", 5), ("cosine", 20)])
def test_settings_begin_at_noise(schedule, fewest):
    found = [steps for name, steps in samplers.settings(Diffusion(schedule=schedule)) if name == "ddim"]
    assert min(found) == fewest
