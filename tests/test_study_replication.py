"""studies/replication.py: the parts are what was preregistered; what is noted changes nothing."""
import json
import pathlib

import pytest
import torch

import lth_diffusion as lth
from studies import replication, replication_pictures, replication_report
from support import runs
from test_data import write_mnist

PREREGISTERED = (pathlib.Path(__file__).resolve().parents[1] / "results" / "PREREGISTRATION.md").read_text(
    encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest form of a part, on a tiny network, and the main job with the same flags."""
    out = tmp_path_factory.mktemp("replication")
    small = dict(samples=16, nfe=4, batch=4, rounds=2, final_sparsity=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "VAL_IMAGES", 100)
        patch.setitem(lth.PRESETS, "mnist", dict(base=16, mults=(1,), patch=4))
        patch.setattr(replication, "SHARED", replication.SHARED | small)
        patch.setitem(replication.PARTS, "v", dict(steps=20, controls=["reinit", "random"], control_rounds=[2]))
        patch.setitem(replication.ONESHOT, "v", (2,))
        for split in "train", "test":
            write_mnist(out / "data", "mnist", split, n=200)
        patch.setitem(replication.PARTS, "dense", dict(steps=40, controls=[]))
        data = ["--data-dir", str(out / "data"), "--seeds", "10"]
        replication.main([*data, "--out", str(out / "part")])
        replication.main([*data, "--part", "dense", "--out", str(out / "long")])
        flags = ("--dataset mnist --preset mnist --batch 4 --lr 4e-3 --rounds 2 --final-sparsity 0.9 --samples 16 "
                 "--nfe 4 --steps 20 --precision fp32 --control-rounds 2").split()
        lth.main([*flags, *data, "--out", str(out / "main")])
    return out


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_networks_are_those_of_the_main_job(folder):
    """Looking at a network while it trains does not change it; the one-shot ticket is one more."""
    for name in "round00_dense", "round01_ticket", "round02_ticket", "round02_reinit", "round02_random":
        one, two = (runs.load_state(folder / run / "seed10" / f"{name}.pt") for run in ("part", "main"))
        for part in "model", "ema":
            assert all(torch.equal(p, two[part][key]) for key, p in one[part].items()), name
        assert one["row"]["fid_domain"] == two["row"]["fid_domain"]
    ticket, oneshot = (runs.load_state(folder / "part" / "seed10" / f"round02_{arm}.pt")["row"]
                       for arm in ("ticket", "oneshot"))
    assert oneshot["live_weights"] == pytest.approx(ticket["live_weights"], abs=1)
    assert oneshot["train_steps_total"] == 20 + 19 and ticket["train_steps_total"] == 20 + 2 * 19


def test_part_dense_trains_nothing_else(folder, tmp_path, capsys):
    row, = lines(folder / "long" / "log.jsonl")
    assert (row["arm"], row["steps"]) == ("dense", 40) and len(lines(folder / "long" / "curves.jsonl")) == 20
    for program in replication_report, replication_pictures:
        program.main([str(folder / "part"), str(folder / "long"), "--out", str(tmp_path)])
    table = (tmp_path / "replication_arms.csv").read_text()
    assert "\ndense,0,dense," in table and not (tmp_path / "replication_dense_quality.png").exists()


def test_curves_end_where_the_network_does(folder):
    curves = lines(folder / "part" / "curves.jsonl")
    for arm in "dense", "oneshot":
        steps = [row["step"] for row in curves if row["arm"] == arm]
        assert steps == list(range(1 if arm == "dense" else 2, 21))
    rows = {(row["round"], row["arm"]): row for row in lines(folder / "part" / "log.jsonl")}
    last = [row for row in curves if row["step"] == 20]
    assert len(last) == len(rows) == 6
    for row in last:  # the average of one step before, on other images: near, not equal
        assert row["val_loss"] == pytest.approx(rows[row["round"], row["arm"]]["val_loss"], rel=0.3)


def test_what_is_exploratory_is_logged(folder):
    for row in lines(folder / "part" / "log.jsonl"):
        assert 0 <= row["closer_to_train"] <= 1 and row["train_images_loss"] > 0
        assert 0 < row["nearest_train"] < 255 and 0 < row["nearest_test"] < 255


def test_nearest_by_hand():
    images = torch.tensor([[0, 0], [10, 10]], dtype=torch.uint8).view(2, 1, 1, 2)
    samples = torch.tensor([[0, 2], [10, 10]], dtype=torch.uint8).view(2, 1, 1, 2)
    assert replication.nearest_to(samples, images).tolist() == pytest.approx([2 ** 0.5, 0], abs=1e-3)


def test_the_text_says_what_the_code_does():
    """Numbers of the preregistration, in the words of its table."""
    shared, parts = replication.SHARED, replication.PARTS
    for said in (f"| images per step | {shared['batch']} |", f"| peak rate | {shared['lr']} |",
                 f"| EMA decay | {shared['ema']} |", f"| samples | {shared['samples']:,} |",
                 f"| k | {round(shared['rewind'] * parts['v']['steps'])} of {parts['v']['steps']:,} steps |",
                 f"| rounds | {shared['rounds']}, to {100 * shared['final_sparsity']:.0f} % sparsity: "):
        assert said in PREREGISTERED, said
    left = [(1 - shared["final_sparsity"]) ** (r / 10) for r in parts["v"]["control_rounds"]]
    assert [f"{1 - one:.0%}" for one in left] == ["75%", "90%", "99%"]
    assert parts["short"]["steps"] == round(parts["v"]["steps"] / 3)


def test_a_part_refuses_other_flags(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        replication.main(["--part", "eps", "--steps", "10", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "--steps: studies.replication fixes it at 2000" in capsys.readouterr().err
