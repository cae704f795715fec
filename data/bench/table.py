"""Runs the measurements, alternating so that a busy machine affects both sides alike, and prints the results."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from data.bench.material import Material, write
from flamingo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORK = (("mmc4", "open_flamingo's MMC4 shards"), ("pairs", "pairs"), ("raw", "the same documents, raw members"))
# What the loader promises: documents per second and core relative to the peer, and absolute limits.
LEAST_RATIO = {"mmc4": 3.0, "pairs": 2.5}
MOST_WAIT = 0.02
"""Of a training step's time, waiting for data."""
MOST_PRIVATE, MOST_AMPLIFICATION, LEAST_INDEX_RATE, LEAST_FILL = 300e6, 1.05, 100_000, 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data bench`."""
    parser.add_argument("--out", type=Path, default=Path("runs/bench-data"), metavar="DIR", help="shards and results")
    parser.add_argument("--documents", type=int, default=480)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3, help="times that each side is measured")
    parser.add_argument("--workers", type=int, default=1, help="processes of each loader")
    parser.add_argument("--count", type=int, default=20, help="batches of a measurement")
    parser.add_argument("--warm", type=int, default=6, help="batches before it, which are not counted")
    parser.add_argument("--layers", type=int, default=12, help="of each backbone of the model that pairs are fed to")
    parser.add_argument("--without-peer", action="store_true", help="measure this loader only")


def run(args: argparse.Namespace) -> int:
    """Measure and print; status 1 when a promise is not kept."""
    if min(args.documents, args.pairs, args.rounds, args.workers, args.count, args.layers) < 1:
        raise UserError("bench: --documents, --pairs, --rounds, --workers, --count and --layers must be at least 1")
    if not args.without_peer:
        from data.bench.peer import module

        module()  # says at once when it is not there
    material = write(args.out, args.documents, args.pairs, shards=4)
    measurements: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(args.rounds):
        for what, _ in WORK:
            for who in ("ours",) if what == "raw" or args.without_peer else ("peer", "ours"):
                measurements.setdefault((who, what), []).append(measured(who, what, args))
                print(f"round {turn + 1} of {args.rounds}: {who} {what}", file=sys.stderr, flush=True)
    (args.out / "rounds.json").write_text(
        json.dumps({f"{who} {what}": measurement for (who, what), measurement in measurements.items()})
    )
    rows = speed_rows(measurements)
    rows += limit_rows(material, args.documents, measurements)
    rows += feeding_rows(args)
    (args.out / "bench.json").write_text(json.dumps([row[:-1] for row in rows], indent=1))
    print(f"{'':50} {'peer':>8} {'ours':>8}  {'ratio (least to most)':21}  promised")
    for label, peer, ours, ratio, promise, kept in rows:
        print(f"{label:50} {peer:>8} {ours:>8}  {ratio:21}  {promise:10} {'' if kept else 'NOT KEPT'}".rstrip())
    return 0 if all(kept for *_, kept in rows) else 1


def measured(who: str, what: str, args: argparse.Namespace) -> dict[str, float]:
    """Return one measurement of a loader alone."""
    options = {
        "--workers": args.workers,
        "--warm": args.warm,
        "--count": args.count,
        "--batch": 64 if what == "pairs" else 16,
    }
    return in_a_process(["measure", who, what, str(args.out.resolve())], options)


def in_a_process(words: list[str], options: dict[str, int]) -> dict[str, float]:
    """Run a module of this folder in a fresh process. Raises UserError with its last line when it fails."""
    command = [sys.executable, "-m", f"data.bench.{words[0]}", *words[1:]]
    command += [str(part) for option in options.items() for part in option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        raise UserError(f"the measurement {' '.join(words)} failed: {last}")
    result: dict[str, float] = json.loads(lines[-1])
    return result


TableRow = tuple[str, str, str, str, str, bool]
"""Label, peer, ours, ratio, what is promised, whether it is kept."""


def speed_rows(measurements: dict[tuple[str, str], list[dict[str, float]]]) -> list[TableRow]:
    """Return rows for documents and images per second and core, and for private memory.

    The two loaders ran one right after the other in each round, so the ratio is the median of the rounds' own ratios,
    shown with the smallest and largest. The rates are medians too, and mean less on a busy machine.
    """
    rows: list[TableRow] = []
    for what, label in WORK:
        for count in ("documents", "images"):
            rates = {
                who: [measurement[count] / measurement["cpu"] for measurement in measurements[who, what]]
                for who in ("peer", "ours")
                if (who, what) in measurements
            }
            ours = f"{statistics.median(rates['ours']):.1f}"
            name = f"{label}: {'seen images' if count == 'images' else count}/s/core"
            if "peer" not in rates:
                rows.append((name, "", ours, "", "", True))
                continue
            ratios = sorted(mine / theirs for mine, theirs in zip(rates["ours"], rates["peer"], strict=True))
            middle = statistics.median(ratios)
            spread = f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            least = LEAST_RATIO[what] if count == "documents" else 0.0
            kept = middle >= least
            rows.append(
                (name, f"{statistics.median(rates['peer']):.1f}", ours, spread, f">= {least}" * bool(least), kept)
            )
    for what, label in WORK:
        most = {
            w: max(measurement["private"] for measurement in measurements[w, what])
            for w in ("peer", "ours")
            if (w, what) in measurements
        }
        peer_memory = f"{most['peer'] / 1e6:.0f}" if "peer" in most else ""
        kept = most["ours"] <= MOST_PRIVATE
        rows.append((f"{label}: private MB a worker", peer_memory, f"{most['ours'] / 1e6:.0f}", "", "<= 300", kept))
    return rows


def feeding_rows(args: argparse.Namespace) -> list[TableRow]:
    """Return rows for packed pairs at 224 px, made by two workers for a training step."""
    found = in_a_process(["feeding", str(args.out.resolve())], {"--count": args.count, "--layers": args.layers})
    label, share = "packed pairs, 224 px, 2 workers", f"{found['wait']:.4f}"
    return [
        (f"{label}: share of a step spent waiting", "", share, "", f"<= {MOST_WAIT}", found["wait"] <= MOST_WAIT),
        (f"{label}: loader's share of processor time", "", f"{found['loading']:.3f}", "", "", True),
        (f"{label}: images/s trained on", "", f"{found['images']:.1f}", "", "", True),
    ]


def limit_rows(
    material: Material, documents: int, measurements: dict[tuple[str, str], list[dict[str, float]]]
) -> list[TableRow]:
    """Read amplification, index speed and packing fill."""
    rows: list[TableRow] = []
    for what, label in WORK:
        ours = amplification(material, what)
        rows.append((f"{label}: bytes read/used", "", f"{ours:.3f}", "", "<= 1.05", ours <= MOST_AMPLIFICATION))
    if ("peer", "mmc4") in measurements:
        whole = sum(path.stat().st_size for path in material.mmc4.glob("*.tar"))
        each = statistics.median(
            measurement["read"] / max(measurement["documents"], 1) for measurement in measurements["peer", "mmc4"]
        )
        rows.append((f"{WORK[0][1]}: bytes read/kept", f"{each * documents / whole:.2f}", "", "", "", True))
    rate = index_rate(material.mmc4.parent / "many.tar")
    rows.append(("index: members/s", "", f"{rate:,.0f}", "", ">= 100,000", rate >= LEAST_INDEX_RATE))
    fill, plain = fills(material)
    rows.append(("pairs: share of positions that are tokens", "", f"{plain:.3f}", "", "", True))
    rows.append(
        ("the same, packed in rows of 256", "", f"{fill:.3f}", f"{fill / plain:.2f}", ">= 0.95", fill >= LEAST_FILL)
    )
    return rows


def amplification(material: Material, what: str, steps: int = 12) -> float:
    """Return the bytes read, divided by the bytes of the texts and images used."""
    from data.bench.ours import collate_of, spec_of
    from data.loading.loader import MixLoader

    loader = MixLoader([spec_of(material, what, 16)], collate_of(material, 64), prefetch_factor=0)
    for _ in islice(loader, steps):
        pass
    store = loader.datasets[0].shards
    assert store is not None
    reader = store.reader
    return reader.bytes_read / reader.bytes_used


def index_rate(path: Path, samples: int = 40_000) -> float:
    """Return how many members per second are indexed, for pairs of three small members."""
    import io
    import tarfile

    from data.shards.index import build_index

    if not path.exists():
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(samples):
                for suffix in ("jpg", "txt", "json"):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = 400
                    tar.addfile(info, io.BytesIO(bytes(400)))
    times = []
    for _ in range(3):
        begun = time.process_time()
        built = build_index(path)
        times.append(time.process_time() - begun)
    return len(built.offset) / min(times)


def fills(material: Material) -> tuple[float, float]:
    """Return the share of positions that are not padding in batches of pairs: (packed, plain)."""
    from data.bench.ours import collate_of, spec_of
    from data.loading.loader import MixLoader

    shares = []
    for pack in (256, 0):
        spec: Any = spec_of(material, "pairs", 128, pack=pack)
        loader = MixLoader([spec], collate_of(material, 32), prefetch_factor=0)
        shares.append(statistics.mean(step.batches["pairs"][0].fill for step in islice(loader, 5)))
    return shares[0], shares[1]
