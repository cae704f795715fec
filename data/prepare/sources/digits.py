"""scikit-learn's bundled photographs of handwritten digits (1,797 of 8x8 pixels) as interleaved documents.

    OUT/train/naming    documents "<digit> seven <digit> two ...": digits under the names they have
    OUT/train/binding   documents "<digit> kibo <digit> lumo ...": made-up names that hold for the document
    OUT/train/pairs     <digit> the digit seven
    OUT/heldout         one document for each image kept out of training: its digit, and names kept out of training

In a binding document an image may be repeated exactly (`--repeats`), which is what a model learns first; the first
mention of a name cannot be known and is not in the loss. Which images are held out does not depend on the seed.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from data.shards.writer import Document, Image, Node, ShardWriter, Text
from data.toy.names import draw_names
from data.toy.streams import stream
from flamingo.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELDOUT_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Digit:
    """A photograph of a digit, encoded."""

    number: int
    png: bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare digits`."""
    parser.add_argument(
        "--documents", type=int, default=4000, help="binding documents for training, and as many naming documents"
    )
    parser.add_argument("--ways", type=int, default=2, help="digits in a document")
    parser.add_argument("--shots", type=int, default=3, help="examples of each, on average")
    parser.add_argument("--repeats", type=float, default=0.5, help="share of exact repetitions of an earlier image")
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents-per-shard", type=int, default=1000)


def run(args: argparse.Namespace) -> None:
    """Write the shards. Raises UserError for an invalid option."""
    if args.documents < 1 or args.shots < 1 or args.size < 8 or args.documents_per_shard < 1:
        raise UserError("--documents, --shots and --documents-per-shard must be at least 1, --size at least 8")
    if not 1 <= args.ways <= len(WORDS) or not 0 <= args.repeats <= 1:
        raise UserError(f"--ways must be between 1 and {len(WORDS)}, --repeats between 0 and 1")
    train, heldout = load_digits(args.size)
    made = {"source": "scikit-learn digits", "size": args.size, "seed": args.seed}
    out, per_shard = Path(args.out), args.documents_per_shard
    options = {"ways": args.ways, "shots": args.shots, "repeats": args.repeats}
    with ShardWriter(out / "train" / "binding", "digits-binding", per_shard, meta=made | options) as writer:
        for index in range(args.documents):
            random = stream(args.seed, "digits/binding", index)
            writer.write(binding_document(train, random, ways=args.ways, shots=args.shots, repeats=args.repeats))
    with ShardWriter(out / "train" / "naming", "digits-naming", per_shard, meta=made) as writer:
        for index in range(args.documents):
            writer.write(naming_document(train, stream(args.seed, "digits/naming", index)))
    with ShardWriter(out / "train" / "pairs", "digits-pairs", per_shard, layout="pairs", meta=made) as writer:
        for digit in train:
            document = Document("", [Image((0,)), Text(f"the digit {WORDS[digit.number]}")], [digit.png])
            document.meta = {"class": str(digit.number)}
            writer.write(document)
    with ShardWriter(out / "heldout", "digits-heldout", per_shard, meta=made) as writer:
        for index, digit in enumerate(heldout):
            names = draw_names(stream(args.seed, "digits/heldout", index), "heldout", 2)
            nodes: list[Node] = [Image((0,)), Text(f" {WORDS[digit.number]}")]
            writer.write(Document("", nodes, [digit.png], {"class": str(digit.number), "names": names}))
    documents = f"{args.documents} naming and {args.documents} binding documents"
    print(f"{documents}, {len(train)} pairs, {len(heldout)} held-out images in {out}")


def load_digits(size: int) -> tuple[list[Digit], list[Digit]]:
    """Return (training, held-out) digits as PNGs of `size` pixels a side, sorted by class."""
    from sklearn.datasets import load_digits as bundled  # takes a second: only when it is needed

    table = bundled()
    train: list[Digit] = []
    heldout: list[Digit] = []
    for number in range(len(WORDS)):
        rows = np.flatnonzero(table.target == number)
        rows = rows[stream(0, "digits/split", number).permutation(len(rows))]
        cut = round(len(rows) * HELDOUT_SHARE)
        heldout += [Digit(number, encode(table.images[row], size)) for row in rows[:cut]]
        train += [Digit(number, encode(table.images[row], size)) for row in rows[cut:]]
    return train, heldout


def encode(image: np.ndarray, size: int) -> bytes:
    """Return an (8, 8) image of ink from 0 to 16 as a PNG of an RGB image, the ink bright as in the original."""
    grey = PILImage.fromarray(np.uint8(np.clip(image * 15.9375, 0, 255)))
    file = io.BytesIO()
    grey.resize((size, size), PILImage.Resampling.BICUBIC).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def naming_document(digits: list[Digit], random: np.random.Generator, most: int = 9) -> Document:
    """Return one to `most` different images of any digits, each with the digit's name."""
    chosen = [digits[int(i)] for i in random.choice(len(digits), size=int(random.integers(1, most + 1)), replace=False)]
    nodes: list[Node] = []
    for number, digit in enumerate(chosen):
        nodes += [Image((number,)), Text(f" {WORDS[digit.number]}")]
    return Document("", nodes, [digit.png for digit in chosen], {"classes": [str(digit.number) for digit in chosen]})


def binding_document(
    digits: list[Digit], random: np.random.Generator, *, ways: int, shots: int, repeats: float, split: str = "train"
) -> Document:
    """Return `ways` digits under names of `split`, ways * shots + 1 images in random order."""
    classes = random.choice(len(WORDS), size=ways, replace=False)
    names = draw_names(random, split, ways)
    order = random.integers(ways, size=ways * shots + 1)  # in a balanced order the rarer name could be counted out
    pools = [[digit for digit in digits if digit.number == number] for number in classes]
    fresh = [iter(random.permutation(len(pool))) for pool in pools]
    document = Document("", [], [], {"classes": [str(number) for number in classes], "names": names, "shots": shots})
    shown: list[list[int]] = [[] for _ in range(ways)]
    for way in order:
        known = bool(shown[way])
        if known and random.random() < repeats:
            number = shown[way][int(random.integers(len(shown[way])))]
        else:
            number = len(document.images)
            document.images.append(pools[way][int(next(fresh[way]))].png)
            shown[way].append(number)
        document.nodes += [Image((number,)), Text(f" {names[way]}", loss=known)]
    document.meta["answer"] = names[order[-1]]
    return document
