"""Every source of the table is there, explained, documented, and cheap to start."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import main, parser
from data.prepare import DRAWN, SOURCES
from data.prepare.engine import load_source
from eval.compose import load_config
from tests.data.sources import refusal

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "prepare.md").read_text()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prepare", name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--out DIR" in shown
    assert f"`{name}`" in DOCS
    if name not in DRAWN:
        module = load_source(name)
        assert module.LAYOUT in ("interleaved", "pairs")
        assert callable(module.units)
        assert callable(module.documents)
        assert "--part i/n" in shown


def test_the_docs_name_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in [["prepare", name] for name in SOURCES] + [["inspect"], ["merge"], ["verify"]]:
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    ours = re.sub(r"(?m)^#SBATCH.*$", "", DOCS)
    assert set(re.findall(r"--[a-z][a-z-]*", ours)) <= known


def test_no_source_needs_torch_to_start() -> None:
    code = "import sys, importlib; [importlib.import_module(f'data.prepare.sources.{n}') for n in sys.argv[1:]]"
    code += "; import data.prepare.engine, data.prepare.merge; print('torch' in sys.modules)"
    names = [name for name in SOURCES if name not in DRAWN]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("source", "package", "file"),
    [("obelics", "pyarrow.parquet", "a.parquet"), ("warc", "fastwarc.warc", "a.warc")],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str, file: str
) -> None:
    (tmp_path / file).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    told = refusal(tmp_path / "out", source, tmp_path / file)
    assert f"needs the package {package.split('.')[0]}; install it with: pip install 'flamingo-vlm[prepare]'" in told


def test_the_page_on_fine_tuning_begins_with_commands_that_exist() -> None:
    page = (ROOT / "docs" / "finetune.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^    python -m (.*)$", page.split("\n## ")[0], re.M)]
    assert len(commands) >= 5
    for area, *words in commands:
        if area == "data":
            assert parser(words[1]).parse_args(words).source == words[1]
        else:
            assert words[0] == "shards"
            end = words.index("--out")
            assert load_config([*words[1:end], "model=none"]).task
    named = set(re.findall(r"`(?:python -m data prepare )?([a-z0-9]+)`", page.split("\nFor example")[0]))
    assert named - {"jsonl"} <= set(SOURCES)
    assert main(["prepare", "task", "slake", "--out", "x"]) == 2
