"""Questions that want a long answer, and conversations: what people, or a judge, have to rate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from data.records import one_line, read_bytes
from eval.spec import SourceSpec
from eval.task import Said, history_of
from eval.tasks.formats.files import Item, image_of, item
from eval.tasks.formats.rows import Row, csv_rows, json_rows
from flamingo.errors import UserError

SUMMARY = "NLM-Summary"
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}


def liveqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read TREC 2017 LiveQA's XML: questions with every ANSWER of theirs; the kind is the first TYPE.

    The question is the element `NLM-Summary`, or `fields: {question: ...}`: NIST-PARAPHRASE, MESSAGE as it was sent.
    Training files, whose answers belong to parts of the question, are read too.
    """
    wanted = source.fields.get("question", SUMMARY)
    for number, element in enumerate(_xml(path).iter("NLM-QUESTION"), 1):
        texts = {child.tag: " ".join("".join(child.itertext()).split()) for child in element.iter()}
        found = ("".join(answer.itertext()) for answer in element.iter("ANSWER"))
        texts["MESSAGE"] = texts.get("MESSAGE") or texts.get("SUBJECT", "")  # some say everything in the subject
        answers = [text for text in (" ".join(answer.split()) for answer in found) if text]
        name = element.get("qid") or element.get("questionid")
        row = Row(path, f"question {number}", {"qid": name, **{tag: text for tag, text in texts.items() if text}})
        kind = next((" ".join((kind.text or "").split()) for kind in element.iter("TYPE")), "")
        yield item(row, row.name("qid"), None, row.text(wanted), answers, kind.lower())


def _xml(path: Path) -> ElementTree.Element:
    raw = read_bytes(path)
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:  # which can make a small file endless
        raise UserError(f"{path} has a document type of its own; is this the published file?")
    try:
        return ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is not XML: {one_line(error)}") from None


def medicationqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `MedInfo2019-QA-Medications.xlsx` (or a CSV of it): Question, Answer, Question Type. Ids are row numbers."""
    for number, row in enumerate(_table(path)):
        answer = " ".join(row.text("Answer", "").split())
        kind = row.text("Question Type", "").lower()
        yield item(row, str(number), None, row.text("Question"), [answer] if answer else [], kind)


def healthsearchqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read HealthSearchQA, a table with the column question (in any letters), and id if there is one.

    There are no answers: an empty text stands for them, which no score takes for one.
    """
    for number, row in enumerate(_table(path)):
        keys = {str(key).strip().lower(): str(key) for key in row.fields}
        name = row.name(keys["id"]) if "id" in keys else str(number)
        yield item(row, name, None, row.text(keys.get("question", "question")), [""])


def _table(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV table, or of the first sheet of an Excel file, below its header."""
    if path.suffix.lower() != ".xlsx":
        yield from csv_rows(path)
        return
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise UserError(f"{path} is an Excel file: pip install flamingo-vlm[tasks], or save it as CSV") from None
    try:
        rows = load_workbook(path, read_only=True, data_only=True).worksheets[0].iter_rows(values_only=True)
        header = [str(cell).strip() for cell in next(rows, ())]
        contents = [(number, cells) for number, cells in enumerate(rows, 2) if any(cell is not None for cell in cells)]
    except Exception as error:  # a damaged archive raises exceptions of every kind
        raise UserError(f"{path} cannot be read as an Excel file: {one_line(error)}") from None
    yield from (Row(path, f"row {number}", dict(zip(header, cells, strict=False))) for number, cells in contents)


def conversations(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read conversations in LLaVA's form, an item for each answer: what was said before it is `{history}`.

    The history has the data's own answers (with the task's history=own the model's); the kind is the turn's number.
    """
    for row in json_rows(path):
        name, file = row.name("id"), row.text("image", "")
        image = image_of(source, file, row) if file else None
        question, said = "", list[Said]()
        for part in row.rows("conversations"):
            speaker = SPEAKERS.get(part.text("from"))
            text = " ".join(re.sub("<image>", " ", part.text("value")).split())
            if speaker is None or (speaker == "answer") != bool(question) or not text:
                raise part.fault("is not a question of human and an answer of gpt in turn, with a text")
            if speaker == "question":
                question = text
                continue
            turn, more = len(said) + 1, {"values": {"history": history_of(said)}, "said": tuple(said)}
            yield item(row, f"{name}.{turn}", image, question, [text], f"turn {turn}", group=name, **more)
            said.append(Said(f"{name}.{turn}", question, text))
            question = ""
