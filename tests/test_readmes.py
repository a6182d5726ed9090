"""The READMEs of folders: commands and files that they name are there, cells are short, and the method of one's
own in methods/README.md runs, cuts what it says and costs what it says."""
import csv
import importlib
import pathlib
import re
import sys
import types

import pytest
import torch

import lth_diffusion as lth
from prune import prunable
from support import cli, runs

HERE = pathlib.Path(__file__).resolve().parents[1]
READMES = {name: (HERE / name / "README.md").read_text(encoding="utf-8")
           for name in ("methods", "checks", "studies", "tests", "results")}
COMMANDS = sorted({command for text in READMES.values()
                   for command in re.findall(r"python (-m (?:methods|checks|studies)\.[^`\n|]*)", text)})


def programs(folder):
    return {path.stem for path in (HERE / folder).glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", READMES)
def test_tables_are_narrow_and_whole(name):
    lines = [line for line in READMES[name].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len(cells) > 5 and all(len(cell) <= 160 for row in cells for cell in row)
    # a row has the width of the row above it, of its own table
    text = READMES[name].splitlines()
    for above, below in zip(text, text[1:]):
        if above.startswith("|") and below.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", above)) == len(re.split(r"(?<!\\)\|", below)), below


def test_every_method_and_check_has_its_row():
    for folder in ("methods", "checks", "studies"):
        there = set(re.findall(rf"python -m {folder}\.(\w+)", READMES[folder]))
        assert programs(folder) <= there | {"common"} <= programs(folder) | {"movement", "common"}
    named = set(re.findall(r"`(test_\w+)\.py`", READMES["tests"]))
    there = {path.stem for path in (HERE / "tests").glob("test_*.py")}
    assert {name for name in there if not name.startswith("test_study_")} <= named <= there | {"test_study_NAME"}


def test_tests_that_are_named_exist():
    text = READMES["tests"]
    source = "".join(path.read_text(encoding="utf-8") for path in (HERE / "tests").glob("test_*.py"))
    names = [name for name in re.findall(r"`(test_\w+)`", text)]
    assert names and all(f"def {name}(" in source for name in names)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "movement" not in c])
def test_flags_of_commands_are_known(command, capsys):
    """--help of the module lists every flag; a positional word is one of its choices or a file."""
    _, module, *words = command.split()
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for word in words:
        number = word.replace(".", "", 1).isdigit()
        known = number or word in ("PATH", "FOLDERS") or "/" in word or word in said or word in cli.DATASETS
        assert known, (command, word)


# ----------------------------------------------------------------------------------- figures and where they come from

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FIGURE = re.compile(r"(?<![\w.,-])\d*\.\d+(?!\w|\.\d)")
NUMBER = re.compile(r"(?<![\w.])-?\d+\.?\d*(?:e[-+]?\d+)?")
WITH_FIGURES = "README.md", "results/README.md", "studies/README.md", "checks/README.md"


def blocks(text):
    """Paragraphs and lists; a table belongs to the paragraph above it."""
    found = []
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.S)):
        if block.startswith("|") and found:
            block = found.pop() + "\n" + block
        found.append(block)
    return found


def linked(block, folder):
    """The results files that a block links to; of a folder, the tables in it."""
    for link in LINK.findall(block):
        path = (folder / link).resolve()
        if HERE / "results" in [path, *path.parents] and path.name != "README.md":
            yield from [path] if path.is_file() else sorted(path.iterdir())


