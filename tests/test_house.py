"""The rules of the house, held by a test: import arrows, YAML-only config folder, sizes of files and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("flamingo", "data", "eval", "train")
HYDRA_MAY = {"flamingo/configs/compose.py", "flamingo/training/compose.py", "eval/compose.py"}


def sources() -> Iterator[tuple[str, ast.Module, str]]:
    for top in ("flamingo", "data", "eval", "train.py", "benchmarks", "tests"):
        path = ROOT / top
        for file in sorted(path.rglob("*.py")) if path.suffix != ".py" else [path]:
            text = file.read_text()
            yield file.relative_to(ROOT).as_posix(), ast.parse(text), text


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


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


def test_config_folder_holds_yaml_only_and_says_how_it_is_used() -> None:
    files = [path for path in (ROOT / "hydra").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".yaml"}
    for path in files:
        text = path.read_text().removeprefix("# @package _global_\n")  # hydra wants this one first
        assert text.startswith(("# python ", "# torchrun ", "# make ")), path


def test_files_and_functions_stay_small() -> None:
    long = []
    for name, tree, text in sources():
        if (lines := text.count("\n")) > 300:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60 and name != "train.py":
                long.append(f"{name}:{node.lineno} {node.name}")
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
