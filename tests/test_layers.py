"""Imports point down: the floors of the design, read from the source without running it."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "run_with_submitit": 8,
    "main": 7,
    "engine": 6,
    "flags": 5,
    "loaders": 5,
    "teachers": 4,
    "datasets": 4,
    "sources": 3,
    "models": 3,
    "packs": 3,
    "checkpoints": 2,
    "losses": 2,
    "augment": 2,
    "models_evit": 1,
    "samplers": 1,
    "utils": 1,
}
# A module is a file, or a folder of files that is imported as one: floors do not divide the inside of a folder.
MODULES = sorted([path.stem for path in ROOT.glob("*.py")] + [path.parent.name for path in ROOT.glob("*/__init__.py")])
NOT_TRAINING = ({path.parent.name for path in ROOT.glob("*/*.py")} | {"tests", "tools"}) - set(FLOORS)


def imports_of(source):
    """Names of the top-level packages that a source imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # a relative import would name a neighbor too, in a repository without packages
            names |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names |= {str(argument.value).partition(".")[0] for argument in node.args[:1] if hasattr(argument, "value")}
    return names


def all_imports(module):
    files = [ROOT / f"{module}.py"] if (ROOT / f"{module}.py").exists() else sorted((ROOT / module).glob("*.py"))
    return set().union(*(imports_of(file.read_text()) for file in files)) - {module}


def house_imports(module):
    return all_imports(module) & (set(FLOORS) | set(MODULES))


def test_there_are_modules_to_check():
    assert {"main", "engine", "utils"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_floor(module):
    assert module in FLOORS, f"{module}.py is not in FLOORS: add its floor"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    # Neighbors on one floor may know each other, if not in circles: losses reads the Batch of samplers.
    floor = FLOORS.get(module, -1)
    above = {name for name in house_imports(module) if FLOORS.get(name, 99) > floor}
    assert not above, f"{module}.py (floor {floor}) imports {', '.join(sorted(above))} from above"


def test_no_module_imports_itself_in_a_circle():
    order = graphlib.TopologicalSorter({module: house_imports(module) for module in MODULES})
    assert set(order.static_order()) == set(MODULES)


def functions_of(folder):
    """(file, name, lines, parameters without self) of every function in the Python files of a folder."""
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                lines = node.end_lineno - node.lineno + 1
                yield file.name, node.name, lines, len([name for name in named if name not in ("self", "cls")])


@pytest.mark.parametrize("folder", [".", "augment", "tools"])
def test_functions_fit_on_a_screen(folder):
    functions = list(functions_of(ROOT / folder))
    assert functions
    for file, name, lines, parameters in functions:
        assert lines <= 60, f"{file}: {name} has {lines} lines"
        assert parameters <= 8, f"{file}: {name} has {parameters} parameters; use an option dataclass"


def test_no_two_modules_share_a_function_name():
    homes = {}
    for file in (*ROOT.glob("*.py"), *ROOT.glob("augment/*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                homes.setdefault(node.name, []).append(file.stem)
    # The two commands have an entry point each, and a job's parser extends that of a run.
    assert sorted(name for name, files in homes.items() if len(files) > 1) == ["cli", "get_parser"], homes


def test_main_stays_short():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 450


def test_main_is_imported_by_the_job_launcher_alone():
    tools = {path.stem: imports_of(path.read_text()) for path in (ROOT / "tools").glob("*.py")}
    users = [name for name, names in ({m: all_imports(m) for m in MODULES} | tools).items() if "main" in names]
    assert users == ["run_with_submitit"]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_tools_or_tests(module):
    imported = all_imports(module) & NOT_TRAINING
    assert not imported, f"{module}.py imports {', '.join(sorted(imported))}, which is not training"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import engine", {"engine"}),
        ("import torch.nn as nn, engine as e", {"torch", "engine"}),
        ("from engine import fit", {"engine"}),
        ("from .engine import fit", {"engine"}),
        ("from . import engine", {"engine"}),
        ("def f():\n    import engine", {"engine"}),
        ("import importlib\nimportlib.import_module('engine')", {"importlib", "engine"}),
        ("engine = 1", set()),
    ],
)
def test_no_way_of_importing_is_overlooked(source, expected):
    assert imports_of(source) == expected


def private_names(source):
    """Names with a leading underscore of attributes, imports and getattr; `*` is a part that is not constant."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (getattr(node, "module", "") or "").split(".")
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            yield re.sub(r"\{.*?\}", "*", ast.unparse(node.args[1]).removeprefix("f").strip("'\""))


def own_names(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_private_names_of_other_packages_are_listed():
    sources = [path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("augment/*.py"), *ROOT.glob("tools/*.py")]]
    documented = {"_exit", "_fields", "_replace", "_asdict"}  # of os and namedtuple, in spite of the underscore
    own = {name for source in sources for name in own_names(source)} | documented
    used = {name for source in sources for name in private_names(source) if re.match("_[^_]", name)} - own
    section = (ROOT / "docs" / "extending.md").read_text().partition("## Private names")[2]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall("`(.*?)`", row)
    }
    listed = {re.sub("_is_.*_supported", "_is_*_supported", name.partition(".")[0]) for name in listed}
    assert used == listed - (listed & own)
    assert listed & own == {"_samples"}  # an attribute of ours, too
