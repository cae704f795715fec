"""A whole few-shot evaluation: many queries, each with its own demonstrations from one support set.

The peer's model does what open_flamingo's evaluation does for a batch: the images of every prompt are stacked and
encoded, demonstrations again for each query that shows them, then tokens are generated or class names ranked. Ours goes
through `eval.inference.engine` as `python -m eval` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sizes import Size
from benchmarks.table import largest_difference, print_table, verdict
from benchmarks.work import IGNORED, SHOT_TOKENS, Row, class_names, image_id
from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache, ImageStore
from eval.inference.model import FlamingoResponder
from eval.prompting.prompts import Decoding, EncodedPrompt, Request
from eval.task import EncodedImage
from flamingo import FlamingoProcessor

NEW_TOKENS = 5  # of an answer to a question, as open_flamingo's evaluation has it
BATCH = 8  # its default
Figures = dict[str, Any]


class Work:
    """Queries and support of an image and eight tokens each; a query's demonstrations are drawn from the support."""

    def __init__(self, size: Size) -> None:
        self.size = size
        generator = torch.Generator().manual_seed(7)
        count = size.eval_queries + size.eval_support
        shape = (count, 3, size.image_size, size.image_size)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.tokens = torch.randint(10, size.vocab, (count, SHOT_TOKENS), generator=generator)
        self.tokens[:, 0], self.tokens[:, -1] = image_id(size), image_id(size) + 1
        orders = [torch.randperm(size.eval_support, generator=generator) for _ in range(size.eval_queries)]
        self._demos = [(size.eval_queries + order).tolist() for order in orders]

    def items(self, query: int, shots: int, fixed: bool = False) -> list[int]:
        """Return the items of a prompt: demonstrations (`fixed`: those of the first query), then the query."""
        return [*self._demos[0 if fixed else query][:shots], query]

    def row(self, query: int, shots: int, fixed: bool = False) -> Row:
        """Return the prompt of a query, which ends where the answer begins."""
        items = self.items(query, shots, fixed)
        ids = self.tokens[items].flatten()[:-1]
        return Row(ids, self.images[items], torch.full_like(ids, IGNORED))