@pytest.mark.parametrize("name", WITH_FIGURES)
def test_figures_are_in_the_files_beside_them(name):
    """Every decimal in a paragraph or table that links to results is there, rounded to as many digits."""
    path, checked = HERE / name, 0
    for block in blocks(path.read_text(encoding="utf-8")):
        tables = [one for one in linked(block, path.parent) if one.suffix in (".csv", ".md", ".json")]
        there = [abs(float(number)) for one in tables for number in NUMBER.findall(one.read_text(encoding="utf-8"))]
        text = LINK.sub("]", block)
        for found in FIGURE.finditer(text) if tables else ():
            figure, scales = found.group(), {1, 100} if text[found.end():].startswith(" %") else {1}  # a share, as per cent
            half = 0.5 * 10 ** -len(figure.split(".")[1]) * (1 + 1e-9)
            assert any(abs(scale * number - float(figure)) <= half for number in there for scale in scales), (
                figure, block[:80])
            checked += 1
    assert checked > 20 or name in ("studies/README.md", "checks/README.md")


@pytest.mark.parametrize("name", WITH_FIGURES)
def test_links_lead_to_files(name):
    path = HERE / name
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (path.parent / link).exists(), link


# ----------------------------------------------------------------------------------- a method of one's own

@pytest.fixture
def movement(tiny, monkeypatch):
    """The block of code in methods/README.md, as the module methods.movement."""
    block, = re.findall(r"```python\n(.*?)```", READMES["methods"], re.S)
    module = types.ModuleType("methods.movement")
    exec(compile(block, "movement.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "methods.movement", module)
    return module


def test_the_method_of_ones_own(movement, tmp_path):
    out = str(tmp_path / "run")
    flags = ("--rounds 2 --prune-rate 0.5 --control-rounds 2 --controls random --rewind 0.25 --steps 20 --batch 4 "
             "--samples 8 --nfe 4 --out").split()
    movement.main([*flags, out])
    args, _ = lth.parse_args([*flags, out])
    exp = lth.Experiment(args)
    dense, ticket = exp.load(lth.Job(0, 0, "dense")), exp.load(lth.Job(0, 2, "ticket"))
    total = sum(p.numel() for p in prunable(dense.model).values())
    early, kept, gone = dense.checkpoint["model"], [], []
    for name, p in prunable(dense.model).items():
        moved, mask = (p.detach() - early[name]).abs(), ticket.masks[name]
        least = max(1, -(-mask.numel() // 40))  # a tenth of the density, which is a quarter
        if int(mask.sum()) > least:  # above the minimum of its layer, the ranking decides
            kept.append(moved[mask])
            gone.append(moved[~mask])
    assert sum(int(mask.sum()) for mask in ticket.masks.values()) == total - round(0.75 * total)
    assert torch.cat(kept).min() >= torch.cat(gone).max()
    with open(f"{out}/results.csv") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"dense", "ticket", "random"}
    assert int(rows["ticket"]["train_steps_total"]) == round((2 - 0.25) * 20)  # 2 - k, as the table says


def test_a_method_that_fixes_a_flag_refuses_another_value(movement, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        movement.main(["--scope", "layer", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "--scope: methods.movement fixes it at global" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- what the other methods cost

@pytest.mark.parametrize("name, flags, expected", [
    ("lth", "--rounds 2", 1 + 2 * 0.75), ("cka", "--rounds 2", 1 + 3 * 0.75),
    ("rigl", "--rounds 1 --rewind 0 --scope erk", 1), ("rst", "--rounds 1 --rewind 0 --scope layer --steps 40", 1.5)])
def test_costs_are_those_of_the_table(name, flags, expected, tiny, tmp_path):
    """Steps of training up to the last ticket, over those of the dense network: real runs of 20 steps."""
    module = lth if name == "lth" else importlib.import_module(f"methods.{name}")
    base = "--prune-rate 0.5 --controls --rewind 0.25 --steps 20 --batch 4 --samples 8 --nfe 4".split()
    out = str(tmp_path / "run")
    module.main([*base, *flags.split(), "--out", out])
    state = runs.read_config(out)["args"]
    last = max(job.round for job in lth.jobs(types.SimpleNamespace(**state)))
    with open(f"{out}/results.csv") as file:
        row, = [row for row in csv.DictReader(file) if row["arm"] == "ticket" and int(row["round"]) == last]
    assert int(row["train_steps_total"]) == round(expected * state["steps"])
