"""Any collection of images with their names as documents: captions, names, and made-up names that hold for a document.

    OUT/train/pairs       an image and its caption: its name, and some of its keywords
    OUT/train/naming      documents "<image> onion <image> bus ...": different things under the names they have
    OUT/train/captions    the same with captions
    OUT/train/binding     documents "<image> kibo <image> lumo <image> kibo ...": fast binding, names that hold for the
                          document, for things drawn anew; a share of them with the things' own names
    OUT/heldout/things    a document for each image of the things kept out of training, with names kept out as well
    OUT/heldout/sources   a document for each image of the sources kept out, of things that were trained on

Document i of a kind is a function of the seed and of i: a longer folder begins with the shorter one. The first mention
of a made-up name cannot be known and is not in the loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import chain, count, islice
from pathlib import Path

import numpy as np

from data.prepare.labels import COLUMNS, Collection, Labelled, held_out, read_collection
from data.prepare.units import Tally, options_of
from data.shards.writer import Document, Image, Node, ShardWriter, Text
from data.toy.names import draw_names
from data.toy.streams import stream
from flamingo.errors import UserError

MOST_WAYS = 12  # names of a document share no syllable
KINDS = ("naming", "captions", "binding")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data prepare labelled`."""
    parser.add_argument("inputs", metavar="LABELS", help="table (csv, tsv, jsonl) with image and name, or a folder")
    parser.add_argument("--images", metavar="DIR", help="where a table's paths begin (default: the table's folder)")
    for what, names in COLUMNS.items():
        parser.add_argument(f"--{what}-column", metavar="NAME", help=f"of a table (default {' or '.join(names)})")
    parser.add_argument("--heldout-share", type=float, default=1 / 6, help="of the names (default a sixth)")
    parser.add_argument("--heldout-sources", nargs="*", default=[], metavar="SOURCE", help="never trained on")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=4000, metavar="N", help="documents (default 4000)")
    parser.add_argument("--most", type=int, default=4, help="images in a naming or caption document, at most")
    parser.add_argument("--ways", type=int, nargs="+", default=[2], help="things in a binding document, one drawn each")
    parser.add_argument("--shots", type=int, nargs="+", default=[3], help="images of each, on average, likewise")
    parser.add_argument("--repeats", type=float, default=0.0, help="share of exact repetitions of an earlier image")
    parser.add_argument("--own-names", type=float, default=0.0, help="share of binding documents with real names")
    parser.add_argument("--form", default=" {name}", help="what is said of an image (default ' {name}')")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents-per-shard", type=int, default=1000, metavar="N", help="(default 1000)")


