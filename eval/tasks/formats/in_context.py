"""VL-ICL Bench (Zong et al. 2025): five of its image-to-text tasks, as its data set on the hub unzips.

A task is a folder with `query.json` and `support.json`, lists of objects with image (a path below the data set's root,
or a list of them), question and answer. What differs from task to task is said by the fields:

- operator induction: a supporting answer is a list, the results of +, - and x; a query names its operator. Every such
  entry becomes three items whose kind is the operator, so that demos=same_kind shows the query's.
- matching: a supporting entry has a pair that is the `same` and one that is `diff`erent; demos=balanced shows as many
  of each, and two shots here are one shot there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, image_of, item
from eval.tasks.formats.rows import Row, json_rows
from flamingo.errors import UserError

OPERATORS = ("+", "-", "x")


def vl_icl(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `query.json` or `support.json` of a task; `source.images` is the root of the data set."""
    rows = json_rows(path)
    if any("support" in row.fields for row in rows):
        raise UserError(
            f"{path} is of open-ended MiniImageNet, whose queries bring their own support: it is not read here"
        )
    for number, row in enumerate(rows):
        name = f"{path.stem} {row.text('id', '') or number}"  # a query and a supporting entry may have one id
        if "same" in row.fields:
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


def _item(row: Row, name: str, source: SourceSpec, answer: str, operator: str) -> Item:
    listed = isinstance(row.get("image"), list)
    files = row.texts("image") if listed else [row.name("image")]
    images = [image_of(source, file, row) for file in files]
    several = {"images": images} if len(images) > 1 else {}
    # Two images make a pair: items that share one of them are not the same item.
    group = name if several else ""
    question = row.text("question", "")
    return item(row, name, images[0], question, [answer], operator, label=answer, group=group, **several)
