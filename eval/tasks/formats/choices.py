"""Multiple choice: ScienceQA, NExT-QA, STAR, and the medical text sets MedQA, MedMCQA, PubMedQA, MMLU."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.records import read_json, table_rows
from eval.spec import SourceSpec
from eval.tasks.formats.files import Item, clip_of, image_of, in_split, item, need, read_jsonl, rows
from flamingo.errors import UserError

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


def choice_item(path: Path, name: object, choices: Sequence[object], correct: Any, question: str, **more: Any) -> Item:
    """Return an item whose answer is one of its choices, `correct` being its index."""
    texts = [str(choice).strip() for choice in choices]
    if not isinstance(correct, int) or not 0 <= correct < len(texts) <= len(LETTERS):
        raise UserError(f"{path}: {name} has {len(texts)} choices and the answer {correct!r}; is this the right file?")
    image, kind = more.pop("image", None), more.pop("kind", "")
    return item(name, image, question, [texts[correct]], kind, choices=texts, **more)


def scienceqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `problems.json` with `pid_splits.json` as annotations; images at images/SPLIT/ID/image.png.

    kind has the words by which results are grouped: NAT, SOC or LAN; TXT and IMG for a hint and an image, NO for
    neither; G1-6 or G7-12. `{context}` is the hint. The rationale is lecture and solution.
    """
    problems, splits = read_json(path), None
    if source.annotations:
        splits = read_json(Path(source.annotations))
        names = [n for split in source.split.split("+") for n in need(splits, split, Path(source.annotations))]
    else:
        names = [name for name, row in problems.items() if in_split(need(row, "split", path, name), source)]
    subjects = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    for name in names:
        row = need(problems, name, path, "the file")
        hint, file_name = row.get("hint") or "", row.get("image")
        seen = [word for word, there in (("TXT", hint), ("IMG", file_name)) if there] or ["NO"]
        grade = int("".join(filter(str.isdigit, str(need(row, "grade", path, name)))) or 0)
        kind = " ".join([subjects.get(row.get("subject", ""), "?"), *seen, "G1-6" if grade <= 6 else "G7-12"])
        image = image_of(source, path, f"{row.get('split')}/{name}/{file_name}", row) if file_name else None
        why = " ".join(" ".join(filter(None, (row.get("lecture"), row.get("solution")))).split())
        values = {"context": hint.strip() or "N/A"}
        yield choice_item(
            *(path, name, need(row, "choices", path, name), row["answer"], row["question"]),
            image=image,
            kind=kind,
            rationale=why,
            values=values,
        )


def star(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `STAR_val.json`: question_id (Interaction_T1_13: the type first), video_id, start, end, choices[].choice."""
    for row in rows(path, read_json(path)):
        name, video = str(need(row, "question_id", path)), str(need(row, "video_id", path))
        choices = [need(choice, "choice", path, name) for choice in need(row, "choices", path, name)]
        answer = need(row, "answer", path, f"{name} (the test split's answers are hidden)")
        clip = clip_of(source, path, video, row, float(row["start"]), float(row["end"]))
        correct = choices.index(answer) if answer in choices else answer
        asked = need(row, "question", path, name)
        yield choice_item(path, name, choices, correct, asked, image=clip, kind=name.split("_")[0], group=video)


def nextqa_choice(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read NExT-QA's multiple choice: `val.csv` with video, question, answer (a number), qid, type, a0 to a4."""
    keys = [f"a{index}" for index in range(5)]
    for row in table_rows(path, ["video", "question", "answer", "qid", "type", *keys]):
        clip, name = clip_of(source, path, row["video"], row), f"{row['video']}.{row['qid']}"
        kind, correct = ("TN" if row["type"] == "TP" else row["type"]), int(row["answer"])
        choices = [row[key] for key in keys]
        yield choice_item(path, name, choices, correct, row["question"], image=clip, kind=kind, group=row["video"])


def medqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `phrases_no_exclude_test.jsonl` (four options): question, options {"A": ...}, answer_idx."""
    for index, row in enumerate(read_jsonl(path)):
        options = need(row, "options", path, f"line {index + 1}")
        names = sorted(options)
        answer = need(row, "answer_idx", path, f"line {index + 1}")
        correct = names.index(answer) if answer in names else answer
        choices = [options[name] for name in names]
        yield choice_item(path, index, choices, correct, row["question"], kind=row.get("meta_info", ""))


def medmcqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `dev.json`, one object a line: question, opa to opd, cop (counted from 1), subject_name, exp."""
    for index, row in enumerate(read_jsonl(path)):
        choices = [need(row, key, path, f"line {index + 1}") for key in ("opa", "opb", "opc", "opd")]
        answer = int(need(row, "cop", path, f"line {index + 1}")) - 1
        facts = {"kind": row.get("subject_name", ""), "rationale": " ".join(str(row.get("exp") or "").split())}
        yield choice_item(path, row.get("id", index), choices, answer, row["question"], **facts)


def pubmedqa(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read `ori_pqal.json`, {id: {QUESTION, CONTEXTS, final_decision}}; annotations: `test_ground_truth.json`, whose
    ids are the 500 of the test split. With `split: rest` those are left out instead. `{context}` is the abstract."""
    chosen = set(read_json(Path(source.annotations))) if source.annotations else None
    for name, row in read_json(path).items():
        if chosen is None or (name in chosen) != (source.split == "rest"):
            decision = str(need(row, "final_decision", path, name)).lower()
            choices, context = ["yes", "no", "maybe"], " ".join(need(row, "CONTEXTS", path, name))
            correct = choices.index(decision) if decision in choices else decision
            values = {"context": " ".join(context.split())}
            yield choice_item(path, name, choices, correct, need(row, "QUESTION", path, name), values=values)


def mmlu(path: Path, source: SourceSpec) -> Iterator[Item]:
    """Read a folder with SUBJECT_SPLIT.csv, no header: question, 4 choices, letter. `only` may name the `subject`."""
    subjects = source.only.get("subject", "").split("+") if source.only else None
    for file in sorted(path.glob(f"*_{source.split or 'test'}.csv")):
        subject = file.stem.rsplit("_", 1)[0]
        if subjects is None or subject in subjects:
            head = "question,A,B,C,D,answer\n"
            for index, row in enumerate(_headless(file, head)):
                correct = LETTERS.find(row["answer"].strip()) if row["answer"] else None
                choices = [row[letter] for letter in "ABCD"]
                kind = subject.replace("_", " ")
                yield choice_item(file, f"{subject}.{index}", choices, correct, row["question"], kind=kind)


def _headless(path: Path, head: str) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    for row_number, row in enumerate(csv.DictReader([head, *lines]), 1):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {row_number} does not have the six columns question, A, B, C, D, answer")
        yield row
