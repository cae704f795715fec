"""Files for evaluation servers, checked against the question file before they are sent.

`vqa`: VQAv2, OK-VQA and TextVQA, `[{"question_id", "answer"}]`; `vizwiz`: `[{"image", "answer"}]`; `captions`: COCO,
NoCaps and TextCaps, `[{"image_id", "caption"}]`. Query ids are the data set's own. A server wants every id of its
question file exactly once; what was not asked (VQAv2's test-standard beside test-dev) gets the empty answer if `pad` is
set, and is an error otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.samples import Sample
from flamingo.errors import UserError

KEYS = {"vqa": ("question_id", "answer"), "vizwiz": ("image", "answer"), "captions": ("image_id", "caption")}


def submission(
    samples: Sequence[Sample], kind: str, ids: Sequence[str] | None = None, pad: bool = False
) -> list[dict[str, Any]]:
    """Return the content of a file, in the order of `ids` (of the samples without any).

    Raises:
        UserError: an unknown kind, a query asked several times (seeds), ids that are not the server's, or that lack.
    """
    if kind not in KEYS:
        raise UserError(f"format={kind}: use one of {', '.join(KEYS)}")
    answers: dict[str, str] = {}
    for sample in samples:
        if sample.query_id in answers:
            raise UserError(
                f"query {sample.query_id} has several answers (seeds, shots or strategies); choose one with "
                "task=, shots=, seed=, strategy="
            )
        answers[sample.query_id] = sample.answer
    wanted = list(answers) if ids is None else list(ids)
    unknown = sorted(answers.keys() - set(wanted))
    if unknown:
        raise UserError(
            f"{len(unknown)} answers have no question in the file of ids=, first {unknown[0]}; give the question file "
            "of the split that was evaluated"
        )
    lacking = [name for name in wanted if name not in answers]
    if lacking and not pad:
        raise UserError(
            f"{len(lacking)} questions in the file of ids= have no answer, first {lacking[0]}; ask them all, or give "
            "them empty answers with pad=true"
        )
    id_key, answer_key = KEYS[kind]
    return [{id_key: _number(name), answer_key: answers.get(name, "")} for name in wanted]


def _number(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


def read_ids(path: str, kind: str) -> list[str]:
    """Return the ids of a data set's question or annotation file, in its order, each once.

    Raises:
        UserError: it cannot be read, or has no such ids.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"ids={path} cannot be read: {error}") from None
    if isinstance(content, dict):
        names = ("questions", "images", "data", "annotations")
        content = next((content[name] for name in names if isinstance(content.get(name), list)), [])
    keys = {"vqa": ("question_id",), "vizwiz": ("image",), "captions": ("image_id", "id")}[kind]
    ids = [str(entry[key]) for entry in content for key in keys if isinstance(entry, dict) and key in entry]
    if not ids:
        raise UserError(f"ids={path} contains no {keys[0]}; give the data set's own question file")
    return list(dict.fromkeys(ids))
