r"""A conversation to token ids: which of them the assistant says, and where each of its turns ends.

A rendered conversation is cut where a turn of the assistant begins and where it has ended, and each piece is tokenised
by itself. So the prompt of a turn is the beginning of the training row, id for id, whatever the tokenizer would merge:

    <|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n | A cat.<|im_end|> | \n<|im_start|>user\n...
    the prompt                                                 | in the loss      | the next prompt goes on here

No template says where that is, so it is found: a turn begins where the prompt of the messages before it ends, and it
ends with the text that the template writes behind an answer (`closing`), up to its last special token. A template for
which that does not hold is refused before anything is trained.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

from flamingo.errors import UserError
from flamingo.processing.chat import ChatRenderer
from flamingo.processing.conversation import Conversation
from flamingo.processing.rows import PLAIN_BEGIN, PLAIN_END, PromptTokenizer, Tag, Text

CUT = f"{PLAIN_BEGIN}{PLAIN_END}"
"""In a prompt: what stands before and what stands behind are tokenised apart."""
TEMPLATE = "the chat template"
SYSTEM: dict[str, Any] = {"role": "system", "content": "fep"}
PROBE: list[dict[str, Any]] = [
    {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("kibo?", "lumo.", "dax?", "wug."))
]
"""What a template is tried on."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """Ids without the row's beginning, which of them are in the loss, and how many there are up to each turn's end."""

    ids: list[int]
    loss_mask: list[bool]
    stops: list[int]


class TurnTokenizer:
    """Conversations to ids by one template; `start`: what a row begins with, which is left out here.

    Raises:
        UserError: the template drops a role or a text, writes a token twice, or does not end a turn.
    """

    def __init__(self, renderer: ChatRenderer, prompts: PromptTokenizer, start: Sequence[int]) -> None:
        self.renderer, self.prompts, self.start = renderer, prompts, list(start)
        self.closing = self._found_closing()
        self._end = re.compile(f"(?<!{PLAIN_BEGIN}){re.escape(self.closing)}")
        self.closing_ids = self._ids(self.closing)
        self.end_id = self.closing_ids[-1]
        self._check_doubles()

    def __call__(
        self, conversation: Conversation, where: str = "the conversation", *, prompt: bool = False
    ) -> TurnTokens:
        """Return the ids of a whole conversation, or with `prompt` of one that the assistant answers next.

        Raises:
            UserError: the template cannot write it, as one without system messages where there is one.
        """
        messages = conversation.to_messages()
        text, turns = self.turns(messages, where, add_generation_prompt=prompt)
        answers = [message for message in conversation.messages if message.role == "assistant"]
        learnt = [turn for turn, message in zip(turns, answers, strict=True) if message.loss]
        ids: list[int] = []
        loss_mask: list[bool] = []
        stops = {end: 0 for _, end in turns}
        for piece in self.prompts.surrounded(self._pieces(text, turns)):
            tokens, in_loss = self.prompts.ids_of(piece), any(a <= piece.start < b for a, b in learnt)
            shows = isinstance(piece, Tag) and piece.id in (self.prompts.image_id, self.prompts.around)
            ids += tokens
            loss_mask += [in_loss and not shows] * len(tokens)
            stops.update({end: len(ids) for end in stops if piece.start < end})
        head = len(self.start) if ids[: len(self.start)] == self.start else 0
        return TurnTokens(ids[head:], loss_mask[head:], [stop - head for stop in stops.values()])

    def answer(self, text: str, *, closed: bool = True) -> list[int]:
        """Return the ids of an answer behind its prompt, whatever the prompt; without its end if not `closed`."""
        messages = [PROBE[0], {"role": "assistant", "content": text}]
        rendered, [(begin, end)] = self.turns(messages, "the answer")
        return self._ids(rendered[begin : end if closed else end - len(self.closing)])

    def said(self, ids: Sequence[int]) -> str:
        """Return what generated ids say, without what the template writes behind an answer."""
        text = str(self.prompts.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        return text.removesuffix(self.renderer.pattern.sub("", self.closing).strip()).strip()

    def by(self, renderer: ChatRenderer) -> TurnTokenizer:
        """Return the same for another renderer of the same template, as one with variables of its own."""
        other = copy.copy(self)
        other.renderer = renderer
        return other

    def turns(self, messages: Messages, where: str, **flags: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return rendered messages, and the characters of each of the assistant's turns; raises as `turns_in`."""
        text, _ = self.renderer.render(messages, where, **flags)
        return text, self.turns_in(text, messages, where)

    def turns_in(self, text: str, messages: Messages, where: str, *, goes_on: bool = False) -> list[tuple[int, int]]:
        """Return the characters of each of the assistant's turns in rendered messages, with what ends it.

        `goes_on`: the last message has no end, since it is to be continued.

        Raises:
            UserError: the prompt of a turn is not the beginning of the whole, or a turn has no end.
        """
        turns: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self.renderer.render(messages[:number], where, add_generation_prompt=True)
            end = self._end.search(text, len(prompt))
            is_open = goes_on and number == len(messages) - 1
            if not text.startswith(prompt) or (turns and len(prompt) < turns[-1][1]) or (end is None and not is_open):
                raise UserError(f"{where}: {_refusal(f'writes message {number} unlike the prompt for it, or no end')}")
            turns.append((len(prompt), len(text) if end is None else end.end()))
        return turns

    def cut(self, text: str, turns: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
        """Return a prompt marked (`CUT`) where the tokenizer would merge across a turn's edge, and these places."""
        places: list[int] = []
        edges = [0, *sorted({place for turn in turns for place in turn} - {0, len(text)}), len(text)]
        for before, place, after in zip(edges, edges[1:], edges[2:], strict=False):
            if self._ids(text[before:after]) != self._ids(text[before:place]) + self._ids(text[place:after]):
                places.append(place)
        return CUT.join(_split(text, places)), places

    def _ids(self, text: str) -> list[int]:
        return self.prompts.row(self.prompts.pieces(text), []).ids

    def _pieces(self, text: str, turns: Sequence[tuple[int, int]]) -> list[Text | Tag]:
        """Return the texts and tags between the cuts, each with its place in the whole text."""
        pieces: list[Text | Tag] = []
        begin = 0
        for part in _split(text, sorted({place for turn in turns for place in turn})):
            pieces += [replace(piece, start=begin + piece.start) for piece in self.prompts.pieces(part)]
            begin += len(part)
        return pieces

    def _found_closing(self) -> str:
        """Return what the template writes behind an answer, up to its last special token."""
        text, _ = self.renderer.render(PROBE, TEMPLATE)
        said = [str(message["content"]) for message in PROBE]
        if wrong := next((word for word in said if text.count(word) != 1), None):
            raise UserError(_refusal(f"writes {wrong!r} {text.count(wrong)} times instead of once"))
        ends = [text.index(word) + len(word) for word in said]
        to_answer, to_question = (text[ends[i] : ends[i + 1] - len(said[i + 1])] for i in (0, 1))
        if to_answer == to_question:
            raise UserError(_refusal("drops the roles: what stands before a question stands before an answer too"))
        # Some templates end a whole conversation with more than a turn, so only what both have is the turn's end.
        both = takewhile(lambda pair: pair[0] == pair[1], zip(text[ends[-1] :], to_question, strict=False))
        behind = "".join(character for character, _ in both)
        if not (tokens := list(self.renderer.pattern.finditer(behind))):
            raise UserError(_refusal("writes no special token behind an answer, so that the model would never end one"))
        return behind[: tokens[-1].end()]

    def _check_doubles(self) -> None:
        """See that no special token stands twice in a row, with images, without and with a system message."""
        shown: list[dict[str, Any]] = [
            {**m, "content": [{"type": "image"}, {"type": "text", "text": m["content"]}]} for m in PROBE
        ]
        probes: list[list[dict[str, Any]]] = [[*PROBE], [shown[0], PROBE[1], shown[2], PROBE[3]], [SYSTEM, *PROBE]]
        for messages in probes:
            try:
                text, _ = self.turns(messages, TEMPLATE)
            except UserError as error:
                if messages[0] is not SYSTEM:
                    raise
                if repr(SYSTEM["content"]) in str(error):
                    raise UserError(_refusal("drops the system's message")) from None
                continue  # it knows no such role and says so, when there is one
            ids, tokenizer = self.prompts.row(self.prompts.pieces(text), self.start).ids, self.prompts.tokenizer
            twice = [a for a, b in pairwise(ids) if a == b and a in tokenizer.all_special_ids]
            apart = re.search(rf"({self.renderer.pattern.pattern})\s*\1", text)
            if twice or apart:
                token = apart[1] if apart else tokenizer.convert_ids_to_tokens(twice[0])
                raise UserError(_refusal(f"writes {token} twice"))


def _refusal(what: str) -> str:
    return f"the chat template {what}; set another one (model.chat_template, processor.chat_template)"


def _split(text: str, places: Sequence[int]) -> list[str]:
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
