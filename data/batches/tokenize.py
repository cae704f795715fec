"""Turns a document into a row of tokens: tokenized node by node, cropped, and with the image that each token sees.

    document     <image 0> a kibo <image 1> a lumo
    tokens   <image> a kibo <EOC> <image> a lumo <EOC> <eos>
    phi         1    1   1    1      2    2   2    2     2

`<EOC>` ends a chunk: it stands before every `<image>` that does not begin the row, and at the end before EOS. Special
tokens are spliced in as ids, so "<image>" in a document's text stays text. A crop is cut between tokens, and only
images whose token is inside are decoded. A row that would show more than `max_images` images ends before the first one
too many, so that no text is trained on beside an image that is not its own.

A conversation, whose nodes have roles, is written by a chat template instead (`flamingo.processing.turns`): what the
assistant says is in the loss, with the end of each of its turns, and a row that is too long ends with a whole turn.

The paper's image placement (section 3.1.3, p_next) is a choice of phi and moves no token:

    previous    1    1   1    1      2    2   2    2     2
    next        1    2   2    2      2    0   0    0     0
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.errors import ContentError
from data.shards.document import Image, Node, Text, conversation_of, is_conversation
from flamingo.errors import UserError
from flamingo.labels import IGNORED
from flamingo.processing.begin import start_ids

if TYPE_CHECKING:  # it brings transformers along, which a worker needs for conversations only
    from flamingo.processing.turns import TurnTokenizer

NO_TURNS = "the processor knows no chat templates"

# The tokenizers of transformers have mutable state and raise when two threads use one at once. A process forked
# meanwhile gets a new lock: the thread that would release the old one does not exist there.
_TOKENIZING = [threading.Lock()]
os.register_at_fork(after_in_child=lambda: _TOKENIZING.__setitem__(0, threading.Lock()))


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids spliced between texts. `bos` is None for a tokenizer without one; `soft_prompt` stands behind it."""

    image: int
    eoc: int
    eos: int
    pad: int
    bos: int | None = None
    soft_prompt: tuple[int, ...] = ()

    @property
    def begin(self) -> list[int]:
        """What every row begins with; it is not in the loss."""
        return [*(() if self.bos is None else (self.bos,)), *self.soft_prompt]


@dataclass(frozen=True, slots=True)
class DocumentTokens:
    """A whole document before cropping: ids, which of them are in the loss, and the position of each image's token.

    `stops` are the numbers of tokens after which a row of a conversation may end: a turn of the assistant has.
    """

    ids: list[int]
    loss_mask: list[bool]
    positions: list[int]
    images: list[Image]
    stops: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A training row of T tokens: ids, phi and labels (T,) int64, and the images to decode, in the order of phi."""

    ids: NDArray[np.int64]
    phi: NDArray[np.int64]
    labels: NDArray[np.int64]
    images: list[Image]


class CachedEncoder:
    """Text to token ids, with a cache: captions repeat, and a dictionary is faster than any tokenizer."""

    def __init__(self, encode: Callable[[str], list[int]], limit: int = 1 << 16) -> None:
        self.encode, self.limit = encode, limit
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens. The list is shared: do not change it."""
        ids = self._known.get(text)
        if ids is None:
            if len(self._known) >= self.limit:
                self._known.clear()
            with _TOKENIZING[0]:
                ids = self._known[text] = list(self.encode(text))
        return ids

    def __getstate__(self) -> tuple[Callable[[str], list[int]], int]:
        return self.encode, self.limit

    def __setstate__(self, state: tuple[Callable[[str], list[int]], int]) -> None:
        self.__init__(*state)  # type: ignore[misc]


PROBES = ("A cat, 12 dogs.\n", " <image>x<|endofchunk|> \u00e9\u4e16 ", "a  b\t</s><eos>", "")


class QuickEncoder:
    """A private copy of a fast tokenizer's core: the same ids without the overhead of its Python side."""

    def __init__(self, core: Tokenizer) -> None:
        self.core = Tokenizer.from_str(core.to_str())
        self.core.no_padding()
        self.core.no_truncation()
        self.core.encode_special_tokens = True  # the name of a special token in a text is text

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        return self.core.encode(text, add_special_tokens=False).ids

    def __reduce__(self) -> tuple[type[QuickEncoder], tuple[Tokenizer]]:
        return QuickEncoder, (self.core,)


