"""One command that shows on a GPU what this library promises there; it needs no network and nothing to download.

    python -m benchmarks gpu                              sizes small and 3b on the GPU, 9 minutes at most
    python -m benchmarks gpu --device cpu --size tiny     the same steps, to see that all of them run

Each step runs in a process of its own with a time limit of its own; one that fails says so and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.sizes import SIZES
from benchmarks.table import print_table
from flamingo.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
ALL_SECONDS = 540.0
ONCE = {"device": 60.0, "attention": 90.0, "collectives": 60.0}
"""Steps that do not depend on the size, and the seconds that each may take."""
SIZED = {"train": 120.0, "memory": 90.0, "checkpoint": 120.0, "decode": 90.0, "ranking": 90.0, "evaluation": 120.0}


def jobs(sizes: list[str], names: list[str]) -> Iterator[tuple[str, str, float]]:
    """Yield (step, size, seconds it may take)."""
    for name, seconds in ONCE.items():
        if not names or name in names:
            yield name, sizes[0], seconds
    for size in sizes:
        for name, seconds in SIZED.items():
            if not names or name in names:
                yield name, size, seconds


def measured(name: str, size: str, device: str, seconds: float) -> dict[str, Any]:
    """Run a step in a new process; return its rows, or why there are none, and the seconds it took."""
    command = [sys.executable, "-m", "benchmarks.gpu_steps", name, "--size", size, "--device", device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    # A group of its own, so that what a step has started ends with it.
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=seconds)
        lines = [line for line in out.splitlines() if line.startswith("[")]
        if child.returncode or not lines:
            last = (err.strip().splitlines() or [f"ended with status {child.returncode}"])[-1]
            found: dict[str, Any] = {"failed": last[:300], "stderr": err[-3000:]}
        else:
            found = {"rows": json.loads(lines[-1])}
    except subprocess.TimeoutExpired:
        found = {"failed": f"took more than its {seconds:.0f} s"}
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    return {"step": name, "size": size, **found, "took_s": round(time.monotonic() - began, 1)}


def lines_of(result: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the table for a step."""
    where = result["step"] if result["step"] in ONCE else f"{result['step']}, {result['size']}"
    if "failed" in result:
        return [[where, "FAILED", result["failed"].replace("|", "/"), "", ""]]
    lines = []
    for row in result["rows"]:
        value = f"{row['value']:,.4g}" if isinstance(row["value"], float) else str(row["value"])
        holds = {True: "yes", False: "NO", None: ""}[row["holds"]]
        lines.append([where, row["what"], value, row["wanted"], holds])
    return lines


def main(arguments: list[str]) -> int:
    """Run the steps, write the JSON and print the table; status 1 if one failed or misses what is wanted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join((*ONCE, *SIZED))}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small", "3b"])
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="that all steps may take together")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "gpu.json", help="the JSON")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - {*ONCE, *SIZED}:
        parser.error(f"{sorted(unknown)[0]!r} is not a step; known are {', '.join((*ONCE, *SIZED))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: install a CUDA build, or see that all steps run with --device cpu")
    began, results = time.monotonic(), []
    for name, size, seconds in jobs(options.size, options.steps):
        left = options.seconds - (time.monotonic() - began)
        if left < 1:
            failed = f"not run: {options.seconds:.0f} s are over"
            result: dict[str, Any] = {"step": name, "size": size, "failed": failed}
        else:
            print(f"{name} {size} ...", file=sys.stderr, flush=True)
            result = measured(name, size, options.device, min(seconds, left))
        results.append(result)
        # After every step: whatever ends this process, what was measured is kept.
        write_atomically(options.out, json.dumps({"device": options.device, "results": results}, indent=1) + "\n")
    head = ["step", "what", "value", "wanted", "holds"]
    print_table([head, ["---"] * len(head), *(line for result in results for line in lines_of(result))])
    print(f"\n{time.monotonic() - began:.0f} s; written to {options.out}")
    rows = [row for result in results for row in result.get("rows", [])]
    return int(any("failed" in result for result in results) or any(row["holds"] is False for row in rows))
