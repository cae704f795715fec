"""Where examples come from: shards written by `python -m data prepare`, a data set's own files, or your own table.

A document is read as turns. Every image (or clip) starts a turn, and the text up to the next image belongs to it: text
out of the loss is its question, text in the loss its answer. So a document with three images gives three examples, each
with exactly the text that training would show. Images are never decoded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.shards.writer import Document, Text, read_documents, read_manifest
from eval.spec import SourceSpec, TaskSpec
from eval.task import EncodedImage, Example, StoredImage, Turn, hash_order
from eval.tasks.formats import FORMATS as DATA_SETS
from eval.tasks.formats.choices import LETTERS, letters, written_options
from eval.tasks.formats.files import Item, below_root
from eval.tasks.formats.interleaved import interleaved
from eval.tasks.formats.tables import FIELDS, read_csv_table, read_jsonl_table
from flamingo.errors import UserError


def read_examples(name: str, spec: TaskSpec, source: SourceSpec, *, complete: bool = True) -> list[Example]:
    """Return the examples of one source under the task's text format; with `complete` all their images have to exist.

    Raises:
        UserError: the source is missing, empty or cannot be read, or a field is not there; naming the task.
    """
    if source.format not in FORMATS:
        raise UserError(f"task {name}: source.format is {source.format!r}; known formats are {', '.join(FORMATS)}")
    known = (*FIELDS, "image") if source.format in ("csv", "jsonl") else FIELDS
    unknown = sorted(set(source.fields) - set(known))
    if unknown:
        raise UserError(f"task {name}: source.fields has {unknown[0]!r}; the fields are {', '.join(known)}")
    source = below_root(source, spec.root)
    path = Path(source.path)
    for key, file in (("path", source.path), ("annotations", source.annotations)):
        if (key == "path" and not file) or (file and not Path(file).exists()):
            where = f"; {published}" if (published := _published(spec, Path(file))) else ""
            raise UserError(
                f"task {name}: source.{key}={file} does not exist; prepare the data, or set source.{key}{where}"
            )
    try:
        items = list(islice(FORMATS[source.format](path, source), source.max_items))
        if complete:
            check_images(items)
    except UserError as error:
        raise UserError(f"task {name}: {error}") from None
    if not items:
        asked = [f"{key}={value}" for key in ("split", "only") if (value := getattr(source, key))]
        which = f" of {' and '.join(asked)}" if asked else ""
        raise UserError(f"task {name}: {source.path} has no image with an answer: it has no row{which}")
    return [_example(name, item, spec) for item in items]


def _published(spec: TaskSpec, path: Path) -> str:
    links = [link for file, link in spec.published.items() if path.as_posix().endswith(file.rstrip("/"))]
    return f"{path.name} is published by {links[0]}" if links else ""


def chosen_support(name: str, spec: TaskSpec, examples: list[Example]) -> list[Example]:
    """Return the examples that demonstrations are drawn from: all, or `support_size` of them by their ids alone."""
    order = hash_order([example.id for example in examples], "support", name)
    return examples if spec.support_size is None else [examples[index] for index in order[: spec.support_size]]


def check_images(items: Sequence[Item]) -> None:
    """Raise UserError if images that lie in files of their own are missing, or no files, or clips beyond their videos.

    It says how many.
    """
    every = [part for item in items for part in (item, *item.get("support", ()))]
    shown = [image for item in every for image in item.get("images", (item["image"],))]
    images = [image for image in shown if isinstance(image, StoredImage)]
    files = {image.file for image in images if image.file is not None}
    missing = sorted(str(file) for file in files if not file.exists())
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} images are missing, the first is {missing[0]}; put them there, or set "
            "source.images to their folder or pattern"
        )
    if odd := sorted(str(file) for file in files if not (file.is_file() or file.is_dir())):
        raise UserError(f"{odd[0]} is neither a file nor a folder, so it is not read as an image")
    _check_segments([image for image in images if image.segment is not None])


def _check_segments(clips: Sequence[StoredImage]) -> None:
    if not clips:
        return
    from eval.tasks.formats.video import seconds_of

    lengths = {file: seconds_of(file) for file in {clip.file for clip in clips} if file is not None}
    faults = []
    for clip in clips:
        start, end = clip.segment or (0.0, None)
        length = lengths.get(clip.file) if clip.file else None
        last = float("inf") if end is None else end
        if not 0 <= start < last or start >= (length or float("inf")):
            beyond = f"the video ends at {length:.3f}" if length and start >= length else "that is no time at all"
            faults.append(f"{clip.file} from {start:g} to {last:g} seconds, but {beyond}")
    if faults:
        raise UserError(
            f"{len(faults)} of {len(clips)} clips are not in their videos, the first is {faults[0]}; correct the "
            "annotations, or leave these out"
        )


def _example(name: str, item: Item, spec: TaskSpec) -> Example:
    choices, answers = item.get("choices", ()), item["answers"]
    lettered = "{options}" in spec.question
    if len(choices) > len(LETTERS) and (lettered or spec.answer_as == "letter"):
        raise UserError(
            f"task {name}: item {item['id']} has {len(choices)} choices, and letters end at Z; leave {{options}} out "
            "of the question and set answer_as=text"
        )
    if choices and spec.answer_as == "letter":
        answers = [letters(choices)[choices.index(answer)] for answer in answers]
    golds = tuple(_between(answer, spec.lead, spec.tail) for answer in answers)
    options = written_options(item.get("shown") or choices, spec.options) if lettered else ""
    values = {"question": item["question"], "options": options} | item.get("values", {})
    template = spec.question.replace("\n{options}", "") if item.get("open") else spec.question
    first, question, more = interleaved(_filled(name, template, values), item)
    rationale = item.get("rationale", "")
    turn = Turn(first, question, spec.lead, _shown(golds, spec), spec.tail, rationale, more)
    if spec.kind == "examples" and item["text"] not in (None, turn.text):
        raise UserError(
            f"task {name}: the text {item['text']!r} of item {item['id']} would become {turn.text!r}; set lead and "
            "tail to its fixed start and end, so that prompts equal training documents"
        )
    candidates = tuple(letters(choices) if spec.answer_as == "letter" else choices)
    label, group = item["label"] or golds[0], item.get("group", "")
    support = tuple(_example(name, demo, spec) for demo in item.get("support", ()))
    facts = item["id"], turn, golds, item["kind"], label, candidates, group, item.get("open", False)
    return Example(*facts, support, tuple(item.get("said", ())))


def _filled(name: str, template: str, values: Mapping[str, str]) -> str:
    """Return the question with its `{...}` replaced; braces in the values stay what they are."""

    def value(mark: re.Match[str]) -> str:
        if mark[1] not in values:
            raise UserError(
                f"task {name}: question has {mark[0]}, but its items only have {', '.join(sorted(values))}; change "
                "task.NAME.question"
            )
        return values[mark[1]]

    return re.sub(r"\{(\w+)\}", value, template)


def _shown(golds: tuple[str, ...], spec: TaskSpec) -> str:
    """Return the answer that a demonstration shows. Of equally frequent ones the first counts."""
    return golds[0] if spec.demo_answer == "first" else max(golds, key=golds.count)


def _between(answer: str, lead: str, tail: str) -> str:
    """Return the answer without the task's fixed start and end, where it has them."""
    return answer.removeprefix(lead).removesuffix(tail).strip()


