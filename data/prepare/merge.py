"""`python -m data merge DIR...`: the parts that `prepare --part i/n` wrote become one dataset with one manifest.

Units have the same numbers, hence shards the same names and bytes, however the input was divided, so the merged folder
equals the one that a single run writes. Parts may share a folder or lie in several (the nodes' own disks).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from data.prepare.engine import Record, finish, tidy
from data.shards.places import Place, fetched, place, send, sizes_in
from data.shards.writer import check_version, make_folder
from flamingo.errors import UserError
from flamingo.files import write_atomically

PART = re.compile(r"_part-.*-of-.*\.json")
SAME = ("source", "fingerprint", "units", "layout", "options")


def read_parts(folders: list[Place]) -> list[tuple[Place, dict[str, Any]]]:
    """Return (folder, part) of every part manifest, by source and number. Raises UserError for an invalid one."""
    listed = []
    for folder in folders:
        names = [folder / name for name in sorted(sizes_in(folder)) if PART.fullmatch(name)]
        if not names:
            raise UserError(f"folder {folder} has no part manifest (_part-*-of-*.json); prepare with --part first")
        for name in names:
            try:
                part = json.loads(name.read_bytes())
                check_version(part, f"part manifest {name}")
                part["records"] = {int(number): record for number, record in part["records"].items()}
                _ = [part[key] for key in SAME], int(part["part"][0]), int(part["part"][1])
            except UserError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise UserError(f"{name} is not a part manifest ({error}); prepare that part again") from None
            listed.append((folder, part))
    return sorted(listed, key=lambda item: (item[1]["source"], item[1]["part"]))


def merge(folders: list[str], out: str | None) -> None:
    """Join the parts of each source. Raises UserError when a part is missing, twice, or of another preparation."""
    parts = read_parts([place(folder) for folder in folders])
    target = make_folder(out or folders[0])
    sizes = {folder: sizes_in(folder) for folder in {folder for folder, _ in parts}}
    for source in sorted({part["source"] for _, part in parts}):
        group = [(folder, part) for folder, part in parts if part["source"] == source]
        _check(source, [part for _, part in group])
        records: dict[int, Record] = {}
        for folder, part in group:
            records |= part["records"]
            for record in part["records"].values():
                for entry in record["shards"]:
                    if sizes[folder].get(entry["name"]) != entry["bytes"]:
                        raise UserError(
                            f"shard {folder / entry['name']} is missing or differs in size from its part manifest; "
                            "prepare that part again"
                        )
                    for name in (f"{entry['name']}.idx", entry["name"]):
                        _bring(folder / name, target / name)
        finish(target, {key: group[0][1][key] for key in SAME}, records)
        tidy(target)


def _check(source: str, parts: list[dict[str, Any]]) -> None:
    wanted = parts[0]["part"][1]
    numbers = [part["part"][0] for part in parts]
    if any(part["fingerprint"] != parts[0]["fingerprint"] or part["part"][1] != wanted for part in parts):
        raise UserError(
            f"the parts of {source} were prepared with different inputs, options or numbers of parts; prepare them all "
            "the same way"
        )
    if missing := sorted(set(range(1, wanted + 1)) - set(numbers)):
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise UserError(f"{source}: {len(missing)} of {wanted} parts are missing ({shown}); prepare them, then merge")
    if len(numbers) > wanted:
        raise UserError(f"{source}: a part occurs twice (numbers {sorted(numbers)}); name each folder once")


def _bring(here: Place, there: Place) -> None:
    """Put a file into the merged folder: by hard link where the file system allows it, else by copy."""
    if isinstance(here, Path) and isinstance(there, Path):
        if here.resolve() != there.resolve():
            write_atomically(there, partial(_link_or_copy, here))
    elif here != there:
        with fetched(here) as copy:
            send(copy, there)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
