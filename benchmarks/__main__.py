"""Run measurements, each in a process of its own, and print the table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.evaluation import print_evaluation
from benchmarks.sizes import SIZES, Size
from benchmarks.steps import BATCHES, IMAGES, TOKENS, grid, print_steps
from benchmarks.table import print_tables

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("decode_step", "first_token", "ranking", "train_step", "shots", "cost", "eval_speed")
TRAINED = ("fused", "bf16", "state_bf16", "bf16_state_8bit")
"""Variants of `ours.py` in a training step."""
ALONE = ("step_cost",)
"""Measured for this library alone, and only on request."""
LIBRARIES = (("peer", "fp32"), ("ours", "fp32"))
IDEFICS = (("idefics", "fp32"), ("ours", "idefics"))
"""The second peer, and this library with its weights."""


def jobs(
    name: str, size: Size, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, int], tuple[tuple[str, str], ...]]]:
    """Yield (measurement, its options, its (library, variant) pairs) for a name of the command line."""
    if name == "decode_step":
        yield "decode_step", {"shots": size.shots}, (*LIBRARIES, ("ours", "bf16"), *IDEFICS)
    elif name == "first_token":
        yield "first_token", {"shots": size.shots}, (*LIBRARIES, ("ours", "bf16"), *IDEFICS)
    elif name == "ranking":
        yield "ranking", {"shots": size.rank_shots}, (*LIBRARIES, ("peer", "copied_cache"), ("ours", "bf16"), *IDEFICS)
    elif name == "train_step":
        yield "train_step", {}, (*LIBRARIES, *(("ours", variant) for variant in TRAINED), *IDEFICS)
    elif name == "step_cost":
        for own in grid(options):
            yield "step_cost", own, (("ours", "fp32"),)
    elif name == "eval_speed":
        yield "eval_questions", {"shots": size.eval_shots}, LIBRARIES
        yield "eval_classes", {"shots": size.rank_shots}, LIBRARIES
    elif name == "shots":
        for shots in (1, size.shots // 2, size.shots):
            yield "decode_step", {"shots": shots}, LIBRARIES
    else:
        for images in size.cost_images:
            for tokens in size.cost_tokens:
                yield "forward", {"images": images, "tokens": tokens}, (*LIBRARIES, *IDEFICS)


def measure(what: str, own: dict[str, int], library: str, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement in a new process and return its figures; if it fails, exit with the end of its stderr."""
    given = {**own, "library": library, "variant": variant, "size": options.size}
    given |= {"repeats": options.repeats, "threads": options.threads}
    command = [sys.executable, "-m", "benchmarks.measure", what]
    command += [word for key, value in given.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return the date, the CPU, the threads and the versions of the libraries."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "open_clip")}
    return {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu, "threads": options.threads, **versions}


def main() -> None:
    """Parse the command line, measure, write the JSON and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (all by default), {ALONE[0]}")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after a warm-up; the median is shown")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without-peer", action="store_true", help="measure this library alone")
    for key, values in (("batches", BATCHES), ("images", IMAGES), ("tokens", TOKENS)):
        parser.add_argument(f"--{key}", type=int, nargs="+", default=values, help="of step_cost")
    parser.add_argument("--out", type=Path, help="the JSON; runs/bench/SIZE.json by default")
    options = parser.parse_args()
    if unknown := set(options.names) - {*NAMES, *ALONE}:
        parser.error(f"{sorted(unknown)[0]!r} is not a measurement; known are {', '.join((*NAMES, *ALONE))}")
    with_peer = not options.without_peer and bool({*(options.names or NAMES)} - {*ALONE})
    if with_peer and importlib.util.find_spec("open_flamingo") is None:
        parser.error("open_flamingo is not installed: pip install --no-deps open_flamingo==2.0.1 einops-exts")
    results: list[dict[str, Any]] = []
    for name in options.names or NAMES:
        for what, own, libraries in jobs(name, SIZES[options.size], options):
            for library, variant in libraries:
                if options.without_peer and (library != "ours" or variant == "idefics"):
                    continue
                print(f"{name} {own} {library} {variant} ...", file=sys.stderr, flush=True)
                # In a process of its own, because peak memory is that of a whole process.
                figures = measure(what, own, library, variant, options)
                results.append({"name": name, "what": what, **own, "library": library, "variant": variant, **figures})
    out = options.out or ROOT / "runs" / "bench" / f"{options.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"size": options.size, "torch_threads": options.threads, "machine": machine(options), "results": results}
    out.write_text(json.dumps(document, indent=1) + "\n")
    print_tables(document)
    print_evaluation(document)
    print_steps(document)
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["gpu"]:
        sys.exit(gpu.main(sys.argv[2:]))
    main()
