"""The layout: which way imports point, how long lines and functions are, how files answer when run."""
import ast
import functools
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parents[1]
CORE = "unet", "ddpm", "prune", "metrics", "lth_diffusion"
FOLDERS = "support", "methods", "studies", "checks"
OURS = {*CORE, *FOLDERS}
FILES = sorted([*HERE.glob("*.py"), *(path for name in FOLDERS for path in (HERE / name).glob("*.py"))])
RUN = [path for path in FILES if path.parent.name in ("methods", "studies", "checks")
       and path.name not in ("common.py", "__init__.py")]
WIDTH, LENGTH = 100, 45  # columns of a line, lines of a function


def name_of(path):
    return path.relative_to(HERE).as_posix()


def of_folder(name):
    return pytest.mark.parametrize("path", sorted((HERE / name).glob("*.py")), ids=name_of)


@functools.lru_cache(maxsize=None)
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path, inside=True):
    """Dotted names of ours that a file imports, at module level or anywhere: "support.cli", "unet".

    `from support import cli` is support.cli; `from studies.common import fit` is studies.common.
    """
    pending, found = list(tree(path).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            whole = node.module in FOLDERS
            found |= {f"{node.module}.{alias.name}" if whole else node.module for alias in node.names}
        command = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)  # as a program
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if inside or not (function or command):
            pending += ast.iter_child_nodes(node)
    return {name for name in found if name.split(".")[0] in OURS}


def roots(names):
    return {name.split(".")[0] for name in names}


# ----------------------------------------------------------------------------------- arrows

@of_folder("support")
def test_support_imports_nothing_of_ours_but_support(path):
    assert roots(imports(path)) <= {"support"}


def test_the_core_in_its_order():
    """At module level; what is imported inside functions, in a second set, is there for commands alone."""
    allowed = {"unet": (set(), set()), "prune": (set(), {"unet"}), "ddpm": ({"unet"}, {"prune", "support"}),
               "metrics": (set(), {"support"}),
               "lth_diffusion": ({"unet", "prune", "ddpm", "metrics", "support"}, set())}
    assert set(allowed) == set(CORE)
    for name, (outside, inside) in allowed.items():
        path = HERE / f"{name}.py"
        assert roots(imports(path, inside=False)) <= outside, name
        assert roots(imports(path)) <= outside | inside, name


@of_folder("methods")
def test_methods_import_no_study(path):
    assert roots(imports(path)) <= {*CORE, "support", "methods"}


@of_folder("studies")
def test_studies_import_no_other_study(path):
    """But for one whose name goes on where that of the other ends: replication, replication_report."""
    found, own = imports(path), "studies." + path.stem.split("_")[0]
    assert "checks" not in roots(found)
    assert {name for name in found if name.startswith("studies") and not name.startswith(own)} <= {"studies.common"}


@of_folder("checks")
def test_checks_import_no_study_but_what_studies_share(path):
    assert {name for name in imports(path) if name.startswith("studies")} <= {"studies.common"}


def test_nothing_imports_itself_in_a_circle():
    """At module level: whichever file is imported first."""
    modules = {name_of(path)[:-3].replace("/", "."): path for path in FILES}
    edges = {name: imports(path, inside=False) & set(modules) for name, path in modules.items()}
    while edges:
        free = {name for name, needs in edges.items() if not needs & set(edges)}
        assert free, f"a circle among {sorted(edges)}"
        edges = {name: needs for name, needs in edges.items() if name not in free}


# ----------------------------------------------------------------------------------- lines and functions

def test_the_five_modules_are_read_in_an_evening():
    assert sum(len((HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in CORE) <= 1750


def test_no_long_lines():
    lines = [(f"{name_of(path)}:{number}", len(line)) for path in FILES
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    assert len(lines) > 3000 and [where for where, width in lines if width > WIDTH] == []


def test_no_long_functions():
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    sizes = {f"{name_of(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
             for path in FILES for node in ast.walk(tree(path)) if isinstance(node, kinds)}
    assert len(sizes) > 300 and {where: n for where, n in sizes.items() if n > LENGTH} == {}


def test_every_file_says_what_it_is():
    assert [name_of(path) for path in FILES if len(ast.get_docstring(tree(path)) or "") < 20] == []


# ----------------------------------------------------------------------------------- as programs

@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_run_as_a_file_it_names_the_command(path):
    """`python studies/NAME.py` would find none of our modules: one line says what to type instead."""
    # -S: without installed packages too, since the line comes before the imports
    done = subprocess.run([sys.executable, "-S", path], capture_output=True, text=True, timeout=60)
    module = name_of(path)[:-3].replace("/", ".")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(f"python -m {module}\n")
