"""`python -m eval shards task=NAME --out DIR`: a task's training split as shards, with the task's own prompt.

It lives here and not under `python -m data prepare` because the prompt is the evaluation's: the same settings, readers
and protocol give the text, so a row of training begins with the ids that the evaluation asks with. Cutting into units,
workers, `--part`, resuming and counting are those of `data.prepare.engine`, for which this module is a source.

The training split is the task's `support`, or without one what `queries` leaves of its `source`; all of it, whatever
`support_size` and `max_items` say. What is also asked by the evaluation is dropped and counted, like an item whose
image or video is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

from data.prepare import engine
from data.prepare.images import ImageRule, add_image_arguments
from data.prepare.inputs import required
from data.prepare.units import Dropped, InputUnit, Tally
from data.shards.document import Document, Image, Node, Text, conversation_nodes
from eval.compose import load_config
from eval.prompting.prompts import asked as questions
from eval.prompting.strategies import ANSWER, answer_turn, rationale_turn
from eval.spec import TaskSpec
from eval.task import EncodedImage, Example, Frame, StoredImage, Turn, content_hash, hash_order
from eval.tasks.formats.files import VIDEO_ENDINGS, below_root
from eval.tasks.sources import read_examples
from flamingo.errors import UserError
from flamingo.processing.conversation import Conversation, Message
from flamingo.terminal import printable

LAYOUT = "interleaved"
IN_A_UNIT = 5000
STAGES: dict[str, Callable[[Turn], Turn]] = {
    "rationale": rationale_turn,
    "answer": lambda turn: answer_turn(turn, turn.rationale),
    "joint": lambda turn: replace(rationale_turn(turn), tail=f"{ANSWER}{turn.lead or ' '}{turn.answer}{turn.tail}"),
}
ALSO_ASKED = "also asked by the evaluation"


def main(arguments: Sequence[str]) -> int:
    """Write the shards of the chosen tasks and return the exit status."""
    parser = argparse.ArgumentParser("python -m eval shards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    engine.add_arguments(parser, "SETTING", "task=NAME, protocol=NAME, task.NAME.KEY=VALUE")
    parser.add_argument(
        "--all-answers", action="store_true", help="a document for each accepted answer (all captions of an image)"
    )
    parser.add_argument(
        "--stage",
        choices=tuple(STAGES),
        help="as strategy=two_stage asks: for the rationale, for the answer behind it, or for both at once (joint)",
    )
    add_image_arguments(parser)
    args = parser.parse_args(arguments)
    args.module = __name__
    _split.cache_clear()  # files may have changed since it was called in this process
    try:
        for name, spec in load_config([*args.inputs, "model=none"]).task.items():
            args.source, args.prompt = name, {key: getattr(spec, key) for key in ("question", "lead", "tail", "chat")}
            with engine.claimed(args):
                engine.run(name, args)
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def units(args: argparse.Namespace) -> list[InputUnit]:
    """Return units of thousands of items. Their names tell items and prompts apart: other ones are prepared anew."""
    examples, asked, _ = _split(tuple(args.inputs), args.source)
    if asked is None:
        print(f"task {args.source}: what it asks is not here, so nothing was compared with it", file=sys.stderr)
    found = []
    for first in range(0, len(examples), IN_A_UNIT):
        some = examples[first : first + IN_A_UNIT]
        content = content_hash(*((example.id, example.turn.question_text, example.turn.text) for example in some))
        label = f"{args.source} from item {first}"
        found.append(InputUnit(label, "", first, first + len(some), names=(content[:16],)))
    return found


def documents(unit: InputUnit, args: argparse.Namespace, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a unit's items."""
    rule = ImageRule.of(args)
    examples, asked, frame = _split(tuple(args.inputs), args.source)
    for example in examples[unit.begin : unit.end]:
        answers = list(dict.fromkeys(example.golds)) if args.all_answers else [example.turn.answer]
        meta = {"task": args.source, "id": example.id} | ({"kind": example.kind} if example.kind else {})
        try:
            if asked and _identity(example) in asked:
                raise Dropped(ALSO_ASKED)
            if args.stage and not example.turn.rationale.strip():
                raise Dropped("no rationale")
            clips = [_frames(image, rule) for image in example.turn.images]
            for answer in answers:
                turn = replace(example.turn, answer=answer)
                nodes = training_nodes(STAGES[args.stage](turn) if args.stage else turn, clips, frame)
                yield Document("", nodes, [image for clip in clips for image in clip], meta)
        except Dropped as dropped:
            tally.drop_document(dropped.reason, f"{args.source} item {example.id}")


