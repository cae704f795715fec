"""A document as training samples it: its tokens, which of them are in the loss, and which image each one sees.

The row is cropped by the loader's own functions (`data.batches.tokenize`), so what is shown is what is trained on.
Without a tokenizer, words stand for tokens; there are about a quarter fewer of them.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from data.batches.tokenize import IGNORED, SpecialTokens, TokenRow, begin_of, make_row, tokenize_document, turns_of
from data.dataset import CROPS, LABEL_POLICIES
from data.errors import ContentError
from data.shards.document import Document
from data.tools.show import TEMPLATES, figure
from data.tools.templates import render
from flamingo.errors import UserError

COLOURS = ("#fde2c4", "#d3ecd3", "#d5e3f7", "#f6d6e6", "#e9e4b8", "#cfeeee", "#e3d6f5", "#f3cfc6")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data inspect --sampled`."""
    parser.add_argument("--sampled", action="store_true", help="the row that training would cut out of the document")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a saved model or tokenizer (default: words)")
    parser.add_argument("--max-tokens", type=int, default=256, help="(default 256)")
    parser.add_argument("--max-images", type=int, default=5, help="(default 5)")
    parser.add_argument("--crop", choices=CROPS, default="random", help="(default random)")
    parser.add_argument("--labels", choices=LABEL_POLICIES, default="text", help="(default text)")
    parser.add_argument(
        "--next-image", type=float, default=0.0, metavar="P", help="chance to see the next image (default 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed cuts another crop")


class WordTokenizer:
    """A tokenizer whose tokens are words, with the space before them."""

    turns = "give --tokenizer, the folder of a saved model, whose chat template it is written by"

    def __init__(self) -> None:
        self.known: list[str] = ["<image>", "<EOC>", "<eos>", "<pad>"]
        self.special = SpecialTokens(image=0, eoc=1, eos=2, pad=3)

    def encode(self, text: str) -> list[int]:
        """Return a new id for every word of a text."""
        words = re.findall(r"\s*\S+|\s+$", text)
        self.known += words
        return list(range(len(self.known) - len(words), len(self.known)))

    def text(self, token: int) -> str:
        """Return a token's text."""
        return self.known[token]


class SavedTokenizer:
    """The tokenizer in a folder: of a Flamingo model's processor, or any of transformers'."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        from flamingo.processor import PROCESSOR_FILE, FlamingoProcessor

        if (Path(folder) / PROCESSOR_FILE).is_file():
            processor = FlamingoProcessor.from_pretrained(folder)
            self.tokenizer, self.turns = processor.tokenizer, turns_of(processor)
            self.image, self.eoc = processor.image_token_id, processor.eoc_token_id
        else:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self.turns = WordTokenizer.turns
            except (OSError, ValueError):
                raise UserError(f"--tokenizer {folder} holds no tokenizer; give the folder of a saved model") from None
            self.image, self.eoc = len(self.tokenizer), len(self.tokenizer) + 1
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"the tokenizer of {folder} has no end-of-text token; set its eos_token")
        self.special = SpecialTokens(self.image, self.eoc, eos, eos, begin_of(self.tokenizer))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def text(self, token: int) -> str:
        """Return a token's text."""
        return {self.image: "<image>", self.eoc: "<EOC>"}.get(token) or str(self.tokenizer.decode([token]))


@dataclass(slots=True)
class SampledRow:
    """A row, its tokens as texts, and the length of the whole document in tokens."""

    row: TokenRow
    texts: list[str]
    special: SpecialTokens
    see_next: bool
    whole: int

    def runs(self) -> list[tuple[int, bool, str]]:
        """Return (image seen, from 1; 0: none), in the loss, text) of runs of tokens that are alike in both."""
        marks = zip(self.row.phi.tolist(), (self.row.labels != IGNORED).tolist(), self.texts, strict=True)
        return [
            (phi, in_loss, "".join(text for _, _, text in group))
            for (phi, in_loss), group in groupby(marks, key=lambda mark: (mark[0], mark[1]))
        ]


def sample_document(document: Document, args: argparse.Namespace) -> SampledRow:
    """Cut a row out of a document as training does. Raises UserError for invalid options."""
    if args.max_tokens < 2 or args.max_images < 0 or not 0 <= args.next_image <= 1:
        raise UserError("--max-tokens must be at least 2, --max-images not negative, --next-image in [0, 1]")
    tokenizer = SavedTokenizer(args.tokenizer) if args.tokenizer else WordTokenizer()
    draws = np.random.default_rng(args.seed).random(2).tolist()
    try:
        tokens = tokenize_document(document.nodes, tokenizer.encode, tokenizer.special, tokenizer.turns)
        row = make_row(
            tokens,
            tokenizer.special,
            max_tokens=args.max_tokens,
            max_images=args.max_images,
            crop=args.crop,
            labels=args.labels,
            next_image_probability=args.next_image,
            draws=(draws[0], draws[1]),
        )
    except ContentError as error:
        raise UserError(f"no row can be cut out of this document: {error}") from None
    texts = [tokenizer.text(token) for token in row.ids.tolist()]
    return SampledRow(row, texts, tokenizer.special, draws[1] < args.next_image, len(tokens.ids))


def facts(sampled: SampledRow, document: Document) -> str:
    """Describe the row in one sentence."""
    row = sampled.row
    return (
        f"{len(row.ids)} of the document's {sampled.whole} tokens, {int((row.labels != IGNORED).sum())} in the loss, "
        f"{len(row.images)} of its {len(document.images)} images; each token sees the "
        f"{'next' if sampled.see_next else 'previous'} image"
    )


def sampled_as_text(sampled: SampledRow, document: Document, where: str) -> str:
    """Return a line for each run of tokens that see the same image; `?` marks those that are not in the loss."""
    lines = [f"{where}, key {document.key}", f"  {facts(sampled, document)}", ""]
    for phi, in_loss, text in sampled.runs():
        seen = f"image {sampled.row.images[phi - 1].frames[0]}" if phi else "nothing"
        lines.append(f"  {' ' if in_loss else '?'} [sees {seen}] {text!r}")
    return "\n".join(lines)


def sampled_as_html(sampled: SampledRow, document: Document, where: str) -> str:
    """A document of HTML: every token on the colour of the image that it sees, the images on theirs."""
    images = [
        (COLOURS[index % len(COLOURS)], [figure(document.images[frame], f"image {frame}") for frame in image.frames])
        for index, image in enumerate(sampled.row.images)
    ]
    tokens = []
    specials = {sampled.special.image, sampled.special.eoc, sampled.special.eos}
    for token, text, phi, label in zip(
        sampled.row.ids.tolist(), sampled.texts, sampled.row.phi.tolist(), sampled.row.labels.tolist(), strict=True
    ):
        seen = f"sees image {sampled.row.images[phi - 1].frames[0]}" if phi else "sees no image"
        classes = (("no-loss", label == IGNORED), ("special", token in specials))
        tokens.append(
            {
                "text": text,
                "classes": " ".join(name for name, holds in classes if holds),
                "style": f"background:{COLOURS[(phi - 1) % len(COLOURS)]}" if phi else "",
                "title": f"token {token}, {seen}, {'not in the loss' if label == IGNORED else 'in the loss'}",
            }
        )
    title = f"{where}, key {document.key}, sampled"
    values = {"facts": facts(sampled, document), "images": images, "tokens": tokens}
    return render(TEMPLATES / "sampled.html.j2", title=title, **values)
