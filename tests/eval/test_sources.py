"""Tasks from files: shards and tables, and one sentence for everything that is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from eval.spec import SourceSpec, TaskSpec
from eval.tasks.build import build_task, check_shots
from eval.tasks.sources import document_turns, read_examples
from flamingo.errors import UserError
from tests.eval.worlds import COLOURS, write_pool, write_scenes
from tests.fixtures import png


def test_a_page_of_several_images_is_as_many_turns() -> None:
    images = [png(COLOURS["red"], i) for i in range(4)]
    nodes: list[Node] = [
        Text("before"),
        Image((1,)),
        Text("what?", loss=False),
        Text(" a"),
        Image((0, 2)),
        Text("b"),
        Text("c"),
    ]
    turns = list(document_turns(Document("key", nodes, images)))
    assert [(question, answer) for _, question, answer in turns] == [("what?", " a"), ("", "bc")]
    assert [image.frames for image, _, _ in turns] == [(images[1],), (images[0], images[2])]


def test_examples_carry_the_text_of_the_page_or_the_facts_named(tmp_path: Path) -> None:
    source = SourceSpec(path=str(write_scenes(tmp_path / "scenes", 8)))
    caption = read_examples("t", TaskSpec(source=source), source)[0]
    assert (caption.turn.question, caption.turn.text, caption.golds) == ("", "a red square", ("a red square",))
    source.fields = {"question": "question", "answer": "answer"}
    answer = read_examples("t", TaskSpec(lead=" ", question="Q: {question}", tail="."), source)[0]
    assert (answer.turn.question, answer.turn.text, answer.golds) == ("Q: what colour?", " red.", ("red",))
    assert len({example.id for example in read_examples("t", TaskSpec(source=source), source)}) == 8


def test_a_text_form_that_training_never_showed_is_refused(tmp_path: Path) -> None:
    source = SourceSpec(path=str(write_scenes(tmp_path / "scenes", 4)))
    with pytest.raises(UserError, match=r"'a red square' .* would become ' a red square'"):
        read_examples("t", TaskSpec(lead=" "), source)


def test_binding_pool_and_names_come_from_meta(tmp_path: Path) -> None:
    pool = SourceSpec(path=str(write_pool(tmp_path / "pool")))
    spec = TaskSpec(kind="binding", source=pool, names_source=pool, question="a", lead=" ", min_images=6, queries=99)
    task = build_task("b", spec)
    assert (len(task.query_ids()), task.max_shots()) == (24, 5)
    check_shots({"b": task}, [0, 5])
    with pytest.raises(UserError, match="shots=6 is more than the 5 that task b allows"):
        check_shots({"b": task}, [0, 6])
    with pytest.raises(UserError, match="0 classes of at least 7 images"):
        build_task("b", TaskSpec(kind="binding", source=pool, names_source=pool, min_images=7))


def test_classes_of_binding_pages_go_by_the_page_names(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "pages", "pages") as writer:
        nodes: list[Node] = [
            n for i in range(2) for n in (Image((i,)), Text("a", loss=False), Text(" kibo" if i else " lumo"))
        ]
        images = [png(COLOURS["red"], i) for i in range(2)]
        writer.write(Document("", nodes, images, {"names": ["kibo", "lumo"], "classes": [7, 9]}))
    source = SourceSpec(path=str(tmp_path / "pages"))
    found = read_examples("t", TaskSpec(kind="binding", lead=" "), source)
    assert [example.label for example in found] == ["9", "7"]


def write_table(folder: Path, text: str) -> SourceSpec:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(("one", "two")):
        (folder / f"{name}.png").write_bytes(png(COLOURS["red"], seed))
    (folder / "table.csv").write_text(text)
    return SourceSpec(format="csv", path=str(folder / "table.csv"))


def test_a_table_is_a_task(tmp_path: Path) -> None:
    source = write_table(
        tmp_path, "image,question,answer,kind\none.png,what?,red|crimson,colour\ntwo.png,how many?,1,count\n"
    )
    task = build_task("mine", TaskSpec(source=source, queries=1, lead=" ", metric="vqa_accuracy"))
    episode = task.episode(task.query_ids()[0], 1, seed=0)
    assert {episode.query.question, episode.demos[0].question} == {"what?", "how many?"}
    assert set(episode.golds) <= {"red", "crimson", "1"}
    assert task.score("red" if "red" in episode.golds else "1", episode) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,reply\none.png,red\n", "no column 'answer'; its columns are image, reply"),
        ("image,answer\nthree.png,red\n", r"row 1 names the image .*three.png, which does not exist"),
        ("image,answer\n", "has no image with an answer"),
        ("image,answer,id\none.png,a,x\ntwo.png,b,x\n", "two queries have the id 'x'"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task("mine", TaskSpec(source=write_table(tmp_path, text)))


def test_what_is_wrong_with_shards_is_one_sentence(tmp_path: Path) -> None:
    def build(path: Path, **fields: str) -> None:
        build_task("t", TaskSpec(source=SourceSpec(path=str(path), fields=fields)))

    with pytest.raises(UserError, match="nowhere does not exist"):
        build(tmp_path / "nowhere")
    scenes = write_scenes(tmp_path / "scenes", 8)
    with pytest.raises(UserError, match=r"no 'kin' in its meta, it has answer, caption, kind, question, question_kind"):
        build(scenes, kind="kin")
    with pytest.raises(UserError, match=r"source.fields has 'gold'"):
        build(scenes, gold="answer")
    next(scenes.glob("*.tar")).unlink()
    with pytest.raises(UserError, match=r"task t: .*\.tar is in the folder's manifest but missing"):
        build(scenes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"task t: .*_dataset.json does not exist"):
        build(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "x"}, "task.t.kind=x is not one of examples, binding"),
        ({"metric": "x"}, "exact_match"),
        ({"ways": 1}, "at least 2"),
        ({"queries": 0}, "1"),
    ],
)
def test_impossible_values_name_their_key(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task("t", TaskSpec(**change))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_table_with_another_image_column_names_its_columns_and_the_setting(tmp_path: Path, name: str) -> None:
    (tmp_path / "one.png").write_bytes(png((1, 2, 3), 0))
    csv, row = "picture,answer\none.png,red\n", {"picture": "one.png", "answer": "red"}
    (tmp_path / name).write_text(csv if name == "t.csv" else json.dumps(row) + "\n")
    source = SourceSpec(format=name.split(".")[1], path=str(tmp_path / name))
    with pytest.raises(UserError, match=r"no column 'image'; its columns are picture, answer: set source\.fields"):
        read_examples("t", TaskSpec(source=source), source)
    source.fields = {"image": "picture"}
    (example,) = read_examples("t", TaskSpec(source=source), source)
    assert example.golds == ("red",)
    assert example.turn.image is not None
