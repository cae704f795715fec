"""Question answering with free answers: VQAv2 and its form, TextVQA, VizWiz, the medical sets, and on videos."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.records import read_json, table_rows
from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, check_annotators, clip_of, image_of, item, need, rows, wanted
from eval.tasks.formats.hub import hub_questions, is_hub
from flamingo.errors import UserError


def vqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read VQAv2 and OK-VQA: a file of questions and one of annotations (`answers[].answer`), joined by question_id.

    `fields: {answer: raw_answer}` takes OK-VQA's answers as they were given; its `answer` is stemmed.
    """
    if not source.annotations:
        raise UserError(f"{path} has only questions; give source.annotations, the file with their answers")
    answers_at = Path(source.annotations)
    key = source.fields.get("answer", "answer")
    annotations = {
        need(row, "question_id", answers_at): row for row in rows(answers_at, read_json(answers_at), "annotations")
    }
    for row in rows(path, read_json(path), "questions"):
        question_id = need(row, "question_id", path)
        if question_id not in annotations:
            raise UserError(
                f"{answers_at} has no answers to question {question_id} of {path}; are they of the same split?"
            )
        given = need(annotations[question_id], "answers", answers_at, question_id)
        answers = [str(need(answer, key, answers_at, question_id)) for answer in given]
        check_annotators(len(answers), source, answers_at, question_id)
        image = image_of(source, path, str(need(row, "image_id", path)), row)
        kind = annotations[question_id].get("answer_type", "")
        yield item(question_id, image, need(row, "question", path), answers, kind, group=str(row["image_id"]))


def stem_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the answers of an OK-VQA annotation file as they were given and as they are stemmed."""
    for row in rows(path, read_json(path), "annotations"):
        for answer in need(row, "answers", path):
            yield str(need(answer, "raw_answer", path)), str(need(answer, "answer", path))


def textvqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `TextVQA_0.5.1_*.json`: under data question, image_id, question_id and ten answers."""
    for row in rows(path, read_json(path), "data"):
        question_id, image = need(row, "question_id", path), str(need(row, "image_id", path))
        answers = need(row, "answers", path, f"question {question_id}")
        check_annotators(len(answers), source, path, question_id)
        yield item(question_id, image_of(source, path, f"{image}.jpg", row), row["question"], answers, group=image)


def vizwiz(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `val.json`: image, question, answers[].answer, answer_type. The question's white space is collapsed."""
    for row in rows(path, read_json(path)):
        file_name = str(need(row, "image", path))
        answers = [need(answer, "answer", path, file_name) for answer in need(row, "answers", path, file_name)]
        check_annotators(len(answers), source, path, file_name)
        image = image_of(source, path, file_name, row)
        yield item(Path(file_name).stem, image, row["question"], answers, row.get("answer_type", ""), group=file_name)


def vqa_rad(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `testset.json`/`trainset.json` (the split everybody scores) or the native file; answers may be numbers.

    Also the hub's parquet, whose kinds are by the answer: `eval.tasks.formats.hub`.
    """
    return hub_questions(path, source) if is_hub(path) else _medical(path, source, field="image_name")


def slake(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `test.json`: img_name, question, answer, q_lang, answer_type; `only: {q_lang: en}` takes the English."""
    return _medical(path, source, field="img_name")


def _medical(path: Path, source: SourceSpec, field: str) -> Iterator[Item]:
    for row in rows(path, read_json(path)):
        if wanted(row, source):
            file_name = str(need(row, field, path))
            kind = str(need(row, "answer_type", path)).strip().upper()
            shown = image_of(source, path, file_name, row)
            yield item(
                need(row, "qid", path), shown, row["question"], [need(row, "answer", path)], kind, group=file_name
            )


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of lists, dicts, strings and numbers, which refuses anything that would need an import."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def pathvqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `test_qa.pkl`, a pickled list of image, question, answer; yes and no are the closed answers.

    Unpickling may run code, so only plain values are read. Also the hub's parquet: `eval.tasks.formats.hub`.
    """
    if is_hub(path):
        yield from hub_questions(path, source)
        return
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except Exception as error:  # damaged pickles raise exceptions of every kind
        raise UserError(f"{path} is not a pickle of plain values: {error}") from None
    for index, row in enumerate(rows(path, content)):
        image, answer = str(need(row, "image", path)), str(need(row, "answer", path)).strip()
        kind = "CLOSED" if answer.lower() in ("yes", "no") else "OPEN"
        yield item(index, image_of(source, path, f"{image}.jpg", row), row["question"], [answer], kind, group=image)


def video_qa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read MSVD-QA and MSRVTT-QA: `test_qa.json`, a list of id, video_id, question, answer."""
    for row in rows(path, read_json(path)):
        video = str(need(row, "video_id", path))
        question = str(need(row, "question", path))
        kind = question.split()[0].lower() if question.split() else ""
        name = need(row, "id", path)
        yield item(name, clip_of(source, path, video, row), question, [need(row, "answer", path)], kind, group=video)


def ivqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `test.csv`: video_id, start, end, question, answer1 to answer5."""
    keys = [f"answer{index}" for index in range(1, 6)]
    for index, row in enumerate(table_rows(path, ["video_id", "start", "end", "question", *keys])):
        answers = [row[key] for key in keys if row[key]]
        check_annotators(len(answers), source, path, index)
        clip = clip_of(source, path, row["video_id"], row, float(row["start"]), float(row["end"]))
        yield item(f"{row['video_id']}.{index}", clip, row["question"], answers, group=row["video_id"])


def nextqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read open-ended NExT-QA: `test.csv`, as annotations `add_reference_answer_test.json` ({video: {qid: answer}})."""
    more = read_json(Path(source.annotations)) if source.annotations else {}
    for row in table_rows(path, ["video", "question", "answer", "qid", "type"]):
        answers = [row["answer"], *filter(None, [more.get(row["video"], {}).get(row["qid"])])]
        kind = "TN" if row["type"] == "TP" else row["type"]
        clip = clip_of(source, path, row["video"], row)
        yield item(f"{row['video']}.{row['qid']}", clip, row["question"], answers, kind, group=row["video"])
