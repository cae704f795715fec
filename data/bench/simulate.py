"""Simulates a corpus of any size: what planning, starting, resuming and reading would cost.

    python -m data simulate --documents 100000000 --shards 20000 --ranks 512 --workers 8

Shard sizes are random (log-normal in documents and in bytes per document); the plan is the real one, and its time and
memory are measured. Files opened, bytes fetched and bytes fetched twice follow from walking the order of one node's
lanes through a cache of the given size. No document exists.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.order import Plan
from data.shard_store import CATALOGUE, read_catalogue, write_catalogue
from data.shards.index import KINDS, IndexHead
from flamingo.errors import UserError


@dataclass(frozen=True)
class ShardSizes:
    """Samples and bytes of every shard, (S,)."""

    samples: NDArray[np.int64]
    size: NDArray[np.int64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data simulate`."""
    for name, value, about in (
        ("documents", 100_000_000, "in the whole corpus"),
        ("shards", 20_000, ""),
        ("ranks", 512, "data-parallel processes"),
        ("workers", 8, "loader processes of a rank"),
        ("ranks-per-node", 8, "ranks that share a machine and its cache"),
        ("batch", 4096, "documents of a global batch"),
        ("lanes", 64, "lanes of the order"),
        ("block", 16, "shards shuffled together"),
        ("kilobytes", 200, "of a document"),
        ("cache-gb", 2000, "disk of a node for shards, in 1e9 bytes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{about} (default {value})".strip())


def drawn(args: argparse.Namespace) -> ShardSizes:
    """Return shards of unequal size that add up to the number of documents."""
    random = np.random.Generator(np.random.Philox(key=[0, 0]))
    shares = random.lognormal(0, 0.25, args.shards)
    samples = np.maximum(1, np.floor(shares / shares.sum() * args.documents)).astype(np.int64)
    samples[: max(0, args.documents - int(samples.sum()))] += 1
    each = random.lognormal(math.log(args.kilobytes * 1000), 0.15, args.shards)
    return ShardSizes(samples, (samples * each).astype(np.int64))


def memory() -> int:
    """Return the private bytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def run(args: argparse.Namespace) -> int:
    """Simulate and print the table, and as JSON on the last line."""
    if args.batch % args.ranks or args.batch % args.lanes:
        raise UserError(
            f"simulate: --batch {args.batch} must be a multiple of --ranks {args.ranks} and of --lanes {args.lanes}"
        )
    corpus = drawn(args)
    print(
        f"{args.documents:,} documents, {args.shards:,} shards, {corpus.size.sum() / 1e12:.1f} TB, {args.ranks} ranks"
    )
    rows = {"catalogue": catalogue(args, corpus)} | {"plan": plan_costs(args, corpus)} | {"node": node(args, corpus)}
    for part, values in rows.items():
        for name, value in values.items():
            shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
            print(f"{part:10} {name:62} {shown:>16}")
    print(json.dumps(rows))
    return 0


def catalogue(args: argparse.Namespace, corpus: ShardSizes) -> dict[str, float | int]:
    """Return what it costs every process to know the corpus."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        heads = {
            f"{n:06d}.tar": IndexHead(int(size), f"{n:032x}", f"{n:032x}", dict.fromkeys(KINDS, int(samples)))
            for n, (samples, size) in enumerate(zip(corpus.samples, corpus.size, strict=True))
        }
        write_catalogue(Path(folder), heads)
        begun = time.process_time()
        read_catalogue(Path(folder))
        seconds = time.process_time() - begun
        size = (Path(folder) / CATALOGUE).stat().st_size
    per_document = 2 * 8 + 2 + 20 + 7 * 19  # an index row, its key, and seven members
    return {
        "file, bytes": size,
        "to read it, s": seconds,
        "sizes checked by a rank at the start, files": -(-args.shards // args.ranks),
        "all indexes on disk, GB": args.documents * per_document / 1e9,
        "one index mapped, MB": args.documents / args.shards * per_document / 1e6,
    }


def first_batch(args: argparse.Namespace, corpus: ShardSizes, step: int) -> tuple[Plan, float, int]:
    """Ask a fresh plan for rank 0's part of a global batch; return (plan, seconds, numbers permuted)."""
    begun = time.process_time()
    plan = Plan(corpus.samples, 1, args.batch, args.lanes, args.block)
    for slot in range(args.batch // args.ranks):
        lane, n = plan.place(slot, step * plan.per_lane)
        plan.at(lane, n)
    return plan, time.process_time() - begun, plan.drawn


def plan_costs(args: argparse.Namespace, corpus: ShardSizes) -> dict[str, float | int]:
    """Return the time and memory of a worker's plan, at the start and in the middle of training."""
    before = memory()
    _, start, drawn_at_start = first_batch(args, corpus, 0)
    plan, resumed, drawn_at_resume = first_batch(args, corpus, 1_000_000)
    rank_lanes = sorted({plan.place(slot, 0)[0] for slot in range(args.batch // args.ranks)})
    for lane in rank_lanes:  # a rank that has moved on: two blocks of its lanes are known
        plan.at(lane, plan.segment_shards(lane, 0)[1])
    return {
        "to the first batch at step 0, s": start,
        "to the first batch at step 1,000,000, s": resumed,
        "numbers permuted for it at step 0": drawn_at_start,
        "numbers permuted for it at step 1,000,000": drawn_at_resume,
        "memory of a worker's plan, MB": max(0, memory() - before) / 1e6,
        "lanes that a rank reads": len(rank_lanes),
        "steps of an epoch": args.documents // args.batch,
    }


def node(args: argparse.Namespace, corpus: ShardSizes) -> dict[str, float | int]:
    """Walk one epoch of a node's ranks block by block through a cache that drops the least recently used shard."""
    plan = Plan(corpus.samples, 1, args.batch, args.lanes, args.block)
    slots = range(args.batch // args.ranks * min(args.ranks_per_node, args.ranks))
    lanes = sorted({plan.place(slot, 0)[0] for slot in slots})
    limit, held, filled = args.cache_gb * 10**9, OrderedDict[int, int](), 0
    fetched = again = most_open = 0
    known: set[int] = set()
    at = dict.fromkeys(lanes, 0)
    while min(at.values()) < plan.length:
        lane = min(at, key=at.__getitem__)
        now = {shard for one in lanes for shard in plan.segment_shards(one, min(at[one], plan.length - 1))[0]}
        most_open = max(most_open, len(now))
        if (needed := int(corpus.size[[*now]].sum())) > limit:
            raise UserError(
                f"simulate: a node draws from {needed / 1e9:.0f} GB of shards at a time and its cache has "
                f"{args.cache_gb} GB, so shards would be fetched again and again; lower --block or raise --cache-gb"
            )
        shards, at[lane] = plan.segment_shards(lane, at[lane])
        for shard in shards:
            size = int(corpus.size[shard])
            if shard not in held:
                fetched += size
                again += size if shard in known else 0
                known.add(shard)
                held[shard] = size
                filled += size
                while filled > limit:
                    filled -= held.pop(next((one for one in held if one not in now), next(iter(held))))
            if shard in held:
                held.move_to_end(shard)
    whole = sum(int(corpus.size[shard]) for shard in known)
    return {
        "lanes that a node reads": len(lanes),
        "shards that its ranks draw from at a time (files open)": most_open,
        "bytes of those, GB": most_open * float(corpus.size.mean()) / 1e9,
        "bytes fetched in an epoch, TB": fetched / 1e12,
        "of them fetched a second time, share": again / max(1, fetched),
        "bytes of the shards touched / of the lanes' documents": whole
        / max(1.0, float(corpus.size.sum()) * len(lanes) / args.lanes),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m data.bench.simulate`."""
    parser: Any = argparse.ArgumentParser(prog="python -m data simulate")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
