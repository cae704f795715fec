"""One measurement of one library, in a process of its own; prints one line of JSON.

python -m benchmarks.measure decode_step --library ours --size tiny
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import arithmetic, evaluation, steps
from benchmarks.sizes import SIZES, Size
from benchmarks.work import Row, class_names, prompt, row, training_steps

Figures = dict[str, Any]
"""seconds (a list), flop (of one timed unit), needed (the same by arithmetic), values (to compare)."""


class Library(Protocol):
    """What both libraries offer to be measured."""

    model: Any

    def generate(self, row: Row, new_tokens: int, beams: int, stamp: Any) -> list[int]: ...
    def rank(self, row: Row, names: list[list[int]]) -> list[float]: ...
    def forward(self, row: Row) -> Tensor: ...
    def train_step(self, rows: list[Row]) -> float: ...


class Stamps:
    """A logits processor that reads a clock, or the count of operations so far, at every new token."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.at: list[float] = [read()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.at.append(self.read())
        return scores

    def steps(self) -> list[float]:
        """Return the differences between readings: what each token took; the first took the whole prompt."""
        return [after - before for before, after in zip(self.at, self.at[1:], strict=False)]


def timed(work: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Return the seconds of `repeats` calls after a warm-up, and the last call's result."""
    result = work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def counter() -> FlopCounterMode:
    """Return torch's counter with what it lacks: the encoder's whole attention layer, and before 2.15 CPU attention."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._native_multi_head_attention: _attention_layer,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _attention_layer(query: tuple[int, int, int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count projections to queries, keys and values, both products and the projection back; `query` is (B, T, D)."""
    batch, tokens, width = query
    return batch * (8 * tokens * width**2 + 4 * tokens**2 * width)


def counted(work: Callable[[], Any]) -> int:
    """Return the operations of one call."""
    with counter() as counting:
        work()
    return counting.get_total_flops()


def generation(
    library: Library, work: Row, new_tokens: int, beams: int, repeats: int
) -> tuple[list[list[float]], list[float], list[int]]:
    """Return seconds (a list for each repeat) and operations of every token, and the tokens."""
    tokens: list[int] = []
    seconds: list[list[float]] = []
    for _ in range(repeats + 1):
        clock = Stamps(time.perf_counter)
        tokens = library.generate(work, new_tokens, beams, clock)
        seconds.append(clock.steps())
    with counter() as counting:
        count = Stamps(counting.get_total_flops)
        library.generate(work, new_tokens, beams, count)
    return seconds[1:], count.steps(), tokens


def decode_step(library: Library, size: Size, options: argparse.Namespace) -> Figures:
    """Measure every token after the first."""
    work = prompt(size, options.shots)
    seconds, flop, tokens = generation(library, work, size.new_tokens + 1, 1, options.repeats)
    each = [step for run in seconds for step in run[1:]]
    needed = arithmetic.decode_step(size, options.shots)
    return {"seconds": each, "flop": sum(flop[1:]) / size.new_tokens, "needed": needed, "values": tokens}


def first_token(library: Library, size: Size, options: argparse.Namespace) -> Figures:
    """Measure from the images' pixels to the first token, with three beams."""
    seconds, flop, tokens = generation(library, prompt(size, options.shots), 1, 3, options.repeats)
    first = [run[0] for run in seconds]
    return {"seconds": first, "flop": flop[0], "needed": arithmetic.first_token(size, options.shots), "values": tokens}


def ranking(library: Library, size: Size, options: argparse.Namespace) -> Figures:
    """Measure scoring all names after one prompt, from the images' pixels on."""
    work, names = prompt(size, options.shots), class_names(size)
    seconds, scores = timed(lambda: library.rank(work, names), options.repeats)
    flop = counted(lambda: library.rank(work, names))
    return {"seconds": seconds, "flop": flop, "needed": arithmetic.ranking(size, options.shots), "values": scores}


def train_step(library: Library, size: Size, options: argparse.Namespace) -> Figures:
    """Measure forward, backward, clipping and AdamW, over rows with different numbers of images."""
    steps = training_steps(size)
    losses = [library.train_step(steps[0])]
    seconds = []
    for rows in steps[1:]:
        start = time.perf_counter()
        losses.append(library.train_step(rows))
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes()
    flop = counted(lambda: [library.train_step(rows) for rows in steps[1:]]) / len(steps[1:])
    needed = arithmetic.train_step(size)
    return {"seconds": seconds, "flop": flop, "needed": needed, "values": losses, "peak_bytes": peak}


def forward(library: Library, size: Size, options: argparse.Namespace) -> Figures:
    """Measure one document without a cache, with all its logits."""
    work = row(size, options.images, options.tokens, seed=0)
    seconds, logits = timed(lambda: library.forward(work), options.repeats)
    flop = counted(lambda: library.forward(work))
    needed = arithmetic.forward(size, options.images, options.tokens)
    return {"seconds": seconds, "flop": flop, "needed": needed, "values": logits[:256].tolist()}


WHAT: dict[str, Callable[[Library, Size, argparse.Namespace], Figures]] = {
    "decode_step": decode_step,
    "first_token": first_token,
    "ranking": ranking,
    "train_step": train_step,
    "forward": forward,
}


def peak_bytes() -> int:
    """Return the peak memory of this process so far, Python and the libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(library: str, size: Size, variant: str) -> Library:
    """Return the library with its model."""
    if "idefics" in (library, variant):
        from benchmarks.idefics import Idefics, OursAsIdefics

        return Idefics(size) if library == "idefics" else OursAsIdefics(size)
    if library == "ours":
        from benchmarks.ours import Ours

        return Ours(size, variant)
    from benchmarks.peer import Peer

    return Peer(size, variant)


def main() -> None:
    """Take one measurement and print its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*WHAT, *evaluation.WHAT, *steps.WHAT])
    parser.add_argument("--library", choices=["ours", "peer", "idefics"], required=True)
    parser.add_argument("--variant", default="fp32", help="ours: as in ours.py, idefics; peer: fp32, copied_cache")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    imported = peak_bytes()
    library = build(options.library, size, options.variant)
    if options.what not in ("train_step", "step_cost"):
        library.model.requires_grad_(False)  # FlopCounterMode stumbles over parameters that are passed on as they are
    built = peak_bytes()
    figures = (WHAT | evaluation.WHAT | steps.WHAT)[options.what](library, size, options)
    if "idefics" in (options.library, options.variant):
        figures["needed"] = 0  # the arithmetic is of open_flamingo's shape
    print(json.dumps({"peak_bytes": peak_bytes(), "built_bytes": built, "imported_bytes": imported} | figures))


if __name__ == "__main__":
    main()
