"""Finds the tests in transformers' source distribution, which no installation holds, and makes them importable.

`make peer-tests` puts them below `.cache/`, and the environment variable TRANSFORMERS_TESTS names another folder. None
of them is committed. They import a few modules that the distribution leaves out; those are stood in for here.

    python -m tests.peer.suite   # fetches the distribution of the installed version, and never fails without a network
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import av
import pytest
import transformers
from PIL import Image

PACKAGE = "transformers_suite"
DISTRIBUTION = f"transformers-{transformers.__version__}"
CACHE = Path(__file__).resolve().parents[2] / ".cache"

# What a config of any model keeps of the arguments that all share; their own list is not in the distribution.
COMMON_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def folder() -> Path:
    """Return where the tests are, or would be."""
    named = os.environ.get("TRANSFORMERS_TESTS")
    return Path(named) if named else CACHE / DISTRIBUTION / "tests"


def load(name: str) -> Any:
    """Return a module of the suite; without the suite, skip the module that asks, with the remedy."""
    if not (folder() / f"{name}.py").is_file():
        pytest.skip(
            f"transformers' own tests are not at hand ({folder()}): run `make peer-tests`, or set TRANSFORMERS_TESTS",
            allow_module_level=True,
        )
    if PACKAGE not in sys.modules:
        _stand_in()
    # It would import the tests' folder as a second transformers.
    with patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


def _stand_in() -> None:
    """Make the suite a package, and give it the neighbours that it imports and the distribution lacks."""
    _module(PACKAGE).__path__ = [str(folder())]
    for package in ("exporters", "generation", "utils"):
        _module(f"{PACKAGE}.{package}").__path__ = []
    _module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    # tests/model/test_generation_mixin.py has checks by the names of these.
    _module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=COMMON_ARGUMENTS)
    _module("fetch_hub_objects_for_ci", url_to_local_path=_local)


def _module(name: str, **contents: Any) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)
    return module


_files: list[tempfile.TemporaryDirectory[str]] = []


def _local(url: str) -> str:
    """Return an image or a clip of ours in place of one on the network; anything else keeps its address."""
    if not url.endswith((".jpg", ".jpeg", ".png", ".mp4")):
        return url
    if not _files:
        _files.append(tempfile.TemporaryDirectory())
    file = Path(_files[0].name) / Path(url).name
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    if file.suffix != ".mp4":
        image.save(file)
        return str(file)
    with av.open(str(file), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=25)
        stream.width, stream.height = image.size
        for turned in range(11):  # frames; their tests count on so many
            clip.mux(stream.encode(av.VideoFrame.from_image(image.rotate(8 * turned))))
        clip.mux(stream.encode())
    return str(file)


def fetch() -> str:
    """Download and unpack the distribution where it is missing; return what happened, in a sentence."""
    if folder().is_dir():
        return f"transformers' own tests are in {folder()}"
    CACHE.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "--dest", str(CACHE), DISTRIBUTION.replace("-", "==")]
    done = subprocess.run(command, capture_output=True, text=True)
    archive = CACHE / f"{DISTRIBUTION}.tar.gz"
    if not archive.is_file():
        why = (done.stderr.strip() or "no archive arrived").splitlines()[-1]
        return f"transformers' own tests could not be fetched, so they will be skipped: {why}"
    # Unpacked beside and renamed, so that what was cut off is not taken for the whole.
    with tempfile.TemporaryDirectory(dir=CACHE) as beside:
        with tarfile.open(archive) as tar:
            tar.extractall(beside, filter="data")
        (Path(beside) / DISTRIBUTION).rename(CACHE / DISTRIBUTION)
    archive.unlink()
    return f"transformers' own tests are in {folder()}"


if __name__ == "__main__":
    print(fetch())
