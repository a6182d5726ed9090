"""The recipes of the README run as they are printed, with fewer steps; its commands have the flags they name."""
import contextlib
import csv
import functools
import importlib
import pathlib
import re
import shlex

import numpy as np
import PIL.Image
import pytest
import test_data
import torch

import ddpm
import lth_diffusion as lth
import prune
from support import classifier, cli, data, report, runs
from unet import UNet

HERE = pathlib.Path(__file__).resolve().parents[1]
TEXT = (HERE / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
            for line in block.splitlines() if line.startswith("python ")]


def test_prune_your_own_model():
    code = PYTHON[0].replace("steps=1000", "steps=8").replace("== 50", "== 2").replace("[50]", "[2]")
    assert code != PYTHON[0]
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    space = dict(model=UNet(base=8, mults=(1,), image_size=8), images=images)
    exec(code, space)
    masks, weights = space["masks"], prune.prunable(space["model"])
    total = sum(mask.numel() for mask in masks.values())
    assert prune.live_total(masks) == total - round(0.8 * total) and space["start"]["step"] == 2
    assert all(not weights[name][~mask].any() and weights[name][mask].any() for name, mask in masks.items())


def test_a_rule_of_your_own(tmp_path, monkeypatch):
    code = PYTHON[1].replace("runs/mine", str(tmp_path / "mine"))
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setitem(cli.DEFAULTS, "digits", cli.DEFAULTS["digits"] | dict(steps=8, batch=4, samples=8, nfe=4))
    monkeypatch.setattr(report, "draw_run", lambda *_, **__: None)
    before = dict(prune.SCORES)
    try:
        space = {}
        exec(code, space)
    finally:
        prune.SCORES.clear()
        prune.SCORES.update(before)
    assert [(row["round"], row["arm"]) for row in space["rows"]][:2] == [(0, "dense"), (1, "ticket")]
    scores = space["per_filter"](torch.tensor([[1.0, 2.0], [3.0, 0.1]]), torch.tensor([[1, 1], [1, 0]]).bool())
    expected = torch.tensor([[5 ** 0.5, 2 * 5 ** 0.5], [9.0, 0.3]])
    assert torch.allclose(scores, expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_flags_they_name(command, capsys):
    words = shlex.split(command)[1:]
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    with contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    said = capsys.readouterr().out
    for word in words:
        if word.startswith("--"):
            assert f"{word} " in said or f"{word}\n" in said or f"{word}]" in said, word
    assert len(COMMANDS) >= 6 and ddpm.PRESETS


@pytest.mark.parametrize("dataset, size, classes", [("fashion", 28, 10), ("cifar100", 32, 100)])
def test_the_main_command_on_files_in_the_official_layout(tmp_path, monkeypatch, dataset, size, classes):
    if dataset == "fashion":
        for split in "train", "test":
            test_data.write_mnist(tmp_path, split=split, n=300)
    else:
        test_data.write_folder(tmp_path, dataset, test_data.cifar_files(dataset, n=300)[0])
    few = functools.partial(classifier.train, steps=8)
    monkeypatch.setattr(classifier, "train", lambda images, labels, **_: few(images, labels))
    out = tmp_path / "run"
    lth.main(["--dataset", dataset, "--data-dir", str(tmp_path), "--out", str(out), "--rounds", "1",
              *"--controls reinit --steps 4 --batch 4 --samples 20 --nfe 4 --device cpu".split()])
    args = runs.read_config(str(out))["args"]
    assert (args["dataset"], args["preset"]) == (dataset, "mnist" if dataset == "fashion" else "cifar-small")
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == ["dense", "ticket", "reinit"]
    assert len({float(row["fid_domain"]) for row in rows}) == 3
    with PIL.Image.open(out / "samples_by_sparsity.png") as picture:
        colours = np.asarray(picture.convert("RGB"), int)
    assert (np.ptp(colours, axis=2) > 40).any() == (dataset != "fashion")  # grey, or in colour
    images, labels = data.load_images(dataset, str(tmp_path), "train")
    assert images.shape[2:] == (size, size) and int(labels.max()) < classes
