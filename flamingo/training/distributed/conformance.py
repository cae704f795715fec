"""The conformance check that starts processes: two under FSDP2 give the gradients of one.

    python -m flamingo.training.distributed.conformance [FAMILY | FOLDER | NAME ...]

One start of two processes serves any number of LMs, since starting takes longer than the check. One process
has a batch with images and the other a row of text alone, which is where a sharded Flamingo hangs if its
processes call different modules.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flamingo.conformance.checks import GRADIENT, CheckResult, close, gradients, print_table
from flamingo.conformance.tiny_models import FAMILIES, MakeLM, loaded_lm, subject
from flamingo.errors import UserError
from flamingo.training.distributed.fsdp import Processes, ShardingStrategy, full_tensor, shard, spawn
from flamingo.training.distributed.units import flamingo_units

_ROWS = ((0, 1), (2,))


def two_processes(makes: Mapping[str, MakeLM]) -> dict[str, CheckResult]:
    """Return a result for each LM; the makers must be picklable (functions of a module, or `partial`s of such)."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, 2, dict(makes), folder)
        return {name: _compare(make, Path(folder) / f"{i}.pt") for i, (name, make) in enumerate(makes.items())}


def _compare(make: MakeLM, file: Path) -> CheckResult:
    if not file.is_file():
        return CheckResult("two_processes", False, file.with_suffix(".txt").read_text())
    sharded: dict[str, Tensor] = torch.load(file, weights_only=True)
    parts = [gradients(subject(make), rows)[1] for rows in _ROWS]
    try:
        if sorted(sharded) != sorted(parts[0]):
            return CheckResult(
                "two_processes", False, "the parameters that have a gradient differ from those of one process"
            )
        notes = [
            close(gradient, (parts[0][name] + parts[1][name]) / 2, f"gradient of {name}", least=GRADIENT)
            for name, gradient in sharded.items()
        ]
    except AssertionError as error:
        return CheckResult("two_processes", False, str(error))
    return CheckResult("two_processes", True, max(notes, key=float))


def _work(processes: Processes, makes: dict[str, MakeLM], folder: str) -> None:
    """Write, in one of the two processes, the whole gradients of each LM, or why there are none."""
    for index, make in enumerate(makes.values()):
        try:
            model = subject(make)
            shard(model, flamingo_units(model), processes, ShardingStrategy())
            mine = {name: full_tensor(grad) for name, grad in gradients(model, _ROWS[processes.rank])[1].items()}
        except Exception as error:
            Path(folder, f"{index}.txt").write_text(f"{type(error).__name__}: {error}")
            continue
        if processes.is_main:
            torch.save(mine, Path(folder, f"{index}.pt"))


def main(arguments: list[str] | None = None) -> int:
    """Print the result for each language model; return 1 if one fails, 2 if one cannot be loaded."""
    parser = argparse.ArgumentParser(prog="python -m flamingo.training.distributed.conformance")
    parser.add_argument("language", nargs="*", help="families, folders or names; all families by default")
    makes = {name: partial(loaded_lm, name) for name in parser.parse_args(arguments).language or FAMILIES}
    try:
        for make in makes.values():
            make()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = two_processes(makes)
    return int(print_table(["two_processes"], ((name, [result]) for name, result in results.items())) > 0)


if __name__ == "__main__":
    sys.exit(main())
