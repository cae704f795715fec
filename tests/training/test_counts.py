"""Counts of bad samples survive a resume: totals, the limit's window, and the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.errors import BadSample, BadSampleCounter, BadSampleLog
from data.shards.index import build_index, index_path
from flamingo.errors import UserError
from tests.training.commands import lines
from tests.training.world import config, write_world
from train import train


def bad(number: int) -> BadSample:
    return BadSample("pages", "undecodable", "a.tar", f"k{number}", "cut")


def test_the_limit_goes_on_where_it_was() -> None:
    counter = BadSampleCounter(max_rate=0.0, grace=3)
    counter.add(8, [bad(0), bad(1)])
    counter.add(8, [bad(1)])
    state = json.loads(json.dumps(counter.state_dict()))
    resumed = BadSampleCounter(max_rate=0.0, grace=3)
    resumed.load_state_dicts([state])
    assert (resumed.seen, resumed.total, resumed.by_sample) == (counter.seen, counter.total, counter.by_sample)
    with pytest.raises(UserError, match="4 of 24 samples were bad"):
        resumed.add(8, [bad(2)])
    together = BadSampleCounter()
    together.load_state_dicts([state, state])
    assert (together.seen, together.total, together.by_reason()) == (32, 6, {("pages", "undecodable"): 6})


def test_the_window_forgets_as_before() -> None:
    one, other = BadSampleCounter(window=20), BadSampleCounter(window=20)
    for step in range(7):
        one.add(5, [bad(step)] * (step % 2))
    other.load_state_dicts([one.state_dict()])
    for counter in (one, other):
        counter.add(5, [])
    assert one.state_dict() == other.state_dict()


def test_files_of_processes_that_are_no_more_lose_what_is_done_again(tmp_path: Path) -> None:
    file = tmp_path / "bad_samples.jsonl"
    for rank in range(3):
        for step in (1, 2):
            BadSampleLog(file, rank, 3).write(step, [bad(rank)])
    BadSampleLog(file, 0, 2).start(2)
    kept = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert kept == {"bad_samples.jsonl": 1, "bad_samples-rank-00001.jsonl": 2, "bad_samples-rank-00002.jsonl": 1}


def test_a_resumed_run_logs_the_same_numbers(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    for tar in sorted((world / "pages").glob("*.tar")):
        content = tar.read_bytes()
        at = content.find(b"\x89PNG")
        tar.write_bytes(content[: at + 20] + bytes(40) + content[at + 60 :])
        build_index(tar).save(index_path(tar))
    (world / "pages" / "_dataset.json").unlink()
    train(config(world, tmp_path / "whole", "flamingo", steps=6))
    for steps in (4, 6):
        train(config(world, tmp_path / "parts", "flamingo", steps=steps))
    whole, parts = (
        [(line["loss"], line["bad_samples"]) for line in lines(tmp_path / name)] for name in ("whole", "parts")
    )
    assert whole == parts
    assert whole[-1][1] > 0
