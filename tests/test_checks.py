"""
pytest tests/test_checks.py      # seconds; the peers are needed for one test only

The checks of this code: parity with other packages, the bias of FID, speed and how costs grow.
"""
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import lth_diffusion as lth
import metrics
from checks import defaults, fid_bias, parity, speed, workers
from support import cli, data, report
from unet import PRESETS, UNet

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["defaults", "fid_bias", "parity", "speed", "verdict", "workers"])
def test_a_check_run_as_a_file_says_how_to_run_it(name):
    done = subprocess.run([sys.executable, f"checks/{name}.py"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"run it as a module:  python -m checks.{name}\n"


# --- parity

def test_parity_with_every_peer(tmp_path):
    missing = parity.missing_peers()
    if missing:
        pytest.skip(f"needs  pip install {' '.join(missing)} ({'; '.join(missing.values())})")
    done = subprocess.run([sys.executable, "-m", "checks.parity", "--out", str(tmp_path)], cwd=HERE,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(tmp_path / "parity.csv")
    assert len(rows) == 25 and {row["verdict"] for row in rows} == {"ok"}
    source = json.loads((tmp_path / "parity.json").read_text("utf-8"))
    assert set(source["peers"]) == set(parity.PEERS) and source["seconds"] > 0
    assert (tmp_path / "parity.md").read_text("utf-8").count("\n| ") == len(rows) + 1


def test_parity_without_peers_names_them_and_writes_nothing(monkeypatch, capsys, tmp_path):
    for module in parity.PEERS.values():
        monkeypatch.setitem(sys.modules, module, None)  # import fails as if it were not installed
    assert parity.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "pip install pytorch-fid torch-fidelity diffusers" in said and "MACs" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ours, theirs, verdict", [
    (1.0, 1.0, "ok"), (1.0, 1.0005, "ok"), (1.0, 1.1, "DIFFERS"), (float("nan"), 1.0, "DIFFERS"),
    ([1.0, 2.0], [1.0, 2.0], "ok"), ([1.0, 2.0], [1.0, 2.1], "DIFFERS"), (1.0, 0.0, "DIFFERS"),
    ([1.0, float("nan")], [1.0, 2.0], "DIFFERS"), (0.0, 0.0, "ok"),
])
def test_parity_verdict(ours, theirs, verdict):
    assert parity.compare("x", ours, theirs, 1e-3).verdict == verdict


def test_parity_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="x: "):
        parity.compare("x", torch.ones(2, 1), torch.ones(2), 1e-3)


def test_parity_exits_1_on_a_difference(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "missing_peers", dict)
    monkeypatch.setattr(parity, "PEERS", {})
    monkeypatch.setattr(parity, "SECTIONS", ((lambda: [parity.compare("x", 1.0, 2.0, 0.1)], None),))
    assert parity.main(["--out", str(tmp_path)]) == 1
    assert [row["verdict"] for row in read(tmp_path / "parity.csv")] == ["DIFFERS"]


# --- the bias of FID

def test_jackknife_of_fid():
    reference, draw = (torch.zeros(8).double(), torch.eye(8).double()), torch.Generator().manual_seed(0)
    for shift, scale, most in ((0.5, 1.2, 1.5), (0.0, 1.0, 1.6)):  # the second: no slope, sqrt(2) too much
        draws = shift + scale * torch.randn(200, 300, 8, generator=draw, dtype=torch.float64)
        spread = np.std([metrics.fid(x, reference) for x in draws], ddof=1)
        errors = [fid_bias.fid_jackknife(x, reference) for x in draws[:10]]
        assert 1 / 1.5 < np.mean(errors) / spread < most


def test_fewer_images_mean_a_larger_fid_and_a_bootstrap_adds_the_bias_again():
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(4000, 8, generator=generator)
    reference = torch.zeros(8).double(), torch.eye(8).double()
    few, many = (fid_bias.spread(feats, n, reference, generator) for n in (100, 400))
    assert (few[0], many[0]) == (10, 10)
    assert few[1] == pytest.approx(4 * many[1], rel=0.3)  # the bias is c / n
    assert few[4] == pytest.approx(2 * few[1], rel=0.3)
    assert fid_bias.spread(feats, 4000, reference, generator)[2] is None  # one draw has no spread


