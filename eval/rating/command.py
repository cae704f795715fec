"""`python -m eval rate`: blinded sheets of finished runs, and the report of what came back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field

from data.instruct.settings import settings_of
from eval.rating.axes import read_axes
from eval.rating.filled import files_in, read_filled
from eval.rating.plan import KEY, Question, Shares, make_plan, read_key, write_key
from eval.rating.sheets import write_sheets
from eval.reports.answers import CHOICES, answers_of, system_names
from eval.reports.commands import split_settings
from eval.reports.saved_run import SavedRun, read_run
from eval.task import EncodedImage
from flamingo.configs.validate import AtLeast1
from flamingo.errors import UserError
from flamingo.files import write_atomically
from flamingo.terminal import printable


@dataclass(kw_only=True)
class RateConfig:
    """The settings of `python -m eval rate`."""

    out: str
    """Folder for the sheets and their key."""
    axes: str = "clinician"
    """Names in eval/rating/axes or YAML files, with commas between them."""
    raters: Annotated[int, Field(ge=1, le=999)] = 2
    """How many people rate."""
    overlap: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the questions that every rater gets; the others are dealt out."""
    questions: AtLeast1 | None = None
    """Questions rated at most; null: all."""
    seed: int = 0
    """Of the choice of questions, their order and the answers' sides."""
    images: bool = True
    """Whether the questions' images are embedded."""


KEYS = (*(field.name for field in fields(RateConfig)), *CHOICES)


def rate(arguments: Sequence[str]) -> int:
    """Run `rate RUN [RUN] out=FOLDER ...` or `rate --read FILES [key=FILE] [out=FOLDER]`."""
    if arguments and arguments[0] == "--read":
        return read(arguments[1:])
    folders, settings = split_settings(arguments, KEYS)
    if len(folders) not in (1, 2):
        raise UserError(f"rate needs one or two folders that `python -m eval` wrote, got {len(folders)}")
    config = settings_of(RateConfig, {key: text for key, text in settings.items() if key not in CHOICES})
    out = Path(config.out)
    if (out / KEY).exists():
        raise UserError(f"{out} has the {KEY} of earlier sheets, without which they cannot be read; give another out=")
    runs = [read_run(folder) for folder in folders]
    axes = read_axes(config.axes)
    if len(runs) == 2 and not any(axis.compares for axis in axes.values()):
        axes |= read_axes("preference")
    if len(runs) == 1 and (pairs := [key for key, axis in axes.items() if axis.compares]):
        raise UserError(f"axis {pairs[0]} compares two answers, and there is one run; give two, or leave it out")
    shares = Shares(config.raters, config.overlap, config.seed, config.questions)
    plan, questions = make_plan(system_names(runs), answers_of(runs, settings), axes, shares)
    wanted = {sha256 for question in questions.values() for sha256, _ in question.figures if sha256 is not None}
    images = images_of(runs[0], wanted) if wanted and config.images else {}
    pages = write_sheets(plan, questions, images, out)
    write_key(plan, out / KEY)  # last: with it the sheets are whole
    _tell(pages, questions, out)
    return 0


def _tell(pages: Sequence[Path], questions: Mapping[str, Question], out: Path) -> None:
    print(printable(f"{len(questions)} questions for {len(pages)} raters: {pages[0]} to {pages[-1].name}, or the .csv"))
    print(printable(f"{out / KEY} says which system answered: keep it, and do not send it to the raters"))


def images_of(run: SavedRun, wanted: set[str]) -> dict[str, EncodedImage]:
    """Return images by SHA-256, read again from the data of the run's tasks, which a run's folder does not hold.

    Raises:
        UserError: the data are not there any more, or have changed.
    """
    from eval.compose import load_config
    from eval.tasks.sources import read_examples

    images: dict[str, EncodedImage] = {}
    try:
        config = load_config(run.results["command"][3:])  # behind: python -m eval
        for name, spec in config.task.items():
            for example in read_examples(name, spec, spec.source):
                if len(images) == len(wanted):
                    return images
                images |= {image.sha256: image for image in example.turn.images if image.sha256 in wanted}
    except (UserError, KeyError, TypeError) as error:
        raise UserError(_LOST.format(folder=run.folder, why=f"cannot be read again ({error})")) from None
    if lost := len(wanted) - len(images):
        raise UserError(_LOST.format(folder=run.folder, why=f"have changed: {lost} of {len(wanted)} images are lost"))
    return images


_LOST = (
    "the data that {folder} was asked about {why}; run this in the folder where the evaluation ran, or make sheets "
    "without images: images=false"
)


def read(arguments: Sequence[str]) -> int:
    """Run `rate --read FILES [key=FILE] [out=FOLDER]`: check, count, report."""
    from eval.rating.report import report_html, shares_png, tables_of
    from eval.rating.summary import summary_of

    names, settings = split_settings(arguments, ("key", "out"))
    files = files_in(names)
    key = Path(settings.get("key", files[0].parent / KEY))
    if not key.is_file():
        raise UserError(f"{key} does not exist; give the {KEY} that was written with the sheets: key=FILE")
    plan = read_key(key)
    filled = read_filled(files, plan)
    summary = summary_of(filled, plan)
    out = Path(settings.get("out", key.parent / "report"))
    figure = shares_png(summary, plan.axes)
    lines = [asdict(rating) | asdict(plan.questions[rating.question]) for rating in filled.ratings]
    write_atomically(out / "ratings.jsonl", "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    write_atomically(out / "rating.png", figure)
    write_atomically(out / "rating.html", report_html(summary, figure, plan.axes))
    write_atomically(out / "ratings.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(printable("\n\n".join(table.text() for table in tables_of(summary) if table.rows)))
    print(printable("\n".join(["", *summary["notes"], f"look at {out}/rating.html"])))
    return 0
