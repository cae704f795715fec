"""Data of one's own, videos, and what is wrong with an annotation file in one sentence."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.check_data import check
from eval.compose import load_config
from eval.spec import SourceSpec, TaskSpec
from eval.task import EncodedImage, StoredImage
from eval.tasks.build import build_task
from eval.tasks.examples import definition_of
from eval.tasks.formats.video import frames_of, spread
from eval.tasks.sources import read_examples
from flamingo.errors import UserError
from tests.eval.published import WRITERS, dump
from tests.eval.published.files import clip, dump_lines, image


def test_own_questions_with_choices_are_five_lines(tmp_path: Path) -> None:
    for number in range(4):
        image(tmp_path / f"{number}.png", number)
    rows: list[dict] = [{"image": f"{n}.png", "question": "Which {one}?", "answer": ["red", "crimson"]} for n in (0, 1)]
    rows.append({"image": ["2.png", "3.png"], "question": "Which?", "answer": "go", "choices": ["go", "stop"]})
    rows.append(
        {"image": None, "question": "Which?", "answer": "stop", "choices": ["go", "stop"], "hint": "{question}"}
    )
    dump_lines(tmp_path / "mine.jsonl", rows)
    source = SourceSpec(format="jsonl", path=str(tmp_path / "mine.jsonl"))
    spec = TaskSpec(source=source, question="{question}\n{options}", lead=" ")
    found = read_examples("mine", spec, source)
    assert found[0].golds == ("red", "crimson")
    assert found[0].turn.question == "Which {one}?\n"  # braces of the data stay
    assert found[2].candidates == ("go", "stop")
    assert found[2].turn.question == "Which?\nA. go\nB. stop"
    assert isinstance(found[2].turn.image, StoredImage)
    assert len(found[2].turn.image.frames) == 2
    assert found[3].turn.image is None
    spec.answer_as, spec.options = "letter", "inline"
    found = read_examples("mine", spec, source)
    assert (found[3].golds, found[3].candidates) == (("B",), ("A", "B"))
    assert found[3].turn.question == "Which?\n(A) go (B) stop"
    with pytest.raises(UserError, match=r"question has \{colour\}, but its items only have options, question; change"):
        read_examples("mine", TaskSpec(source=source, question="{colour}"), source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "0.png"}\n', "line 1 has no column 'answer'; its columns are image"),
        ('{"image": "9.png", "answer": "a"}\n', r"row 1 names the image .*9.png, which does not exist"),
        ('{"image": "0.png", "answer": "a", "choices": ["b"]}\n', "the answer 'a', which is not among its choices"),
        ('{"image": "0.png", "answer": " "}\n', "row 1 has no answer"),
        ("{\n", "line 1 is not JSON"),
    ],
)
def test_what_is_wrong_with_a_table_of_lines(tmp_path: Path, line: str, message: str) -> None:
    image(tmp_path / "0.png", 0)
    (tmp_path / "mine.jsonl").write_text(line)
    source = SourceSpec(format="jsonl", path=str(tmp_path / "mine.jsonl"))
    with pytest.raises(UserError, match=message):
        read_examples("mine", TaskSpec(source=source), source)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": None}, "line 1 has null as 'question', which must be given"),
        ({"question": ["what?"]}, "line 1 has a list of 1 as 'question', which must be text"),
        ({"answer": True}, "line 1 has true as 'answer', which must be text"),
        ({"answer": ["a", None]}, r"line 1 has null as 'answer\[1\]', which must be text"),
        ({"answer": float("nan")}, "line 1 has float as 'answer', which must be text"),
        ({"image": 5.5}, "row 1 names the image .*5.5, which does not exist"),
        ({"image": [["0.png"]]}, r"line 1 has a list of 1 as 'image\[0\]', which must be text"),
        ({"image": "x" * 300}, "line 1 names 'xxx.*which no file can be called"),
        ({"choices": {"a": 1}}, "line 1 has an object as 'choices', which must be text"),
        ({"kind": ["x"]}, "line 1 has a list of 1 as 'kind', which must be text"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_row(tmp_path: Path, row: dict, message: str) -> None:
    image(tmp_path / "0.png", 0)
    dump_lines(tmp_path / "mine.jsonl", [{"image": "0.png", "answer": "a", "question": "what?"} | row])
    source = SourceSpec(format="jsonl", path=str(tmp_path / "mine.jsonl"))
    with pytest.raises(UserError, match=rf"task mine: .*mine\.jsonl: {message}"):
        read_examples("mine", TaskSpec(source=source), source)


def test_a_null_of_a_further_column_is_nothing_and_not_the_word_none(tmp_path: Path) -> None:
    image(tmp_path / "0.png", 0)
    dump_lines(tmp_path / "mine.jsonl", [{"image": "0.png", "answer": "a", "hint": None, "kind": None, "boxes": [1]}])
    source = SourceSpec(format="jsonl", path=str(tmp_path / "mine.jsonl"))
    (found,) = read_examples("mine", TaskSpec(source=source, question="[{hint}]"), source)
    assert (found.turn.question, found.kind) == ("[]", "")
    with pytest.raises(UserError, match=r"question has \{boxes\}, but its items only have hint, options, question"):
        read_examples("mine", TaskSpec(source=source, question="{boxes}"), source)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_path_out_of_the_folder_works_where_the_user_says_so(tmp_path: Path, ending: str) -> None:
    image(tmp_path / "elsewhere" / "0.png", 0)
    (tmp_path / "tables").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")

    def read(name: str, images: str = "") -> EncodedImage | None:
        table = tmp_path / "tables" / f"mine.{ending}"
        dump_lines(table, [{"image": name, "answer": "a"}])
        if ending == "csv":
            table.write_text(f"image,answer\n{name},a\n")
        source = SourceSpec(format=ending, path=str(table), images=images)
        return read_examples("mine", TaskSpec(source=source), source)[0].turn.image

    outside = str(tmp_path / "elsewhere" / "0.png")
    for name in (outside, "../elsewhere/0.png"):
        with pytest.raises(UserError, match=r"(row|line) 1 names .*0\.png, which is outside the folder .*tables; set"):
            read(name)
    for name, images in (
        (outside, str(tmp_path / "elsewhere")),
        (outside, "/"),
        (outside, str(tmp_path / "link")),
        ("0.png", str(tmp_path / "elsewhere")),
        ("0", str(tmp_path / "elsewhere" / "{image}.png")),
    ):
        found = read(name, images)
        assert found is not None
        assert found.frames == ((tmp_path / "elsewhere" / "0.png").read_bytes(),)


def test_an_absolute_path_in_a_published_file_follows_the_same_rule(tmp_path: Path) -> None:
    WRITERS["coco"](tmp_path)
    rows = [{"split": "test", "filename": str(tmp_path / "val2014/0.jpg"), "sentences": [{"raw": "a"}]}]
    (tmp_path / "set").mkdir()
    dump(tmp_path / "set" / "own.json", {"images": rows})
    source = SourceSpec(format="karpathy", path=str(tmp_path / "set" / "own.json"))
    with pytest.raises(UserError, match=r"own\.json: images 1 names .*val2014/0\.jpg, which is outside the folder"):
        read_examples("t", TaskSpec(), source)
    source.images = str(tmp_path)
    assert len(read_examples("t", TaskSpec(), source)) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("t.jsonl", "", r"t\.jsonl has no image with an answer: it has no row$"),
        ("t.jsonl", "[]", r"t\.jsonl has no image with an answer"),
        ("t.csv", "image,answer\n", r"t\.csv has no image with an answer"),
        ("t.csv", "", r"t\.csv has no image with an answer"),
    ],
)
def test_a_table_without_rows_is_one_sentence(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    source = SourceSpec(format=file[2:], path=str(tmp_path / file))
    with pytest.raises(UserError, match=message):
        read_examples("t", TaskSpec(source=source), source)


def test_more_choices_than_letters_are_ranked_as_text_and_refused_as_letters(tmp_path: Path) -> None:
    names = "".join(f"n{index:08d} thing {index}\n" for index in range(30))
    (tmp_path / "names.txt").write_text(names)
    image(tmp_path / "val/n00000003/x.JPEG", 1)
    source = SourceSpec(format="imagenet", path=str(tmp_path / "val"), annotations=str(tmp_path / "names.txt"))
    (found,) = read_examples("t", TaskSpec(source=source), source)
    assert (found.golds, len(found.candidates)) == (("thing 3",), 30)
    for spec in (TaskSpec(source=source, question="{options}"), TaskSpec(source=source, answer_as="letter")):
        with pytest.raises(UserError, match="has 30 choices, and letters end at Z"):
            read_examples("t", spec, source)


def test_a_stored_image_is_read_when_needed_and_equals_its_bytes(tmp_path: Path) -> None:
    reads = []

    def read() -> tuple[bytes, ...]:
        reads.append(1)
        return (b"one", b"two")

    stored = StoredImage(read, tmp_path / "x.png")
    assert not reads
    assert stored.frames == (b"one", b"two")
    assert stored.sha256 == stored.sha256
    assert len(reads) == 2  # the hash is remembered, the image is not
    assert "x.png" in repr(stored)


def test_frames_are_spread_evenly(tmp_path: Path) -> None:
    assert spread(10, 2) == [2, 7]
    assert spread(3, 8) == [0, 1, 2]
    clip(tmp_path / "clip", 1)
    files = sorted((tmp_path / "clip").iterdir())
    assert frames_of(tmp_path / "clip", 1) == (files[1].read_bytes(),)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a folder of images"):
        frames_of(tmp_path / "empty", 1)


def test_frames_of_a_video_come_from_its_segment(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="videos are decoded by PyAV")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for number in range(40):  # 4 seconds from black to white
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 6 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    def greys(*segment: float) -> list[float]:
        found = frames_of(tmp_path / "v.mp4", 2, *segment)
        return [float(np.asarray(Image.open(io.BytesIO(frame))).mean()) / 6 for frame in found]

    assert greys() == pytest.approx([10, 30], abs=2)
    assert greys(2.0, 4.0) == pytest.approx([25, 35], abs=2)
    with pytest.raises(UserError, match=r"no frame between 9.0 and None"):
        greys(9.0)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="cannot be decoded as a video"):
        frames_of(tmp_path / "bad.mp4", 2)


def _other_split(root: Path) -> None:
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": []})


def _no_list(root: Path) -> None:
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", [1])


def _code(root: Path) -> None:
    (root / "qas/test/test_qa.pkl").write_bytes(pickle.dumps([io.BytesIO]))


def _five_choices(root: Path) -> None:
    row = {"question": "?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 5}
    dump_lines(root / "dev.json", [row])


def _unknown_class(root: Path) -> None:
    image(root / "val/n99999999/x.JPEG", 1)


def _hidden(root: Path) -> None:
    dump_lines(root / "dev_seen.jsonl", [{"id": 1, "img": "img/00000.png", "text": "x"}])


@pytest.mark.parametrize(
    ("task", "harm", "message"),
    [
        ("vqav2", _other_split, "has no answers to question 0 of"),
        ("vqav2", _no_list, "is this the published file"),
        ("pathvqa", _code, r"is not a pickle of plain values: it asks for _io.BytesIO"),
        ("medmcqa", _five_choices, "has 4 choices and the answer 4"),
        ("imagenet", _unknown_class, "the folder n99999999, which .* does not name"),
        ("hateful_memes", _hidden, "the unlabelled test file has none"),
    ],
)
def test_a_file_that_is_not_as_published_is_one_sentence(
    tmp_path: Path, task: str, harm: Callable[[Path], None], message: str
) -> None:
    WRITERS[task](tmp_path)
    harm(tmp_path)
    spec = load_config(["model=m", f"task={task}", f"task.{task}.root={tmp_path}"]).task[task]
    with pytest.raises(UserError, match=message) as caught:
        build_task(task, spec)
    assert str(caught.value).startswith(f"task {task}: ")
    assert not check(task, tmp_path)[1]


def test_a_missing_annotation_file_is_named_with_its_publisher(tmp_path: Path) -> None:
    spec = load_config(["model=m", "task=coco", f"task.coco.root={tmp_path}"]).task["coco"]
    with pytest.raises(UserError, match=r"dataset_coco.json does not exist; .* published by Karpathy's splits"):
        build_task("coco", spec)


def test_settings_that_came_later_leave_older_tasks_their_hash() -> None:
    older = "kind queries question lead tail output candidates metric demos max_new_tokens ways min_pictures names"
    assert list(definition_of(TaskSpec())) == [*older.split(), "names_source"]
    assert definition_of(TaskSpec(cut=["x"]))["cut"] == ["x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["x"]}, "x is not one of by_word, captions"),
        ({"metrics": ["roc_auc"]}, "metrics has roc_auc, which compares candidates: set output=rank"),
        ({"end_of_chunk": False}, "a demonstration needs an end"),
        ({"zero_shot": "three"}, "is not one of none, two_text"),
        ({"support_size": 0}, "support_size=0 must be at least 1"),
    ],
)
def test_impossible_settings_name_their_key(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task("t", TaskSpec(**change))
