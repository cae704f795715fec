"""Names and texts of data, shown: no command writes a control character of theirs, no page runs a script of theirs."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.__main__ import main as data_main
from data.shards.document import Document, Image, Text
from data.shards.writer import ShardWriter
from data.tools.show import document_as_html
from data.tools.show_sampled import sample_document, sampled_as_html
from eval.__main__ import main as eval_main
from eval.reports.gallery import gallery_html
from eval.reports.plots import curve_png
from eval.reports.report_page import report_html
from eval.reports.results import results_of, write_report
from eval.reports.saved_run import read_run
from eval.runner import Grid, run
from eval.spec import TaskSpec
from eval.task import Task
from eval.tasks.examples import ExampleTask
from flamingo.__main__ import main as flamingo_main
from flamingo.errors import UserError
from flamingo.terminal import printable
from tests.eval.worlds import Constant, colour_examples
from tests.fixtures import png

CODES = "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b2J\r\x08\x7f\u202emoc\u2066\u200f\u2028"
"""Sets a terminal's title, clears it, colours it, goes back over what it shows, turns text around."""
UNWANTED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
MARKUP = (
    "<script>document.documentElement.dataset.ran=1</script><img src=x onerror=document.documentElement.dataset.ran=1>"
    "'\"><svg onload=document.documentElement.dataset.ran=1></code></pre></figcaption></style>"
)
FACTS = {"model": {"name": "m", "sha256": "0" * 64}, "date": "2026-01-01", "code": "c", "device": "cpu", "wall_s": 1.0}


def clean(text: str) -> str:
    assert not UNWANTED.search(text), ascii(text)
    return text


def test_what_is_printable() -> None:
    assert printable("red\n\tgrün 🏳️\u200d🌈 न\u200dक \xa0") == "red\n\tgrün 🏳️\u200d🌈 न\u200dक \xa0"
    assert printable("\x1b[31m\x9b\u202e\ud800\r\0") == "\\x1b[31m\\x9b\\u202e\\ud800\\r\\x00"
    assert printable(printable(CODES)) == printable(CODES)
    assert str(UserError("key 'a\nb\x1b[2J' is missing")) == "key 'a\\nb\\x1b[2J' is missing"


def document(text: str) -> Document:
    meta = {"title": text, text: "value", "list": [text]}
    return Document("k", [Image((0,)), Text(f"a {text} b"), Text(text, loss=False)], [png(9)], meta)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shards", "d") as writer:
        writer.write(document(CODES))
    return tmp_path / "shards" / "d-000000.tar"


