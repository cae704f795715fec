"""Samples to the tensors of one objective: `FlamingoCollate`, `LanguageCollate`, `PairCollate`.

A collate has two steps. `sample` runs for each sample on its own, with that sample's random numbers, and may raise
`ContentError`; `batch` joins the results. Images stay uint8 (a quarter of the bytes of floats on the way between
processes); the model normalises them. A batch is ragged: the images of all rows in one stack, with counts.

Letters: B rows, T tokens (the longest row of the batch), I images of all rows, F frames, S side of an image.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batches.decode import Transform, clip_frames, empty, image_bytes, jittered, load_image, stacked
from data.batches.packing import groups, join
from data.batches.tokenize import (
    IGNORED,
    CachedEncoder,
    SpecialTokens,
    TokenRow,
    begin_of,
    crop_of,
    make_row,
    quick_encoder,
    tokenize_document,
    turns_of,
)
from data.dataset import DatasetSpec
from data.errors import ContentError, PassedOver
from data.shards.document import Image, Node, Text, is_conversation
from data.shards.reader import RawSample
from flamingo.errors import UserError

SIDES = re.compile(
    r"\b(?:left|right)(?:s|most|ward|wards|-hand|-most)?\b", re.IGNORECASE
)  # mirroring makes these wrong
NO_EOS = "the tokenizer has no end-of-text token; set its eos_token"


class Collate(Protocol):
    """What the loader needs of an objective."""

    def sample(self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator) -> Any:
        """Return one sample, ready for `batch`. Raises ContentError when it cannot be used."""

    def batch(self, spec: DatasetSpec, samples: list[Any]) -> dict[str, Tensor]:
        """Return the tensors of a batch."""


def pad_rows(rows: Sequence[NDArray[np.int64]], value: int) -> Tensor:
    """Return rows of different lengths as one tensor (B, T), padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out)


