"""A trainer in miniature that is told to stop: it notes the signal, goes on for some steps, "saves" and ends.

    python -m tests.data.signalled SHARDS saving|hanging|waiting

The first line it prints is the ids of its workers. "saving" ends by itself after a signal, having read on; "hanging"
ends at once, without closing its loader, while its worker hangs in a read; "waiting" is there to be killed.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data.batches.collate import FlamingoCollate
from data.dataset import DatasetSpec
from data.loading.loader import MixLoader
from data.shards.reader import RawSample
from tests.data.helpers import byte_processor

MORE = 30


class Hanging(FlamingoCollate):
    """Opens a pipe that nobody ever writes to."""

    def sample(self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator) -> Any:
        pipe = Path(tempfile.mkdtemp()) / "pipe"
        os.mkfifo(pipe)
        return pipe.open("rb").read()


def main(shards: str, what: str) -> None:
    noted: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda signum, frame: noted.append(signum))
    spec = DatasetSpec(name="d", shards=[shards], batch_size=4)
    collate = (Hanging if what == "hanging" else FlamingoCollate)(byte_processor())
    loader = MixLoader([spec], collate, num_workers=2, prefetch_factor=1, patience=0.5, give_up=1.0)
    steps = iter(loader)
    if what == "hanging":
        supply = loader._supply()
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
        time.sleep(0.5)
        loader.kept = supply  # type: ignore[attr-defined]  # something that knows it still, as a traceback does
        sys.exit(7)
    next(steps)
    print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
    while not noted:
        next(steps)
        time.sleep(0.01)
    time.sleep(1.5)  # a worker that means to go is gone
    for step in itertools.islice(steps, MORE):
        last = step.step
    print(f"saved {last}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
