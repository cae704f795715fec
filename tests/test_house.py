"""The rules of the house: which way imports point, what a folder says of itself, YAML-only configs, short functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("flamingo", "data", "eval", "train")
HYDRA_MAY = {"flamingo/configs/compose.py", "flamingo/training/compose.py", "eval/compose.py"}
RECIPE = ("flamingo/training/", "flamingo/configs/")  # what train.py is made of, never installed
LONGEST_FUNCTION = 60  # lines; train.py is the recipe and reads from top to bottom


@cache
def sources() -> dict[str, ast.Module]:
    """Every Python file of ours, by its path."""
    tops = ("flamingo", "data", "eval", "train.py", "benchmarks", "tests")
    files = [file for top in tops for file in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in sorted(files)}


def imported(tree: ast.Module) -> Iterator[str]:
    """Everything that a file imports, inside functions and for types too; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports() -> list[tuple[str, str]]:
    """(importing file, imported file) of the product."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in sources()}
    product = [name for name in sources() if not name.startswith(("tests/", "benchmarks/"))]
    return [(name, modules[to]) for name in product for to in imported(sources()[name]) if to in modules]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Some circle of a graph, if there is one: repeatedly take away what points at nothing that is left."""
    left = {node: set(targets) for node, targets in graph.items()}
    while ends := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in ends:
            del left[node]
    return [sorted(left)] if left else []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == [["a", "b", "c"]]


def test_imports_point_left() -> None:
    tops = [(name.split("/")[0].removesuffix(".py"), to.split("/")[0].removesuffix(".py")) for name, to in imports()]
    wrong = [pair for pair in tops if all(top in ORDER for top in pair) and ORDER.index(pair[1]) > ORDER.index(pair[0])]
    assert wrong == []


def test_neighbours_never_import_each_other_in_a_circle() -> None:
    """At every level: the files and folders of one folder, each folder taken as one, are in an order."""
    folders = {"/".join(name.split("/")[:depth]) for name in sources() for depth in range(name.count("/") + 1)}
    for folder in sorted(folders):
        inside = f"{folder}/" if folder else ""
        graph: dict[str, set[str]] = defaultdict(set)
        for name, to in imports():
            if name.startswith(inside) and to.startswith(inside):
                here, there = (path.removeprefix(inside).split("/")[0] for path in (name, to))
                if here != there and there != "__init__.py":
                    graph[here].add(there)
        for node in {there for targets in graph.values() for there in targets}:
            graph.setdefault(node, set())
        assert circles(graph) == [], f"in {folder or '.'}"


def test_the_library_does_not_import_the_trainer() -> None:
    library = [(name, to) for name, to in imports() if name.startswith("flamingo/") and not name.startswith(RECIPE)]
    assert [pair for pair in library if pair[1].startswith(RECIPE)] == []


def test_hydra_stays_where_configs_are_composed() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, tree in sources().items()
        for module in imported(tree)
        if module.split(".")[0] in ("hydra", "omegaconf") and name not in HYDRA_MAY and not name.startswith("tests/")
    ]
    assert wrong == []


def test_every_folder_says_what_it_is() -> None:
    """Three sentences or more: what comes in, what goes out, where to begin."""
    silent = []
    for name in sources():
        if name.startswith(("flamingo/", "data/", "eval/")) and name.endswith("/__init__.py"):
            said = ast.get_docstring(sources()[name]) or ""
            if len(re.findall(r"[.:](?:\s|$)", said)) < 3 or "TODO" in said:
                silent.append(name)
    assert silent == []


def test_what_a_folder_names_exists() -> None:
    """Files by `name.py`, below the folder or the root, and `module.Name` of its own modules."""
    missing = []
    for name in sources():
        if not name.startswith(("flamingo/", "data/", "eval/")) or not name.endswith("/__init__.py"):
            continue
        folder, text = ROOT / Path(name).parent, ast.get_docstring(sources()[name]) or ""
        for file in re.findall(r"`([a-z_/]+\.py)`", text):
            if not (folder / file).is_file() and not (ROOT / file).is_file():
                missing.append(f"{name}: {file}")
        for module, attribute in re.findall(r"`([a-z_]+)\.([A-Z]\w+)`", text):
            file = folder / f"{module}.py"
            if file.is_file() and not re.search(rf"^(class )?{attribute}\b", file.read_text(), re.MULTILINE):
                missing.append(f"{name}: {module}.{attribute}")
    assert missing == []


def test_config_folder_holds_yaml_only_and_says_how_it_is_used() -> None:
    files = [path for path in (ROOT / "hydra").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".yaml"}
    for path in files:
        text = path.read_text().removeprefix("# @package _global_\n")  # hydra wants this one first
        assert text.startswith(("# python ", "# torchrun ", "# make ")), path


def test_functions_stay_short() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > LONGEST_FUNCTION
        if name != "train.py"
    ]
    assert long == []


def test_the_recipe_is_one_sitting() -> None:
    text = (ROOT / "train.py").read_text()
    assert text.count("\n") < 250
    ours = [line for line in text.splitlines() if re.match(r"from (flamingo|data|eval)\b", line)]
    assert len(ours) <= 12


def test_the_walks_of_the_architecture_page_are_walked_through_code_that_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    walked = re.findall(r"`([\w/]+\.py):([\w.]+)`", page)
    assert len(walked) >= 30
    missing = []
    for path, name in walked:
        scope: ast.AST = sources()[path]
        for part in name.split("."):
            inside = [node for node in ast.iter_child_nodes(scope) if getattr(node, "name", None) == part]
            if not inside:
                missing.append(f"{path}:{name}")
                break
            scope = inside[0]
    assert missing == []


def test_what_holds_a_guarantee_exists() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    files = re.findall(r"`((?:tests/[a-z/]*)?test_\w+\.py)`", page)
    have = [path.as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(files) >= 20
    assert [file for file in files if not any(path.endswith(f"/{file}") for path in have)] == []


def test_nothing_important_is_ignored_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(["git", "check-ignore", "data", "eval", "hydra"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == ""


def test_only_the_library_is_packaged() -> None:
    """And of the library not the trainer, which it does not import either (tests/model/test_wheel.py)."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    code = f"import setuptools; print(*setuptools.find_packages(**{rules!r}), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = found.stdout.split()
    assert "flamingo.layers" in packages
    assert not [package for package in packages if package.startswith(("flamingo.training", "flamingo.configs"))]
    assert all(package.split(".")[0] == "flamingo" for package in packages)
