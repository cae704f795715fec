"""Nothing is asked, encoded or lost twice: the log, the image store and the engine between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.inference.engine import Engine, Ranks
from eval.inference.feature_cache import FeatureCache, ImageStore
from eval.inference.response_log import ResponseLog
from eval.prompting.prompts import Completion, Decoding, EncodedPrompt, Request
from eval.runner import Grid, run
from eval.spec import TaskSpec
from eval.task import EncodedImage, Task
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.worlds import COLOURS, Looker, colour_examples
from tests.fixtures import png


def tasks() -> dict[str, Task]:
    colours = TaskSpec(lead=" ", queries=20)
    return {
        "said": ExampleTask("said", colours, colour_examples(60)),
        "ranked": ExampleTask("ranked", TaskSpec(lead=" ", queries=20, output="rank"), colour_examples(60)),
    }


class Counting(Looker):
    """Counts the rows it was asked, and may die behind a number of them, as a killed process does."""

    def __init__(self, dies_after: int | None = None) -> None:
        super().__init__()
        self.rows = 0
        self.batches: list[tuple[tuple[int, ...], ...]] = []
        self._dies_after = dies_after

    def _count(self, prompts: Sequence[EncodedPrompt]) -> None:
        if self._dies_after is not None and self.rows >= self._dies_after:
            raise KeyboardInterrupt
        self.rows += len(prompts)
        self.batches.append(tuple(prompt.ids for prompt in prompts))

    def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
        self._count(prompts)
        return super().rank(prompts, features)

    def generate(self, prompts: Sequence[EncodedPrompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        self._count(prompts)
        return super().generate(prompts, features, max_new_tokens)


GRID = Grid([0, 4], [0, 1], ["real", "blank"], batch_size=8)


def engine(model: Counting, folder: Path, ranks: Ranks | None = None) -> Engine:
    return Engine(model, FeatureCache(model), GRID.batch_size, log=ResponseLog(folder), ranks=ranks, model_key="m")


def test_a_run_that_died_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = Counting()
    expected, _ = run(tasks(), GRID, whole)
    first = Counting(dies_after=70)
    with pytest.raises(KeyboardInterrupt):
        run(tasks(), GRID, first, engine=engine(first, tmp_path))
    with (tmp_path / "responses.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')
    second = Counting()
    mended = engine(second, tmp_path)
    samples, _ = run(tasks(), GRID, second, engine=mended)
    assert samples == expected
    assert 70 <= first.rows < first.rows + second.rows == whole.rows
    assert first.batches + second.batches == whole.batches  # the very batches of an undisturbed run
    third = Counting()
    again = engine(third, tmp_path)
    samples, cache = run(tasks(), GRID, third, engine=again)
    assert (samples, third.rows, third.encode_calls, again.asked) == (expected, 0, 0, 0)
    assert cache.shown == sum(len(s.turns) for s in samples)


def test_the_log_keeps_whole_lines_and_asks_again_what_it_cannot_read(tmp_path: Path) -> None:
    log = ResponseLog(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing is written before there is something to write
    log.append([("a", Completion("x\ny", True, -0.5)), ("b", [-1.0, -float("inf")])])
    other = ResponseLog(tmp_path, rank=1)
    other.append([("c", Completion("ünë", False))])
    path = tmp_path / "responses.jsonl"
    path.write_bytes(path.read_bytes() + b'not json\n{"key": "d", "response": 3}\n{"key": "e"')
    read = ResponseLog(tmp_path)
    assert read.unreadable == 2
    assert read.known == {
        "a": Completion("x\ny", True, -0.5),
        "b": [-1.0, -float("inf")],
        "c": Completion("ünë", False),
    }
    read.append([("e", [0.0])])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines() if line.startswith("{")] == list("abde")


def test_equal_requests_are_asked_once_and_other_keys_are_not_mixed_up() -> None:
    model = Counting()
    task = tasks()["ranked"]
    prompt = model.builder.build(task.episode(task.query_ids()[0], 2, 0), 4)
    ranked, said, longer = Request(prompt), Request(prompt, Decoding(4)), Request(prompt, Decoding(5))
    made = Engine(model, FeatureCache(model), 8)
    told: list[int] = []
    found = made.ask([ranked, said, ranked, longer, said], told.append)
    assert model.rows == made.asked == 3
    assert sum(told) == 5
    assert found[0] == found[2]
    assert found[1] == found[3] == found[4]
    keys = {request.key(model_key) for request in (ranked, said, longer) for model_key in ("m", "n")}
    drawn = [Request(prompt, Decoding(4, temperature=0.7, draw=draw)).key("m") for draw in range(2)]
    assert len(keys | set(drawn)) == 8


def test_ranks_share_all_batches_and_merge_each_once() -> None:
    batches = list(range(11))
    shares = [Ranks(rank, 3).mine(batches) for rank in range(3)]
    assert sorted(batch for share in shares for batch in share) == batches
    owners = [[Ranks(rank, 3).owns(f"{i:064x}") for rank in range(3)] for i in range(20)]
    assert all(sum(one) == 1 for one in owners)

    class Twice(Ranks):
        def gathered(self, value):  # type: ignore[no-untyped-def]
            return [value, value]

    with pytest.raises(AssertionError, match="two ranks did the same"):
        Twice().merged({"a": 1})


def images(count: int) -> list[EncodedImage]:
    return [EncodedImage((png(COLOURS["red"], 7000 + index),)) for index in range(count)]


def test_a_second_run_encodes_none(tmp_path: Path) -> None:
    first, second = Looker(), Looker()
    some = images(9)
    one = FeatureCache(first, store=ImageStore(tmp_path, "key", 1 << 20)).features(some)
    two = FeatureCache(second, store=ImageStore(tmp_path, "key", 1 << 20)).features(some[::-1])
    assert torch.equal(one, two.flip(0))
    assert (first.encode_calls, second.encode_calls) == (9, 0)
    other = Looker()
    FeatureCache(other, store=ImageStore(tmp_path, "other weights", 1 << 20)).features(some)
    assert other.encode_calls == 9


def test_a_damaged_file_is_encoded_again(tmp_path: Path) -> None:
    some = images(3)
    FeatureCache(Looker(), store=ImageStore(tmp_path, "key", 1 << 20)).features(some)
    files = sorted(tmp_path.rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:20])
    files[1].write_bytes(b"")
    again = Looker()
    cache = FeatureCache(again, store=ImageStore(tmp_path, "key", 1 << 20))
    assert torch.equal(cache.features(some), FeatureCache(Looker()).features(some))
    assert again.encode_calls == cache.encoded == 2


def test_a_bit_that_flips_anywhere_in_a_file_is_encoded_again(tmp_path: Path) -> None:
    (image,) = images(1)
    expected = FeatureCache(Looker(), store=ImageStore(tmp_path, "key", 1 << 20)).features([image])
    (path,) = tmp_path.rglob("*.safetensors")
    raw = path.read_bytes()
    for at in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        model = Looker()
        cache = FeatureCache(model, store=ImageStore(tmp_path, "key", 1 << 20))
        assert torch.equal(cache.features([image]), expected)
        assert path.read_bytes() == raw, at  # encoded again, or harmless: a blank of the header


def test_the_folder_stays_within_its_limit_and_the_oldest_goes(tmp_path: Path) -> None:
    some = images(12)
    FeatureCache(Looker(), store=ImageStore(tmp_path, "a", 1 << 20)).features(some[:6])
    each = max(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    limit = 8 * each
    model = Looker()
    FeatureCache(model, store=ImageStore(tmp_path, "a", limit)).features([*some[4:6], *some[6:]])
    assert model.encode_calls == 6
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= limit
    kept = {path.stem for path in tmp_path.rglob("*.safetensors")}
    assert {image.sha256 for image in some[4:]} <= kept  # used by this run, so not given up
    # A run that fills the folder alone keeps the rest in memory, and is right all the same.
    small = FeatureCache(Looker(), store=ImageStore(tmp_path / "small", "a", 3 * each))
    assert torch.equal(small.features(some), FeatureCache(Looker()).features(some))
    assert len(list((tmp_path / "small").rglob("*.safetensors"))) <= 3


def test_little_memory_reads_from_disk_instead_of_encoding_again(tmp_path: Path) -> None:
    model, some = Looker(), images(10)
    cache = FeatureCache(model, store=ImageStore(tmp_path, "a", 1 << 20), memory_bytes=100)
    whole = cache.features(some)
    assert torch.equal(torch.cat([cache.features([image]) for image in some]), whole)
    assert model.encode_calls == cache.encoded == 10


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache=.*file"):
        ImageStore(tmp_path / "file", "key", 100)
