"""A prompt to token ids.

A prompt given as one string is trusted: `<image>`, `<|endofchunk|>` and the special tokens of the LM's own tokenizer
written in it are those tokens. The text between two tags is tokenised by itself, as the text nodes of training
documents are, so that prompts and documents agree. Text of a user is not trusted: nothing in it is a special token.

    "<image>A cat.<|endofchunk|>"   [<image>] [A] [ cat] [.] [<|endofchunk|>]
    the same as a user's text       [<] [image] [>] [A] ...

`<video>` in a prompt is another way to write `<image>`, whose place a clip takes.

Letters: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from flamingo.errors import UserError

VIDEO_TAG = "<video>"
PLAIN_BEGIN, PLAIN_END = "\ue100", "\ue101"
"""Around a control token in a chat's text that is to stay text; from Unicode's private use area, never in the ids."""
_PLAIN = re.compile(f"{PLAIN_BEGIN}(.*?){PLAIN_END}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text: with `special`, the tokenizer's special tokens in it are tokens. It begins at `start`."""

    text: str
    special: bool
    start: int = 0


@dataclass(frozen=True, slots=True)
class Tag:
    """The id that stands for a tag, and the tag as it was written."""

    id: int
    written: str
    start: int = 0


@dataclass(slots=True)
class Row:
    """What a row shows: the ids, which kind of tag each `<image>` was, and each token's characters if asked for.

    The first `start` tokens are not the prompt's own and stay when it is truncated.
    """

    ids: list[int]
    tags: list[str]
    spans: list[tuple[int, int]] = field(default_factory=list)
    start: int = 0

    def put(self, start: int, begin: Sequence[int], soft_prompt: Sequence[int]) -> None:
        """Put a soft prompt behind `begin`, where the row begins with that; `start` of its tokens stay anyway."""
        place = len(begin) if self.ids[: len(begin)] == list(begin) else 0
        self.ids[place:place] = soft_prompt
        self.spans[place:place] = [(0, 0)] * len(soft_prompt)
        self.start = place + len(soft_prompt) if soft_prompt else start