@pytest.mark.parametrize("more", [[], ["--sampled"]])
def test_inspect(shard: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert data_main(["inspect", str(shard), *more]) == 0
    said = clean(capsys.readouterr().out)
    assert "\\x1b" in said


def odd_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "verify": lambda folder: ["verify", str(odd_tar(folder / "a.tar", (f"../k{CODES}.json", b"{"), ("k.jpg", b"x")))],
    "verify a file's name": lambda folder: ["verify", str(odd_tar(folder / f"a{CODES}.tar", ("k.json", b"{")))],
    "index": lambda folder: ["index", str(odd_tar(folder / f"a{CODES}.tar", ("k.json", b"{}")))],
    "index a broken one": lambda folder: ["index", str(shutil.copy(__file__, folder / f"a{CODES}.tar"))],
    "inspect nothing": lambda folder: ["inspect", str(folder / f"gone{CODES}.tar")],
    "merge nothing": lambda folder: ["merge", str(folder / f"gone{CODES}")],
    "prepare nothing": lambda folder: ["prepare", "pairs", str(folder / f"x{CODES}"), "--out", str(folder / "out")],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_main(COMMANDS[name](tmp_path))
    said = capsys.readouterr()
    assert "title" in clean(said.out) + clean(said.err)  # it was said, and the code in it shown


def finished(folder: Path, text: str) -> tuple[dict[str, Any], list[Any], Any]:
    """A run whose ids, kinds, questions and answers hold `text`, in a folder."""
    examples = [
        replace(
            example,
            id=f"{i}{text}",
            kind=f"{example.kind}{text}",
            golds=(f"{example.golds[0]}{text}",),
            turn=replace(example.turn, question=f"what {text}?", answer=f"{example.golds[0]}{text}"),
        )
        for i, example in enumerate(colour_examples(12))
    ]
    task = ExampleTask("colours", TaskSpec(lead=" ", queries=6), examples)
    task.description["note"] = text
    tasks: dict[str, Task] = {"colours": task}
    grid = Grid([0, 2], [0], ["real"])
    samples, cache = run(tasks, grid, Constant(f"red{text}"))
    results = results_of(samples, tasks, grid.description(), FACTS | {"images": cache.counts()})
    results["model"] = {"name": f"m{text}", "sha256": text}
    results["rows"][0]["constant_answer"] = text
    write_report(folder, results, samples)
    return results, samples, cache


def test_commands_on_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"run{CODES}"
    results, samples, _ = finished(folder, CODES)
    write_report(folder, results, [*samples[:-1], samples[0]])  # one twice, one missing
    other = tmp_path / "other"
    finished(other, "")
    commands = [
        ["check", str(folder)],
        ["report", str(folder)],
        ["compare", str(folder), str(folder)],
        ["compare", str(folder), str(other)],
        ["export", str(folder), "format=vqa", f"to={tmp_path / 'x.json'}", "shots=0"],
        ["export", str(folder), "format=vqa", f"to={tmp_path / 'x.json'}"],
        ["export", str(folder), f"format={CODES}", f"to={tmp_path / 'x.json'}"],
        ["check", str(folder), f"key{CODES}=1"],
        ["prepare", f"coco{CODES}", "--from", str(tmp_path)],
        [f"model={CODES}", "task=csv", f"task.csv.source.path={CODES}"],
    ]
    for command in commands:
        assert eval_main(command) in (0, 1, 2), command
        said = capsys.readouterr()
        assert clean(said.out) + clean(said.err), command


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flamingo_main(["generate", "--model", str(tmp_path / f"gone{CODES}")]) == 2
    assert "\\x1b" in clean(capsys.readouterr().err)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def ran(page: Path, profile: Path) -> bool:
    """Whether a script of the data ran when a real browser opened a page; the page must not be empty."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: {' or '.join(BROWSERS[:2])} shows the pages (apt-get install chromium)")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom --virtual-time-budget=2000"
    )
    command = [browser, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<body" in shown
    assert "dataset.ran" in shown  # as text, or as the script itself
    return "data-ran" in shown


def _gallery(folder: Path) -> str:
    results, samples, cache = finished(folder, MARKUP)
    return gallery_html(results, samples, cache.images)


def _report(folder: Path) -> str:
    results, samples, _ = finished(folder / "<b>run", MARKUP)
    write_report(folder / "<b>run", results, samples[:-1])  # its problems are shown too
    return report_html([read_run(folder / "<b>run")], curve_png({"": results}), None)


def _sampled(folder: Path) -> str:
    options = Namespace(
        tokenizer=None, max_tokens=64, max_images=2, crop="start", labels="text", next_image=0.5, seed=0
    )
    return sampled_as_html(sample_document(document(MARKUP), options), document(MARKUP), MARKUP)


PAGES: dict[str, Callable[[Path], str]] = {
    "document": lambda folder: document_as_html(document(MARKUP), MARKUP),
    "sampled": _sampled,
    "gallery": _gallery,
    "report": _report,
}


@pytest.mark.parametrize("page", PAGES)
def test_pages_hold_no_element_of_the_data(page: str, tmp_path: Path) -> None:
    html = PAGES[page](tmp_path)
    assert "dataset.ran" in html
    assert "&lt;script&gt;" in html
    for tag in ("<script", "<svg", "onerror=document.documentElement.dataset.ran=1>"):
        assert tag not in html


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_no_script_of_the_data_runs_in_a_browser(page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGES[page](tmp_path), encoding="utf-8")
    assert not ran(file, tmp_path / "profile")


@pytest.mark.slow
def test_the_browser_would_have_run_it(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{MARKUP}</body>")
    assert ran(tmp_path / "page.html", tmp_path / "profile")
