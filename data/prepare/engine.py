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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from data.errors import StorageError
from data.prepare.executors import EXECUTORS, RESUME, run_jobs
from data.prepare.images import ImageRule
from data.prepare.units import InputUnit, SourceModule, Tally, fingerprint, options_of, parse_part, write_json
from data.shards.places import Place, is_store, place, put, remove_folder, sizes_in
from data.shards.writer import (
    MANIFEST_VERSION,
    ShardWriter,
    check_version,
    make_folder,
    output_place,
    read_manifest,
    replace_part,
    write_part,
)
from flamingo.errors import UserError
from flamingo.folder_lock import lock_folder

WORK, MARK = ".prepare", "fingerprint"
Record = dict[str, Any]


class NothingKeptError(UserError):
    """All of the input was dropped."""


def load_source(name: str, module: str = "") -> SourceModule:
    """Return the module of a source; `module` is where it lies when it is not one of `data.prepare.sources`."""
    return cast(SourceModule, import_module(module or f"data.prepare.sources.{name}"))


def add_arguments(
    parser: argparse.ArgumentParser, metavar: str = "INPUT", about: str = "files, folders or patterns"
) -> None:
    """Add the options that every source has; `metavar` and `about` say what its inputs are."""
    parser.add_argument("inputs", nargs="+", metavar=metavar, help=about)
    parser.add_argument("--part", metavar="i/n", help="only this part of the input; join the parts with `merge`")
    parser.add_argument("--workers", type=int, metavar="N", help="at the same time (default: one for each core)")
    parser.add_argument(
        "--engine", choices=EXECUTORS, default="processes", help="what runs the work (default processes)"
    )
    parser.add_argument(
        "--engine-options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="the engine's own: memory=8e9 (ray), slurm_partition=cpu timeout_min=600 (submitit)",
    )
    parser.add_argument(
        "--scratch", metavar="DIR", help="with --out s3://...: folder for what is built before it is sent"
    )
    parser.add_argument("--documents-per-shard", type=int, default=1000, metavar="N", help="(default 1000)")
    parser.add_argument("--mb-per-shard", type=int, default=1000, metavar="MB", help="close a shard beyond this size")
    parser.add_argument("--skip-bad-files", action="store_true", help="skip and count damaged input files")
    parser.add_argument("--restart", action="store_true", help="discard an earlier, different preparation")


@contextlib.contextmanager
def claimed(args: argparse.Namespace) -> Iterator[None]:
    """Hold the output folder for a source, or for a part of it: parts and sources may be prepared side by side."""
    what = re.sub(r"\W+", "-", f"{args.source}-{getattr(args, 'part', None) or 'all'}")
    remedy = "wait for its end or stop it; several machines share the work with --part i/n"
    out = output_place(args.out)
    with contextlib.ExitStack() as held:
        try:
            if isinstance(out, Path):  # a store has no locks; its shards come whole, under their own names
                held.enter_context(lock_folder(out, f"prepare {what}", remedy, f".lock-{what}"))
        except OSError as error:
            make_folder(args.out)  # says what is in the way, if something is
            raise UserError(f"--out {args.out} cannot be written ({error}); choose another folder") from error
        yield


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
    module = load_source(source, getattr(args, "module", ""))
    units = module.units(args)
    out = make_folder(args.out)
    digest = fingerprint(source, options_of(args), units)
    mine = list(range(part[0] - 1, len(units), part[1]) if part else range(len(units)))
    sizes = sizes_in(out)
    if not args.restart and _complete(out, source, part, digest, sizes):
        return
    state = out / WORK / (f"{source}-{part[0]}-of-{part[1]}" if part else f"{source}-all")
    work = _claim(state, digest, args, hasattr(module, "begin"))
    replace_part(out, source, None)
    args.work, args.state, args.workers, args.digest = str(work), str(state), workers, digest
    there = sizes_in(state)
    done = {n: record for n in mine if (record := _finished(state, source, n, units[n], sizes, there))}
    jobs = {number: (source, args, number, units[number]) for number in mine if number not in done}
    try:
        if jobs and hasattr(module, "begin"):
            module.begin(args, work)
        for number, record in on_engine(run_unit, jobs, args):
            done[number] = record
            _progress(len(done), len(mine), last=len(done) == len(mine))
    except KeyboardInterrupt:
        raise UserError(f"stopped with {len(done)} of {len(mine)} units done; {RESUME}") from None
    facts = {"source": source, "fingerprint": digest, "units": len(units), "layout": module.LAYOUT}
    facts["options"] = options_of(args)
    _conclude(out, part, facts, {number: done[number] for number in mine}, (state, work))


def on_engine(function: Callable[..., Any], jobs: dict[int, tuple[Any, ...]], args: argparse.Namespace) -> Any:
    """Yield (number, result) of each job on the engine of the command line, for `begin` of a source too."""
    folder = Path(args.work) / args.engine / function.__name__
    return run_jobs(
        function, jobs, engine=args.engine, workers=args.workers, options=args.engine_options, folder=folder
    )


def _conclude(
    out: Place,
    part: tuple[int, int] | None,
    facts: dict[str, Any],
    records: dict[int, Record],
    state: tuple[Place, Path],
) -> None:
    """Write the manifest, of the whole or of the part, and remove the state."""
    source = facts["source"]
    if part is None:
        try:
            finish(out, facts, records)
        except NothingKeptError:  # nothing to resume, and the next attempt may have other options
            _remove(*state)
            tidy(out)
            raise
    else:
        name = out / part_name(source, part)
        write_json(name, {"v": MANIFEST_VERSION, "part": list(part), **facts, "records": records})
        print("\n".join([f"{name}: {_headline(source, records)}", *total(records).report()]))
    _remove(*state)
    if part is None:
        tidy(out)


