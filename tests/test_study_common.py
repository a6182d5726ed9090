"""studies/common.py: means over seeds, overlap of masks, density by block, a study's command line."""
import argparse
import csv
import json
import math
import pathlib

import numpy as np
import pytest
import scipy.stats
import torch

import lth_diffusion as lth
from lth_diffusion import Job
from prune import dense_masks, live_counts, prunable, prune_magnitude, random_masks
from studies import common
from studies.common import (Study, check_rounds, checkpoint, density_by_block, deviation, fit, open_run,
                            over_seeds, overlap, rows_of, slope, take_dense, ticket_masks)
from support import cli
from unet import ResBlock, UNet


def net(seed=0, **changes):
    torch.manual_seed(seed)
    model = UNet(**dict(channels=1, base=16, mults=(1, 2), image_size=8) | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


# ----------------------------------------------------------------------------------- means over seeds

def test_over_seeds_is_students_interval():
    values = [3.0, 4.5, 4.0, 3.5]
    mean, low, high = over_seeds(values)
    expected = scipy.stats.t.interval(0.9, 3, np.mean(values), scipy.stats.sem(values))
    assert mean == pytest.approx(4.0 - 0.25) and (low, high) == pytest.approx(expected)
    narrow = over_seeds(values, alpha=0.25)
    assert low < narrow[1] < narrow[2] < high


@pytest.mark.parametrize("values", [[2.0], [2.0, 4.0]])
def test_over_seeds_of_fewer_than_three_has_no_interval(values):
    assert over_seeds(values) == (np.mean(values), None, None)


def test_deviation():
    assert deviation([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(7 / 3)) and deviation([3.0]) is None


def test_slope_is_per_length_of_the_network():
    assert slope([1.0, 1.5, 2.0, 2.5, 3.0]) == pytest.approx((2.0, 0.0), abs=1e-9)
    values = [0.3, math.nan, 0.1, 0.6, 0.4, 0.9]  # the second keeps its place, and counts for nothing
    place = np.array([0, 2, 3, 4, 5]) / 5
    line = scipy.stats.linregress(place, np.array(values)[[0, 2, 3, 4, 5]])
    assert slope(values) == pytest.approx((line.slope, line.stderr))
    assert all(math.isnan(v) for v in slope([1.0, math.nan, 2.0]))


# ----------------------------------------------------------------------------------- masks

def test_overlap_by_hand():
    a = {"x": torch.tensor([True, True, False, False])}
    b = {"x": torch.tensor([True, False, True, False])}
    iou, chance = overlap(a, b)
    assert iou == pytest.approx(1 / 3)  # one of three
    assert chance == pytest.approx(1 / 3)  # 2 * 2 / 4 = 1 expected in both, 3 in either
    assert overlap(a, a)[0] == 1.0
    assert overlap(a, {"x": ~a["x"]}) == (0.0, pytest.approx(1 / 3))


def test_overlap_of_shuffled_masks_is_by_chance():
    """To 0.01, 5 standard errors; it counts weights, not layers; layers of `b` alone are left out."""
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.7)
    iou, chance = overlap(masks, random_masks(masks, torch.Generator().manual_seed(0)))
    assert iou == pytest.approx(chance, abs=0.01) and 0.1 < chance < 0.4
    few = {name: mask for name, mask in masks.items() if "conv1" in name}
    assert overlap(few, masks)[0] == 1.0


def test_density_by_block_counts_every_weight_once():
    model = net()
    masks = prune_magnitude(model, dense_masks(model), 0.6)
    found, live = density_by_block(model, live_counts(masks)), live_counts(masks)
    assert list(found) == [name for name, m in model.named_modules() if isinstance(m, ResBlock)]
    middle = [name for name in live if name.startswith("mid.2.")]
    size = sum(prunable(model)[name].numel() for name in middle)
    after = [name for name in live if name.startswith("mid.1.")]  # attention belongs to mid.0
    wanted = sum(live[name] for name in middle) / size
    assert after and found["mid.2"] == pytest.approx(wanted)
    assert set(density_by_block(model, live_counts(dense_masks(model))).values()) == {1.0}


# ----------------------------------------------------------------------------------- the command line

def test_study_saves_its_table_with_provenance(tmp_path):
    study = Study("studies.example", "What is asked.\n\nMore.")
    study.add_argument("--n", type=int, default=3)
    with study.arguments(["--n", "5", "--out", str(tmp_path / "new")]) as args:
        assert args.n == 5 and args.rest == []
        study.save(f"{args.out}/example_digits", ["a", "b"], [[1, 1 / 3], ["x", None]], n=args.n)
    with open(tmp_path / "new" / "example_digits.csv", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", "0.333333"], ["x", ""]]
    facts = json.loads((tmp_path / "new" / "example_digits.json").read_text())
    assert facts["command"] == f"python -m studies.example --n 5 --out {tmp_path / 'new'}"
    assert facts["n"] == 5 and facts["versions"]["torch"] and "commit" in facts and facts["seconds"] >= 0


@pytest.mark.parametrize("flags, said", [
    (["--steps", "3"], "unrecognized arguments: --steps 3"), (["--o", "x"], "unrecognized"),
    (["--out", "{file}"], "--out"), (["--out", "{file}/below"], "--out")])
def test_a_study_refuses_in_one_line(flags, said, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    with pytest.raises(SystemExit) as stop, Study("studies.example", "Asks.").arguments(flags):
        pytest.fail("it went on")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_flags_of_the_main_command_pass_but_those_a_study_owns(capsys):
    with Study("studies.example", "Asks.").arguments(["--steps", "9"], owned=["--scope"]) as args:
        assert args.rest == ["--steps", "9"]
    for flag in (["--scope", "layer"], ["--scope=layer"]):
        with pytest.raises(SystemExit) as stop, \
                Study("studies.example", "Asks.").arguments(flag, owned=["--scope"]):
            pytest.fail("it went on")
        assert stop.value.code == 2 and "argument --scope: " in capsys.readouterr().err


def test_check_rounds():
    jobs = [Job(0, r, "ticket") for r in (0, 2, 5)]
    check_rounds([5, 2], jobs)
    with pytest.raises(cli.Mistake, match="^argument --rounds: .* 3"):
        check_rounds([2, 3], jobs)


# ----------------------------------------------------------------------------------- a finished run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a dense network and one ticket, and its Experiment."""
    with pytest.MonkeyPatch.context() as patch:  # seconds, not minutes
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        patch.setattr(lth.report, "draw_run", lambda *_: None)
        out = str(tmp_path_factory.mktemp("common") / "run")
        flags = "--rounds 1 --steps 16 --rewind 0.25 --batch 8 --samples 16 --nfe 4 --controls"
        lth.main([*flags.split(), "--out", out])
        yield out, *open_run(out)


def test_open_run_returns_the_rows_of_every_job(finished):
    out, exp, rows = finished
    assert list(rows) == lth.jobs(exp.args) and exp.args.out == out and exp.k == 4
    assert all(row["n_samples"] == 16 and row["arm"] == job.arm for job, row in rows.items())


def test_open_run_refuses_what_is_no_run(tmp_path, finished):
    with pytest.raises(OSError, match="config.json"):
        open_run(str(tmp_path))
    (tmp_path / "config.json").write_text((pathlib.Path(finished[0]) / "config.json").read_text())
    with pytest.raises(OSError, match="holds no finished runs"):
        open_run(str(tmp_path))
    facts = json.loads((tmp_path / "config.json").read_text()) | dict(method="methods.rigl")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(OSError, match="made by methods.rigl"):
        open_run(str(tmp_path))


def test_fit_trains_again_where_anything_differs(finished):
    """Masks, start, order of the data, region of t: the file of another training is not taken, but replaced."""
    _, exp, _ = finished
    masks, state = ticket_masks(exp, 0), checkpoint(exp, 0)
    upper = common.at_region(exp, "upper half")
    ways = [(exp, masks, state, {}), (exp, None, state, {}), (exp, masks, None, {}), (exp, masks, state, dict(seed=1)),
            (upper, masks, dict(state, step=2), {})]
    found = []
    for mine, its, start, changed in ways:
        ema = fit(mine, "one_name", 0, exp.new_model(0), its, start, **changed)
        found.append(torch.cat([p.flatten() for p in ema.parameters()]))
    for i, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[i + 1:])


def test_fit_repeats_a_ticket_to_the_bit_and_keeps_it(finished, monkeypatch):
    """From the state of step k, under the ticket's masks, it is the ticket; asked again it trains nothing."""
    out, exp, _ = finished
    ticket = exp.load(Job(0, 1, "ticket"))
    masks, model, state = ticket_masks(exp, 0), exp.new_model(0), checkpoint(exp, 0)
    ema = fit(exp, "again", 0, model, masks, state)
    for found, wanted in ((model, ticket.model), (ema, ticket.ema)):
        assert all(torch.equal(v, wanted.state_dict()[n]) for n, v in found.state_dict().items())
    monkeypatch.setattr(common, "train", None)  # a second training run would fail
    other = exp.new_model(0)
    assert all(torch.equal(v, ema.state_dict()[n])
               for n, v in fit(exp, "again", 0, other, masks, state).state_dict().items())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in other.state_dict().items())
    for changed in (dict(seed=1), dict(lr=0.5)):  # trained otherwise: another network
        with pytest.raises(TypeError):
            fit(exp, "again", 0, exp.new_model(0), masks, state, **changed)
    for fresh in (None, state | dict(optimizer=None), state | dict(ema=state["model"])):
        with pytest.raises(TypeError):
            fit(exp, "again", 0, exp.new_model(0), masks, fresh)


def test_take_dense_spares_the_dense_runs(finished, tmp_path):
    out, exp, rows = finished
    args = argparse.Namespace(**vars(exp.args) | dict(out=str(tmp_path / "new")))
    take_dense(out, args)
    dense = [job for job in rows if job.round == 0]
    assert rows_of(args) == {job: rows[job] for job in dense} and len(dense) > 0
    assert all(torch.equal(v, checkpoint(exp, 0)["model"][n])
               for n, v in checkpoint(lth.Experiment(args), 0)["model"].items())
    path = tmp_path / "new" / "seed0" / "round00_dense.pt"
    path.write_bytes(b"mine")
    take_dense(out, args)
    assert path.read_bytes() == b"mine"  # what is there stays
