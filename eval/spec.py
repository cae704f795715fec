"""What a task's YAML under `hydra/task/` may say: `TaskSpec`, and its `SourceSpec`s. Every key, type and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from eval.metrics.table import METRICS, NEEDS_RANKING
from eval.metrics.text import SCORE_NAMES
from flamingo.configs.validate import AtLeast1, one_of

VECTOR_KINDS = frozenset({"zero_shot", "retrieval"})
"""Kinds of tasks that an encoder does, not a Flamingo."""
TEMPLATE_SETS = {"openai_imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
"""Sets of templates by the names that open_clip has for them."""
Score = Annotated[str, one_of(SCORE_NAMES)]


@dataclass(kw_only=True)
class SourceSpec:
    """Where a task's items come from."""

    format: str = "documents"
    """documents: shards of `python -m data prepare`; csv and jsonl: your own table with columns image, answer and
    optionally question, id, kind, choices; the others are data sets' own files, see eval/tasks/formats."""
    path: str = ""
    """Folder of shards, or the file."""
    annotations: str = ""
    """A second file that some data sets keep their answers (or splits) in."""
    images: str = ""
    """Folder of the images or videos, or a pattern such as `val2014/COCO_val2014_{image_id:012d}.jpg`."""
    split: str = ""
    """Which split of a file that holds several; `a+b` takes both."""
    only: dict[str, str] = field(default_factory=dict)
    """Items are taken only if these fields have these values, for example {q_lang: en}."""
    annotators: int | None = None
    """How many answers every question must have; any other count stops the run."""
    frames: int = 8
    """Frames taken from a video, evenly spread."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which key of a document's `meta` (or which column) is the question, answer, kind or label; what is not named
    here is the document's own text."""
    max_items: int | None = 4096
    """Items read at most, in file order; null reads all."""


