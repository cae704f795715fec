"""Readers of data sets' own annotation files, as people download them.

A reader takes the path of a file (or folder) and the task's `SourceSpec` and yields items. A new data set is a function
and an entry in `FORMATS`; nothing is decoded, images are files that are read when a model has to see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from eval.spec import SourceSpec
from eval.tasks.formats.captions import coco_captions, karpathy, textcaps, vatex, youcook2
from eval.tasks.formats.choices import medmcqa, medqa, mmlu, nextqa_choice, pubmedqa, scienceqa, star
from eval.tasks.formats.files import Item
from eval.tasks.formats.in_context import smmile, vl_icl
from eval.tasks.formats.labels import hateful_memes, imagenet, rareact, winoground
from eval.tasks.formats.long_form import conversations, healthsearchqa, liveqa, medicationqa
from eval.tasks.formats.mmmu import mmmu
from eval.tasks.formats.questions import ivqa, nextqa, pathvqa, slake, textvqa, video_qa, vizwiz, vqa, vqa_rad

Reader = Callable[[Path, SourceSpec], Iterator[Item]]
FORMATS: dict[str, Reader] = {
    reader.__name__: reader
    for reader in (
        *(coco_captions, karpathy, textcaps, vatex, youcook2),
        *(ivqa, nextqa, pathvqa, slake, textvqa, video_qa, vizwiz, vqa, vqa_rad),
        *(medmcqa, medqa, mmlu, mmmu, nextqa_choice, pubmedqa, scienceqa, star),
        *(hateful_memes, imagenet, rareact, winoground),
        *(conversations, healthsearchqa, liveqa, medicationqa),
        *(smmile, vl_icl),
    )
}
"""Name in a task's `source.format` to its reader."""
