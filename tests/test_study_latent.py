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
from support import cli, runs

SMALL = "--rounds 1 --steps 16 --batch 8 --samples 16 --nfe 4 --prune-rate 0.5 --out".split()


@pytest.fixture(autouse=True)
def small(tiny, monkeypatch):
    monkeypatch.setattr(latent, "STEPS", 40)


def test_latent(tmp_path, monkeypatch, capsys):
    """The experiment on latents, all of its files, and again from what is kept."""
    lth.main([*SMALL, str(tmp_path / "run")])
    command = ["--from", str(tmp_path / "run"), "--out", str(tmp_path)]
    latent.main(command)
    assert "no verdict" in capsys.readouterr().out  # one seed
    with open(tmp_path / "latent_digits_verdicts.csv", encoding="utf-8") as file:
        assert [(row["space"], row["metric"]) for row in csv.DictReader(file)] == [
            (space, metric) for space in ("pixel", "latent") for metric in lth.MARGINS]
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


def test_lines_and_verdicts_by_hand():
    def rows(dense, ticket):
        values = {("dense", 0): dense, ("ticket", 1): ticket, ("reinit", 1): (8, 8, 9), ("random", 1): (9, 8, 9)}
        return {lth.Job(seed, r, arm): dict(fid_domain=v, val_loss=0.1 * v, sparsity=0.5 * r, macs_live=2e6)
                for (arm, r), each in values.items() for seed, v in enumerate(each)}
    pixel = rows((2, 4, 8), (1, 2, 4))
    table = list(latent.lines("pixel", pixel, [0, 1, 2]))
    assert [line.arm for line in table] == ["dense", "ticket", "reinit", "random"]
    sd, mean = pytest.approx(np.std([1, 2, 4], ddof=1)), pytest.approx(7 / 3)
    assert table[1] == ("pixel", "ticket", 0.5, 3, mean, sd, 0.5, 0.0, pytest.approx(0.7 / 3), 2.0)
    assert table[1].over_dense == 0.5
    won = list(latent.verdict_rows("latent", rows((2, 3, 4), (1, 2, 3)), [0, 1, 2], 1))
    answer = latent.VERDICTS.index("answer")
    assert [row[:4] for row in won] == [["latent", "fid_domain", 3, 3.0], ["latent", "val_loss", 3, pytest.approx(0.3)]]
    assert won[0][answer] == "winning" and won[0][answer + 1:answer + 4] == [-1, -1, -1]
    few = list(latent.verdict_rows("pixel", pixel, [0], 1))
    assert few[0][answer] == "no verdict"
    assert latent.title_of([*few, *won], 0.5) == "At 50 % sparsity tickets win in latent space"
    assert latent.title_of(few, 0.5).endswith("fewer than three seeds, no verdict")
    lost = list(latent.verdict_rows("pixel", rows((1, 2, 3), (7, 8, 9)), [0, 1, 2], 1))
    assert "win in neither space" in latent.title_of([*few, *lost], 0.5)


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