def _remove(state: Place, work: Path) -> None:
    remove_folder(state)
    remove_folder(work)


def tidy(out: Place) -> None:
    """Remove the folder of the state when nothing is left in it (parts leave that to `merge`)."""
    if isinstance(out, Path):  # in a store, a folder without a file is none
        with contextlib.suppress(OSError):
            (out / WORK).rmdir()


def part_name(source: str, part: tuple[int, int]) -> str:
    """Return the name of a part's manifest."""
    return f"_part-{source}-{part[0]:03d}-of-{part[1]:03d}.json"


def _complete(out: Place, source: str, part: tuple[int, int] | None, digest: str, sizes: Mapping[str, int]) -> bool:
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
        whole = before == digest and all(sizes[e["name"]] == e["bytes"] for e in shards)
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return False
    if whole:
        print(f"{out}: {source} was already prepared from these inputs with these options; --restart does it again")
    return whole


def finish(out: Place, facts: dict[str, Any], records: dict[int, Record]) -> None:
    """Write the manifest of a whole source and print the report. Raises NothingKeptError."""
    tally, source = total(records), facts["source"]
    report = tally.report()
    if not tally.documents:
        reasons = "; ".join(" ".join(line.split()) for line in report) or "the input is empty"
        raise NothingKeptError(f"{source}: not one document was kept ({reasons}); change the options or the input")
    shards = _shards(records)
    listed = {entry["name"] for entry in shards}
    leftover = re.compile(rf"\.*({re.escape(source)}-\d{{6}}-\d{{6}}\.tar)(\.idx)?(\.\d+|\.partial)*")
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


def _claim(state: Place, digest: str, args: argparse.Namespace, builds: bool) -> Path:
    """Check that the state belongs to this preparation, or begin it; return the folder for what is built on the way.

    `builds` says that the source builds something there first. Raises UserError when there is a state of another one.
    """
    mark = state / MARK
    before = mark.read_bytes().decode() if mark.exists() else None
    if isinstance(state, Path):
        work = state
    else:
        if not args.scratch and (args.engine == "submitit" or (args.engine != "processes" and builds)):
            raise UserError(
                f"--engine {args.engine} with --out {state.parent.parent} needs --scratch DIR: a folder that all "
                "machines see, for what they share on the way"
            )
        if args.scratch and is_store(args.scratch):
            raise UserError(f"--scratch {args.scratch} must be a folder on a disk, not a store")
        work = Path(args.scratch or tempfile.gettempdir()) / f"prepare-{digest[:16]}-{state.name}"
    if before not in (None, digest) and not args.restart:
        raise UserError(
            f"{state.parent.parent} holds an unfinished preparation with other inputs or options; give the same "
            "ones to resume it, another --out, or --restart to start over"
        )
    if args.restart:
        _remove(state, work)
    work.mkdir(parents=True, exist_ok=True)
    put(mark, digest.encode())
    return work


def _finished(
    state: Place, source: str, number: int, unit: InputUnit, sizes: Mapping[str, int], there: Mapping[str, int]
) -> Record | None:
    """Return the record of a finished unit whose shards are still there, else None."""
    name = f"{source}-{number:06d}.json"
    if name not in there:
        return None
    try:
        record: Record = json.loads((state / name).read_bytes())
        whole = all(sizes[entry["name"]] == entry["bytes"] for entry in record["shards"])
    except (OSError, KeyError, ValueError):
        return None
    return record if whole and record["unit"] == unit.digest else None


def _check_claim(args: argparse.Namespace) -> None:
    """Raise UserError on a machine that does not see the state, or when another preparation has taken its place."""
    try:
        mark = (place(args.state) / MARK).read_bytes().decode()
    except FileNotFoundError:
        raise UserError(
            f"{os.uname().nodename} does not see {args.state}: all machines of --engine need the same folders, or an "
            "--out that is a store (s3://bucket/folder)"
        ) from None
    if mark != args.digest:
        raise UserError(f"{args.state} now belongs to another preparation; this one has been given up")


def run_unit(source: str, args: argparse.Namespace, number: int, unit: InputUnit) -> Record:
    """Write the shards and the record of one unit. A damaged input file raises UserError, or is counted if asked to."""
    _check_claim(args)
    module, tally, scratch = load_source(source, getattr(args, "module", "")), Tally(), Path(args.work)
    scratch.mkdir(parents=True, exist_ok=True)  # another machine may have a disk of its own for it
    writer = ShardWriter(
        args.out,
        f"{source}-{number:06d}",
        args.documents_per_shard,
        layout=module.LAYOUT,
        bytes_per_shard=args.mb_per_shard * 1_000_000,
        listed=False,
        scratch=scratch,
    )
    try:
        with writer:
            for document in module.documents(unit, args, tally):
                writer.write(document)
                tally.documents += 1
                tally.images += len(document.images)
    except UserError as error:
        if not args.skip_bad_files or isinstance(error, StorageError):  # a store that is away is no damaged file
            raise
        print(f"skipped: {error}", file=sys.stderr)
        tally = Tally()
        tally.drop_document("whole file damaged", unit.label)
        writer.shards.clear()
        writer.close()
    record: Record = {"unit": unit.digest, "label": unit.label, "shards": writer.shards, "tally": tally.to_json()}
    _check_claim(args)
    write_json(place(args.state) / f"{source}-{number:06d}.json", record)
    return record


_last_progress = 0.0


def _progress(done: int, units: int, *, last: bool) -> None:
    """Print a line on stderr at most every ten seconds, and at the end."""
    global _last_progress
    now = time.monotonic()
    if last or now - _last_progress > 10:
        _last_progress = now
        print(f"{done} of {units} units done", file=sys.stderr, flush=True)
