"""Training splits as shards: a row begins with the ids of the evaluation's prompt, and nothing asked is trained on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.__main__ import main as data_main
from data.batches.collate import FlamingoCollate
from data.batches.tokenize import TokenRow, make_row, tokenize_document
from data.shards.document import Document, Image, Text
from data.shards.writer import read_documents, read_manifest
from data.tools.verify import verify
from eval.__main__ import main
from eval.compose import load_config
from eval.prompting.prompts import Completion, PromptBuilder
from eval.prompting.strategies import PromptingSettings, Query, two_stage
from eval.protocols import names
from eval.spec import TaskSpec
from eval.task import Episode
from eval.tasks.build import build_task
from eval.training_shards import STAGES
from flamingo import FlamingoProcessor, ImageTransform
from flamingo.labels import IGNORED
from flamingo.processing.begin import start_ids
from tests.eval.published import WRITERS
from tests.eval.published.files import dump_csv, dump_lines, image

NO_TRAINING = {"winoground", "rareact"}
DOCUMENTS_HAVE_NONE = {"idefics"}  # its prompts: text before every image, demonstrations without an end of chunk


@dataclass
class Written:
    documents: list[Document]
    meta: dict[str, Any]

    @property
    def dropped(self) -> dict[str, int]:
        return self.meta["documents"]["dropped"]


def shards(out: Path, task: str, *arguments: object) -> Written:
    """Write a task's shards in this process and read them back."""
    assert main(["shards", f"task={task}", *map(str, arguments), "--out", str(out), "--workers", "1"]) == 0
    assert list(verify(out)) == []
    part = read_manifest(out)["parts"][task]
    documents = [document for entry in part["shards"] for document in read_documents(out / entry["name"])]
    return Written(documents, part["meta"])


def published(root: Path, task: str) -> str:
    WRITERS[task](root / task)
    return f"task.{task}.root={root / task}"


