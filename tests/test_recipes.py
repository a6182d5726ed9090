"""The recipes of the README run as they are printed, with fewer steps; its commands have the flags they name."""
import contextlib
import importlib
import pathlib
import re
import shlex

import pytest
import torch

import ddpm
import lth_diffusion as lth
import prune
from support import cli, report
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
