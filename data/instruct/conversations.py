"""From captions to requests, and from replies to conversations that a model can be trained on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.instruct.endpoint import REFUSED, Message
from data.instruct.reply_log import Reply
from data.instruct.settings import fields_in, filled
from data.prepare.units import Dropped, Tally
from data.records import json_objects, read_json
from flamingo.errors import UserError

PROMPTS = Path(__file__).parent / "prompts"
IMAGE_TAG = "<image>"
_SPEAKER = re.compile(r"^[ \t*#]*(user|assistant)[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)


@dataclass(kw_only=True)
class Example:
    """A worked example: what is known of a figure, and the conversation that it should become."""

    caption: str
    conversation: str
    mentions: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class InstructPrompt:
    """A file of data/instruct/prompts. The last three are regular expressions, for which letters' case is nothing."""

    system: str
    user: str
    """With `{caption}`."""
    mentions: str = ""
    """Appended where sentences mention the figure, with `{mentions}`, one a line."""
    examples: list[Example] = field(default_factory=list)
    lead_ins: list[str] = field(default_factory=list)
    """Taken away from the beginning of answers."""
    refusals: list[str] = field(default_factory=list)
    """Answers with one of these are left out."""
    giveaways: list[str] = field(default_factory=list)
    """Turns with one of these, in question or answer, show that only a text was read, and are left out."""

    def conflicts(self) -> Iterator[str]:
        """Yield a clause for each impossible combination of values."""
        if fields_in(self.user) != {"caption"}:
            yield "user must have {caption} and no other field"
        if self.mentions and fields_in(self.mentions) != {"mentions"}:
            yield "mentions must have {mentions} and no other field"
        for pattern in (*self.lead_ins, *self.refusals, *self.giveaways):
            try:
                re.compile(pattern)
            except (re.error, OverflowError) as error:
                yield f"{pattern!r} is not a regular expression ({error})"
        for number, example in enumerate(self.examples, 1):
            try:
                turns_in(example.conversation)
            except Dropped as dropped:
                yield f"the conversation of example {number} is wrong: {dropped.reason}"


@dataclass(frozen=True)
class Figure:
    """What is known of an image."""

    name: str
    image: str
    caption: str
    mentions: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """Limits: words of an answer, and turns of a conversation."""

    min_words: int
    max_words: int
    min_turns: int


def read_figures(path: Path, tally: Tally) -> Iterator[Figure]:
    """Yield the figures of a file: JSON lines, an array, or LLaVA-Med's object of arrays by domain."""
    for where, item in _items(path):
        try:
            yield _figure(item)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, f"{path.name} {where}")


