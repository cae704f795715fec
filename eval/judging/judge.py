"""Asks a judge about pairs of answers, each in both orders, and reads the two scores of its replies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.instruct.endpoint import REFUSED, Endpoint, EndpointConfig, Message
from data.instruct.reply_log import Reply, ReplyLog
from data.instruct.settings import fields_in, filled, read_prompt
from data.records import json_objects
from eval.reports.answers import Pairs, text_of
from eval.reports.gallery import figures_of
from flamingo.errors import UserError

PROMPTS = Path(__file__).parent / "prompts"
FIELDS = ("question", "first", "second", "context")
_SCORES = re.compile(r"[\s*_`(\[]*(\d+(?:\.\d+)?)[\s,;/]+(\d+(?:\.\d+)?)[\s*_`)\].]*")


@dataclass(kw_only=True)
class JudgeConfig(EndpointConfig):
    """The settings of `python -m eval judge`."""

    out: str
    """Folder for the replies and the report."""
    prompt: str = "text"
    """A name in eval/judging/prompts, or a YAML file."""
    context: str = ""
    """JSON lines of id (of the query) and context (what the judge is told of the image)."""


@dataclass(kw_only=True)
class JudgePrompt:
    """A file of eval/judging/prompts."""

    user: str
    """The question to the judge, with `{question}`, `{first}`, `{second}`, and `{context}` where it is given one."""
    system: str = ""
    scale: list[float] = field(default_factory=lambda: [1.0, 10.0])
    """Lowest and highest score."""

    def conflicts(self) -> Iterator[str]:
        """Yield a clause for each impossible combination of values."""
        fields = fields_in(self.user)
        if lost := [name for name in FIELDS[:3] if name not in fields]:
            yield f"user lacks {{{lost[0]}}}: the judge has to see it"
        if odd := sorted(fields.difference(FIELDS)):
            yield f"user has {{{odd[0]}}}: it may have {', '.join(FIELDS)}"
        if len(self.scale) != 2 or not 0 < self.scale[0] < self.scale[1]:
            yield "scale must be the lowest and the highest score, both above 0: a ratio of scores is taken"


@dataclass(frozen=True)
class Judged:
    """One question: the scores (of the first system, of the second) when the first was shown first, and last.

    None, and `why`, where a reply has no two scores.
    """

    task: str
    query_id: str
    kind: str
    cluster: str
    scores: tuple[tuple[float, float] | None, tuple[float, float] | None]
    why: str


def judge(pairs: Pairs, config: JudgeConfig) -> list[Judged]:
    """Return what the judge says of each question: of two runs, or of a run's answer after the gold answer.

    Raises:
        UserError: see `Endpoint.ask`; or no reply has scores.
    """
    prompt = read_prompt(JudgePrompt, config.prompt, PROMPTS)
    contexts = _contexts(config.context, pairs) if "context" in fields_in(prompt.user) else {}
    questions: list[list[Message]] = []
    for key, samples in pairs.items():
        answers = [text_of(sample) for sample in samples]
        if len(answers) == 1 and not any(samples[0].golds):
            raise UserError(f"{key[0]} has no gold answers to judge its answers beside; give two runs")
        answers = answers if len(answers) == 2 else [samples[0].golds[0], *answers]
        text = "".join(text for _, text, is_query in figures_of(samples[0]) if is_query).strip()
        values = {"question": text, "context": contexts.get(key[1], "")}
        for first, second in (answers, answers[::-1]):
            user = filled(prompt.user, {**values, "first": first, "second": second})
            system = [{"role": "system", "content": prompt.system}] if prompt.system else []
            questions.append([*system, {"role": "user", "content": user}])
    log = ReplyLog(Path(config.out) / "replies.jsonl")
    replies = Endpoint(config, log).ask(questions)
    judged = [
        _judged(key, samples[0].kind, samples[0].cluster, replies[2 * number : 2 * number + 2], prompt)
        for number, (key, samples) in enumerate(pairs.items())
    ]
    if not any(None not in one.scores for one in judged):
        raise UserError(
            f"no question of {len(judged)} has two scores in both orders, the first because: {judged[0].why}; look at "
            f"{log.path}, and change the prompt or the model"
        )
    return judged


def _judged(key: tuple[str, str], kind: str, cluster: str, replies: Sequence[Reply], prompt: JudgePrompt) -> Judged:
    scores, reasons = [], []
    for reply in replies:
        found, why = scores_in(reply, prompt.scale)
        scores.append(found)
        reasons += [why] if why else []
    turned = scores[1] and scores[1][::-1]
    return Judged(*key, kind, cluster, (scores[0], turned), reasons[0] if reasons else "")


def scores_in(reply: Reply, scale: Sequence[float]) -> tuple[tuple[float, float] | None, str]:
    """Return the two scores on the reply's first line that is not empty; or None and why there are none."""
    if reply.finish == REFUSED:
        return None, "the endpoint refused the question"
    line = next((line for line in reply.text.splitlines() if line.strip()), "")
    match = _SCORES.fullmatch(line)
    if match is None:
        cut = reply.finish == "length"
        return None, "the reply was cut off before its scores" if cut else "the first line is not two scores"
    scores = float(match[1]), float(match[2])
    if not all(scale[0] <= score <= scale[1] for score in scores):
        return None, f"a score is not from {scale[0]:g} to {scale[1]:g}"
    return scores, ""


def _contexts(file: str, pairs: Pairs) -> dict[str, str]:
    """Return the context of each query. Raises UserError if some have none."""
    if not file:
        raise UserError("the prompt has {context}; give context=FILE with lines of id and context, or prompt=text")
    contexts = {}
    for line, entry in json_objects(Path(file)):
        if "id" not in entry or not isinstance(entry.get("context"), str):
            raise UserError(f"{file}: line {line} must have id and context, a text")
        contexts[str(entry["id"])] = entry["context"]
    if lost := [query for _, query in pairs if query not in contexts]:
        raise UserError(f"{file} has no context for {len(lost)} of {len(pairs)} questions, the first is {lost[0]}")
    return contexts
