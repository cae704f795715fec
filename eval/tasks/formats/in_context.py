"""Benchmarks of learning in context: VL-ICL Bench (Zong et al. 2025), as its data set on the hub unzips, and SMMILE.

A task of VL-ICL is a folder with `query.json` and `support.json`, lists of objects with image (a path below the data
set's root, or a list of them), question and answer. What differs from task to task is said by the fields:

- operator induction: a supporting answer is a list, the results of +, - and x; a query names its operator. Every such
  entry becomes three items whose kind is the operator, so that demos=same_kind shows the query's.
- open-ended MiniImageNet: a query brings its own support, five images of each of five made-up `classes`. Only these may
  be shown, so `support.json` is not read; demos=balanced shows two of the classes, and two shots are one there.
- matching: a supporting entry has a pair that is the `same` and one that is `diff`erent; demos=balanced shows as many
  of each, and two shots here are one shot there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from eval.spec import SourceSpec
from eval.task import EncodedImage
from eval.tasks.formats.files import Item, image_of, item
from eval.tasks.formats.hub import hub_image, hub_rows
from eval.tasks.formats.rows import Row, json_rows

OPERATORS = ("+", "-", "x")


def vl_icl(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `query.json` or `support.json` of a task; `source.images` is the root of the data set."""
    for number, row in enumerate(json_rows(path)):
        name = f"{path.stem} {row.text('id', '') or number}"  # a query and a supporting entry may have one id
        if "support" in row.fields:
            support = list(_of_classes(row, name, source))
            yield _item(row, name, source, row.name("answer"), "") | {"support": support}
        elif "same" in row.fields:
            for part, answer in (("same", "yes"), ("diff", "no")):
                pair = row.row(part)
                if pair.name("answer").lower() != answer:
                    raise pair.wrong("answer", pair.fields["answer"], repr(answer))
                yield _item(pair, f"{name}.{part}", source, pair.name("answer"), "")
        elif isinstance(row.fields.get("answer"), list):
            answers = row.texts("answer")
            if len(answers) != len(OPERATORS):
                raise row.wrong("answer", row.fields["answer"], f"the results of {', '.join(OPERATORS)}")
            for operator, answer in zip(OPERATORS, answers, strict=True):
                yield _item(row, f"{name}.{operator}", source, answer, operator)
        else:
            operator = row.text("operator", "")
            if operator and operator not in OPERATORS:
                raise row.wrong("operator", operator, f"one of {', '.join(OPERATORS)}")
            yield _item(row, name, source, row.name("answer"), operator)


def _of_classes(row: Row, name: str, source: SourceSpec) -> Iterator[Item]:
    """Yield the images that a query of open-ended MiniImageNet brings, as its code shows them: "This is a" CLASS."""
    classes = row.texts("classes")
    if row.name("answer") not in classes:
        raise row.wrong("answer", row.fields["answer"], "one of its classes")
    for label in classes:
        brought = row.row("support").row(label)
        for number, file in enumerate(brought.texts("images")):
            image = image_of(source, file, brought)
            yield item(brought, f"{name}.{label}.{number}", image, "This is a", [label], label=label)


def smmile(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read SMMILE (Rieff et al. 2025): a parquet file with a row for every image, or the folder that has `train-*`.

    The rows of a `problem_id` belong together, in their `order`: the last one is asked, the others are its
    demonstrations. The kind is its `speciality`; its choices are all answers of the problem, for output=rank.
    """
    problems: dict[str, list[Row]] = {}
    for _, row in hub_rows(path, source):
        problems.setdefault(row.name("problem_id"), []).append(row)
    images: dict[str, EncodedImage] = {}
    for name, rows in problems.items():
        rows.sort(key=lambda row: row.number("order"))
        if twice := [row for before, row in pairwise(rows) if row.number("order") == before.number("order")]:
            raise twice[0].fault(f"is the second of problem {name} with order {twice[0].text('order')}; correct it")
        items = [_of_problem(row, f"{name}.{row.text('order')}", source, images) for row in rows]
        if not items[:-1]:
            raise rows[0].fault(f"is all of problem {name}, which has nothing to show; is this the published file?")
        choices = list(dict.fromkeys(item["answers"][0] for item in items))
        yield items[-1] | {"id": name, "support": items[:-1], "choices": choices}


def _of_problem(row: Row, name: str, source: SourceSpec, images: dict[str, EncodedImage]) -> Item:
    image, _ = hub_image(row, source, images)
    return item(row, name, image, row.text("question"), [row.name("answer")], row.text("speciality", ""))


def _item(row: Row, name: str, source: SourceSpec, answer: str, operator: str) -> Item:
    listed = isinstance(row.get("image"), list)
    files = row.texts("image") if listed else [row.name("image")]
    images = [image_of(source, file, row) for file in files]
    several = {"images": images} if len(images) > 1 else {}
    # Two images make a pair: items that share one of them are not the same item.
    group = name if several else ""
    question = row.text("question", "")
    return item(row, name, images[0], question, [answer], operator, label=answer, group=group, **several)
