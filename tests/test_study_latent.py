"""studies.latent: the whole of it on a tiny run; the autoencoder and the ratios by hand."""
import argparse
import collections
import csv
import json

import numpy as np
import pytest
import torch

import lth_diffusion as lth
from ddpm import to_float
from studies import latent


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
    monkeypatch.setattr(latent, "STEPS", 40)


def test_latent(compared, tmp_path, monkeypatch, capsys):
    """The experiment on latents, all of its files, and again from what is kept."""
    command = ["--from", str(compared / "runs" / "oneshot"), "--runs", str(tmp_path / "run"), "--out",
               str(tmp_path)]
    latent.main(command)
    assert "n=1 seed, no verdict" in capsys.readouterr().out
    with open(tmp_path / "latent_digits.csv") as file:
        rows = list(csv.DictReader(file))
    by = {(row["space"], row["arm"], row["sparsity"]): row for row in rows}
    assert len(rows) == len(by) == 2 * 4 + 2  # dense, twin and two tickets; reconstructed and real images
    for row in rows[:-2]:
        dense = by[row["space"], "dense", "0"]
        over = float(row["fid_domain"]) / float(dense["fid_domain"])
        assert float(row["over own dense"]) == pytest.approx(over, rel=1e-4)
    facts = json.load(open(tmp_path / "latent_digits.json"))
    assert facts["reconstruction"]["decoder_macs"] == 14 * 14 * 9 * (32 + 32 * 32 + 32 * 4)
    assert facts["reconstruction"]["mse"] < 1
    for name in ("latent_digits.png", "latent_digits_samples.png", "run/layers.png", "run/losses.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    state = lth.load_state(tmp_path / "run" / "seed0" / "round02_rewind.pt")
    assert (state["config"]["patch"], state["config"]["image_size"]) == (1, 14)
    assert state["pictures"].shape == (16, 1, 28, 28) and state["pictures"].dtype == torch.uint8
    before = (tmp_path / "latent_digits.csv").read_bytes()
    monkeypatch.setattr(lth, "draw_everything", lambda *_: None)
    monkeypatch.setattr(lth, "train", None)  # nothing is trained again, the autoencoder neither
    monkeypatch.setattr(latent.Autoencoder, "fit", None)
    latent.main(command)
    assert (tmp_path / "latent_digits.csv").read_bytes() == before
    with pytest.raises(OSError, match="LatentExperiment"):  # other studies would sample it in pixels
        lth.open_run(str(tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        latent.main([*command, "--code", "2"])
    assert stop.value.code == 2 and "--code" in capsys.readouterr().err


def test_autoencoder_learns_and_normalises():
    blank = torch.zeros(300, 1, 28, 28, dtype=torch.uint8)
    blank[:, :, 4:24, 4:24] = torch.randint(256, (300, 1, 1, 1), dtype=torch.uint8)  # squares of every grey
    torch.manual_seed(0)
    coder = latent.Autoencoder(1, 1)

    def error():
        return (to_float(coder.eval().decode(coder.encode(blank))) - to_float(blank)).square().mean().item()
    before = error()
    coder.train().fit(blank)
    assert error() < 0.3 * before
    code = coder.eval().encode(blank)
    assert code.shape == (300, 1, 14, 14) and abs(code.mean()) < 0.3 and 0.6 < code.std() < 1.4


def test_ratios_and_conclusion_by_hand():
    def rows(dense, ticket):
        values = {("dense", 0): dense, ("rewind", 1): ticket, ("reinit", 1): (8, 8, 8), ("probe", 0): dense}
        return {lth.Job(seed, round, arm): dict(fid_domain=v, sparsity=0.5 * round, macs_live=2e6)
                for (arm, round), each in values.items() for seed, v in enumerate(each)}
    pixel, codes = rows((2, 4, 8), (1, 2, 4)), rows((2, 4, 8), (2, 4, 8))
    table = list(latent.lines("pixel", pixel, [0, 1, 2]))
    assert [row[1] for row in table] == ["dense", "ticket", "reinit"]
    sd = pytest.approx(np.std([1, 2, 4], ddof=1))
    assert table[1] == ["pixel", "ticket", 0.5, 3, pytest.approx(7 / 3), sd, 0.5, 0.0, 2.0]
    said = latent.conclude(pixel, codes, [0, 1, 2])
    assert "2.00 times as large in latent space (log difference +0.69 to +0.69); n=3 seeds" in said
    assert "latent: ticket over dense 1.00" in said and "no verdict" not in said
    assert "n=1 seed, no verdict" in latent.conclude(pixel, codes, [0])


@pytest.mark.parametrize("flags, reason", [(["--from", "nowhere"], "nowhere"), (["--code", "0"], "--code"),
                                           (["--fast"], "--fast")])
def test_mistakes_end_in_one_line(flags, reason, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        latent.main([*flags, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and reason in said and said.count("\n") == 1


def test_flips_are_refused():
    with pytest.raises(ValueError, match="flips"):
        latent.LatentExperiment(argparse.Namespace(dataset="cifar10"))
