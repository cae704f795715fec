"""Small files in the exact form in which data sets publish theirs: six questions to ask and six to show each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.eval.published.files import COUNT as COUNT
from tests.eval.published.files import dump as dump
from tests.eval.published.images import (
    coco,
    flickr30k,
    hateful_memes,
    imagenet,
    mmmu,
    nocaps,
    okvqa,
    pathvqa,
    scienceqa,
    slake,
    textcaps,
    textvqa,
    vizwiz,
    vqa_rad,
    vqav2,
)
from tests.eval.published.videos import (
    ivqa,
    medmcqa,
    medqa,
    mmlu_medicine,
    msrvtt_qa,
    msvd_qa,
    nextqa,
    nextqa_choice,
    pubmedqa,
    rareact,
    star,
    vatex,
    winoground,
    youcook2,
)

WRITERS: dict[str, Callable[[Path], None]] = {
    writer.__name__: writer
    for writer in (
        *(coco, flickr30k, nocaps, textcaps, vqav2, okvqa, textvqa, vizwiz, hateful_memes, imagenet, scienceqa),
        *(vqa_rad, slake, pathvqa, mmmu, winoground, msvd_qa, msrvtt_qa, ivqa, vatex, nextqa, nextqa_choice, star),
        *(youcook2, rareact, medqa, medmcqa, pubmedqa, mmlu_medicine),
    )
}
