"""studies.latent: the whole of it on a tiny run; the autoencoder and the ratios by hand."""
import argparse
import csv
import json

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from ddpm import to_float
from studies import common, latent
from support import cli, data, report, runs

SMALL = "--rounds 1 --steps 16 --batch 8 --samples 16 --nfe 4 --prune-rate 0.5 --out".split()


whole = data.load_images


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(data, "load_images", lambda *args: tuple(part[:800] for part in whole(*args)))
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    monkeypatch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(latent, "STEPS", 40)


def test_latent(tmp_path, monkeypatch, capsys):
    """The experiment on latents, all of its files, and again from what is kept."""
    lth.main([*SMALL, str(tmp_path / "run")])
    command = ["--from", str(tmp_path / "run"), "--out", str(tmp_path)]
    latent.main(command)
    assert "1 seed, no verdict" in capsys.readouterr().out
    with open(tmp_path / "latent_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by = {(row["space"], row["arm"], row["sparsity"]): row for row in rows}
    assert len(rows) == len(by) == 2 * 4 + 2  # dense, ticket, two controls; two references
    for row in rows[:-2]:
        over = float(row["fid_domain"]) / float(by[row["space"], "dense", "0"]["fid_domain"])
        assert float(row["over_dense"]) == pytest.approx(over, rel=1e-4)
    facts = json.loads((tmp_path / "latent_digits.json").read_text())
    assert facts["reconstruction"]["mse"] < 1
    for name in ("latent_digits.png", "latent_digits_samples.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    state = runs.load_state(tmp_path / "run_latent" / "seed0" / "round01_ticket.pt")
    assert (state["config"]["patch"], state["config"]["image_size"]) == (1, 14)
    assert state["pictures"].shape == (16, 1, 28, 28) and state["pictures"].dtype == torch.uint8
    before = (tmp_path / "latent_digits.csv").read_bytes()
    monkeypatch.setattr(lth, "train", None)  # nothing is trained again, the autoencoder neither
    monkeypatch.setattr(latent.Autoencoder, "fit", None)
    latent.main(command)
    assert (tmp_path / "latent_digits.csv").read_bytes() == before
    with pytest.raises(OSError, match="studies.latent"):  # other studies would sample it in pixels
        common.open_run(str(tmp_path / "run_latent"))


def test_autoencoder_learns_and_normalises():
    blank = torch.zeros(300, 1, 28, 28, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)  # squares of every grey
    blank[:, :, 4:24, 4:24] = torch.randint(256, (300, 1, 1, 1), generator=generator, dtype=torch.uint8)
    torch.manual_seed(0)
    coder = latent.Autoencoder(1)

    def error():
        back = coder.eval().decode(coder.encode(blank))
        return (to_float(back) - to_float(blank)).square().mean().item()
    before = error()
    coder.train().fit(blank)
    assert error() < 0.3 * before
    code = coder.eval().encode(blank)
    assert code.shape == (300, 1, 14, 14) and abs(code.mean()) < 0.3 and 0.6 < code.std() < 1.4


def test_lines_and_conclusion_by_hand():
    def rows(dense, ticket):
        values = {("dense", 0): dense, ("ticket", 1): ticket, ("reinit", 1): (8, 8, 8)}
        return {lth.Job(seed, r, arm): dict(fid_domain=v, sparsity=0.5 * r, macs_live=2e6)
                for (arm, r), each in values.items() for seed, v in enumerate(each)}
    pixel = rows((2, 4, 8), (1, 2, 4))
    table = list(latent.lines("pixel", pixel, [0, 1, 2]))
    assert [line.arm for line in table] == ["dense", "ticket", "reinit"]
    sd = pytest.approx(np.std([1, 2, 4], ddof=1))
    assert table[1] == ("pixel", "ticket", 0.5, 3, pytest.approx(7 / 3), sd, 0.5, 0.0, 2.0)
    same = latent.conclude("latent", rows((2, 3, 4), (1, 2, 3)), [0, 1, 2], 1)
    assert "over dense 0.64 (-1.00 to -1.00), reinit 0.25" in same and "3 seeds, in brackets: 90 %" in same
    assert latent.conclude("pixel", pixel, [0], 1) == (
        "pixel: fid_domain of the last ticket over dense 0.50, reinit 0.12; 1 seed, no verdict.")


def test_only_finished_seeds_are_used():
    args, _ = lth.parse_args(["--seeds", "0", "1", "--rounds", "1"])
    rows = dict.fromkeys(lth.jobs(args)[:-1])
    assert latent.finished_seeds(args, rows) == [0]
    with pytest.raises(cli.Mistake, match="--from"):
        latent.finished_seeds(args, {})


@pytest.mark.parametrize("flags, reason", [(["--from", "nowhere"], "nowhere"), (["--fast"], "--fast")])
def test_mistakes_end_in_one_line(flags, reason, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        latent.main([*flags, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and reason in said and said.count("\n") == 1


def test_flips_are_refused():
    with pytest.raises(cli.Mistake, match="flips"):
        latent.LatentExperiment(argparse.Namespace(dataset="cifar10"))