def _items(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = read_json(path) if path.suffix == ".json" else None
    if isinstance(content, dict) and content and all(isinstance(items, list) for items in content.values()):
        for domain, items in content.items():
            for number, item in enumerate(items, 1):
                if not isinstance(item, dict):
                    raise UserError(f"{path}: item {number} of {domain} is not a JSON object")
                yield f"{domain} {number}", item
        return
    yield from ((f"line {line}", item) for line, item in json_objects(path))


def _figure(item: Mapping[str, Any]) -> Figure:
    """Return what an item says, under its names here or LLaVA-Med's. Raises Dropped."""
    name, caption = item.get("id", item.get("pair_id")), item.get("caption", item.get("fig_caption"))
    mentions = item.get("mentions", item.get("in_text_mention")) or []
    mentions = [mentions] if isinstance(mentions, str) else mentions
    if not isinstance(name, str | int) or name == "":
        raise Dropped("no id")
    if not isinstance(caption, str) or not caption.strip():
        raise Dropped("no caption")
    if not isinstance(mentions, list):
        raise Dropped("'mentions' is not a list of sentences")
    listed = [mention.get("tokens") if isinstance(mention, dict) else mention for mention in mentions]
    sentences = [sentence.strip() for sentence in listed if isinstance(sentence, str)]
    if len(sentences) < len(listed):
        raise Dropped("'mentions' is not a list of sentences")
    image = item.get("image", f"{name}.jpg")
    if not isinstance(image, str) or not image:
        raise Dropped("'image' is not a path")
    return Figure(str(name), image, caption.strip(), tuple(filter(None, sentences)))


def request(figure: Figure, prompt: InstructPrompt) -> list[Message]:
    """Return the messages that ask for a conversation: the worked examples, then the figure."""
    messages = [{"role": "system", "content": prompt.system}]
    for example in prompt.examples:
        messages.append({"role": "user", "content": _shown(example.caption, example.mentions, prompt)})
        messages.append({"role": "assistant", "content": example.conversation})
    return [*messages, {"role": "user", "content": _shown(figure.caption, figure.mentions, prompt)}]


def _shown(caption: str, mentions: Sequence[str], prompt: InstructPrompt) -> str:
    sentences = "\n".join(f"- {mention}" for mention in mentions)
    return filled(prompt.user, {"caption": caption}) + (
        filled(prompt.mentions, {"mentions": sentences}) if mentions else ""
    )


def turns_in(text: str) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a text with `User:` and `Assistant:`. Raises Dropped."""
    _, *parts = _SPEAKER.split(text)
    speakers, texts = [part.lower() for part in parts[::2]], [part.strip() for part in parts[1::2]]
    if not speakers or speakers != ["user", "assistant"] * (len(speakers) // 2):
        raise Dropped("reply is not a conversation of User and Assistant in turn")
    if not all(texts):
        raise Dropped("reply has an empty turn")
    return list(zip(texts[::2], texts[1::2], strict=True))


def conversation(
    figure: Figure, reply: Reply, prompt: InstructPrompt, lengths: Lengths, turns: Tally
) -> dict[str, Any]:
    """Return an item as LLaVA's files have them. `turns` counts the turns that are left out. Raises Dropped."""
    if reply.finish == REFUSED:
        raise Dropped("the endpoint refused the request")
    if reply.finish == "length":
        raise Dropped("reply was cut off: raise --max-tokens")
    if reply.finish == "content_filter":
        raise Dropped("the endpoint's content filter took the reply")
    kept = []
    for question, answer in turns_in(reply.text):
        try:
            kept.append((question, _kept(question, answer, prompt, lengths)))
            turns.documents += 1
        except Dropped as dropped:
            turns.drop_document(dropped.reason, figure.name)
    if len(kept) < lengths.min_turns:
        raise Dropped(f"fewer than {lengths.min_turns} turns are left")
    first = hashlib.sha256(figure.name.encode("utf-8", "replace")).digest()[0] % 2 == 0
    opening = f"{IMAGE_TAG}\n{kept[0][0]}" if first else f"{kept[0][0]}\n{IMAGE_TAG}"
    spoken = [{"from": "human", "value": question} for question in (opening, *(q for q, _ in kept[1:]))]
    answers = [{"from": "gpt", "value": answer} for _, answer in kept]
    both = [turn for pair in zip(spoken, answers, strict=True) for turn in pair]
    return {"id": figure.name, "image": figure.image, "conversations": both}


def _kept(question: str, answer: str, prompt: InstructPrompt, lengths: Lengths) -> str:
    """Return the answer as it is kept. Raises Dropped with the reason why the turn is not."""
    if any(_found(pattern, answer) for pattern in prompt.refusals):
        raise Dropped("answer is a refusal")
    for pattern in prompt.lead_ins:
        match = re.match(pattern, answer, re.IGNORECASE)
        rest = answer[match.end() :] if match else ""
        if rest:
            answer = rest[0].upper() + rest[1:]
    if any(_found(pattern, f"{question}\n{answer}") for pattern in prompt.giveaways):
        raise Dropped("turn gives away that only a text was read")
    if IMAGE_TAG in question or IMAGE_TAG in answer:
        raise Dropped(f"turn contains {IMAGE_TAG}")
    words = len(answer.split())
    if words < lengths.min_words:
        raise Dropped(f"answer of fewer than {lengths.min_words} words")
    if words > lengths.max_words:
        raise Dropped(f"answer of more than {lengths.max_words} words")
    return answer


def _found(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None
