"""Captioning data sets: Karpathy's splits of COCO and Flickr30k, COCO-style files, TextCaps, VATEX, YouCook2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, clip_of, image_of, in_split, item
from eval.tasks.formats.rows import Row, json_rows, whole


def karpathy(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `dataset_coco.json` or `dataset_flickr30k.json`: images with split, filename and sentences[].raw."""
    for row in whole(path).rows("images"):
        if in_split(row.text("split"), source):
            name = row.name("filename")
            where = "/".join(filter(None, (row.text("filepath", ""), name)))
            captions = [sentence.text("raw") for sentence in row.rows("sentences")]
            image_id = row.text("cocoid", Path(name).stem)
            yield item(row, image_id, image_of(source, where, row), "", captions, group=image_id)


def coco_captions(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read COCO's form, NoCaps' too: images (id, file_name, for NoCaps domain) and annotations (image_id, caption)."""
    content = whole(path)
    captions: dict[str, list[str]] = {}
    for row in content.rows("annotations"):
        captions.setdefault(row.name("image_id"), []).append(row.text("caption"))
    for row in content.rows("images"):
        image_id = row.name("id")
        if image_id in captions:
            image = image_of(source, row.name("file_name"), row)
            yield item(row, image_id, image, "", captions[image_id], row.text("domain", ""), group=image_id)


def textcaps(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `TextCaps_0.1_*.json`: one entry a caption under data; `reference_strs` are all of the image's."""
    images: dict[str, tuple[Row, list[str]]] = {}
    for row in whole(path).rows("data"):
        captions = images.setdefault(row.name("image_id"), (row, []))[1]
        captions.extend(row.texts("reference_strs") if row.fields.get("reference_strs") else [row.text("caption_str")])
    for image_id, (row, captions) in images.items():
        image = image_of(source, f"{image_id}.jpg", row)
        yield item(row, image_id, image, "", list(dict.fromkeys(captions)), group=image_id)


def vatex(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `vatex_*.json`: videoID (of YouTube, with its seconds) and ten English captions in enCap."""
    for row in json_rows(path):
        name = row.name("videoID")
        yield item(row, name, clip_of(source, name, row), "", row.texts("enCap"), group=name)


def youcook2(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `youcookii_annotations_trainval.json`: under database each video's subset and segments with a sentence."""
    for name, row in whole(path).row("database").entries():
        if in_split(row.text("subset"), source):
            video = Row(path, row.where, {**row.fields, "video_id": name})
            for part in video.rows("annotations"):
                start, end = part.numbers("segment", 2)
                sentence = re.sub(r"\s+", " ", part.text("sentence"))
                clip = clip_of(source, name, video, start, end)
                yield item(part, f"{name}.{part.name('id')}", clip, "", [sentence], group=name)
