"""Turns as nodes: with roles, which a chat template writes in training, or as text. Only answers are in the loss.

As text (`--user`, `--assistant`) a conversation is an ordinary document: `User: What?\\nAssistant: A cat.`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data.prepare.units import Dropped
from data.shards.document import Image, Node, Text, conversation_nodes
from flamingo.processing.conversation import Conversation, Medium, Message

USER, ASSISTANT = "User: ", "\nAssistant:"


def add_turn_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for how speakers are introduced."""
    about = "write turns as text, with this {} (default: roles, for the model's chat template)"
    parser.add_argument("--user", metavar="TEXT", help=about.format(f"before a question, such as {USER!r}"))
    parser.add_argument("--assistant", metavar="TEXT", help=about.format(f"before an answer, such as {ASSISTANT!r}"))


def question_and_answer(images: Sequence[Image], question: str, answer: str) -> list[Message]:
    """Return a question about images, which come before it, and its answer. Raises Dropped where nothing is asked."""
    if not images and not question.strip():
        raise Dropped("no question")
    shown = (Medium("image" if len(image.frames) == 1 else "video", image) for image in images)
    return [Message("user", (*shown, question)), Message("assistant", (answer,))]


def turn_nodes(messages: Sequence[Message], args: argparse.Namespace) -> list[Node]:
    """Return the nodes of a document that is this conversation; what its media hold are nodes."""
    if args.user is None and args.assistant is None:
        conversation = Conversation(tuple(messages))
        return conversation_nodes(conversation, [medium.source for medium in conversation.media])
    nodes: list[Node] = []
    for message in messages:
        if message.role == "user":
            nodes += _question(message.content, args, first=not nodes)
            continue
        text = "".join(part for part in message.content if isinstance(part, str)).strip()
        nodes += [part.source for part in message.content if isinstance(part, Medium)]
        answers = message.role == "assistant"
        nodes.append(Text(f" {text}" if answers else f"{text}\n", loss=answers and message.loss))
    return nodes


def _question(parts: Sequence[str | Medium], args: argparse.Namespace, *, first: bool) -> list[Node]:
    """Return the nodes of a question as text; a line break divides it from the previous turn, or else an image does."""
    nodes: list[Node] = []
    head = ("" if first or isinstance(parts[0], Medium) else "\n") + (USER if args.user is None else args.user)
    parts = [*parts, ""] if isinstance(parts[-1], Medium) else parts
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        if isinstance(part, Medium):
            nodes.append(part.source)
        elif part.strip() or is_last:
            tail = (ASSISTANT if args.assistant is None else args.assistant) if is_last else ""
            nodes.append(Text(f"{head}{part.strip()}{tail}", loss=False))
            head = ""
    return nodes
