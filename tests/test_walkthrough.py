"""studies/walkthrough.ipynb: its cells run in order, as a notebook would run them; what they say about masks is
true; pictures are saved in it, and the file is valid and small."""
import ast
import base64
import contextlib
import io
import json
import math
import pathlib
import sys
import types

import pytest
import torch
from PIL import Image

import ddpm
import prune
from support import data
from unet import PRESETS

HERE = pathlib.Path(__file__).resolve().parents[1]
PATH = HERE / "studies" / "walkthrough.ipynb"
BOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
FEWER = {"STEPS = 1500": "STEPS = 20", "SAMPLES = 500": "SAMPLES = 16"}


def text(cell):
    return "".join(cell["source"])


def said(cell):
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """What the cells leave behind, run with few steps, images and weights; .shown: pictures; .said: texts."""
    folder, found = tmp_path_factory.mktemp("walkthrough"), {"__name__": "__main__"}
    shown, told, scores = [], [], dict(prune.SCORES)
    display = types.ModuleType("IPython.display")
    display.Image, display.display = lambda path: pathlib.Path(path).read_bytes(), shown.append
    before = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        patch.setitem(sys.modules, "IPython.display", display)
        patch.setitem(data.DIGITS, "train", (400, 1))
        patch.setitem(data.DIGITS, "test", (100, 2))
        patch.setitem(PRESETS, "tiny", dict(base=16, mults=(1,), blocks=1, patch=4))
        patch.setenv("LTH_DATA", str(folder / "data"))
        patch.chdir(HERE / "studies")  # as a notebook server that is started there
        for number, cell in enumerate(CODE):
            source = text(cell)
            if number == 0:
                for old, new in FEWER.items():
                    assert source.count(old) == 1
                    source = source.replace(old, new)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(source, f"cell {number}", "exec"), found)
            told.append(out.getvalue())
        yield types.SimpleNamespace(**found, shown=shown, told=told)
    sys.path[:] = before
    prune.SCORES.clear()
    prune.SCORES.update(scores)


# ----------------------------------------------------------------------------------- the file

def test_the_file_is_a_notebook_of_format_4():
    assert BOOK["nbformat"] == 4 and BOOK["nbformat_minor"] >= 5 and set(BOOK) == {
        "cells", "metadata", "nbformat", "nbformat_minor"}
    assert BOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in BOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(1 <= len(one) <= 64 for one in ids)
    for cell in BOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown") and set(cell) == keys | more
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and text(cell).strip()
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert PATH.stat().st_size < 400_000


def test_cells_are_short_and_need_no_other_package():
    assert 12 <= len(CODE) <= 20
    for cell in CODE:
        assert all(len(line) <= 100 for line in text(cell).splitlines())
        assert len(text(cell).splitlines()) <= 25
    allowed = {"copy", "os", "sys", "tempfile", "torch", "ddpm", "metrics", "prune", "support", "unet", "IPython"}
    nodes = [node for cell in CODE for node in ast.walk(ast.parse(text(cell)))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == allowed
    assert "answer" in CODE[-1]["metadata"]["tags"] and CODE[-1]["metadata"]["jupyter"]["source_hidden"]


def test_outputs_are_saved():
    """Every cell that prints or shows has its output: no error, and pictures that open."""
    pictures = 0
    for cell in CODE:
        for out in cell["outputs"]:
            assert out["output_type"] in ("stream", "display_data")
            if out["output_type"] == "display_data":
                image = Image.open(io.BytesIO(base64.b64decode(out["data"]["image/png"])))
                assert image.format == "PNG" and min(image.size) > 50
                image.load()
                pictures += 1
        called = {node.func.id for node in ast.walk(ast.parse(text(cell)))
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert ("print" in called or "train" in called) <= bool(said(cell)) or cell is CODE[0]
        assert ("show" in called) <= any(out["output_type"] == "display_data" for out in cell["outputs"])
    assert pictures >= 5


def test_saved_figures_are_of_a_whole_run():
    """The saved outputs are those of the default STEPS, and of one run: the answer repeats the table's figures."""
    cell, = [one for one in CODE if "FID, n=" in text(one)]
    table = {line.split()[0]: float(line.split()[-1]) for line in said(cell).splitlines()[3:]}
    assert set(table) == {"dense", "ticket", "reinit", "random"}
    answer = {line.rsplit(None, 1)[0]: float(line.rsplit(None, 1)[1])
              for line in said(CODE[-1]).splitlines() if line[-1].isdigit() and "step" not in line}
    assert all(answer[name] == pytest.approx(value, abs=0.006) for name, value in table.items())
    assert any("step 1500" in said(cell) for cell in CODE)


# ----------------------------------------------------------------------------------- what the cells do

def test_pruned_counts_are_exact(space):
    live, lines = space.TOTAL, [line for told in space.told for line in told.splitlines() if "round " in line]
    assert len(lines) == 3
    for line in lines:
        cut = round(0.2 * live)
        assert f"{live:,} - {cut:,} = {live - cut:,} weights" in line
        live -= cut
    assert prune.live_total(space.masks) == space.TOTAL - round(0.8 * space.TOTAL)
    assert prune.live_counts(space.shuffled) == prune.live_counts(space.masks)
    assert prune.live_total(space.wrong) == prune.live_total(space.masks)


def test_pruned_weights_are_zero_and_the_others_trained(space):
    for model, masks in ((space.ticket, space.masks), (space.fresh, space.masks), (space.other, space.shuffled)):
        weights = prune.prunable(model)
        assert not any(bool(weights[name][~mask].any()) for name, mask in masks.items())
        early = space.early["model"]
        assert any(bool((weights[name] != early[name] * mask).any()) for name, mask in masks.items())
    assert "weights 0 are not zero" in "".join(space.told)


def test_the_kept_state_is_that_of_step_k(space):
    """A copy: what it holds did not train on with the network."""
    assert space.early["step"] == space.K == 1
    dense = space.dense.state_dict()
    assert any(not torch.equal(value, dense[name]) for name, value in space.early["model"].items())


def test_a_ticket_that_prunes_nothing_repeats_the_dense_run(space):
    model = space.new_model(0)
    start = prune.rewind(model, space.every, space.early)
    how = dict(space.how, checkpoint=None)
    ema, losses = ddpm.train(model, space.diffusion, space.images, state=start, **how,
                             **prune.mask_hooks(model, space.every))
    assert losses == space.losses
    dense = space.dense.state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    assert torch.equal(space.draw(ema.model), space.drawn["dense"])


def test_losses_scores_and_pictures(space):
    assert len(space.losses) == 20 and all(math.isfinite(value) for _, value in space.losses)
    assert space.losses[-1][1] < space.losses[0][1]
    assert set(space.found) == {"real images", "dense", "ticket", "reinit", "random", "largest cut"}
    assert all(math.isfinite(value) and value >= 0 for value in space.found.values())
    assert space.found["real images"] < min(v for name, v in space.found.items() if name != "real images")
    assert all(drawn.shape == (16, 1, 28, 28) and drawn.dtype == torch.uint8 for drawn in space.drawn.values())
    assert len(space.shown) == 5 and all(png.startswith(b"\x89PNG") for png in space.shown)


def test_it_goes_on_without_a_notebook(space, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)  # import raises ImportError
    space.show("there is no such picture")
