"""Closed answers: Hateful Memes, ImageNet, Winoground, RareAct."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.records import table_rows
from eval.metrics.ranking import ANNOTATIONS
from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, clip_of, image_of, item, need, read_jsonl, stored
from flamingo.errors import UserError
from flamingo.vision.image_files import SUFFIXES


def hateful_memes(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `dev_seen.jsonl`: id, img, label, text. `{text}` is what is written on the image."""
    for line_number, row in enumerate(read_jsonl(path), 1):
        name = need(row, "id", path, f"line {line_number}")
        label = need(row, "label", path, f"line {line_number} (the unlabelled test file has none)")
        image = image_of(source, path, str(need(row, "img", path)), row)
        values = {"text": " ".join(str(need(row, "text", path)).split())}
        yield item(name, image, "", ["yes" if int(label) else "no"], values=values, choices=["no", "yes"])


def imagenet(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read a folder with a folder per class (n01440764/...), and as annotations lines `WNID name, other names`.

    Two classes have the same name twice in ImageNet-1k ("crane", "maillot"): their second names distinguish them.
    """
    if not source.annotations or not Path(source.annotations).is_file():
        raise UserError(
            f"{source.annotations or 'source.annotations'} does not exist; give the file of class names, "
            "LOC_synset_mapping.txt of the Kaggle release"
        )
    lines = Path(source.annotations).read_text(encoding="utf-8").split("\n")
    synonyms = {line.split(" ", 1)[0]: line.split(" ", 1)[1].split(", ") for line in lines if " " in line}
    first = [names[0] for names in synonyms.values()]
    names = {key: n[0] if first.count(n[0]) == 1 or len(n) == 1 else f"{n[0]}, {n[1]}" for key, n in synonyms.items()}
    every = list(dict.fromkeys(names.values()))
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name not in names:
            raise UserError(f"{path} has the folder {folder.name}, which {source.annotations} does not name")
        for file in sorted(entry for entry in folder.iterdir() if entry.suffix.lower()[1:] in SUFFIXES):
            name = f"{folder.name}/{file.name}"
            yield item(name, stored(file), "", [names[folder.name]], label=folder.name, choices=every, group=name)


def winoground(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `examples.jsonl`: id, image_0, image_1, caption_0, caption_1. Three queries an item: each image and none.

    Each ranks both captions; the one without an image gives the captions' own probability.
    """
    for row in read_jsonl(path):
        name = str(need(row, "id", path))
        captions = [str(need(row, f"caption_{index}", path, name)) for index in (0, 1)]
        for index in (0, 1):
            image = str(need(row, f"image_{index}", path, name))
            file = image_of(source, path, image if Path(image).suffix else f"{image}.png", row)
            kind = str(row.get("collapsed_tag", ""))
            yield item(f"{name}.{index}", file, "", [captions[index]], kind, choices=captions, group=name)
        yield item(f"{name}.none", None, "", [captions[0]], "no image", choices=captions, group=name)


def rareact(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `rareact.csv`: each segment is scored for all actions; kind is its annotation, the answer its own action."""
    needed = ["id", "video_id", "start", "end", "verb", "noun", "annotation"]
    table = list(table_rows(path, needed))
    actions = list(dict.fromkeys(f"{row['verb']} {row['noun']}" for row in table))
    for row in table:
        clip = clip_of(source, path, row["video_id"], row, float(row["start"]), float(row["end"]))
        if row["annotation"] not in ANNOTATIONS:
            raise UserError(f"{path}: row {row['id']} has the annotation {row['annotation']!r}; annotations are 0 to 4")
        action, kind = f"{row['verb']} {row['noun']}", ANNOTATIONS[row["annotation"]]
        yield item(row["id"], clip, "", [action], kind, choices=actions, group=row["video_id"])
