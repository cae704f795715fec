"""Multiple choice: ScienceQA, NExT-QA, STAR, and the medical text sets MedQA, MedMCQA, PubMedQA, MMLU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.records import read_json
from eval.spec import SourceSpec
from eval.task import EncodedImage
from eval.tasks.formats.files import Item, clip_of, image_of, in_split, item
from eval.tasks.formats.rows import Row, csv_rows, json_lines, json_rows, whole

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(choices: Sequence[str]) -> list[str]:
    """Return A, B, ... for as many choices."""
    return list(LETTERS[: len(choices)])


def written_options(choices: Sequence[str], style: str) -> str:
    """Return the choices as a question shows them; see `TaskSpec.options`."""
    pairs = zip(letters(choices), choices, strict=True)
    if style == "inline":
        return " ".join(f"({letter}) {choice}" for letter, choice in pairs)
    return "\n".join(f"{letter}. {choice}" for letter, choice in pairs)


def choice_item(
    row: Row,
    name: str,
    choices: Sequence[str],
    correct: int | str,
    question: str,
    *,
    image: EncodedImage | None = None,
    kind: str = "",
    **more: object,
) -> Item:
    """Return an item whose answer is one of its choices, `correct` being its index."""
    texts = [choice.strip() for choice in choices]
    if not isinstance(correct, int) or not 0 <= correct < len(texts) <= len(LETTERS):
        raise row.fault(f"has {len(texts)} choices and the answer {correct!r}; is this the right file?")
    return item(row, name, image, question, [texts[correct]], kind, choices=texts, **more)


def scienceqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `problems.json` with `pid_splits.json` as annotations; images at images/SPLIT/ID/image.png.

    kind has the words by which results are grouped: NAT, SOC or LAN; TXT and IMG for a hint and an image, NO for
    neither; G1-6 or G7-12. `{context}` is the hint. The rationale is lecture and solution.
    """
    problems = whole(path)
    if source.annotations:
        splits = whole(Path(source.annotations))
        names = [name for split in source.split.split("+") for name in splits.texts(split)]
    else:
        names = [name for name, row in problems.entries() if in_split(row.text("split"), source)]
    subjects = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    for name in names:
        row = Row(path, f"entry {name!r}", problems.get(name))
        hint, file_name = row.text("hint", ""), row.text("image", "")
        seen = [word for word, there in (("TXT", hint), ("IMG", file_name)) if there] or ["NO"]
        grade = int("".join(filter(str.isdecimal, row.text("grade"))) or 0)
        kind = " ".join([subjects.get(row.text("subject", ""), "?"), *seen, "G1-6" if grade <= 6 else "G7-12"])
        image = image_of(source, f"{row.text('split', '')}/{name}/{file_name}", row) if file_name else None
        why = " ".join(" ".join(filter(None, (row.text("lecture", ""), row.text("solution", "")))).split())
        yield choice_item(
            *(row, name, row.texts("choices"), row.integer("answer"), row.text("question")),
            image=image,
            kind=kind,
            rationale=why,
            values={"context": hint.strip() or "N/A"},
        )


def star(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `STAR_val.json`: question_id (Interaction_T1_13: the type first), video_id, start, end, choices[].choice."""
    for row in json_rows(path):
        name, video = row.name("question_id"), row.name("video_id")
        choices = [choice.text("choice") for choice in row.rows("choices")]
        if "answer" not in row.fields:
            raise row.fault("has no 'answer' (the test split's answers are hidden)")
        answer = row.text("answer")
        clip = clip_of(source, video, row, row.number("start"), row.number("end"))
        correct = choices.index(answer) if answer in choices else answer
        kind = name.split("_")[0]
        yield choice_item(row, name, choices, correct, row.text("question"), image=clip, kind=kind, group=video)


def nextqa_choice(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read NExT-QA's multiple choice: `val.csv` with video, question, answer (a number), qid, type, a0 to a4."""
    keys = [f"a{index}" for index in range(5)]
    for row in csv_rows(path, ["video", "question", "answer", "qid", "type", *keys]):
        video, kind, choices = row.name("video"), row.text("type"), [row.text(key) for key in keys]
        yield choice_item(
            *(row, f"{video}.{row.name('qid')}", choices, row.integer("answer"), row.text("question")),
            image=clip_of(source, video, row),
            kind="TN" if kind == "TP" else kind,
            group=video,
        )


def medqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `phrases_no_exclude_test.jsonl` (four options): question, options {"A": ...}, answer_idx."""
    for index, row in enumerate(json_lines(path)):
        options, answer = row.row("options"), row.text("answer_idx")
        names = sorted(map(str, options.fields))
        correct = names.index(answer) if answer in names else answer
        choices = [options.text(name) for name in names]
        yield choice_item(row, str(index), choices, correct, row.text("question"), kind=row.text("meta_info", ""))


def medmcqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `dev.json`, one object a line: question, opa to opd, cop (counted from 1), subject_name, exp."""
    for index, row in enumerate(json_lines(path)):
        choices = [row.text(key) for key in ("opa", "opb", "opc", "opd")]
        kind, why = row.text("subject_name", ""), " ".join(row.text("exp", "").split())
        name, correct = row.text("id", str(index)), row.integer("cop") - 1
        yield choice_item(row, name, choices, correct, row.text("question"), kind=kind, rationale=why)


def pubmedqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `ori_pqal.json`, {id: {QUESTION, CONTEXTS, final_decision}}; annotations: `test_ground_truth.json`, whose
    ids are the 500 of the test split. With `split: rest` those are left out instead. `{context}` is the abstract."""
    chosen = _ids(Path(source.annotations)) if source.annotations else None
    for name, row in whole(path).entries():
        if chosen is None or (name in chosen) != (source.split == "rest"):
            decision = row.text("final_decision").lower()
            choices, context = ["yes", "no", "maybe"], " ".join(row.texts("CONTEXTS"))
            correct = choices.index(decision) if decision in choices else decision
            values = {"context": " ".join(context.split())}
            yield choice_item(row, name, choices, correct, row.text("QUESTION"), values=values)


def _ids(path: Path) -> set[str]:
    """Return the keys of a file's object, or the entries of its list."""
    content = read_json(path)
    row = Row(path, "the file", {"ids": content} if isinstance(content, list) else content)
    return set(row.texts("ids") if isinstance(content, list) else map(str, row.fields))


def mmlu(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read a folder with SUBJECT_SPLIT.csv, no header: question, 4 choices, letter. `only` may name the `subject`."""
    subjects = source.only.get("subject", "").split("+") if source.only else None
    for file in sorted(path.glob(f"*_{source.split or 'test'}.csv")):
        subject = file.stem.rsplit("_", 1)[0]
        if subjects is None or subject in subjects:
            for index, row in enumerate(csv_rows(file, header=["question", *"ABCD", "answer"])):
                answer = row.name("answer").strip()
                correct = LETTERS.index(answer) if answer in [*LETTERS] else answer
                choices, kind = [row.text(letter) for letter in "ABCD"], subject.replace("_", " ")
                yield choice_item(row, f"{subject}.{index}", choices, correct, row.text("question"), kind=kind)
