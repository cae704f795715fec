"""Questions and answers as nodes: only answers are in the loss."""

from __future__ import annotations

import argparse

from data.shards.document import Node, Text


def add_turn_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for how speakers are introduced."""
    parser.add_argument("--user", default="User: ", metavar="TEXT", help="before a question (default 'User: ')")
    parser.add_argument("--assistant", default="\nAssistant:", metavar="TEXT", help="before an answer")


def question(text: str, args: argparse.Namespace, *, first: bool, begins: bool = True, ends: bool = True) -> Text:
    """Return a question, or a part of one with images in it; a line break divides it from the previous turn."""
    head = ("" if first else "\n") + args.user if begins else ""
    return Text(f"{head}{text}{args.assistant if ends else ''}", loss=False)


def answer(text: str) -> Text:
    """Return an answer."""
    return Text(f" {text.strip()}")


def has_text(nodes: list[Node]) -> bool:
    """Return whether any text is in the loss."""
    return any(isinstance(node, Text) and node.loss and node.text.strip() for node in nodes)
