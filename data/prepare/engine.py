"""Turns the input of every source that reads files into shards, in parallel and resumable.

The input is cut into units (a file, or a range of one), in an order that depends on the input alone. Each unit becomes
shards of its own, `{source}-{unit:06d}-{shard:06d}.tar`, written by one process, so the shards have the same bytes for
every number of workers and of parts, and the only state is the list of finished units:

    OUT/.prepare/*/{source}-000012.json     a finished unit: its shards, checksums and counts
    OUT/_part-{source}-003-of-100.json      with --part 3/100: all of that part's units; `merge` joins the parts
    OUT/_dataset.json                       the manifest, written last

A run that was killed continues when it is started again: finished units are kept, the others are done again from their
start. Until the end the manifest does not list the source, so nobody trains on half of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, cast

from data.prepare.images import ImageRule
from data.prepare.units import InputUnit, SourceModule, Tally, fingerprint, options_of, parse_part, write_json
from data.shards.writer import (
    MANIFEST_VERSION,
    ShardWriter,
    check_version,
    make_folder,
    read_manifest,
    replace_part,
    write_part,
)
from flamingo.errors import UserError
from flamingo.files import write_atomically

WORK = ".prepare"
RESUME = "finished units are kept; run the same command again to continue"
Record = dict[str, Any]


class NothingKeptError(UserError):
    """All of the input was dropped."""


def load_source(name: str) -> SourceModule:
    """Return the module of a source."""
    return cast(SourceModule, import_module(f"data.prepare.sources.{name}"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every source has."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or patterns")
    parser.add_argument("--part", metavar="i/n", help="only this part of the input; join the parts with `merge`")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--documents-per-shard", type=int, default=1000, metavar="N", help="(default 1000)")
    parser.add_argument("--mb-per-shard", type=int, default=1000, metavar="MB", help="close a shard beyond this size")
    parser.add_argument("--skip-bad-files", action="store_true", help="skip and count damaged input files")
    parser.add_argument("--restart", action="store_true", help="discard an earlier, different preparation")


def run(source: str, args: argparse.Namespace) -> None:
    """Prepare a source as the command line says, and print what was kept and dropped. Raises UserError."""
    if args.documents_per_shard < 1 or args.mb_per_shard < 1:
        raise UserError("--documents-per-shard and --mb-per-shard must be at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if args.workers is None else args.workers
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    if hasattr(args, "min_side"):
        ImageRule.of(args)  # refuses invalid limits before anything is read
    part = parse_part(args.part) if args.part else None
    module, out = load_source(source), Path(args.out)
    units = module.units(args)
    make_folder(args.out)
    digest = fingerprint(source, options_of(args), units)
    mine = list(range(part[0] - 1, len(units), part[1]) if part else range(len(units)))
    if not args.restart and _complete(out, source, part, digest):
        return
    work = out / WORK / (f"{source}-{part[0]}-of-{part[1]}" if part else f"{source}-all")
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, digest, args.restart)
    replace_part(out, source, None)
    args.work, args.workers = str(work), workers
    done = {number: record for number in mine if (record := _finished(work, out, source, number, units[number]))}
    if hasattr(module, "begin") and len(done) < len(mine):
        module.begin(args, work)
    todo = [number for number in mine if number not in done]
    try:
        for number, record in _records(source, args, [(number, units[number]) for number in todo], workers):
            done[number] = record
            _progress(len(done), len(mine), last=len(done) == len(mine))
    except KeyboardInterrupt:
        raise UserError(f"stopped with {len(done)} of {len(mine)} units done; {RESUME}") from None
    facts = {"source": source, "fingerprint": digest, "units": len(units), "layout": module.LAYOUT}
    facts["options"] = options_of(args)
    records = {number: done[number] for number in mine}
    if part is None:
        try:
            finish(out, facts, records)
        except NothingKeptError:  # nothing to resume, and the next attempt may have other options
            shutil.rmtree(work)
            tidy(out)
            raise
    else:
        name = out / part_name(source, part)
        write_json(name, {"v": MANIFEST_VERSION, "part": list(part), **facts, "records": records})
        print("\n".join([f"{name}: {_headline(source, records)}", *total(records).report()]))
    shutil.rmtree(work)
    if part is None:
        tidy(out)


def tidy(out: Path) -> None:
    """Remove the folder of the state when nothing is left in it (parts leave that to `merge`)."""
    with contextlib.suppress(OSError):
        (out / WORK).rmdir()


def part_name(source: str, part: tuple[int, int]) -> str:
    """Return the name of a part's manifest."""
    return f"_part-{source}-{part[0]:03d}-of-{part[1]:03d}.json"


def _complete(out: Path, source: str, part: tuple[int, int] | None, digest: str) -> bool:
    """Return whether all of this was prepared before, and print so."""
    try:
        if part is None:
            listed = read_manifest(out)["parts"][source]
            before, shards = listed["meta"]["fingerprint"], listed["shards"]
        else:
            listed = json.loads((out / part_name(source, part)).read_bytes())
            check_version(listed, "")
            before = listed["fingerprint"]
            shards = [entry for record in listed["records"].values() for entry in record["shards"]]
        whole = before == digest and all((out / e["name"]).stat().st_size == e["bytes"] for e in shards)
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return False
    if whole:
        print(f"{out}: {source} was already prepared from these inputs with these options; --restart does it again")
    return whole


