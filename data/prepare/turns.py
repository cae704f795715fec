"""Turns as nodes: with roles, which a chat template writes in training, or as text. Only answers are in the loss.

As text (`--user`, `--assistant`) a conversation is an ordinary document: `User: What?\\nAssistant: A cat.`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from data.prepare.conversation import Said
from data.shards.document import Image, Node, Text

USER, ASSISTANT = "User: ", "\nAssistant:"


def add_turn_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for how speakers are introduced."""
    about = "write turns as text, with this {} (default: roles, for the model's chat template)"
    parser.add_argument("--user", metavar="TEXT", help=about.format(f"before a question, such as {USER!r}"))
    parser.add_argument("--assistant", metavar="TEXT", help=about.format(f"before an answer, such as {ASSISTANT!r}"))


def conversation_nodes(said: Sequence[Said], args: argparse.Namespace) -> list[Node]:
    """Return the nodes of a document that is this conversation."""
    if args.user is None and args.assistant is None:
        return [
            replace(part, role=message.role)
            if isinstance(part, Image)
            else Text(part, loss=message.role == "assistant" and message.loss, role=message.role)
            for message in said
            for part in message.parts
            if part
        ]
    nodes: list[Node] = []
    for message in said:
        if message.role == "user":
            nodes += _question(message.parts, args, first=not nodes)
        else:
            text = "".join(part for part in message.parts if isinstance(part, str)).strip()
            shown = [part for part in message.parts if isinstance(part, Image)]
            answers = message.role == "assistant"
            nodes += [*shown, Text(f" {text}" if answers else f"{text}\n", loss=answers and message.loss)]
    return nodes


def _question(parts: Sequence[str | Image], args: argparse.Namespace, *, first: bool) -> list[Node]:
    """Return the nodes of a question as text; a line break divides it from the previous turn, or else an image does."""
    nodes: list[Node] = []
    head = ("" if first or isinstance(parts[0], Image) else "\n") + (USER if args.user is None else args.user)
    parts = [*parts, ""] if isinstance(parts[-1], Image) else parts
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        if isinstance(part, Image):
            nodes.append(part)
        elif part.strip() or is_last:
            tail = (ASSISTANT if args.assistant is None else args.assistant) if is_last else ""
            nodes.append(Text(f"{head}{part.strip()}{tail}", loss=False))
            head = ""
    return nodes