def run(args: argparse.Namespace) -> None:
    """Write the shards and print what was kept and dropped. Raises UserError for an invalid option or input."""
    _check(args)
    tally = Tally()
    columns = {what: value for what in COLUMNS if (value := getattr(args, f"{what}_column")) is not None}
    images = None if args.images is None else Path(args.images)
    collection = read_collection(Path(args.inputs), images, columns, tally)
    kept_out = held_out(collection.things, args.heldout_share)
    sources = sorted({image.source for image in collection.images})
    if unknown := sorted(set(args.heldout_sources) - set(sources)):
        raise UserError(f"--heldout-sources {unknown[0]}: the sources are {', '.join(sources) or 'not given'}")
    seen = [source for source in sources if source not in args.heldout_sources]
    trained = collection.only(set(collection.things) - set(kept_out), seen)
    if len(trained.things) < max(*args.ways, args.most):
        raise UserError(
            f"documents of {max(*args.ways, args.most)} different things need as many names to train on, but there are "
            f"{len(trained.things)}: lower --ways and --most, hold out less, or give more images"
        )
    writer = _Writer(Path(args.out), args, tally, trained, frozenset(kept_out))
    writer.write("train/pairs", (writer.pair(image) for image in trained.images), layout="pairs")
    for kind in KINDS:
        random = (stream(args.seed, f"labelled/{kind}", index) for index in range(getattr(args, kind)))
        writer.write(f"train/{kind}", map(writer.makers[kind], random))
    for name, part in (
        ("things", collection.only(kept_out)),
        ("sources", collection.only(trained.things, args.heldout_sources)),
    ):
        writer.write(f"heldout/{name}", map(writer.asked, part.images, count()))
    things = f"{len(trained.things):,} things to train on, {len(kept_out):,} held out"
    print("\n".join([f"{args.out}: {tally.images:,} images of {things}", *writer.lines, *tally.report()]))


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for an option that makes no sense."""
    if min(args.naming, args.captions, args.binding) < 0 or min(args.documents_per_shard, args.most, *args.shots) < 1:
        raise UserError(
            "the numbers of documents must not be negative, --most, --shots and --documents-per-shard at least 1"
        )
    if not 2 <= min(args.ways) <= max(args.ways) <= MOST_WAYS:
        raise UserError(f"--ways must be between 2 and {MOST_WAYS}")
    for option in ("heldout_share", "repeats", "own_names"):
        if not 0 <= getattr(args, option) <= 1:
            raise UserError(f"--{option.replace('_', '-')} must be between 0 and 1")
    if args.form.count("{name}") != 1:
        raise UserError(f"--form {args.form!r} must hold {{name}} once, as in ' This is a {{name}}.'")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} is outside 0 to 2**63-1")


class _Writer:
    """Makes the documents of a collection and writes its folders; `lines` says what was written."""

    def __init__(
        self, out: Path, args: argparse.Namespace, tally: Tally, trained: Collection, kept_out: frozenset[str]
    ) -> None:
        self.makers: dict[str, Callable[[np.random.Generator], Document]] = {
            "naming": self.naming,
            "captions": self.captions,
            "binding": self.binding,
        }
        self.lines: list[str] = []
        self._out, self._args, self._trained, self._kept_out = out, args, trained, kept_out
        self._things = list(trained.things)
        self._meta = {"source": "labelled", **options_of(args), **tally.to_json()}

    def write(self, folder: str, documents: Iterable[Document], layout: str = "interleaved") -> None:
        """Write a folder of shards; where there is no document no new one, and an older one is emptied."""
        first = list(islice(iterator := iter(documents), 1))
        if not first and not (self._out / folder).exists():
            return
        prefix, per_shard = folder.rpartition("/")[2], self._args.documents_per_shard
        with ShardWriter(self._out / folder, prefix, per_shard, layout=layout, meta=self._meta) as writer:
            for document in chain(first, iterator):
                writer.write(document)
        self.lines.append(f"  {folder}: {sum(shard['documents'] for shard in writer.shards):,} documents")

    def pair(self, image: Labelled) -> Document:
        """Return an image and its caption with all keywords."""
        caption = ", ".join([image.name, *self._words(image)])
        return Document("", [Image((0,)), Text(caption)], [self._trained.read(image)], {"class": image.thing})

    def _words(self, image: Labelled) -> list[str]:
        """Return the keywords that a training document may say: no held-out name, and not the image's own."""
        return [word for word in image.keywords if word.casefold() not in self._kept_out | {image.thing}]

    def naming(self, random: np.random.Generator) -> Document:
        """Return one to `--most` images of different things under their names."""
        return self._said(random, lambda image: image.name)

    def captions(self, random: np.random.Generator) -> Document:
        """Return the same with captions: up to three keywords, in any order, follow the name."""

        def caption(image: Labelled) -> str:
            words = self._words(image)
            chosen = random.permutation(len(words))[: int(random.integers(4))]
            return ", ".join([image.name, *(words[int(number)] for number in chosen)])

        return self._said(random, caption)

    def _said(self, random: np.random.Generator, words: Callable[[Labelled], str]) -> Document:
        number = int(random.integers(1, self._args.most + 1))
        document = Document("", [], [])
        shown = []
        for choice in random.choice(len(self._things), size=number, replace=False):
            images = self._trained.things[self._things[int(choice)]]
            shown.append(images[int(random.integers(len(images)))])
            document.nodes += [Image((len(document.images),)), self._text(words(shown[-1]))]
            document.images.append(self._trained.read(shown[-1]))
        document.meta = {"classes": [image.thing for image in shown], "kind": shown[-1].source}
        return document

    def binding(self, random: np.random.Generator) -> Document:
        """Return ways * shots + 1 images of `ways` things in random order, each followed by the name it has here.

        An image comes again, exactly, with probability `--repeats` and when its thing has no other left.
        """
        args = self._args
        ways, shots = (int(random.choice(choices)) for choices in (args.ways, args.shots))
        things = [self._things[int(i)] for i in random.choice(len(self._things), size=ways, replace=False)]
        own = bool(random.random() < args.own_names)
        pools = [self._trained.things[thing] for thing in things]
        names = [pool[0].name for pool in pools] if own else draw_names(random, "train", ways)
        fresh = [list(random.permutation(len(pool))) for pool in pools]
        document = Document("", [], [], {"classes": things, "names": names, "shots": shots})
        earlier: list[list[int]] = [[] for _ in range(ways)]
        for way in random.integers(
            ways, size=ways * shots + 1
        ):  # in a balanced order the rarer name could be counted out
            known = bool(earlier[way])
            if known and (random.random() < args.repeats or not fresh[way]):
                number = earlier[way][int(random.integers(len(earlier[way])))]
            else:
                number = len(document.images)
                document.images.append(self._trained.read(pools[way][int(fresh[way].pop(0))]))
                earlier[way].append(number)
            document.nodes += [Image((number,)), self._text(names[way], loss=known or own)]
            document.meta["answer"] = names[way]
        return document

    def asked(self, image: Labelled, index: int) -> Document:
        """Return a held-out image under its name, which lists names that training has not seen either."""
        names = draw_names(stream(self._args.seed, "labelled/heldout", index), "heldout", 2)
        meta = {"class": image.thing, "names": names, "kind": image.source}
        return Document("", [Image((0,)), self._text(image.name)], [self._trained.read(image)], meta)

    def _text(self, name: str, loss: bool = True) -> Node:
        return Text(self._args.form.replace("{name}", name), loss)