class RawProcessor:
    """A stand-in for the processor, because the benchmark's text is token ids."""

    bos_token_id = None
    start_ids: Sequence[int] = ()
    turns = None  # its prompts are no conversations

    def __init__(self, size: Size) -> None:
        self.image_token_id, self.eoc_token_id = image_id(size), image_id(size) + 1
        self.eos_token_id, self.pad_token_id = 2, 1

    def pad(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return FlamingoProcessor.pad(self, ids, "left")  # type: ignore[arg-type]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class RawResponder(FlamingoResponder):
    """The evaluation's responder; an image's file is its raw pixels."""

    def __init__(self, model: Any, size: Size, share_prefix: bool = True) -> None:
        super().__init__(model, RawProcessor(size), share_prefix=share_prefix)  # type: ignore[arg-type]
        self._side = size.image_size

    def _pixels(self, image: EncodedImage) -> Tensor:
        pixels = torch.frombuffer(bytearray(image.frames[0]), dtype=torch.uint8)
        return pixels.view(1, 1, 3, self._side, self._side)


def requests(work: Work, shots: int, names: list[list[int]] | None, queries: int, fixed: bool = False) -> list[Request]:
    """Return a request for each query: an answer to generate, or names to rank."""
    files = [EncodedImage((image.numpy().tobytes(),)) for image in work.images]
    result = []
    for query in range(queries):
        images = tuple(files[item] for item in work.items(query, shots, fixed))
        ids = tuple(work.row(query, shots, fixed).ids.tolist())
        candidates = tuple(tuple(name) for name in names or ())
        shared = (shots * SHOT_TOKENS, shots) if fixed else (0, 0)
        prompt = EncodedPrompt(ids, images, candidates, ((None, ""),), shots, shared)
        result.append(Request(prompt, None if names else Decoding(NEW_TOKENS)))
    return result


def ours(library: Any, work: Work, shots: int, names: list[list[int]] | None, queries: int) -> Figures:
    """Run this library: at `shots`, then at half of them with the images' features read from disk.

    Then run all queries with the same demonstrations twice: with their prefix shared, and as whole prompts.
    """
    responder = RawResponder(library.model, work.size)
    with tempfile.TemporaryDirectory() as folder:
        seconds, values, encoded = [], [], []
        for count in (shots, shots // 2):
            cache = FeatureCache(responder, store=ImageStore(Path(folder), "benchmark", 1 << 40))
            asked = requests(work, count, names, queries)
            start = time.perf_counter()
            values.append(Engine(responder, cache, BATCH).ask(asked))
            seconds.append(time.perf_counter() - start)
            encoded += [cache.encoded, len(cache.images)]
        fixed = []
        for share in (True, False):
            # Images are encoded before the clock starts: only the text is compared.
            own = RawResponder(library.model, work.size, share)
            cache = FeatureCache(own, store=ImageStore(Path(folder), "benchmark", 1 << 40))
            asked = requests(work, shots, names, queries, fixed=True)
            cache.features([image for request in asked for image in request.prompt.images])
            start = time.perf_counter()
            Engine(own, cache, BATCH).ask(asked)
            fixed.append(time.perf_counter() - start)
    flat = [row if isinstance(row, list) else row.text.split() for row in values[0]]
    answers = [x if names else int(x) for row in flat for x in row]
    facts = {"encoded": encoded[0], "distinct": encoded[1], "again_s": seconds[1], "again_encoded": encoded[2]}
    facts |= {"fixed_s": fixed[0], "fixed_whole_s": fixed[1]}
    return {"seconds": seconds[:1], "values": answers, **facts}


def peer(library: Any, work: Work, shots: int, names: list[list[int]] | None, queries: int) -> Figures:
    """Run open_flamingo batch by batch; a hook counts the images that its encoder is given."""
    counted: list[int] = []
    encoder: nn.Module = library.model.vision_encoder
    handle = encoder.register_forward_pre_hook(lambda module, given: counted.append(len(given[0])))
    values: list[Any] = []
    rows = [work.row(query, shots) for query in range(queries)]
    start = time.perf_counter()
    for first in range(0, queries, BATCH):
        batch = rows[first : first + BATCH]
        if names:
            values += [score for row in batch for score in library.rank(row, names)]
        else:
            values += library.answers(batch, NEW_TOKENS)
    seconds = time.perf_counter() - start
    handle.remove()
    distinct = len({item for query in range(queries) for item in work.items(query, shots)})
    return {"seconds": [seconds], "values": values, "encoded": sum(counted), "distinct": distinct}


def evaluate(library: Any, size: Size, names: list[list[int]] | None, queries: int, shots: int) -> Figures:
    """Run either library; one query first, so that start-up is not timed."""
    run: Callable[..., Figures] = ours if type(library).__name__ == "Ours" else peer
    work = Work(size)
    run(library, work, 1, names and names[:2], 1)
    return run(library, work, shots, names, queries)


def questions(library: Any, size: Size, options: argparse.Namespace) -> Figures:
    """Generate answers."""
    return evaluate(library, size, None, size.eval_queries, options.shots)


def classes(library: Any, size: Size, options: argparse.Namespace) -> Figures:
    """Rank class names."""
    return evaluate(library, size, class_names(size), size.eval_ranked, options.shots)


WHAT: dict[str, Callable[[Any, Size, argparse.Namespace], Figures]] = {
    "eval_questions": questions,
    "eval_classes": classes,
}
EVAL_AT_MOST = {"eval_questions": 1 / 3, "eval_classes": 1 / 15}
"""The wanted share of the peer's time, at size small."""


def print_evaluation(document: dict[str, Any]) -> None:
    """Print a table of time, share of the peer's time and images encoded, if any of it was measured."""
    results = [result for result in document["results"] if result["name"] == "eval_speed"]
    if not results:
        return
    head = ["few-shot evaluation", "library", "s", "share of peer's", "wanted", "encoded / distinct", "again at half"]
    lines = [[*head, "same demonstrations for all", "difference"], ["---"] * 9]
    for result in results:
        others = [r for r in results if r["what"] == result["what"] and r["library"] == "peer"]
        seconds, share, wanted, apart = result["seconds"][0], "1", "", ""
        if others and result["library"] == "ours":
            ratio = seconds / others[0]["seconds"][0]
            share = f"{ratio:.3f}"
            wanted = verdict(ratio, EVAL_AT_MOST[result["what"]] if document["size"] == "small" else None)
            apart = largest_difference(result, others[0])
        again = f"{result['again_s']:.2f} s, {result['again_encoded']} encoded" if "again_s" in result else ""
        fixed = f"{result['fixed_s']:.2f} s, whole {result['fixed_whole_s']:.2f} s" if "fixed_s" in result else ""
        work = f"{result['what'].removeprefix('eval_')}, {result['shots']} shots"
        seen = f"{result['encoded']} / {result['distinct']}"
        lines.append([work, result["library"], f"{seconds:.2f}", share, wanted, seen, again, fixed, apart])
    print()
    print_table(lines)