def attention_mask(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """Return (B, T) int64: 1 for tokens, 0 for padding."""
    lengths = torch.tensor([len(row) for row in rows])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


class FlamingoCollate:
    """Interleaved rows for `FlamingoForConditionalGeneration.forward`.

    Tensors: input_ids, attention_mask, phi, labels (B, T) int64; pixel_values (I, F, 3, S, S) uint8; image_counts (B,)
    int64. F is the dataset's `max_frames`: a longer clip gives a run of F frames of it, a shorter one (or an image)
    repeats its last frame. Where the dataset packs, B counts packed rows, and `sequence_ids` (B, T) int64 numbers the
    samples of a row from 1 (0: padding).

    `processor` is a FlamingoProcessor, or anything with its `encode_text`, `image_token_id`, `eoc_token_id`,
    `image_transform` and `tokenizer` (eos_token_id, bos_token_id, pad_token_id).
    """

    can_pack = True
    empty = staticmethod(empty)

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(NO_EOS)
        self.special = SpecialTokens(
            image=processor.image_token_id,
            eoc=processor.eoc_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            bos=begin_of(tokenizer),
            soft_prompt=tuple(getattr(processor, "soft_prompts", {}).get("default", ())),
        )
        self.encode = CachedEncoder(quick_encoder(tokenizer, processor.encode_text))
        self.transform: Transform = processor.image_transform
        self.turns = turns_of(processor)

    def sample(self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator) -> tuple[TokenRow, list[Tensor]]:
        """Return a row and the frames of its images, F for each."""
        self._check_room(spec)
        draws = random.random(2).tolist()
        nodes = raw.nodes if spec.kind != "text" else [node for node in raw.nodes if isinstance(node, Text)]
        if not nodes:
            raise ContentError("empty", "the document has no text or images that this dataset uses")
        if spec.space_probability and not is_conversation(nodes) and random.random() < spec.space_probability:
            nodes = with_space(nodes)
        may_flip = spec.flip and not any(isinstance(node, Text) and SIDES.search(node.text) for node in nodes)
        row = make_row(
            tokenize_document(nodes, self.encode, self.special, self.turns),
            self.special,
            max_tokens=spec.max_tokens,
            max_images=spec.max_images,
            crop="start" if spec.kind == "pairs" else spec.crop,  # a random crop of a long caption may lose its image
            labels=spec.labels,
            next_image_probability=spec.next_image_probability,
            draws=(draws[0], draws[1]),
        )
        if len(row.images) == 1 and spec.single_image_share < 1 and random.random() >= spec.single_image_share:
            raise PassedOver
        return row, self._frames(spec, raw, row.images, may_flip, random)

    def _frames(
        self, spec: DatasetSpec, raw: RawSample, images: list[Image], may_flip: bool, random: np.random.Generator
    ) -> list[Tensor]:
        """Return the frames of a row's images, F for each."""
        chosen = [(random.random() < 0.5 if may_flip else False, clip_frames(p, spec, random)) for p in images]
        # Only now, when cropping is done, is it known which images the row shows: the others are never read.
        raw.fetch(sorted({number for _, numbers in chosen for number in numbers}))
        frames: list[Tensor] = []
        decoded: dict[int, Tensor] = {}  # a document may show one image several times
        for flip, numbers in chosen:
            draws = random.random(3).tolist() if spec.colour else ()
            for number in numbers:
                if number not in decoded:
                    decoded[number] = load_image(raw, number, self.transform)
                frame = decoded[number].flip(-1) if flip else decoded[number]
                frames.append(jittered(frame, spec.colour, draws) if spec.colour else frame)
        return frames

    def _check_room(self, spec: DatasetSpec) -> None:
        if self.special.soft_prompt and spec.max_tokens < len(self.special.begin) + 2:
            raise UserError(
                f"data.datasets.{spec.name}.max_tokens={spec.max_tokens} leaves no room behind the soft prompt of "
                f"{len(self.special.soft_prompt)} vectors: raise it by that number"
            )

    def batch(self, spec: DatasetSpec, samples: list[tuple[TokenRow, list[Tensor]]]) -> dict[str, Tensor]:
        """Return the tensors that the class describes."""
        if spec.pack:
            return self._packed(spec, samples)
        rows = [row for row, _ in samples]
        return {
            "input_ids": pad_rows([row.ids for row in rows], self.special.pad),
            "attention_mask": attention_mask([row.ids for row in rows]),
            "phi": pad_rows([row.phi for row in rows], 0),
            "labels": pad_rows([row.labels for row in rows], IGNORED),
            "pixel_values": self._pixels(spec, [frame for _, more in samples for frame in more]),
            "image_counts": torch.tensor([len(row.images) for row in rows]),
        }

    def _packed(self, spec: DatasetSpec, samples: list[tuple[TokenRow, list[Tensor]]]) -> dict[str, Tensor]:
        shared = groups([len(row.ids) for row, _ in samples], spec.pack)
        rows = [join([samples[number][0] for number in group]) for group in shared]
        sequences = pad_rows([row.sequence for row in rows], 0)
        return {
            "input_ids": pad_rows([row.ids for row in rows], self.special.pad),
            "attention_mask": (sequences > 0).long(),
            "sequence_ids": sequences,
            "phi": pad_rows([row.phi for row in rows], 0),
            "labels": pad_rows([row.labels for row in rows], IGNORED),
            "pixel_values": self._pixels(
                spec, [frame for group in shared for number in group for frame in samples[number][1]]
            ),
            "image_counts": torch.tensor([row.images for row in rows]),
        }

    def _pixels(self, spec: DatasetSpec, frames: list[Tensor]) -> Tensor:
        size = self.transform.size
        return stacked(frames, size, self.empty).view(-1, spec.max_frames, 3, size, size)

    def most_bytes(self, spec: DatasetSpec, rows: int) -> int:
        """Return the most bytes that a batch of this many samples can take."""
        images = image_bytes(spec.max_images * spec.max_frames, self.transform.size)
        return rows * (images + 8 * 5 * max(spec.max_tokens, 1) + 64)


def with_space(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes with a leading space in the first text (the augmentation of pairs in the paper's appendix)."""
    out = list(nodes)
    first = next((index for index, node in enumerate(out) if isinstance(node, Text)), None)
    if first is not None:
        text = out[first]
        assert isinstance(text, Text)
        out[first] = replace(text, text=f" {text.text}")
    return out


class PreferenceCollate(FlamingoCollate):
    """Two rows for each sample, the preferred answer's and the other's: the tensors of `FlamingoCollate` for 2B rows.

    The preferred rows come first, then the others in the same order. `pixel_values` holds the images of the first B
    rows, which are those of the others as well; `image_counts` counts them for all rows. Only answers have labels.

    A sample's last node is the preferred text, and its meta's `rejected` the other one.
    """

    can_pack = False

    def sample(self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator) -> Any:
        """Return (preferred row, other row, frames). Raises ContentError for what is not a pair that can be used."""
        refuse_conversation(raw.nodes)
        self._check_room(spec)
        prompt, last = raw.nodes[:-1], next(reversed(raw.nodes), None)
        rejected = raw.meta.get("rejected")
        if not isinstance(last, Text) or not isinstance(rejected, str) or not rejected:
            raise ContentError("not a preference", "the last node is the chosen text, and meta.rejected the other one")
        answers = [Text(last.text), Text(rejected)]
        documents = [tokenize_document([*prompt, answer], self.encode, self.special) for answer in answers]
        if documents[0].ids == documents[1].ids:
            raise ContentError("equal preference", f"chosen and rejected are the same tokens: {rejected[:80]!r}")
        longest = max(len(document.ids) for document in documents) + len(self.special.begin)
        if longest > spec.max_tokens or len(documents[0].images) > spec.max_images:
            raise ContentError(
                "too long", f"{longest} tokens and {len(documents[0].images)} images; see max_tokens and max_images"
            )
        rows = [
            make_row(document, self.special, max_tokens=spec.max_tokens, max_images=spec.max_images)
            for document in documents
        ]
        for row, answer in zip(rows, answers, strict=True):
            row.labels[: -len(self.encode(answer.text)) - 2] = IGNORED  # EOC and EOS end an answer
        texts = [node.text for node in [*prompt, *answers] if isinstance(node, Text)]
        may_flip = spec.flip and not any(map(SIDES.search, texts))
        return *rows, self._frames(spec, raw, rows[0].images, may_flip, random)

    def batch(self, spec: DatasetSpec, samples: list[Any]) -> dict[str, Tensor]:
        """Return the tensors that the class describes."""
        preferred = [(row, frames) for row, _, frames in samples]
        return super().batch(spec, [*preferred, *((row, []) for _, row, _ in samples)])

    def most_bytes(self, spec: DatasetSpec, rows: int) -> int:
        """Return the most bytes that a batch of this many samples can take."""
        return super().most_bytes(spec, 2 * rows)


class LanguageCollate:
    """Rows of text only, for training a language model on the text of documents.

    Adjacent text nodes are joined as they are, as in a Flamingo row; images between two texts become a line break; EOS
    ends the row. A text with `loss=False` gets no labels. Tensors: input_ids, attention_mask, labels
    (B, T) int64. `tokenizer` is a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(NO_EOS)
        self.eos, self.bos = int(tokenizer.eos_token_id), begin_of(tokenizer)
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.tokenizer = tokenizer
        self.encode = CachedEncoder(self._encode)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def sample(
        self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (ids, labels), both (T,). Raises ContentError for a document without text."""
        refuse_conversation(raw.nodes)
        ids: list[int] = []
        loss_mask: list[bool] = []
        gap = False
        for node in raw.nodes:
            if isinstance(node, Image):
                gap = bool(ids)
                continue
            tokens = [*(self.encode("\n") if gap else ()), *self.encode(node.text)]
            ids += tokens
            loss_mask += [node.loss] * len(tokens)
            gap = False
        if not ids:
            raise ContentError("no text", "the document has images only")
        ids.append(self.eos)
        loss_mask.append(True)
        begin = [] if self.bos is None else [self.bos]
        start, stop = crop_of(len(ids), spec.max_tokens - len(begin), spec.crop, random.random())
        row = np.array(begin + ids[start:stop], dtype=np.int64)
        return row, np.where([False] * len(begin) + loss_mask[start:stop], row, IGNORED)

    def batch(self, spec: DatasetSpec, samples: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> dict[str, Tensor]:
        """Return the tensors that the class describes."""
        ids = [row for row, _ in samples]
        labels = pad_rows([row for _, row in samples], IGNORED)
        return {"input_ids": pad_rows(ids, self.pad), "attention_mask": attention_mask(ids), "labels": labels}

    def most_bytes(self, spec: DatasetSpec, rows: int) -> int:
        """Return the most bytes that a batch of this many samples can take."""
        return rows * 8 * 3 * spec.max_tokens


class PairCollate:
    """Images with their captions, for contrastive training with open_clip.

    Tensors: image (B, 3, S, S) uint8, text (B, context) int64. `tokenizer` maps a list of B strings to (B, context).
    """

    empty = staticmethod(empty)

    def __init__(self, tokenizer: Callable[[list[str]], Tensor], transform: Transform) -> None:
        self.tokenizer, self.transform = tokenizer, transform

    def sample(self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator) -> tuple[Tensor, str]:
        """Return the sample's first image (of a clip, the first frame) and all of its text."""
        refuse_conversation(raw.nodes)
        first = next((node for node in raw.nodes if isinstance(node, Image)), None)
        text = caption(raw.nodes)
        if first is None or not text:
            raise ContentError("not a pair", "an image and a text are needed")
        image = load_image(raw, first.frames[0], self.transform)
        may_flip = spec.flip and not SIDES.search(text)
        return image.flip(-1) if may_flip and random.random() < 0.5 else image, text

    def batch(self, spec: DatasetSpec, samples: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
        """Return the tensors that the class describes."""
        images = stacked([image for image, _ in samples], self.transform.size, self.empty)
        return {"image": images, "text": self.tokenizer([text for _, text in samples])}

    def most_bytes(self, spec: DatasetSpec, rows: int) -> int:
        """Return the most bytes that a batch of this many pairs can take, with texts of up to 512 tokens."""
        return rows * (image_bytes(1, self.transform.size) + 8 * 512)


class AlignCollate(PairCollate):
    """Images with their names and keywords, "onion, food, vegetable", for objective align.

    Tensors: image (B, 3, S, S) uint8; text (B, T) int64, the ids of all words, each with a space before it; share
    (B, T) float, what each counts (a row's sum is 1); name (B,) int64, equal for equal names.
    """

    def __init__(self, processor: Any, name_share: float) -> None:
        self.transform = processor.image_transform
        self.encode = CachedEncoder(quick_encoder(processor.tokenizer, processor.encode_text))
        self.name_share = name_share

    def sample(self, spec: DatasetSpec, raw: RawSample, random: np.random.Generator) -> tuple[Tensor, str]:
        """Return the sample's image and its text, which begins with a name. Raises ContentError where there is none."""
        image, text = super().sample(spec, raw, random)
        name = text.partition(",")[0].strip()
        if not name or not self.encode(f" {name}"):
            raise ContentError("no name", f"no word stands before the first comma of {text[:80]!r}")
        return image, text

    def batch(self, spec: DatasetSpec, samples: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
        """Return the tensors that the class describes."""
        rows, shares, names = [], [], []
        for _, text in samples:
            name, *words = (part.strip() for part in text.split(","))
            own = self.encode(f" {name}")[: spec.max_tokens]
            more = [number for word in words if word for number in self.encode(f" {word}")][
                : spec.max_tokens - len(own)
            ]
            part = self.name_share if more else 1.0
            rows.append(np.array([*own, *more], dtype=np.int64))
            shares.append(torch.tensor([part / len(own)] * len(own) + [(1 - part) / max(len(more), 1)] * len(more)))
            names.append(int.from_bytes(hashlib.blake2b(name.casefold().encode(), digest_size=8).digest(), signed=True))
        return {
            "image": stacked([image for image, _ in samples], self.transform.size, self.empty),
            "text": pad_rows(rows, 0),
            "share": torch.nn.utils.rnn.pad_sequence(shares, batch_first=True),
            "name": torch.tensor(names),
        }


def refuse_conversation(nodes: Sequence[Node]) -> None:
    """Raise UserError for nodes with roles, which would be lost."""
    if is_conversation(nodes):
        raise UserError(
            "a document is a conversation, and only objective=flamingo keeps apart who says what; use that objective, "
            "or prepare the data without roles"
        )


def caption(nodes: Sequence[Node]) -> str:
    """Return all text of a document, without the spaces around it."""
    return "".join(node.text for node in nodes if isinstance(node, Text)).strip()
