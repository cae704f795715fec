"""The wheel alone: what it holds, what it imports, and a model that speaks in an environment with nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.model import tiny

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {"xformers": "attention"}  # imported where it is installed
SPEAK = """
import sys
from pathlib import Path
from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
import flamingo, torch
assert Path(flamingo.__file__).is_relative_to(sys.prefix), flamingo.__file__
processor = FlamingoProcessor.from_pretrained(sys.argv[1])
model = FlamingoForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
pixels = torch.full((3, 28, 28), 100, dtype=torch.uint8)
inputs = processor(images=[[pixels]], text=["<image>A"])
print(model.generate(**inputs, max_new_tokens=3).shape[0], "row")
assert not [name for name in sys.modules if name.split(".")[0] in ("hydra", "omegaconf", "data", "eval", "train")]
"""


def declared() -> list[Requirement]:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [Requirement(line) for line in lines]


EXTRAS = {"pillow_heif", "trl"}  # of the extras heif and trl; what needs them is refused in a sentence without them


def test_what_the_library_imports_is_declared() -> None:
    known = {canonicalize_name(requirement.name) for requirement in declared()}
    owners = packages_distributions()
    for file in sorted((ROOT / "flamingo").rglob("*.py")):
        if {"training", "configs"} & set(file.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert not name.startswith(("flamingo.training", "flamingo.configs")), file
                top = name.split(".")[0]
                if top not in {*sys.stdlib_module_names, "flamingo", *EXTRAS}:
                    assert known & {canonicalize_name(owner) for owner in owners[top]}, f"{file} imports {name}"


def closure() -> dict[str, Distribution]:
    """What the wheel requires, and what that requires, as far as it is installed here."""
    found: dict[str, Distribution] = {}
    todo = declared()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            assert name in OPTIONAL or name not in {canonicalize_name(r.name) for r in declared()}, name
            continue
        todo += [Requirement(line) for line in found[name].requires or ()]
    return found


@pytest.mark.slow
def test_the_wheel_alone_loads_prompts_and_generates(tmp_path: Path) -> None:
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("flamingo", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", str(source)]
    subprocess.run([*build, "--wheel-dir", str(tmp_path / "wheels"), "--quiet"], check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "flamingo/modeling.py" in names
    assert not [
        name
        for name in names
        if name.startswith(("flamingo/training", "flamingo/configs", "hydra", "data", "eval", "tests"))
    ]

    home = tmp_path / "home"
    venv.create(home, symlinks=True)
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    for found in closure().values():
        tops = {Path(str(file)).parts[0] for file in found.files or () if not str(file).startswith("..")}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
    command = [str(home / "bin" / "python"), "-I", "-c", SPEAK, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "1 row"