def training_nodes(turn: Turn, clips: Sequence[Sequence[bytes]], frame: Frame) -> list[Node]:
    """Return the nodes of a turn: tokenized, they begin with the ids of the prompt that asks for its answer.

    `clips` are the frames of each of its images, which the document has one after another.

    Raises:
        Dropped: there are several images in the question, or no answer.
    """
    if not turn.answer.strip():
        raise Dropped("no answer")
    ends = list(accumulate(map(len, clips), initial=0))
    shown = [Image(tuple(range(*place))) for place in pairwise(ends)]
    if frame.chat:
        answer = Message("assistant", (turn.text.strip(),))
        return conversation_nodes(Conversation((*questions(frame.prefix, [turn]).messages, answer)), shown)
    if turn.more:  # a document ends a chunk before each further image, a prompt does so only before each turn's first
        raise Dropped("several images in a question (protocol=chat takes them)")
    asked: list[Node] = [Text(turn.question, loss=False)] if turn.question else []
    return [*shown, *asked, Text(turn.text)]


def _frames(image: EncodedImage, rule: ImageRule) -> list[bytes]:
    """Return the frames of an image. Raises Dropped when they are missing or cannot be read."""
    if isinstance(image, StoredImage) and image.file is not None:
        if not image.file.exists():
            raise Dropped("image or video is missing")
        if image.file.suffix.lower() in VIDEO_ENDINGS and image.file.is_file():
            required("av", "decoding videos", "tasks")
    try:
        frames = image.frames
    except UserError:
        raise Dropped("image or video cannot be read") from None
    return [rule.check(frame) for frame in frames]


Identity = tuple[str, str, tuple[str, ...], str]


def _identity(example: Example) -> Identity:
    """Return what makes an item the same in two splits, without reading its image."""
    image = example.turn.image
    file = image.file if isinstance(image, StoredImage) else None  # some ids are only counts, in each split anew
    return example.id, example.turn.question_text, example.golds, str(file or example.group)


@lru_cache(maxsize=1)
def _split(settings: tuple[str, ...], name: str) -> tuple[list[Example], frozenset[Identity] | None, Frame]:
    """Return the items to train on, what the evaluation asks (None where its files are not here), and their frame.

    Raises:
        UserError: the task has no training split, or no prompt that a document can have.
    """
    spec = load_config([*settings, "model=none"]).task[name]
    _check_prompt(name, spec)
    whole = replace(spec.support or spec.source, max_items=None)
    examples = read_examples(name, spec, whole, complete=False)
    frame = Frame(spec.prefix, chat=spec.chat)
    if spec.support is None:
        first = examples[: spec.source.max_items]
        order = hash_order([example.id for example in first], "queries", name)
        asked = {order[index] for index in range(min(spec.queries or 0, len(first)))}
        rest = [example for index, example in enumerate(examples) if index not in asked]
        if not rest:
            raise UserError(f"task {name}: all of its {len(examples)} items are asked; lower task.{name}.queries")
        return rest, frozenset(), frame
    if not Path(below_root(spec.source, spec.root).path).exists():
        return examples, None, frame
    return examples, frozenset(map(_identity, read_examples(name, spec, spec.source, complete=False))), frame


def _check_prompt(name: str, spec: TaskSpec) -> None:
    """Raise UserError for a task without a training split, or with a prompt that no document has."""
    if spec.kind == "binding" or (spec.support is None and spec.queries is None):
        raise UserError(
            f"task {name} has no training split: set task.{name}.support to one, or choose a task that has it"
        )
    unlike = [key for key in ("prefix", "before") if getattr(spec, key)] + ["end_of_chunk"] * (not spec.end_of_chunk)
    if unlike and not spec.chat:  # a chat's prefix is its system message
        raise UserError(
            f"task.{name}.{unlike[0]} is {getattr(spec, unlike[0])!r}, which documents of shards cannot have: training "
            "would see another prompt than the evaluation's; use protocol=modern or openflamingo, or unset it"
        )
