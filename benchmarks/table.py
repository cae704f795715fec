"""Results as Markdown tables, ours as a share of the peer's."""

from __future__ import annotations

from statistics import median
from typing import Any

TITLES = {
    "decode_step": "decode step",
    "first_token": "time to first token, beam 3",
    "ranking": "ranking of class names",
    "train_step": "training step",
    "shots": "decode step",
    "cost": "forward pass",
}
AT_MOST = {"decode_step": 1 / 3, "first_token": 0.4, "ranking": 1 / 15, "train_step": 0.65}
"""The wanted share of the peer's time, at size small."""
MEMORY_AT_MOST = {"fp32": 0.72, "fused": 0.72, "bf16_state_8bit": 0.5}

Result = dict[str, Any]


def largest_difference(result: Result, reference: Result) -> str:
    """Compare what both computed: the largest difference of logits, scores or losses; how many tokens are the same."""
    a, b = result["values"], reference["values"]
    if all(isinstance(x, int) for x in a):
        same = sum(x == y for x, y in zip(a, b, strict=False))
        return "same tokens" if a == b else f"{same} of {len(b)} tokens the same"
    return f"{max(abs(x - y) for x, y in zip(a, b, strict=True)):.1e}"


def _is_idefics(result: Result) -> bool:
    """Return whether a result is the second peer's, or with its weights."""
    return "idefics" in (result["library"], result["variant"])


def title(result: Result) -> str:
    """Return what was measured, with its options."""
    own = [f"{result[key]} {key}" for key in ("shots", "images", "tokens") if key in result]
    return ", ".join([TITLES[result["name"]], *own])


def verdict(share: float, limit: float | None) -> str:
    """Return the wanted share, and whether it is reached."""
    return "" if limit is None else f"{limit:.3f}: {'yes' if share <= limit else 'NO'}"


def row(result: Result, reference: Result | None, judge: bool) -> list[str]:
    """Return one line of the table."""
    seconds = median(result["seconds"])
    cells = [title(result), f"{result['library']} {result['variant']}", f"{1000 * seconds:.1f}"]
    cells += [f"{result['flop'] / 1e9:.3g}", f"{result['flop'] / result['needed']:.2f}" if result["needed"] else ""]
    cells += [f"{result['peak_bytes'] / 2**30:.2f}"]
    if reference is None or reference is result:
        return [*cells, "1", "", ""]
    share = seconds / median(reference["seconds"])
    limit = AT_MOST.get(result["name"]) if judge and result["library"] == "ours" and not _is_idefics(result) else None
    return [*cells, f"{share:.3f}", verdict(share, limit), largest_difference(result, reference)]


def memory(result: Result, reference: Result | None, judge: bool) -> list[list[str]]:
    """Return the lines on the peak memory of a training step."""
    if reference is None or result["name"] != "train_step" or result is reference:
        return []
    share = result["peak_bytes"] / reference["peak_bytes"]
    limit = MEMORY_AT_MOST.get(result["variant"]) if judge else None
    cells = ["peak memory of that step", f"{result['library']} {result['variant']}", "", "", ""]
    peak = f"{result['peak_bytes'] / 2**30:.2f}"
    return [[*cells, peak, f"{share:.3f}", verdict(share, limit), ""]]


def print_tables(document: dict[str, Any]) -> None:
    """Print all results, each compared with the peer's on the same work."""
    about = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    print(f"size {document['size']}; {about}\n")
    head = ["", "library", "ms", "GFLOP", "x needed", "peak GiB", "share of peer's", "wanted", "difference"]
    lines = [head, ["---"] * len(head)]
    results: list[Result] = document["results"]
    judge = document["size"] == "small"
    titled = [result for result in results if result["name"] in TITLES]
    for result in titled:
        same = [r for r in results if title(r) == title(result) and r["name"] == result["name"]]
        other = "idefics" if _is_idefics(result) else "peer"
        reference = next((r for r in same if (r["library"], r["variant"]) == (other, "fp32")), None)
        lines.append(row(result, reference, judge))
        lines += memory(result, reference, judge)
    print_table(lines if titled else [])


def print_table(lines: list[list[str]]) -> None:
    """Print lines of cells as Markdown."""
    for line in lines:
        print("| " + " | ".join(line) + " |")