def _from_documents(folder: Path, source: SourceSpec) -> Iterator[Item]:
    for shard in shards_of(folder):
        for document in read_documents(shard):
            turns = document_turns(document, f"{shard}: document {document.key}")
            for index, (image, question, answer) in enumerate(turns):
                facts = {"question": question, "answer": answer, "kind": str(document.meta.get("kind", ""))}
                facts["label"] = _label(document.meta, answer)
                for fact, key in source.fields.items():
                    facts[fact] = str(_fact(document.meta, key, f"{shard}: document {document.key}"))
                if facts["answer"]:
                    yield {
                        "id": f"{document.key}.{index}",
                        "image": image,
                        "question": facts["question"],
                        "answers": [facts["answer"]],
                        "kind": facts["kind"],
                        "label": facts["label"],
                        "rationale": facts.get("rationale", ""),
                        "text": None if "answer" in source.fields else answer,
                    }


def document_turns(document: Document, where: str = "") -> Iterator[tuple[EncodedImage, str, str]]:
    """Yield (image, question, answer) of every image of a document; text before the first image belongs to none.

    `where` is what messages call the document.
    """
    turns: list[tuple[EncodedImage, list[str], list[str]]] = []
    for node in document.nodes:
        if not isinstance(node, Text):
            names = tuple(f"{where}, image {frame}" for frame in node.frames)
            turns.append((EncodedImage(tuple(document.images[frame] for frame in node.frames), names), [], []))
        elif turns:
            (turns[-1][2] if node.loss else turns[-1][1]).append(node.text)
    for image, question, answer in turns:
        yield image, "".join(question), "".join(answer)


def shards_of(folder: Path) -> list[Path]:
    """Return the shards that a folder's manifest lists, all present."""
    parts: Mapping[str, Any] = read_manifest(folder)["parts"]
    shards = [folder / entry["name"] for part in parts.values() for entry in part["shards"]]
    for shard in shards:
        if not shard.exists():
            raise UserError(f"shard {shard} is in the folder's manifest but missing; prepare the data again")
    return shards


def read_names(name: str, source: SourceSpec) -> list[str]:
    """Return all names that the documents of a folder list in their meta."""
    folder = Path(source.path)
    if not folder.exists():
        raise UserError(f"task {name}: names_source.path={source.path} does not exist; prepare it, or list names=")
    documents = (document for shard in shards_of(folder) for document in read_documents(shard))
    return sorted(
        {str(word) for document in islice(documents, source.max_items) for word in document.meta.get("names", [])}
    )


def _fact(meta: Mapping[str, Any], key: str, where: str) -> object:
    if key not in meta:
        raise UserError(f"{where} has no {key!r} in its meta, it has {', '.join(sorted(meta)) or 'nothing'}")
    return meta[key]


def _label(meta: Mapping[str, Any], answer: str) -> str:
    """Return the image's class: the document's only one, or, for binding, the class that has this name there."""
    if "class" in meta:
        return str(meta["class"])
    named = dict(zip(meta.get("names", []), meta.get("classes", []), strict=False))
    return str(named.get(answer.strip(), ""))


FORMATS: dict[str, Callable[[Path, SourceSpec], Iterator[Item]]] = {
    "documents": _from_documents,
    "csv": read_csv_table,
    "jsonl": read_jsonl_table,
    **DATA_SETS,
}
