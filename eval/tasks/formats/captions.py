"""Captioning data sets: Karpathy's splits of COCO and Flickr30k, COCO-style files, TextCaps, VATEX, YouCook2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data.records import read_json
from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, clip_of, image_of, in_split, item, need, rows


def karpathy(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `dataset_coco.json` or `dataset_flickr30k.json`: images with split, filename and sentences[].raw."""
    for row in rows(path, read_json(path), "images"):
        if in_split(need(row, "split", path), source):
            name = str(need(row, "filename", path))
            where = "/".join(filter(None, (row.get("filepath"), name)))
            captions = [need(sentence, "raw", path, name) for sentence in need(row, "sentences", path, name)]
            image_id = row.get("cocoid", Path(name).stem)
            yield item(image_id, image_of(source, path, where, row), "", captions, group=str(image_id))


def coco_captions(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read COCO's form, NoCaps' too: images (id, file_name, for NoCaps domain) and annotations (image_id, caption)."""
    content = read_json(path)
    captions: dict[int, list[str]] = {}
    for row in rows(path, content, "annotations"):
        captions.setdefault(need(row, "image_id", path), []).append(need(row, "caption", path))
    for row in rows(path, content, "images"):
        image_id = need(row, "id", path)
        if image_id in captions:
            image = image_of(source, path, str(need(row, "file_name", path)), row)
            yield item(image_id, image, "", captions[image_id], row.get("domain", ""), group=str(image_id))


def textcaps(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `TextCaps_0.1_*.json`: one entry a caption under data; `reference_strs` are all of the image's."""
    images: dict[str, tuple[dict, list[str]]] = {}
    for row in rows(path, read_json(path), "data"):
        image_id = str(need(row, "image_id", path))
        captions = images.setdefault(image_id, (row, []))[1]
        captions.extend(row.get("reference_strs") or [need(row, "caption_str", path, image_id)])
    for image_id, (row, captions) in images.items():
        image = image_of(source, path, f"{image_id}.jpg", row)
        yield item(image_id, image, "", list(dict.fromkeys(captions)), group=image_id)


def vatex(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `vatex_*.json`: videoID (of YouTube, with its seconds) and ten English captions in enCap."""
    for row in rows(path, read_json(path)):
        name = str(need(row, "videoID", path))
        yield item(name, clip_of(source, path, name, row), "", need(row, "enCap", path, name), group=name)


def youcook2(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `youcookii_annotations_trainval.json`: under database each video's subset and segments with a sentence."""
    for name, video in need(read_json(path), "database", path).items():
        if in_split(need(video, "subset", path, name), source):
            for part in need(video, "annotations", path, name):
                start, end = need(part, "segment", path, name)
                sentence = re.sub(r"\s+", " ", str(need(part, "sentence", path, name)))
                clip = clip_of(source, path, name, {**video, "video_id": name}, float(start), float(end))
                yield item(f"{name}.{need(part, 'id', path, name)}", clip, "", [sentence], group=name)