def quick_encoder(tokenizer: Any, encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """Return a function with the same result as `encode` in a fraction of its time, or `encode` where there is none."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        return encode
    quick = QuickEncoder(core)
    return quick if all(quick(text) == list(encode(text)) for text in PROBES) else encode


def tokenize_document(
    nodes: Sequence[Node],
    encode: Callable[[str], list[int]],
    special: SpecialTokens,
    turns: TurnTokenizer | str = NO_TURNS,
) -> DocumentTokens:
    """Return all tokens of a document, without BOS. An EOC after a text with `loss=False` is not in the loss.

    `turns` writes a conversation, or is the reason why there is nothing that could. Raises ContentError for one whose
    roles are out of order or that the template refuses, UserError where no conversation can be written.
    """
    if is_conversation(nodes):
        return _tokenize_conversation(nodes, special, turns)
    ids: list[int] = []
    loss_mask: list[bool] = []
    positions: list[int] = []
    images: list[Image] = []
    in_loss = True  # whether the text before is: its EOC goes with it
    for node in nodes:
        if isinstance(node, Text):
            tokens = encode(node.text)
            ids += tokens
            loss_mask += [node.loss] * len(tokens)
            in_loss = node.loss
            continue
        if ids:
            ids.append(special.eoc)
            loss_mask.append(in_loss)
        positions.append(len(ids))
        images.append(node)
        ids.append(special.image)
        loss_mask.append(False)
        in_loss = True
    ids += (special.eoc, special.eos)
    loss_mask += (in_loss, in_loss)
    return DocumentTokens(ids, loss_mask, positions, images)


def _tokenize_conversation(nodes: Sequence[Node], special: SpecialTokens, turns: TurnTokenizer | str) -> DocumentTokens:
    if isinstance(turns, str):
        raise UserError(f"a document is a conversation, which cannot be written: {turns}")
    try:
        conversation = conversation_of(nodes)
        with _TOKENIZING[0]:
            tokens = turns(conversation)
    except UserError as error:
        raise ContentError("not a conversation for this template", str(error)) from None
    if not any(tokens.loss_mask):
        raise ContentError("no answer", "the assistant says nothing that is in the loss")
    positions = [position for position, token in enumerate(tokens.ids) if token == special.image]
    return DocumentTokens(
        tokens.ids, tokens.loss_mask, positions, [medium.source for medium in conversation.media], tokens.stops
    )


def crop_of(length: int, room: int, crop: str, draw: float) -> tuple[int, int]:
    """Return the [start, stop) of a crop of at most `room` tokens of `length`; `draw` in [0, 1) places a random one."""
    if length <= room:
        return 0, length
    start = int(draw * (length - room + 1)) if crop == "random" else 0
    return start, start + room


def make_row(
    document: DocumentTokens,
    special: SpecialTokens,
    *,
    max_tokens: int,
    max_images: int,
    crop: str = "random",
    labels: str = "text",
    next_image_probability: float = 0.0,
    draws: tuple[float, float] = (0.0, 0.5),
) -> TokenRow:
    """Crop a document to `max_tokens` tokens (BOS and soft prompt included) and its first `max_images` images.

    `draws` are two numbers in [0, 1): where a random crop begins, and whether tokens see the next image. A conversation
    begins at its beginning, ends behind a turn of the assistant, and sees the previous image, as its prompts will.

    Raises:
        ContentError: not even the first turn of a conversation fits.
    """
    see_next = draws[1] < next_image_probability and not document.stops
    begin = special.begin
    room = max_tokens - len(begin)
    if document.stops:
        start, stop = 0, _last_stop(document, room, max_images)
    else:
        start, stop = crop_of(len(document.ids), room, crop, draws[0])
    inside = [k for k, position in enumerate(document.positions) if start <= position < stop]
    if len(inside) > max_images:
        stop = document.positions[inside[max_images]]
        inside = inside[:max_images]
    while not see_next and inside and document.positions[inside[-1]] == stop - 1 and stop - start > 1:
        inside.pop()  # its token ends the crop: nothing in the loss would see it
        stop -= 1
    ids = np.array(begin + document.ids[start:stop], dtype=np.int64)
    loss_mask = np.array([False] * len(begin) + document.loss_mask[start:stop], dtype=np.bool_)
    positions = [document.positions[k] - start + len(begin) for k in inside]
    if labels == "openflamingo":
        loss_mask &= _inside_chunks(ids, special)
    phi = phi_of(len(ids), positions, see_next)
    phi[len(begin) - len(special.soft_prompt) : len(begin)] = 0  # also where a row sees the next image
    return TokenRow(ids, phi, np.where(loss_mask, ids, IGNORED), [document.images[k] for k in inside])


def _last_stop(document: DocumentTokens, room: int, max_images: int) -> int:
    """Return how many tokens of a conversation fit, in whole turns."""
    allowed = document.positions[max_images] if len(document.positions) > max_images else room
    fitting = [stop for stop in document.stops if stop <= min(room, allowed)]
    if not fitting:
        shown = sum(position < document.stops[0] for position in document.positions)
        raise ContentError(
            "first turn too long",
            f"{document.stops[0]} tokens and {shown} images up to the end of the first answer, of at most {room} and "
            f"{max_images}; raise max_tokens or max_images",
        )
    return fitting[-1]


def phi_of(length: int, positions: Sequence[int], see_next: bool) -> NDArray[np.int64]:
    """Return which image each of `length` tokens sees, given the positions of the `<image>` tokens (see above)."""
    phi = np.zeros(length, dtype=np.int64)
    for number, position in enumerate(positions, start=1):
        if not see_next:
            phi[position:] = number
        else:
            phi[positions[number - 2] + 1 if number > 1 else 0 : position + 1] = number
    return phi


def _inside_chunks(ids: NDArray[np.int64], special: SpecialTokens) -> NDArray[np.bool_]:
    """Return which tokens OpenFlamingo trains on: from each `<image>` to its EOC."""
    inside = np.zeros(len(ids), dtype=np.bool_)
    open_chunk = False
    for position, token in enumerate(ids.tolist()):
        if token == special.image:
            open_chunk = True
        inside[position] = open_chunk
        if token == special.eoc:
            open_chunk = False
    return inside


def turns_of(processor: Any) -> TurnTokenizer | str:
    """Return what writes conversations, tried once at the start, or why there is nothing that could."""
    try:
        return processor.turns() if hasattr(processor, "turns") else NO_TURNS
    except UserError as error:
        return str(error)


def begin_of(tokenizer: Any) -> int | None:
    """The token that begins a row: what the tokenizer itself puts in front of a text, which may be none.

    Raises:
        UserError: it puts several there.
    """
    begin = start_ids(tokenizer)
    if len(begin) > 1:
        raise UserError(f"the tokenizer begins a text with {len(begin)} tokens; rows can begin with one or none")
    return begin[0] if begin else None