def finish(out: Path, facts: dict[str, Any], records: dict[int, Record]) -> None:
    """Write the manifest of a whole source and print the report. Raises NothingKeptError."""
    tally, source = total(records), facts["source"]
    report = tally.report()
    if not tally.documents:
        reasons = "; ".join(" ".join(line.split()) for line in report) or "the input is empty"
        raise NothingKeptError(f"{source}: not one document was kept ({reasons}); change the options or the input")
    shards = _shards(records)
    listed = {entry["name"] for entry in shards}
    leftover = re.compile(rf"\.?({re.escape(source)}-\d{{6}}-\d{{6}}\.tar)(\.idx)?(\.\d+)?(\.partial)?")
    for path in out.iterdir():  # left by an earlier or killed run
        match = leftover.fullmatch(path.name)
        if match and (match[1] not in listed or path.name.endswith(".partial")):
            path.unlink()
    write_part(out, source, facts | tally.to_json(), shards)
    print("\n".join([f"{out}: {_headline(source, records)}", *report]))


def total(records: dict[int, Record]) -> Tally:
    """Return the sum of the units' counts."""
    tally = Tally()
    for number in sorted(records):
        tally.add(Tally.from_json(records[number]["tally"]))
    return tally


def _shards(records: dict[int, Record]) -> list[dict[str, Any]]:
    return [entry for number in sorted(records) for entry in records[number]["shards"]]


def _headline(source: str, records: dict[int, Record]) -> str:
    tally = total(records)
    seen = tally.documents + tally.dropped_documents.total()
    shards = _shards(records)
    size = sum(entry["bytes"] for entry in shards) / 1e6
    return (
        f"{source}: {tally.documents:,} of {seen:,} documents kept with {tally.images:,} images, "
        f"in {len(shards):,} shards of {size:,.1f} MB together"
    )


def _claim(work: Path, digest: str, restart: bool) -> None:
    """Check that the contents of the work folder belong to this preparation. Raises UserError."""
    mark = work / "fingerprint"
    if restart or (mark.exists() and mark.read_text() != digest):
        if not restart:
            raise UserError(
                f"{work.parent.parent} holds an unfinished preparation with other inputs or options; give the same "
                "ones to resume it, another --out, or --restart to start over"
            )
        shutil.rmtree(work)
        work.mkdir()
    write_atomically(mark, digest)


def _finished(work: Path, out: Path, source: str, number: int, unit: InputUnit) -> Record | None:
    """Return the record of a finished unit whose shards are still there, else None."""
    try:
        record: Record = json.loads((work / f"{source}-{number:06d}.json").read_bytes())
        whole = all((out / entry["name"]).stat().st_size == entry["bytes"] for entry in record["shards"])
    except (OSError, ValueError):
        return None
    return record if whole and record["unit"] == unit.digest else None


def _records(
    source: str, args: argparse.Namespace, todo: list[tuple[int, InputUnit]], workers: int
) -> Iterator[tuple[int, Record]]:
    """Yield (number, record) of each unit as it is finished. The first error stops the rest."""
    if workers == 1 or len(todo) < 2:
        for number, unit in todo:
            yield number, run_unit(source, args, number, unit)
        return
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn"), initializer=die_with_parent)
    try:
        futures: dict[Future[Record], int] = {}
        waiting = iter(todo)
        while True:
            for number, unit in waiting:
                futures[pool.submit(run_unit, source, args, number, unit)] = number
                if len(futures) >= 2 * workers:
                    break
            if not futures:
                return
            finished, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in finished:
                yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(f"a worker was killed (out of memory?); {RESUME}, with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def die_with_parent() -> None:
    """Make a worker end as soon as its parent is gone, so that no orphan writes beside the run that continues."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_unit(source: str, args: argparse.Namespace, number: int, unit: InputUnit) -> Record:
    """Write the shards and the record of one unit. A damaged input file raises UserError, or is counted if asked to."""
    module, out, tally = load_source(source), Path(args.out), Tally()
    writer = ShardWriter(
        out,
        f"{source}-{number:06d}",
        args.documents_per_shard,
        layout=module.LAYOUT,
        bytes_per_shard=args.mb_per_shard * 1_000_000,
        listed=False,
    )
    try:
        with writer:
            for document in module.documents(unit, args, tally):
                writer.write(document)
                tally.documents += 1
                tally.images += len(document.images)
    except UserError as error:
        if not args.skip_bad_files:
            raise
        print(f"skipped: {error}", file=sys.stderr)
        tally = Tally()
        tally.drop_document("whole file damaged", unit.label)
        writer.shards.clear()
        writer.close()
    record: Record = {"unit": unit.digest, "label": unit.label, "shards": writer.shards, "tally": tally.to_json()}
    write_json(Path(args.work) / f"{source}-{number:06d}.json", record)
    return record


_last_progress = 0.0


def _progress(done: int, units: int, *, last: bool) -> None:
    """Print a line on stderr at most every ten seconds, and at the end."""
    global _last_progress
    now = time.monotonic()
    if last or now - _last_progress > 10:
        _last_progress = now
        print(f"{done} of {units} units done", file=sys.stderr, flush=True)