class PromptTokenizer:
    """Prompts to rows of ids. `tags`: id of each tag; `image_id`: the tag of an image; `end_id`: of a chunk's end."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tags: Mapping[str, int],
        image_id: int,
        end_id: int,
        around: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tags = {**tags, VIDEO_TAG: image_id}
        self.image_id, self.end_id, self.around = image_id, end_id, around
        self.pattern = re.compile(f"({'|'.join(map(re.escape, self.tags))})")

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text: nothing is added, and no special token's name in it is special."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def pieces(self, prompt: str, *, plain: bool = False) -> list[Text | Tag]:
        """Return a prompt's texts and tags; `plain`: it is a user's, all of it is text.

        Raises:
            UserError: it holds half a character, as JSON and files' names can, which no tokenizer takes.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            half = f"{prompt[error.start]!r} at position {error.start}"
            raise UserError(f"the text is not Unicode ({half} is half a character): remove it") from None
        if plain:
            return [Text(unmarked(prompt), False)] if prompt else []
        out: list[Text | Tag] = []
        start = 0
        for place, part in enumerate(_PLAIN.split(prompt)):
            if place % 2:  # between two marks, of which a pair around nothing only divides
                out += [Text(part, False, start + len(PLAIN_BEGIN))] if part else []
                start += len(PLAIN_BEGIN) + len(part) + len(PLAIN_END)
                continue
            for piece in self.pattern.split(part):
                if piece in self.tags:
                    out.append(Tag(self.tags[piece], piece, start))
                elif text := unmarked(piece):
                    out.append(Text(text, True, start))
                start += len(piece)
        return out

    def row(self, pieces: Sequence[Text | Tag], start: Sequence[int], *, spans: bool = False) -> Row:
        """Return the row's ids, behind `start` where it does not begin with that already."""
        row = Row([], [])
        for piece in self.surrounded(pieces):
            if isinstance(piece, Tag):
                row.ids.append(piece.id)
                row.spans.append((piece.start, piece.start + len(piece.written)))
                if piece.id == self.image_id:
                    row.tags.append(piece.written)
            else:
                ids, places = self._encoded(piece, spans)
                row.ids += ids
                row.spans += places
        if row.ids[: len(start)] != list(start):
            row.ids[:0] = start
            row.spans[:0] = [(0, 0)] * len(start)
        return row

    def ids_of(self, piece: Text | Tag) -> list[int]:
        """Return the ids of a text or a tag."""
        return [piece.id] if isinstance(piece, Tag) else self._encoded(piece, False)[0]

    def _encoded(self, piece: Text, spans: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if not piece.special:
            ids = self._plain_ids(piece.text)
            return ids, [(piece.start, piece.start + len(piece.text))] * len(ids) if spans else []
        out = self.tokenizer(
            piece.text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=spans
        )
        places = [(a + piece.start, b + piece.start) for a, b in out["offset_mapping"]] if spans else []
        return list(out["input_ids"]), places

    def _plain_ids(self, text: str) -> list[int]:
        ids = self.encode_text(text)
        if (own := self.tokenizer.added_tokens_encoder.get(text)) is not None and own in ids:
            # Not one of the special tokens, so the tokenizer takes it for a token all the same: cut it in two.
            return self.encode_text(text[:1]) + self.encode_text(text[1:])
        return ids

    def surrounded(self, pieces: Sequence[Text | Tag]) -> list[Text | Tag]:
        """Return the pieces with the token `around` on both sides of each image, where it is not there already."""
        if (around := self.around) is None:
            return list(pieces)
        out: list[Text | Tag] = []
        for piece in pieces:
            last = out[-1].id if out and isinstance(out[-1], Tag) else None
            this = piece.id if isinstance(piece, Tag) else None
            if this == self.image_id and last != around:
                out.append(Tag(around, "", piece.start))
            if this == around == last:
                continue
            out.append(piece)
            if this == self.image_id:
                out.append(Tag(around, "", piece.start))
        return out

    def truncated(self, row: Row, limit: int, where: str) -> tuple[Row, int]:
        """Return a row of at most `limit` tokens, and how many images it has lost from its left.

        Whole examples (up to a chunk's end) go from the left, with their images, as long as another is behind them.
        If what is left is too long still, its text is cut on the tokenizer's `truncation_side`.

        Raises:
            UserError: that would cut an image's tag.
        """
        ids, head = row.ids, row.ids[: row.start]
        body = ids[row.start :]
        while len(head) + len(body) > limit and self.end_id in body[:-1]:
            body = body[body.index(self.end_id) + 1 :]
        lost = ids.count(self.image_id) - body.count(self.image_id)
        room = max(limit - len(head), 0)
        if len(body) > room:
            left = self.tokenizer.truncation_side == "left"
            kept = body[len(body) - room :] if left else body[:room]
            if kept.count(self.image_id) != body.count(self.image_id):
                raise UserError(
                    f"{where} has {len(ids)} tokens, and cutting it to max_length={limit} would cut an image's tag "
                    "from its image; give a larger max_length or fewer images"
                )
            body = kept
        return Row(head + body, row.tags[lost:]), lost


def unmarked(text: str) -> str:
    """Return a text without the marks that only this module writes."""
    return text.replace(PLAIN_BEGIN, "").replace(PLAIN_END, "")


def control_tokens(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str], template: str = "") -> re.Pattern[str]:
    """Return a pattern of what a user's text must not forge: tags, special tokens, and tokens a template writes."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or (token.content in template and token.content.strip())}
    return re.compile("|".join(map(re.escape, sorted({*names, *tags} - {""}, key=len, reverse=True))))


def marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return texts, in lists and mappings too, with every control token in them marked as plain text."""
    if isinstance(value, str):
        return pattern.sub(lambda found: f"{PLAIN_BEGIN}{found[0]}{PLAIN_END}", unmarked(value))
    if isinstance(value, Mapping):
        return {key: marked(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked(item, pattern) for item in value]
    return value
