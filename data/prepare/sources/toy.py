"""`python -m data prepare toy`: the drawn world as shards, a folder for each use.

    OUT/train/scene_pairs, glyph_pairs            image and text, for the contrastive encoder
    OUT/train/text, names                         text alone, for the language model
    OUT/train/captions, vqa, long, naming,
              binding, long_binding, clips        documents, for Flamingo
    OUT/heldout/scene_pairs, glyph_pairs, ...     labelled images and documents of other streams, for evaluation
    OUT/tokenizer                                 the tokenizer that knows the toy's words

The folders depend on the seed and the counts alone: the number of processes changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from data.shards.writer import Document, ShardWriter
from data.toy.documents import make_documents
from data.toy.drafts import MAKERS
from data.toy.vocabulary import write_tokenizer
from flamingo.errors import UserError

# Documents per folder: the demo's training sees each of them two to five times.
TRAIN = {
    "glyph_pairs": 32_000,
    "scene_pairs": 32_000,
    "text": 8_000,
    "names": 24_000,
    "captions": 12_000,
    "vqa": 6_000,
    "long": 1_400,
    "naming": 10_000,
    "binding": 10_000,
    "long_binding": 700,
    "clips": 2_000,
}
HELDOUT = {
    "glyph_pairs": 4_000,
    "scene_pairs": 1_000,
    "captions": 200,
    "vqa": 500,
    "long": 100,
    "binding": 500,
    "clips": 200,
    "text": 500,
    "names": 500,
}

_CHUNK = 250  # documents made by one call of a process
_PAIRS = ("glyph_pairs", "scene_pairs")


def _make(job: tuple[int, str, str, range]) -> list[Document]:
    return make_documents(*job)


def _documents(seed: int, split: str, kind: str, count: int, pool: ProcessPoolExecutor | None) -> Iterator[Document]:
    jobs = [(seed, split, kind, range(at, min(at + _CHUNK, count))) for at in range(0, count, _CHUNK)]
    for documents in (pool.map if pool else map)(_make, jobs):
        yield from documents


def prepare(
    out: Path,
    *,
    seed: int = 1,
    scale: float = 1.0,
    processes: int = 1,
    documents_per_shard: int = 2000,
    train: Mapping[str, int] = TRAIN,
    heldout: Mapping[str, int] = HELDOUT,
) -> dict[str, int]:
    """Write all folders under `out`; every count is multiplied by `scale` (at least one document).

    Returns the number of documents by folder. Raises UserError for counts that make no sense.
    """
    if scale <= 0 or processes < 1 or documents_per_shard < 1:
        raise UserError(
            f"prepare toy: scale={scale}, processes={processes} and documents_per_shard={documents_per_shard} "
            "must be positive"
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"prepare toy: seed={seed} is outside 0 to 2**63-1; give a small whole number")
    write_tokenizer(out / "tokenizer")
    written: dict[str, int] = {}
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes > 1 else None
    try:
        for split, counts in (("train", train), ("heldout", heldout)):
            for kind, count in counts.items():
                number = max(1, round(count * scale))
                layout = "pairs" if kind in _PAIRS else "interleaved"
                meta = {"source": "toy", "split": split, "kind": kind, "seed": seed}
                with ShardWriter(out / split / kind, kind, documents_per_shard, layout=layout, meta=meta) as writer:
                    for document in _documents(seed, split, kind, number, pool):
                        writer.write(document)
                written[f"{split}/{kind}"] = number
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare toy`, beside --out."""
    parser.add_argument("--seed", type=int, default=1, help="another seed draws other images (default 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of documents (default 1.0)")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw (default 2)")
    parser.add_argument("--documents-per-shard", type=int, default=2000, help="documents in one tar (default 2000)")
    parser.add_argument(
        "--kinds", nargs="+", choices=sorted(MAKERS), help="only these folders (default: all)", metavar="KIND"
    )


def run(args: argparse.Namespace) -> None:
    """Prepare as the command line says and print one line a folder."""
    kinds = set(args.kinds or MAKERS)
    written = prepare(
        Path(args.out),
        seed=args.seed,
        scale=args.scale,
        processes=args.processes,
        documents_per_shard=args.documents_per_shard,
        train={kind: count for kind, count in TRAIN.items() if kind in kinds},
        heldout={kind: count for kind, count in HELDOUT.items() if kind in kinds},
    )
    for folder, count in written.items():
        print(f"{Path(args.out) / folder}: {count} documents")


__all__ = ["HELDOUT", "TRAIN", "add_arguments", "prepare", "run"]
