"""Parquet files as the hub has them, and clips whose segments are not in their videos."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.spec import SourceSpec, TaskSpec
from eval.task import Example
from eval.tasks.formats.video import shown_at, spread
from eval.tasks.sources import read_examples
from flamingo.errors import UserError
from tests.data.sources import jpeg
from tests.data.test_prepare_video import timed


def write(path: Path, *rows: dict[str, Any], schema: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), path, row_group_size=2)
    return path


def row(number: int, question: str, answer: str) -> dict[str, Any]:
    return {"image": {"bytes": jpeg(number), "path": None}, "question": question, "answer": answer}


def examples(form: str, path: Path, **more: Any) -> list[Example]:
    source = SourceSpec(format=form, path=str(path), **more)
    return read_examples("t", TaskSpec(source=source), source)


@pytest.mark.parametrize("form", ["vqa_rad", "pathvqa"])
def test_the_hubs_copies_of_medical_sets(tmp_path: Path, form: str) -> None:
    train = [row(0, "is it?", "yes"), row(0, "what is\n it?", " a lung "), row(1, "is it?", "No")]
    write(tmp_path / "data" / "train-00000-of-00002-0abc.parquet", *train[:2])
    write(tmp_path / "data" / "train-00001-of-00002-0abc.parquet", *train[2:])
    write(tmp_path / "data" / "test-00000-of-00001-0abc.parquet", row(2, "where?", "there"))
    read = examples(form, tmp_path, split="train")
    assert [example.id for example in read] == ["train.0", "train.1", "train.2"]
    assert [example.turn.question for example in read] == ["is it?", "what is it?", "is it?"]
    assert [(example.golds, example.kind) for example in read] == [
        (("yes",), "CLOSED"),
        (("a lung",), "OPEN"),
        (("No",), "CLOSED"),
    ]
    assert [example.turn.images[0].frames for example in read] == [(jpeg(0),), (jpeg(0),), (jpeg(1),)]
    assert read[0].group == read[1].group != read[2].group
    assert [example.golds for example in examples(form, tmp_path)] == [("there",)]
    one = examples(form, tmp_path / "data" / "test-00000-of-00001-0abc.parquet", split="train")
    assert [example.golds for example in one] == [("there",)]


def test_images_in_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(1))
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"image": image, "question": pyarrow.large_string(), "answer": pyarrow.string()})
    rows = [{"image": {"bytes": None, "path": "a.jpg"}, "question": "q", "answer": "a"}]
    path = write(tmp_path / "test.parquet", *rows, schema=schema)
    (example,) = examples("vqa_rad", path, images=str(tmp_path / "images"))
    assert example.turn.images[0].frames == (jpeg(1),)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("split", r"holds no val-\*\.parquet"),
        ("damaged", "cannot be read as parquet: "),
        ("column", "has no 'answer'"),
        ("image", "has null as 'image'"),
        ("empty", "has no image with an answer"),
    ],
)
def test_faults_of_parquet_are_one_sentence(tmp_path: Path, fault: str, sentence: str) -> None:
    path, split = tmp_path / "test-0.parquet", ""
    rows: list[dict[str, Any]] = [row(1, "q", "a")]
    if fault == "column":
        rows = [{"image": {"bytes": b"x", "path": None}, "question": "q"}]
    if fault == "image":
        rows.append({"image": None, "question": "q", "answer": "a"})
    write(path, *rows)
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    if fault == "empty":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    if fault == "split":
        split = "val"
    with pytest.raises(UserError, match=sentence) as caught:
        examples("pathvqa", tmp_path if split else path, split=split)
    assert "\n" not in str(caught.value)


def segments(folder: Path, *parts: tuple[float, float]) -> Path:
    """An annotation file of YouCook2 whose videos last two seconds."""
    folder.mkdir(exist_ok=True)
    (folder / "v.mp4").write_bytes(timed(list(range(0, 2000, 200)), "mp4"))
    annotations = [{"id": n, "segment": list(part), "sentence": "cut"} for n, part in enumerate(parts)]
    path = folder / "a.json"
    path.write_text(json.dumps({"database": {"v": {"subset": "validation", "annotations": annotations}}}))
    return path


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ((3.0, 4.0), "from 3 to 4 seconds, but the video ends at"),
        ((1.0, 1.0), "from 1 to 1 seconds, but that is no time at all"),
        ((1.5, 0.5), "from 1.5 to 0.5 seconds"),
        ((-1.0, 0.5), "from -1 to 0.5 seconds"),
    ],
)
def test_segments_that_are_not_in_their_videos_are_counted(
    tmp_path: Path, part: tuple[float, float], sentence: str
) -> None:
    with pytest.raises(UserError, match=f"2 of 3 clips are not in their videos, the first is .*{sentence}"):
        examples("youcook2", segments(tmp_path, (0.0, 1.0), part, part))


def test_segments_within_and_a_little_beyond_are_read(tmp_path: Path) -> None:
    read = examples("youcook2", segments(tmp_path, (0.0, 1.0), (0.05, 0.06), (1.5, 9.0)))
    assert [len(example.turn.images[0].frames) for example in read] == [5, 1, 3]


@settings(max_examples=300)
@given(st.integers(1, 60), st.integers(1, 40), st.sampled_from([1, 8, 25, 30]))
def test_at_a_constant_rate_the_frames_are_those_in_the_middle(total: int, count: int, rate: int) -> None:
    times = [Fraction(number, rate) for number in range(total)]
    assert shown_at(times, Fraction(total, rate), count, 0.0, None) == spread(total, count)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.integers(1, 9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_frames_are_those_that_are_shown_then(gaps: list[int], count: int, start: float, end: float) -> None:
    times = [Fraction(sum(gaps[:k]), 10) for k in range(len(gaps))]
    length = times[-1] + 1
    chosen = shown_at(times, length, count, start, end)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= count
    assert bool(chosen) == (0 <= start < end and start < length)
    for index in chosen:  # each is shown at some time of the segment
        until = times[index + 1] if index + 1 < len(times) else length
        assert times[index] < min(Fraction(end), length)
        assert until > Fraction(start)


@pytest.mark.parametrize("part", [(float("nan"), 1.0), (0.0, float("nan")), (0.0, float("inf"))])
def test_segments_without_a_time_are_refused_by_row(tmp_path: Path, part: tuple[float, float]) -> None:
    with pytest.raises(
        UserError, match=r"entry 'v', annotations 2 has float as 'segment\[[01]\]', which must be a number"
    ):
        examples("youcook2", segments(tmp_path, (0.0, 1.0), part))
