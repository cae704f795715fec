"""A process that reads batches, writes down what it got and saves the loader's state, until it is killed.

    python -m tests.data.consume SHARDS OUT WORLD WORKERS STEPS

OUT/ledger.jsonl gets one line a step, OUT/state.json the state after it (before the next step begins). All ranks are
served here, one after the other; every rank has its own loader.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from tests.data.helpers import byte_processor


def main(shards: str, out: str, world: int, workers: int, steps: int) -> None:
    folder = Path(out)
    cache = str(folder / "cache") if "://" in shards else ""
    spec = DatasetSpec(name="d", shards=[shards], batch_size=8, lanes=4, block=2, cache=cache)
    collate = FlamingoCollate(byte_processor())
    loaders = [MixLoader([spec], collate, rank=rank, world_size=world, num_workers=workers) for rank in range(world)]
    state = folder / "state.json"
    if state.exists():
        for loader in loaders:
            loader.load_state_dict(json.loads(state.read_text()))
    with (folder / "ledger.jsonl").open("a") as ledger:
        for ranks in zip(*loaders, strict=True):
            keys = [key for rank in ranks for batch in rank.batches["d"] for key in batch.keys]
            ledger.write(json.dumps([ranks[0].step, keys]) + "\n")
            ledger.flush()
            time.sleep(0.01)
            partial = folder / "state.partial"
            partial.write_text(json.dumps(loaders[0].state_dict()))
            partial.replace(state)
            if ranks[0].step + 1 >= steps:
                return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
