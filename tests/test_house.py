"""The rules of the code base: the direction of imports, a config folder of YAML only, sizes of files and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("flamingo", "data", "eval", "train")
HYDRA_MAY = {"train.py", "flamingo/training/compose.py", "eval/__main__.py", "eval/compose.py"}
LINES, FUNCTION_LINES = 600, 60


def sources() -> Iterator[tuple[str, ast.Module, str]]:
    for top in ("flamingo", "data", "eval", "train.py", "benchmarks", "tests"):
        path = ROOT / top
        for file in sorted(path.rglob("*.py")) if path.suffix != ".py" else [path]:
            text = file.read_text()
            yield file.relative_to(ROOT).as_posix(), ast.parse(text), text


def imported(tree: ast.Module) -> set[str]:
    """Return the modules a file imports, and for `from a import b` also `a.b`, which may be one."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_point_left_and_hydra_stays_in_the_entry_points() -> None:
    wrong = []
    for name, tree, _ in sources():
        top = name.split("/")[0].removesuffix(".py")
        for module in imported(tree):
            first = module.split(".")[0]
            if top in ORDER and first in ORDER and ORDER.index(first) > ORDER.index(top):
                wrong.append(f"{name} imports {module}")
            if first in ("hydra", "omegaconf") and name not in HYDRA_MAY and not name.startswith("tests/"):
                wrong.append(f"{name} imports {module}")
    assert wrong == []


def test_nothing_imports_in_a_circle() -> None:
    """Neither modules nor folders, at any depth; imports inside functions and for types count too."""
    trees = {name: tree for name, tree, _ in sources()}
    files = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): PurePath(name) for name in trees}
    arrows = {
        (PurePath(name), files[module]) for name, tree in trees.items() for module in imported(tree) & files.keys()
    }
    circles = []
    for folder in {parent for file in files.values() for parent in file.parents}:
        inside = [(a, b) for a, b in arrows if a.is_relative_to(folder) and b.is_relative_to(folder)]
        imports: dict[str, set[str]] = {}
        for a, b in inside:
            one, other = (file.relative_to(folder).parts[0] for file in (a, b))
            if one != other and other != "__init__.py":  # every module imports the __init__ of its package
                imports.setdefault(one, set()).add(other)
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            circles.append(f"{folder}: {' -> '.join(error.args[1])}")
    assert circles == []


def test_config_folder_holds_yaml_only_and_says_how_it_is_used() -> None:
    files = [path for path in (ROOT / "hydra").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".yaml"}
    for path in files:
        text = path.read_text().removeprefix("# @package _global_\n")  # hydra wants this one first
        assert text.startswith(("# python ", "# torchrun ", "# make ")), path


def test_files_and_functions_stay_readable() -> None:
    long = []
    for name, tree, text in sources():
        if (lines := text.count("\n")) > LINES:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            length = (node.end_lineno or 0) - node.lineno if isinstance(node, ast.FunctionDef) else 0
            if length > FUNCTION_LINES and name != "train.py":
                long.append(f"{name} has a function of {length} lines")
    assert long == []


def test_nothing_important_is_ignored_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    found = subprocess.run(["git", "check-ignore", "data", "eval", "hydra"], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""


def test_only_the_library_is_packaged() -> None:
    code = "import setuptools; print(*setuptools.find_packages(include=['flamingo*']), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = found.stdout.split()
    assert "flamingo.training" in packages
    assert all(package.split(".")[0] == "flamingo" for package in packages)
