"""One measurement in a process of its own: `python -m data.bench.measure WHO WHAT FOLDER ...` prints one JSON line.

Time is processor time of the process and its workers together, from the first batch that was asked for after a warm-up
to the last; a second of it is one core for one second, on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from importlib import import_module
from itertools import islice
from pathlib import Path

from data.bench.material import Material

TICK = os.sysconf("SC_CLK_TCK")


def processes() -> list[int]:
    """Return the ids of this process and its workers."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def cpu_seconds() -> float:
    """Return the processor time used so far by this process and its workers."""
    total = 0
    for pid in processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def bytes_read() -> int:
    """Return the bytes that the workers have read so far, from files and pipes."""
    total = 0
    for pid in processes()[1:]:
        line = next(line for line in Path(f"/proc/{pid}/io").read_text().splitlines() if line.startswith("rchar"))
        total += int(line.split()[1])
    return total


def private_memory() -> int:
    """Return the private bytes of the largest worker."""
    most = 0
    for pid in processes()[1:]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        most = max(most, 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_")))
    return most


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ours", "peer"))
    parser.add_argument("what", choices=("mmc4", "raw", "pairs"))
    parser.add_argument("folder", type=Path)
    for name, value in (("size", 224), ("batch", 16), ("workers", 1), ("warm", 6), ("count", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    make = import_module(f"data.bench.{args.who}").batches
    begun = time.perf_counter()
    supply = make(Material.at(args.folder), args.what, args.size, args.batch, args.workers)
    next(supply)
    first = time.perf_counter() - begun
    for _ in islice(supply, args.warm):
        pass
    cpu, wall, read = cpu_seconds(), time.perf_counter(), bytes_read()
    documents = images = 0
    for more_documents, more_images in islice(supply, args.count):
        documents += more_documents
        images += more_images
    result = {
        "cpu": cpu_seconds() - cpu,
        "wall": time.perf_counter() - wall,
        "read": bytes_read() - read,
        "documents": documents,
        "images": images,
        "private": private_memory(),
        "first": first,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