def test_fid_bias(monkeypatch, tmp_path):
    monkeypatch.setattr(fid_bias, "IMAGES", (100, 200))
    monkeypatch.setattr(fid_bias, "measure", lambda name, folder: (
        [[name, n, 2, 100 / n, None, 10 / n, 200 / n] for n in fid_bias.IMAGES], "abc"))
    (tmp_path / "mnist").mkdir()
    fid_bias.main(["--data-dir", str(tmp_path), "--out", str(tmp_path)])
    rows = read(tmp_path / "fid_bias.csv")
    assert [row["dataset"] for row in rows] == ["digits"] * 2 + ["mnist"] * 2
    assert json.loads((tmp_path / "fid_bias.json").read_text("utf-8"))["classifiers"]["mnist"] == "abc"
    assert (tmp_path / "fid_bias.png").stat().st_size > 10_000


# --- speed

@pytest.fixture
def tiny(monkeypatch):
    """Every preset is a tiny network."""
    for name in ("tiny", "mnist", "paper"):
        monkeypatch.setitem(PRESETS, name, dict(base=16, mults=(1,), patch=4))


def test_speed_of_tickets_and_masks(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)  # without a compiler: minutes
    speed.main("tickets cost --turns 1 --device cpu --out".split() + [str(tmp_path)])
    rows = read(tmp_path / "speed_tickets_cost.csv")
    assert [row["section"] for row in rows] == ["tickets"] * 9 + ["cost"] * 2
    assert all(float(row["seconds"]) > 0 for row in rows)
    for row in rows:
        ratio = float(row["its seconds"]) / float(row["seconds"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=1e-4)
    assert f"{tmp_path}/speed_tickets_cost.csv" in capsys.readouterr().out


def test_speed_names_a_section_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(["nothing"])
    assert stop.value.code == 2 and "no section nothing" in capsys.readouterr().err


def test_a_peer_that_is_not_there_is_named(capsys):
    with speed.installed("some-package"):
        raise ImportError("No module named 'some_package'")
    assert "pip install some-package" in capsys.readouterr().out


def test_a_step_trains_and_a_draw_does_not():
    """Each package is timed at what the row says."""
    model, x = UNet(base=8, mults=(1,), image_size=8), torch.randn(4, 1, 8, 8)
    package = speed.ours(x, model)
    before = model.conv_out.weight.detach().clone()
    for name in speed.PRECISIONS:
        package.draw(name)
    assert torch.equal(before, model.conv_out.weight)
    for name in speed.PRECISIONS:
        package.step(name)
        assert not torch.equal(before, model.conv_out.weight)
        before = model.conv_out.weight.detach().clone()
    assert all(p.grad is None for p in model.parameters())


def test_a_ratio_is_scaled_with_the_seconds_of_the_other(monkeypatch):
    times = np.array([[1.0, 2.0], [2.0, 6.0], [1.0, 1.0]])
    monkeypatch.setattr(speed.runs, "seconds_in_turns", lambda *_, **__: times.copy())
    args = cli.argparse.Namespace(turns=3, device="cpu")
    what, mine, _, other, *ratios = speed.row(args, "x", None, "y", None, 0.5)
    assert (mine, other, ratios) == (1.0, 1.0, [1.0, 0.5, 1.5, 3])


# --- how costs grow, what a second buys

def test_scaling(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "SIZES", dict(parameters=(8, 16), images=(50, 100)))
    monkeypatch.setattr(speed, "GROWTH", {name: speed.GROWTH[name] for name in speed.SIZES})
    some = tuple(map(torch.from_numpy, data.draw_digits(100, 0)))
    monkeypatch.setattr(speed.data, "load_images", lambda *_: some)
    # a process of its own would know nothing of these changes
    monkeypatch.setattr(speed, "ProcessPoolExecutor", lambda *_, **__: Inline())
    speed.main(["scaling", "--turns", "1", "--device", "cpu", "--out", str(tmp_path)])
    rows = read(tmp_path / "scaling.csv")
    assert len(rows) == 2 * 5 and all(float(row["seconds"]) > 0 for row in rows)
    assert len(json.loads((tmp_path / "scaling.json").read_text("utf-8"))["exponents"]) == 5
    assert "exponent of seconds" in capsys.readouterr().out


class Inline:
    """A pool that works in this process."""
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        value = function(*args)
        return cli.argparse.Namespace(result=lambda: value)


def test_a_run_of_some_rounds_is_a_work_of_scaling(monkeypatch):
    begun = []
    monkeypatch.setattr(speed.lth, "run", lambda args, parser: begun.append((args.rounds, args.controls)))
    args = cli.argparse.Namespace(device="cpu", data_dir="data")
    size, works = speed.of_rounds(4, args)
    works["a small run"]()
    assert size == 4 and begun == [(4, [])]


def test_exponents_by_hand():
    table = [["a", "n", n, 3 * n ** 1.5, 2.0 * n] for n in (1, 2, 4, 8)]
    (_, _, exponent, error, memory, its_error), = speed.exponents(table)
    assert (exponent, memory) == pytest.approx((1.5, 1)) and max(error, its_error) < 1e-9


def test_pilots_keep_what_is_done(tmp_path, capsys, monkeypatch):
    """A row per setting and seed, kept and not trained again; a chain of 80, 90 and 95 % per ranking."""
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    flags = ["--seeds", "900", "901", "--steps", "6", "--batch", "4", "--samples", "8", "--runs", str(tmp_path),
             "--out", str(tmp_path), "--precision", "fp32", "--only"]
    defaults.main(["training", *flags, "default", "eps, plain", "dropout 0.1"])
    rows = read(tmp_path / "defaults_training_digits.csv")
    assert [(row["setting"], row["seed"]) for row in rows] == [
        ("default", "900"), ("default", "901"), ("eps, plain", "900"), ("eps, plain", "901"),
        ("dropout 0.1", "900"), ("dropout 0.1", "901")]
    assert len({row["val_loss"] for row in rows}) == 6 and "real images" in capsys.readouterr().out
    monkeypatch.setattr(defaults, "train", lambda *_, **__: pytest.fail("trained again"))
    defaults.main(["training", *flags, "default"])
    assert read(tmp_path / "defaults_training_digits.csv")[0] == rows[0]
    defaults.main(["scoring", *flags[3:], "layer", "global, LAMP", "--seeds", "900"])
    rows = read(tmp_path / "defaults_scoring_digits.csv")
    assert [float(row["sparsity"]) for row in rows] == pytest.approx(2 * [0, 0.8, 0.9, 0.95], abs=1e-3)
    assert rows[0]["val_loss"] == rows[4]["val_loss"] and rows[3]["val_loss"] != rows[7]["val_loss"]
    with pytest.raises(SystemExit) as stop:
        defaults.main(["training", *flags, "nonsense"])
    assert stop.value.code == 2 and "--only" in capsys.readouterr().err


def test_pilots_on_colour_ask_for_flips_and_attention():
    args, _ = lth.parse_args(["--dataset", "cifar10", "--device", "cpu"])
    cells = defaults.settings(args)
    assert cells["no flips"] == dict(flip=False) and "no flips" not in defaults.settings(lth.parse_args([])[0])
    for cell in cells.values():
        lth.UNet(3, image_size=32, **lth.PRESETS[args.preset] | cell.get("model", {}))  # they can be built


# --- workers

def test_the_queue_by_hand():
    """Two seeds of two rounds, one control each at the last: 8 jobs of a second."""
    args, _ = lth.parse_args("--rounds 2 --control-rounds 2 --controls random --seeds 0 1".split())
    jobs = lth.jobs(args)
    seconds = dict.fromkeys(jobs, 1.0)
    ends = {n: workers.finish(jobs, seconds, n) for n in (1, 2, 3, 100)}
    assert ends == {1: 8.0, 2: 4.0, 3: 4.0, 100: 4.0}  # dense, two tickets, a control: the chain
    assert workers.finish(jobs[:4], dict(zip(jobs, (5.0, 1.0, 1.0, 2.0))), 9) == 9.0


def test_a_busy_machine_is_let_go_again():
    with workers.spinning(1):
        pass
    assert float(workers.run("print(1.5)")) == 1.5
    assert workers.run("import os; print(os.environ.get('GOMP_SPINCOUNT'))", GOMP_SPINCOUNT="7") == "7\n"