@dataclass(kw_only=True)
class TaskSpec:
    """One YAML under `hydra/task/`. Every field is checked before a model is loaded."""

    kind: Literal["examples", "binding", "zero_shot", "retrieval"] = "examples"
    """examples: demonstrations are other items with their answers; binding: new names for classes of images; zero_shot
    and retrieval compare the vectors of an encoder that has images and texts."""
    source: SourceSpec = field(default_factory=SourceSpec)
    support: SourceSpec | None = None
    """Where demonstrations come from; null splits `source`: the first `queries` in hash order are asked, the rest
    are demonstrations."""
    root: str = ""
    """Folder that the relative paths of `source` and `support` start from."""
    published: dict[str, str] = field(default_factory=dict)
    """Files that the task needs below `root`, and where each is published; for `python -m eval prepare`."""
    expected: int | None = None
    """Queries in the published split, which `prepare` compares with."""
    support_size: AtLeast1 | None = None
    """Items of `support` used, chosen by their ids alone; null uses all."""
    queries: AtLeast1 | None = 200
    """Queries asked at most (items of `source`; episodes for binding); null asks all."""
    form: str = ""
    """Which of a protocol's prompts the task takes: caption, vqa, choice and so on; see hydra/protocol."""
    prefix: str = ""
    """Text at the head of the prompt: an instruction."""
    before: str = ""
    """Text ahead of every image."""
    separator: str = ""
    """Text after every demonstration."""
    end_of_chunk: bool = True
    """Whether a demonstration (and a ranked answer) ends with the end-of-chunk token; without it, with `separator`."""
    chat: bool = False
    """Whether demonstrations and query are turns of a conversation, written by the model's chat template; `prefix` is
    its system message. Then neither `before`, `separator` nor `end_of_chunk` has a meaning."""
    history: Literal["given", "own"] = "given"
    """Whose answers `{history}` shows in a conversation: the data's, or those that the model itself gave."""
    options: Literal["lines", "inline"] = "lines"
    """How `{options}` in a question is written: lines (`A. red`, one a line) or inline (`(A) red (B) blue`)."""
    answer_as: Literal["text", "letter"] = "text"
    """Multiple choice: whether the answer is the option's text or its letter."""
    demo_answer: Literal["first", "majority"] = "first"
    """Which of several annotators' answers a demonstration shows: first or majority."""
    zero_shot: Literal["none", "two_text", "two_text_fixed", "two_text_first_image"] = "none"
    """At 0 shots: none, or two_text, which shows two demonstrations without their images (not counted as shots), drawn
    for each query; with two_text_fixed they are the same for all. two_text_first_image is a historic fault: the query
    is then shown with a demonstration's image."""
    num_beams: AtLeast1 = 1
    """Beams of a generated answer."""
    length_penalty: float = 1.0
    """Exponent of the length that beam search divides by."""
    cut: list[str] = field(default_factory=list)
    """A generated answer ends where one of these strings begins."""
    remove: str = ""
    """Characters taken out of a generated answer."""
    metrics: list[Annotated[str, one_of(METRICS)]] = field(default_factory=list)
    """Metrics of the whole set, names of eval.metrics.table.METRICS, beside the mean of `metric`."""
    question: str = "{question}"
    """The question's text node; `{question}` is the item's own question, `{options}` its choices, and what else a
    format's items have may be named likewise."""
    lead: str = ""
    """Fixed start of the answer's text node, part of the query's prompt too; a space where answers begin with one."""
    tail: str = ""
    """Fixed end of the answer's text node, shown in demonstrations and ignored in answers."""
    output: Literal["generate", "rank"] = "generate"
    """generate: greedy decoding; rank: the most probable of the candidates."""
    ranking: Literal["sum", "mean"] = "sum"
    """What candidates are ranked by: sum, the log-probability of the whole answer, or mean, its share of one token
    (as OpenFlamingo does), which favours long answers."""
    rank_end: bool = True
    """Whether a candidate is scored with its end; without it "tiger" never has a lower sum than "tiger shark"."""
    candidates: list[str] = field(default_factory=list)
    """Closed answers for rank; empty takes every answer of the support set of the query's kind."""
    candidates_from: str = ""
    """Instead: a JSON file with a list of answers (or an object whose keys they are), or support:N, the answers that
    occur at least N times in all of the support's file, which is how vocabularies of video questions are made."""
    metric: Score = "exact_match"
    """Score of one answer: a name of eval.metrics.text.SCORE_NAMES."""
    open_metric: Annotated[str, one_of(("", *SCORE_NAMES))] = ""
    """Score of an answer that is generated although the task ranks: of an open question among closed ones."""
    stem: Literal["", "okvqa"] = ""
    """okvqa: generated answers are stemmed word by word as the annotation files stem theirs (raw_answer to answer)."""
    demos: str = "random"
    """Which demonstrations a query gets: a name of eval.demonstrations.samplers.SAMPLERS, with a value or file after
    a colon."""
    max_new_tokens: AtLeast1 = 32
    """Longest generated answer, in tokens."""
    ways: Annotated[int, Field(ge=2)] = 2
    """Binding: classes in an episode. Shots are examples of each. With demos=balanced also how many classes are shown
    out of those that a query brings, its own among them."""
    min_images: AtLeast1 = 9
    """Binding: classes with fewer different images are left out; one more than the most shots."""
    ask: str = ""
    """Binding: only images of this kind (who drew them, say) are asked about, and none of them is shown; empty: all."""
    own_names: bool = False
    """Binding: classes keep the names that the data give them, instead of names that hold for an episode."""
    names: list[str] = field(default_factory=list)
    """Binding: names to give; empty reads them from `names_source`."""
    names_source: SourceSpec | None = None
    """Binding: documents whose meta lists `names`."""
    templates: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["a photo of a {}."])
    """Zero-shot: texts with {} for the class, whose vectors are averaged; openai_imagenet and simple are open_clip's
    sets of 80 and of 7."""
    class_names: Literal["", "openai_imagenet"] = ""
    """Zero-shot: what templates call the classes: as the data do, or ImageNet's in OpenAI's words."""
    captions_each: AtLeast1 | None = None
    """Retrieval: the first so many captions of each image (5 is usual); null takes all."""

    def conflicts(self) -> Iterator[str]:
        """Yield a clause for each impossible combination of values."""
        if self.kind in VECTOR_KINDS:
            yield from self._vector_conflicts()
        if self.output != "rank":
            for name in sorted(NEEDS_RANKING.intersection(self.metrics)):
                yield f"metrics has {name}, which compares candidates: set output=rank"
        if self.history == "own" and "{history}" not in self.question:
            yield "history=own has no effect on a question without {history}: remove it"
        if self.own_names and (self.names or self.names_source is not None):
            yield "own_names is set, so names and names_source have no effect: remove them"
        if self.chat and (self.before or self.separator or not self.end_of_chunk or self.kind == "binding"):
            yield "chat=true is for kind=examples, and before, separator and end_of_chunk have no effect: remove them"
        elif not self.end_of_chunk and not self.separator:
            yield "separator is empty and end_of_chunk is false: a demonstration needs an end"

    def _vector_conflicts(self) -> Iterator[str]:
        if self.metric != "exact_match":
            yield f"metric={self.metric} has no effect on kind={self.kind}: remove it"
        if self.support is not None or self.demos != "random":
            yield f"support and demos have no effect on kind={self.kind}, which shows no demonstrations: remove them"
        if bad := [text for text in self.templates if text not in TEMPLATE_SETS and text.count("{}") != 1]:
            yield f"templates has {bad[0]!r}: write {{}} once, where the class goes, or name {', '.join(TEMPLATE_SETS)}"
