"""The whole job in about a minute, through the command line, as a student would run it."""
import csv
import json
import os
import subprocess
import sys

import pytest

import lth_diffusion

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = "--steps 20 --batch 16 --samples 32 --nfe 4".split()


def run(*command):
    """Run a command line from the repository's folder; return (exit code, what it printed)."""
    done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True,
                          timeout=300)
    return done.returncode, done.stderr + done.stdout  # a log's progress first


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run of the main job with two controls."""
    out = str(tmp_path_factory.mktemp("smoke") / "run")
    command = ["lth_diffusion.py", "--rounds", "2", "--controls", "reinit", "random", "--out", out,
               *SMALL]
    return command, out, *run(*command)


def test_main_job_ends_with_a_table_and_says_what_it_means(finished):
    _, _, code, said = finished
    assert code == 0, said
    assert "device   " in said and "to go here" in said  # what and how long, before it starts
    for word in ("dense", "ticket", "reinit", "random mask", "fid_domain", "36.0 %"):
        assert word in said, word
    assert "no verdict (1 seed; it needs 3)" in said and "not comparable with papers" in said


def test_results_hold_exact_counts(finished):
    _, out, _, _ = finished
    with open(os.path.join(out, "results.csv")) as file:
        rows = list(csv.DictReader(file))
    assert [(r["round"], r["arm"]) for r in rows] == [
        ("0", "dense"), ("1", "ticket"), ("2", "ticket"), ("2", "reinit"), ("2", "random")]
    live = {(r["round"], r["arm"]): int(r["live_weights"]) for r in rows}
    first, second = live["1", "ticket"], live["2", "ticket"]
    assert first == live["0", "dense"] - round(0.2 * live["0", "dense"])
    assert second == first - round(0.2 * first)
    assert all(n == second for (r, _), n in live.items() if r == "2")
    assert all(float(r["fid_domain"]) > 0 and int(r["ticket_bytes"]) > 0 for r in rows)
    config = json.load(open(os.path.join(out, "config.json")))
    assert config["versions"]["torch"] and config["classifier_hash"]
    assert config["margins"] == dict(fid_domain=0.1, val_loss=0.03)
    assert config["args"]["precision"] in ("fp32", "bf16")  # what was used, not "auto"


@pytest.mark.parametrize("name", ["samples_by_sparsity", "quality_vs_sparsity", "layers",
                                  "losses"])
def test_pictures_are_there(finished, name):
    from PIL import Image
    image = Image.open(os.path.join(finished[1], f"{name}.png"))
    assert image.width >= 900 and len(image.convert("L").getcolors(256)) > 2


def test_rerun_trains_nothing_and_says_the_same(finished, capsys):
    command, out, _, said = finished
    path = os.path.join(out, "seed0", "round02_ticket.pt")
    before = os.path.getmtime(path)
    lth_diffusion.main(command[1:])  # in this process: another one takes seconds to import torch
    again = capsys.readouterr().out
    total = said.split(" training runs, ")[0].split()[-1]
    assert f"{total} training runs, {total} of them done" in again
    assert again.split("\n\n")[1:] == said.split("\n\n")[1:]  # table, conclusion, folder
    assert os.path.getmtime(path) == before


def test_another_flag_on_the_same_folder_is_refused(finished, capsys):
    command, _, _, _ = finished
    with pytest.raises(SystemExit) as stop:
        lth_diffusion.main([*command[1:], "--lr", "0.5"])
    assert stop.value.code == 2 and "--lr" in capsys.readouterr().err


def test_ddpm_alone_trains_and_draws(tmp_path):
    code, said = run("ddpm.py", "--dataset", "digits", "--out", str(tmp_path), *SMALL)
    assert code == 0 and "samples.png" in said, said
    assert (tmp_path / "samples.png").exists() and (tmp_path / "model.pt").exists()
