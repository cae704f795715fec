"""METEOR and SPICE: what is missing is told before anything runs; with Java they are the reference scorers' figures."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from eval.metrics.java import METEOR, PARSER, SPICE, meteor, program
from eval.metrics.ptb import caption_words
from eval.metrics.table import measure
from eval.spec import TaskSpec
from eval.tasks.build import check_spec
from flamingo.errors import UserError
from tests.eval.test_metrics_table import answered

SAID = ["a dog runs on the grass", "two men are cooking", "a red bus, parked!"]
TRUE = [["A dog is running on grass.", "the dog plays"], ["Two people cook."], ["a bus that is red", "A parked bus"]]


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """A package pycocoevalcap with some of its files, alone on the path."""
    for name in ("__init__.py", *files):
        (folder / "pycocoevalcap" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pycocoevalcap" / name).write_text("")
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)


def java(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A java that ends at once."""
    folder.mkdir(exist_ok=True)
    (folder / "java").write_text("#!/bin/sh\nexit 1\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    with pytest.raises(UserError, match=r"pip install 'flamingo-vlm\[captions\]', and Java"):
        check_spec("coco", TaskSpec(metrics=["meteor"]))
    package(tmp_path, monkeypatch, METEOR)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="the metric spice needs Java"):
        check_spec("coco", TaskSpec(metrics=["spice"]))
    java(tmp_path / "bin", monkeypatch)
    assert program("meteor", METEOR) == tmp_path / "pycocoevalcap" / METEOR
    with pytest.raises(UserError, match=r"spice-1.0.jar, which does not exist; install pycocoevalcap again"):
        check_spec("coco", TaskSpec(metrics=["spice"]))
    package(tmp_path, monkeypatch, METEOR, SPICE)
    both = r"3.6.0.jar and stanford-corenlp-3.6.0-models.jar in .*spice/lib; nlp.*zip has them, and .*_models` fetches"
    with pytest.raises(UserError, match=both):
        check_spec("coco", TaskSpec(metrics=["spice"]))
    package(tmp_path, monkeypatch, METEOR, SPICE, PARSER[0])
    with pytest.raises(UserError, match=r"needs stanford-corenlp-3.6.0-models.jar in .*zip has them$"):
        check_spec("coco", TaskSpec(metrics=["spice"]))
    package(tmp_path, monkeypatch, METEOR, SPICE, *PARSER)
    check_spec("coco", TaskSpec(metrics=["spice", "meteor"]))


def test_a_program_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, METEOR)
    java(tmp_path / "bin", monkeypatch)
    with pytest.raises(UserError, match=r"METEOR's program .* ended before it gave a score"):
        meteor(SAID, TRUE)


def has_java() -> bool:
    try:
        return program("meteor", METEOR).is_file() and shutil.which("java") is not None
    except UserError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_java(), reason="METEOR needs java and pycocoevalcap (the extra captions)")
def test_meteor_is_that_of_the_reference_scorer() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    theirs = Meteor()
    try:
        expected, each = theirs.compute_score(
            {n: [caption_words(text) for text in several] for n, several in enumerate(TRUE)},
            {n: [caption_words(text)] for n, text in enumerate(SAID)},
        )
    finally:
        for pipe in (theirs.meteor_p.stdin, theirs.meteor_p.stdout, theirs.meteor_p.stderr):
            pipe.close()
    score, ours = meteor(SAID, TRUE)
    assert score == pytest.approx(expected, abs=1e-6)
    assert ours == pytest.approx(each, abs=1e-6)
    answers = [answered(str(n), SAID[n], tuple(TRUE[n]), cluster=str(n)) for n in range(3)]
    value = measure(["meteor"], answers)["meteor"]
    assert value["score"] == pytest.approx(expected, abs=1e-6)
    assert value["low"] <= value["score"] <= value["high"]
