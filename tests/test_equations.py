"""studies/EQUATIONS.md: every function it names is there and names the paper; no paper is left out."""
import ast
import functools
import importlib
import inspect
import pathlib
import re

import pytest

HERE = pathlib.Path(__file__).resolve().parents[1]
TABLE = HERE / "studies" / "EQUATIONS.md"
ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{4,5})(?![\d.])")
FOLDERS = "methods", "studies", "support", "checks"
CITING = sorted([*HERE.glob("*.py"), *(p for name in FOLDERS for p in (HERE / name).glob("*.py"))])


def rows(text):
    """[(arXiv ids, cells)] of the rows of all tables."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [(ARXIV.findall(line[0]), line) for line in cells if line[0] != "paper" and set(line[0]) != set("-")]


ROWS = rows(TABLE.read_text(encoding="utf-8"))
PAIRS = sorted({(number, name) for numbers, cells in ROWS for number in numbers
                for name in re.findall(r"`([\w.]+)`", cells[-1])})


def find(name):
    """(what "module.Class.method" names, what encloses it down from the module)."""
    parts = name.split(".")
    depth = 2 if parts[0] in FOLDERS else 1
    module = importlib.import_module(".".join(parts[:depth]))
    chain = functools.reduce(lambda found, part: [*found, getattr(found[-1], part)], parts[depth:], [module])
    return chain[-1], chain[:-1]


def mentions(name, number):
    """Whether the source of a function, or a docstring of what it stands in, has the paper's number."""
    it, around = find(name)
    return number in inspect.getsource(it) or any(number in (inspect.getdoc(outer) or "") for outer in around)


def cited(path):
    """The arXiv numbers in docstrings and comments of a file; numbers of the code are no papers."""
    text = path.read_text(encoding="utf-8")
    strings = {node.value for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    comments = re.findall(r"#.*", text)
    return {number for part in (*strings, *comments) for number in re.findall(r"\b(\d{4}\.\d{4,5})\b", part)
            if 1 <= int(number[2:4]) <= 12}


def test_rows_are_whole():
    assert len(ROWS) > 40 and len(PAIRS) > 40
    for numbers, cells in ROWS:
        assert len(numbers) == 1 and "`" in cells[-1] and len(cells) in (3, 4), cells
        assert all(len(cell) <= 160 for cell in cells), cells


@pytest.mark.parametrize("number, name", PAIRS)
def test_the_function_is_there_and_names_the_paper(number, name):
    it, _ = find(name)
    assert callable(it) and it.__module__ == ".".join(name.split(".")[:2 if name.split(".")[0] in FOLDERS else 1])
    assert mentions(name, number)


def test_no_paper_is_left_out():
    there = {number for numbers, _ in ROWS for number in numbers}
    for path in CITING:
        assert cited(path) <= there, path.name
    assert there == set().union(*map(cited, CITING))  # and none is named that no file cites


def test_sections_are_those_that_the_code_cites():
    """An equation, section, figure or appendix stands in the source with the paper's number, or in the file."""
    for numbers, cells in ROWS:
        places = re.findall(r"(?:eq\.|sections?|appendix|figure) [\w., ]+", cells[1]) if len(cells) == 4 else []
        module = re.search(r"`([\w.]+)`", cells[-1])[1]
        text = inspect.getsource(find(module)[1][0])
        for place in places:
            for value in re.findall(r"(?<![\w.])(?:\d+(?:\.\d)?|[A-Z])(?!\w)", place.split(" ", 1)[1]):
                assert re.search(rf"(eq\.|section|appendix|appendices|figure)s?[^\n]*\b{re.escape(value)}\b", text), \
                    (numbers, place, value)


def test_a_wrong_row_is_found():
    """The checks above can fail: a function that is not there, a paper that the function does not name."""
    with pytest.raises(AttributeError):
        find("ddpm.Diffusion.q_samples")
    assert mentions("ddpm.ddim_step", "2010.02502") and not mentions("ddpm.ddim_step", "2211.01095")
    assert rows("| paper | code |\n|---|---|\n| A, 2020, 2010.02502 | `a.b` |") == [
        (["2010.02502"], ["A, 2020, 2010.02502", "`a.b`"])]