@pytest.fixture(scope="module")
def processor() -> FlamingoProcessor:
    """One whose tokens are whole words with the space before them, so that it matters where a text is cut."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = ["Question: Which? Answer: red\nAnswer: A B Output: a thing number yes no Short answer: Is it normal?"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    assert len(tokenizer(" Answer")["input_ids"]) == 1
    made = FlamingoProcessor(tokenizer, ImageTransform(8, mode="squash"))
    made.chat_template = "plain"
    return made


def row_of(document: Document, processor: FlamingoProcessor) -> TokenRow:
    """The row that training makes of a document."""
    collate = FlamingoCollate(processor)
    tokens = tokenize_document(document.nodes, collate.encode, collate.special, collate.turns)
    return make_row(tokens, collate.special, max_tokens=4096, max_images=9, crop="start")


def asked(task: str, spec: TaskSpec) -> dict[str, Episode]:
    """What the evaluation would ask about the items of the training split, by their ids."""
    assert spec.support is not None
    spec = replace(spec, source=spec.support, support=None, queries=None, zero_shot="none", candidates_from="")
    spec.metric, spec.metrics, spec.stem = "exact_match", [], ""  # some need WordNet's files
    if spec.output == "rank" and spec.form == "hateful":
        spec.candidates = ["no", "yes"]
    built = build_task(task, spec)
    return {query: built.episode(query, 0, 0) for query in built.query_ids()}


@pytest.mark.parametrize("protocol", [name for name in names() if name not in DOCUMENTS_HAVE_NONE])
@pytest.mark.parametrize("task", [task for task in WRITERS if task not in NO_TRAINING])
def test_a_row_begins_with_the_ids_of_the_evaluation_s_prompt(
    tmp_path: Path, processor: FlamingoProcessor, task: str, protocol: str
) -> None:
    settings = [published(tmp_path, task), f"protocol={protocol}"]
    try:
        (spec,) = load_config([f"task={task}", "model=m", *settings]).task.values()
    except Exception as error:
        assert "has no prompt for task" in str(error)  # noqa: PT017
        return
    written = shards(tmp_path / "out", task, *settings)
    episodes = asked(task, spec)
    several = {name for name, episode in episodes.items() if len(episode.query.images) > 1 and not spec.chat}
    assert sum(written.dropped.values()) == len(several)
    assert all(reason.startswith("several images in a question") for reason in written.dropped)
    assert [document.meta["id"] for document in written.documents] == [id_ for id_ in episodes_in_order(task, spec)
                                                                      if id_ not in several]  # fmt: skip
    builder = PromptBuilder(processor, start=start_ids(processor.tokenizer), turns=processor.turns)
    for document in written.documents:
        episode, row = episodes[document.meta["id"]], row_of(document, processor)
        prompt = builder.build(episode, 8)
        ids, length = row.ids.tolist(), len(prompt.ids)
        assert tuple(ids[:length]) == prompt.ids
        assert document.images == [frame for image in episode.query.images for frame in image.frames]
        if spec.chat:
            check_conversation(episode, prompt.ids, prompt.candidates, row, processor)
            continue
        end = (processor.eoc_token_id, processor.tokenizer.eos_token_id)
        if episode.candidates:
            assert tuple(ids[length:-1]) in prompt.candidates
            assert ids[length:-1] == list(prompt.candidates[episode.candidates.index(episode.golds[0])])
            assert ids[-1] == end[1]
        else:
            said = processor.tokenizer.decode(ids[length:-2])
            assert said.strip() == f"{episode.query.lead}{episode.query.answer}{episode.query.tail}".strip()
            assert tuple(ids[-2:]) == end
        # All of the question is out of the loss, all that the model has to say is in it.
        labels = row.labels.tolist()
        question = len(builder.build(replace(episode, query=replace(episode.query, lead=""), candidates=()), 8).ids)
        assert labels == [IGNORED] * question + ids[question:]
        # The same item as a demonstration has the same ids.
        shown = replace(episode, demos=(episode.query,), frame=replace(episode.frame, separator=""))
        assert builder.build(shown, 8).ids[: len(ids) - 1] == tuple(ids[:-1])


def check_conversation(
    episode: Episode,
    prompt: tuple[int, ...],
    candidates: tuple[tuple[int, ...], ...],
    row: TokenRow,
    processor: FlamingoProcessor,
) -> None:
    """The row goes on with the answer and the end of the turn, and these alone are in the loss."""
    ids, labels = row.ids.tolist(), row.labels.tolist()
    begin = next(place for place, label in enumerate(labels) if label != IGNORED)
    learnt = [label for label in labels if label != IGNORED]
    assert learnt == ids[begin : begin + len(learnt)]
    assert learnt[-1] == processor.eoc_token_id
    assert processor.tokenizer.decode(learnt[:-1]).strip() == episode.query.text.strip()
    if candidates:
        gold = candidates[episode.candidates.index(episode.golds[0])]
        assert [*prompt, *gold] == ids[: begin + len(learnt)]
    else:
        assert len(prompt) == begin


def episodes_in_order(task: str, spec: TaskSpec) -> Sequence[str]:
    from eval.tasks.sources import read_examples

    assert spec.support is not None
    return [example.id for example in read_examples(task, spec, spec.support)]


def test_what_a_task_has_not_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> str:
        assert main(["shards", *arguments, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.tar"))
        return line

    for task in sorted(NO_TRAINING):
        assert f"task {task} has no training split" in told(f"task={task}", published(tmp_path, task))
    assert "task digits_binding has no training split" in told("task=digits_binding")
    for task in ("vqav2", "scienceqa", "imagenet"):
        line = told(f"task={task}", published(tmp_path, task), "protocol=idefics")
        assert f"task.{task}." in line
        assert "which documents of shards cannot have" in line
    assert "does not exist; prepare the data, or set" in told("task=slake", "task.slake.root=nowhere")
    assert "task=nothing" in told("task=nothing")
    assert data_main(["prepare", "task", "slake", "--out", "x"]) == 2
    assert "python -m eval shards task=slake --out DIR" in capsys.readouterr().err


def test_what_is_missing_or_asked_is_counted_and_never_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = published(tmp_path, "slake")
    images = tmp_path / "slake" / "imgs"
    every = shards(tmp_path / "all", "slake", settings)
    assert every.dropped == {}
    files = sorted({file for file in images.rglob("*") if file.is_file()})
    used = [file for file in files if any(file.read_bytes() in document.images for document in every.documents)]
    used[0].unlink()
    used[1].write_bytes(b"<html>")
    lost = shards(tmp_path / "some", "slake", settings)
    assert sum(lost.dropped.values()) == len(every.documents) - len(lost.documents) >= 2
    assert set(lost.dropped) == {"image or video is missing", "HTML saved as an image"}
    assert "image or video is missing  (first: slake item " in capsys.readouterr().out
    shutil.copy(tmp_path / "slake" / "train.json", tmp_path / "slake" / "test.json")
    assert main(["shards", "task=slake", settings, "--out", str(tmp_path / "none")]) == 2
    assert "not one document was kept" in (told := capsys.readouterr().err)
    assert "also asked by the evaluation" in told
    (tmp_path / "slake" / "test.json").unlink()
    again = shards(tmp_path / "without", "slake", settings)
    assert len(again.documents) == len(lost.documents)
    assert "task slake: what it asks is not here, so nothing was compared with it" in capsys.readouterr().err


def test_a_table_of_one_s_own_keeps_its_queries_apart(tmp_path: Path) -> None:
    for number in range(12):
        image(tmp_path / f"{number}.png", number)
    rows = [{"id": f"r{n}", "image": f"{n}.png", "question": "Which?", "answer": f"red|crimson{n}"} for n in range(12)]
    dump_csv(tmp_path / "mine.csv", rows)
    settings = [f"task.csv.source.path={tmp_path / 'mine.csv'}", "task.csv.queries=4", "task.csv.lead=' '"]
    (spec,) = load_config(["task=csv", "model=m", *settings]).task.values()
    queries = set(build_task("csv", spec).query_ids())
    written = shards(tmp_path / "out", "csv", *settings)
    trained = {document.meta["id"] for document in written.documents}
    assert len(queries) == 4
    assert trained == {row["id"] for row in rows} - queries
    assert written.documents[0].nodes == [Image((0,)), Text("Which?", False), Text(" red")]
    # Rows behind `max_items` are never asked, so all of them are trained on.
    limited = [*settings[:1], "task.csv.queries=2", "task.csv.source.max_items=5"]
    (spec,) = load_config(["task=csv", "model=m", *limited]).task.values()
    queries = set(build_task("csv", spec).query_ids())
    trained = {document.meta["id"] for document in shards(tmp_path / "limited", "csv", *limited).documents}
    assert trained == {row["id"] for row in rows} - queries
    every = shards(tmp_path / "every", "csv", *settings, "--all-answers")
    texts = [document.nodes[-1].text for document in every.documents if isinstance(document.nodes[-1], Text)]
    assert len(texts) == 16
    assert set(texts) >= {" red"}
    assert len({text for text in texts if text.startswith(" crimson")}) == 8
    assert main(["shards", "task=csv", settings[0], "task.csv.queries=12", "--out", str(tmp_path / "no")]) == 2


def test_videos_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    settings = published(tmp_path, "msvd_qa")
    videos = tmp_path / "msvd_qa" / "videos"
    whole = shards(tmp_path / "whole", "msvd_qa", settings)
    assert all(isinstance(document.nodes[0], Image) for document in whole.documents)
    assert {len(document.images) for document in whole.documents} == {3}
    trained = [folder for folder in sorted(videos.iterdir()) if any(
        (folder / "000.png").read_bytes() == document.images[0] for document in whole.documents)]  # fmt: skip
    shutil.rmtree(trained[0])
    shutil.rmtree(trained[1])
    (videos / f"{trained[1].name}.mp4").write_bytes(b"no video")
    some = shards(tmp_path / "some", "msvd_qa", settings)
    assert set(some.dropped) == {"image or video is missing", "image or video cannot be read"}


def test_a_second_run_changes_nothing_and_another_prompt_is_another_preparation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = published(tmp_path, "vqa_rad")
    first = shards(tmp_path / "out", "vqa_rad", settings)
    prompt = {"question": "Question: {question} Answer:", "lead": " ", "tail": "", "chat": False}
    assert first.meta["options"]["prompt"] == prompt
    capsys.readouterr()
    shards(tmp_path / "out", "vqa_rad", settings)
    assert "was already prepared from these inputs" in capsys.readouterr().out
    other = shards(tmp_path / "out", "vqa_rad", settings, "protocol=openflamingo")
    assert "already prepared" not in capsys.readouterr().out
    assert other.meta["fingerprint"] != first.meta["fingerprint"]
    parts = [["--part", f"{part}/2"] for part in (1, 2)]
    for part in parts:
        assert main(["shards", "task=vqa_rad", settings, "--out", str(tmp_path / "parts"), *part]) == 0
    assert data_main(["merge", str(tmp_path / "parts")]) == 0
    assert [d.nodes for d in documents_of(tmp_path / "parts", "vqa_rad")] == [d.nodes for d in first.documents]


def documents_of(folder: Path, part: str) -> list[Document]:
    entries = read_manifest(folder)["parts"][part]["shards"]
    return [document for entry in entries for document in read_documents(folder / entry["name"])]


def test_the_collate_takes_what_was_written(tmp_path: Path, processor: FlamingoProcessor) -> None:
    """And `kind` is kept, by which results are grouped."""
    dump_lines(tmp_path / "a.jsonl", [{"image": None, "question": "Say.", "answer": "it", "kind": "k"}] * 1)
    settings = [f"task.jsonl.source.path={tmp_path / 'a.jsonl'}", "task.jsonl.queries=1"]
    assert main(["shards", "task=jsonl", *settings, "--out", str(tmp_path / "o")]) == 2  # its only item is asked
    dump_lines(tmp_path / "a.jsonl", [{"image": None, "question": "Say.", "answer": "it", "kind": "k"}] * 2)
    (document,) = shards(tmp_path / "out", "jsonl", *settings).documents
    assert document.meta["kind"] == "k"
    assert document.images == []
    assert row_of(document, processor).images == []


@pytest.mark.parametrize("chat", [False, True])
def test_a_stage_s_rows_are_what_two_stages_ask(tmp_path: Path, processor: FlamingoProcessor, chat: bool) -> None:
    image(tmp_path / "0.png", 0)
    row = {"image": "0.png", "question": "Which? Answer:", "answer": "red", "rationale": "It is a thing."}
    rows = [row, {**row, "image": "", "answer": "A"}, {**row, "rationale": " "}]
    dump_lines(tmp_path / "train.jsonl", rows)
    dump_lines(tmp_path / "asked.jsonl", [{**row, "question": "number?"}])
    settings = [f"task.jsonl.source.path={tmp_path / 'asked.jsonl'}", f"task.jsonl.chat={chat}"]
    settings.append(f"task.jsonl.support={{format:jsonl,path:{tmp_path / 'train.jsonl'}}}")
    settings += [] if chat else ["task.jsonl.lead=' '"]
    (spec,) = load_config(["task=jsonl", "model=m", *settings]).task.values()
    assert spec.support is not None
    task = build_task("jsonl", replace(spec, source=spec.support, support=None, queries=None))
    start, turns = start_ids(processor.tokenizer), processor.turns
    builder = PromptBuilder(processor, start=start, turns=turns)
    for stage in STAGES:
        written = shards(tmp_path / stage, "jsonl", *settings, "--stage", stage)
        assert written.dropped == {"no rationale": 1}
        assert len(written.documents) == 2
        for document in written.documents:
            episode = task.episode(document.meta["id"], 0, 0)
            steps = two_stage(Query(task, episode, builder, PromptingSettings(), 0))
            first = next(steps)[0].prompt.ids
            second = steps.send([Completion("It is a thing.", True)])[0].prompt.ids
            gold = episode.golds[0]
            said = {"rationale": " It is a thing.", "answer": f" {gold}", "joint": f" It is a thing.\nAnswer: {gold}"}
            prompt, row_ids = second if stage == "answer" else first, row_of(document, processor).ids.tolist()
            assert tuple(row_ids[: len(prompt)]) == prompt
            rest = processor.tokenizer.decode(row_ids[len(prompt) :], skip_special_tokens=True)
            assert rest.strip() == said[stage].strip()
