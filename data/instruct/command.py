"""`python -m data instruct`: figures with captions to conversations about them, by a language model.

OUT/replies.jsonl         every reply, so that a stopped run goes on and a finished one costs nothing
OUT/conversations.json    an array as LLaVA has it, for `python -m data prepare llava`
OUT/report.json           what was kept, and what was left out, by reason
"""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from data.instruct.conversations import (
    PROMPTS,
    Figure,
    InstructPrompt,
    Lengths,
    conversation,
    read_figures,
    request,
)
from data.instruct.endpoint import Endpoint, EndpointConfig
from data.instruct.reply_log import ReplyLog
from data.instruct.settings import read_prompt, settings_of
from data.prepare.units import Dropped, Tally
from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.folder_lock import lock_folder
from flamingo.terminal import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m data instruct`; those of the endpoint have the names of its settings."""
    parser.add_argument("inputs", nargs="+", metavar="FILE", help="JSON (lines): id, image, caption, mentions")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--prompt", default="llava_med", metavar="NAME|FILE", help="(default llava_med)")
    parser.add_argument("--most", type=int, metavar="N", help="only the first N figures")
    parser.add_argument("--min-words", type=int, default=3, metavar="N", help="of an answer (default 3)")
    parser.add_argument("--max-words", type=int, default=300, metavar="N", help="of an answer (default 300)")
    parser.add_argument("--min-turns", type=int, default=1, metavar="N", help="of a conversation (default 1)")
    for option in fields(EndpointConfig):
        default = option.default if option.default_factory is MISSING else {}
        shown = "required" if default is MISSING else f"default {default}"
        parser.add_argument(f"--{option.name.replace('_', '-')}", metavar="VALUE", help=f"of the endpoint ({shown})")


def run(args: argparse.Namespace) -> int:
    """Ask for all conversations, filter them and write them. Raises UserError."""
    given = {option.name: getattr(args, option.name) for option in fields(EndpointConfig)}
    config = settings_of(EndpointConfig, {name: text for name, text in given.items() if text is not None})
    prompt = read_prompt(InstructPrompt, args.prompt, PROMPTS)
    lengths = Lengths(args.min_words, args.max_words, args.min_turns)
    if not (0 <= lengths.min_words <= lengths.max_words and lengths.min_turns >= 1 and (args.most or 1) >= 1):
        raise UserError("--min-words must not be above --max-words, and --min-turns and --most must be at least 1")
    tally, turns, out = Tally(), Tally(), Path(args.out)
    figures = _figures(args, tally)
    with lock_folder(out, "an instruct run", "wait for its end, stop it, or give another --out"):
        log = ReplyLog(out / "replies.jsonl")
        replies = Endpoint(config, log).ask([request(figure, prompt) for figure in figures])
        lines = []
        for figure, reply in zip(figures, replies, strict=True):
            try:
                lines.append(json.dumps(conversation(figure, reply, prompt, lengths, turns), ensure_ascii=False))
                tally.documents += 1
            except Dropped as dropped:
                tally.drop_document(dropped.reason, figure.name)
        report = [f"{tally.documents:,} conversations of {turns.documents:,} turns", *tally.report()]
        report += ["turns left out of them or of others:", *turns.report()] if turns.dropped_documents else []
        if not lines:
            raise UserError(f"not one conversation was kept: {'; '.join(' '.join(line.split()) for line in report)}")
        facts = {"figures": tally.to_json()["documents"], "turns": turns.to_json()["documents"]}
        facts |= {"model": config.model, "prompt": asdict(prompt), "lengths": asdict(lengths), "tokens": log.tokens}
        write_atomically(out / "report.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        body = "[\n" + ",\n".join(lines) + "\n]\n"
        write_atomically(out / "conversations.json", body.encode("utf-8", "replace"))
    print(printable("\n".join([f"{out / 'conversations.json'}: {report[0]}", *report[1:]])))
    return 0


def _figures(args: argparse.Namespace, tally: Tally) -> list[Figure]:
    """Return the figures of all files, each id once."""
    figures: dict[str, Figure] = {}
    for path in map(Path, args.inputs):
        for figure in read_figures(path, tally):
            if figure.name in figures:
                tally.drop_document("id occurs twice", f"{path.name} {figure.name}")
            elif args.most is None or len(figures) < args.most:
                figures[figure.name] = figure
    if not figures:
        raise UserError(f"no figure in {', '.join(args.inputs)}: {'; '.join(tally.report()) or 'the files are empty'}")
    return list(figures.values())
