"""Question answering with free answers: VQAv2 and its form, TextVQA, VizWiz, the medical sets, and on videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, check_annotators, clip_of, image_of, item, wanted
from eval.tasks.formats.hub import hub_questions, is_hub
from eval.tasks.formats.rows import Row, csv_rows, json_rows, pickled_rows, whole
from flamingo.errors import UserError


def vqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read VQAv2 and OK-VQA: a file of questions and one of annotations (`answers[].answer`), joined by question_id.

    `fields: {answer: raw_answer}` takes OK-VQA's answers as they were given; its `answer` is stemmed.
    """
    if not source.annotations:
        raise UserError(f"{path} has only questions; give source.annotations, the file with their answers")
    answers_at = Path(source.annotations)
    key = source.fields.get("answer", "answer")
    annotations = {row.name("question_id"): row for row in whole(answers_at).rows("annotations")}
    for row in whole(path).rows("questions"):
        question_id = row.name("question_id")
        if question_id not in annotations:
            raise UserError(
                f"{answers_at} has no answers to question {question_id} of {path}; are they of the same split?"
            )
        note = annotations[question_id]
        answers = [answer.text(key) for answer in note.rows("answers")]
        check_annotators(note, question_id, len(answers), source)
        image_id, kind = row.name("image_id"), note.text("answer_type", "")
        image = image_of(source, image_id, row)
        yield item(note, question_id, image, row.text("question"), answers, kind, group=image_id)


def stem_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the answers of an OK-VQA annotation file as they were given and as they are stemmed."""
    for row in whole(path).rows("annotations"):
        for answer in row.rows("answers"):
            yield answer.text("raw_answer"), answer.text("answer")


def textvqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `TextVQA_0.5.1_*.json`: under data question, image_id, question_id and ten answers."""
    for row in whole(path).rows("data"):
        question_id, image, answers = row.name("question_id"), row.name("image_id"), row.texts("answers")
        check_annotators(row, question_id, len(answers), source)
        shown = image_of(source, f"{image}.jpg", row)
        yield item(row, question_id, shown, row.text("question"), answers, group=image)


def vizwiz(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `val.json`: image, question, answers[].answer, answer_type. The question's white space is collapsed."""
    for row in json_rows(path):
        file_name = row.name("image")
        answers = [answer.text("answer") for answer in row.rows("answers")]
        check_annotators(row, file_name, len(answers), source)
        image, kind = image_of(source, file_name, row), row.text("answer_type", "")
        yield item(row, Path(file_name).stem, image, row.text("question"), answers, kind, group=file_name)


def vqa_rad(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `testset.json`/`trainset.json` (the split everybody scores) or the native file; answers may be numbers.

    Also the hub's parquet, whose kinds are by the answer: `eval.tasks.formats.hub`.
    """
    return hub_questions(path, source) if is_hub(path) else _medical(path, source, field="image_name")


def slake(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `test.json`: img_name, question, answer, q_lang, answer_type; `only: {q_lang: en}` takes the English."""
    return _medical(path, source, field="img_name")


def _medical(path: Path, source: SourceSpec, field: str) -> Iterator[Item]:
    for row in json_rows(path):
        if wanted(row.fields, source):
            file_name, kind = row.name(field), row.text("answer_type").strip().upper()
            shown = image_of(source, file_name, row)
            question, answers = row.text("question"), [row.text("answer")]
            yield item(row, row.name("qid"), shown, question, answers, kind, group=file_name)


def pathvqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `test_qa.pkl`, a pickled list of image, question, answer; yes and no are the closed answers.

    Also the hub's parquet: `eval.tasks.formats.hub`.
    """
    if is_hub(path):
        yield from hub_questions(path, source)
        return
    for index, row in enumerate(pickled_rows(path)):
        image, answer = row.name("image"), row.text("answer").strip()
        kind = "CLOSED" if answer.lower() in ("yes", "no") else "OPEN"
        shown = image_of(source, f"{image}.jpg", row)
        yield item(row, str(index), shown, row.text("question"), [answer], kind, group=image)


def video_qa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read MSVD-QA and MSRVTT-QA: `test_qa.json`, a list of id, video_id, question, answer."""
    for row in json_rows(path):
        video, question = row.name("video_id"), row.text("question")
        kind = question.split()[0].lower() if question.split() else ""
        clip = clip_of(source, video, row)
        yield item(row, row.name("id"), clip, question, [row.text("answer")], kind, group=video)


def ivqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `test.csv`: video_id, start, end, question, answer1 to answer5."""
    keys = [f"answer{index}" for index in range(1, 6)]
    for index, row in enumerate(csv_rows(path, ["video_id", "start", "end", "question", *keys])):
        video, answers = row.name("video_id"), [row.text(key) for key in keys if row.text(key)]
        check_annotators(row, str(index), len(answers), source)
        clip = clip_of(source, video, row, row.number("start"), row.number("end"))
        yield item(row, f"{video}.{index}", clip, row.text("question"), answers, group=video)


def nextqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read open-ended NExT-QA: `test.csv`, as annotations `add_reference_answer_test.json` ({video: {qid: answer}})."""
    more: dict[str, Row] = dict(whole(Path(source.annotations)).entries()) if source.annotations else {}
    for row in csv_rows(path, ["video", "question", "answer", "qid", "type"]):
        video, question_id, kind = row.name("video"), row.name("qid"), row.text("type")
        second = more[video].text(question_id, "") if video in more else ""
        answers = [row.text("answer"), *filter(None, [second])]
        kind = "TN" if kind == "TP" else kind
        clip = clip_of(source, video, row)
        yield item(row, f"{video}.{question_id}", clip, row.text("question"), answers, kind, group=video)
