"""Closed answers: Hateful Memes, ImageNet, Winoground, RareAct."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.records import read_bytes
from eval.metrics.ranking import ANNOTATIONS
from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, clip_of, image_of, item, stored
from eval.tasks.formats.rows import Row, csv_rows, json_lines
from flamingo.errors import UserError
from flamingo.vision.image_files import SUFFIXES


def hateful_memes(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `dev_seen.jsonl`: id, img, label, text. `{text}` is what is written on the image."""
    for row in json_lines(path):
        if "label" not in row.fields:
            raise row.fault("has no 'label' (the unlabelled test file has none)")
        if (label := row.integer("label")) not in (0, 1):
            raise row.wrong("label", label, "0 or 1")
        image, values = image_of(source, row.name("img"), row), {"text": " ".join(row.text("text").split())}
        yield item(row, row.name("id"), image, "", ["yes" if label else "no"], values=values, choices=["no", "yes"])


def imagenet(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read a folder with a folder per class (n01440764/...), and as annotations lines `WNID name, other names`.

    Two classes have the same name twice in ImageNet-1k ("crane", "maillot"): their second names distinguish them.
    """
    if not source.annotations or not Path(source.annotations).is_file():
        raise UserError(
            f"{source.annotations or 'source.annotations'} does not exist; give the file of class names, "
            "LOC_synset_mapping.txt of the Kaggle release"
        )
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the one that holds a folder per class")
    names = _class_names(Path(source.annotations))
    every = list(dict.fromkeys(names.values()))
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name not in names:
            raise UserError(f"{path} has the folder {folder.name}, which {source.annotations} does not name")
        for file in sorted(entry for entry in folder.iterdir() if entry.suffix.lower()[1:] in SUFFIXES):
            row, name = Row(path, f"the image {file.name}", {}), f"{folder.name}/{file.name}"
            yield item(row, name, stored(file), "", [names[folder.name]], label=folder.name, choices=every, group=name)


def _class_names(file: Path) -> dict[str, str]:
    synonyms: dict[str, list[str]] = {}
    for number, line in enumerate(read_bytes(file).decode().split("\n"), 1):
        if not line.strip():
            continue
        wnid, _, names = line.strip().partition(" ")
        synonyms[wnid] = [name.strip() for name in names.split(", ")]
        if not all(synonyms[wnid]):
            raise UserError(f"{file}: line {number} is {line[:40]!r}, not `WNID name, other names`")
    first = [names[0] for names in synonyms.values()]
    return {key: n[0] if first.count(n[0]) == 1 or len(n) == 1 else f"{n[0]}, {n[1]}" for key, n in synonyms.items()}


def winoground(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `examples.jsonl`: id, image_0, image_1, caption_0, caption_1. Three queries an item: each image and none.

    Each ranks both captions; the one without an image gives the captions' own probability.
    """
    for row in json_lines(path):
        name, kind = row.name("id"), row.text("collapsed_tag", "")
        captions = [row.name(f"caption_{index}") for index in (0, 1)]
        for index in (0, 1):
            image = row.name(f"image_{index}")
            file = image_of(source, image if Path(image).suffix else f"{image}.png", row)
            yield item(row, f"{name}.{index}", file, "", [captions[index]], kind, choices=captions, group=name)
        yield item(row, f"{name}.none", None, "", [captions[0]], "no image", choices=captions, group=name)


def rareact(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `rareact.csv`: each segment is scored for all actions; kind is its annotation, the answer its own action."""
    table = list(csv_rows(path, ["id", "video_id", "start", "end", "verb", "noun", "annotation"]))
    actions = list(dict.fromkeys(f"{row.name('verb')} {row.name('noun')}" for row in table))
    for row in table:
        video, annotation = row.name("video_id"), row.text("annotation")
        clip = clip_of(source, video, row, row.number("start"), row.number("end"))
        if annotation not in ANNOTATIONS:
            raise row.fault(f"has the annotation {annotation!r}; annotations are 0 to 4")
        action, kind = f"{row.text('verb')} {row.text('noun')}", ANNOTATIONS[annotation]
        yield item(row, row.name("id"), clip, "", [action], kind, choices=actions, group=video)
