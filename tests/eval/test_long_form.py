"""Long-form questions in the files in which they are published, conversations by turns, and sheets of long answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from eval.__main__ import main
from eval.compose import load_config
from eval.prompting.prompts import Completion, EncodedPrompt
from eval.runner import Grid, run
from eval.spec import SourceSpec, TaskSpec
from eval.task import Example, Task
from eval.tasks.build import build_task
from eval.tasks.sources import read_examples
from flamingo.errors import UserError
from tests.eval.finished import sample, write_run
from tests.eval.worlds import Constant
from tests.fixtures import png

TEST = """<?xml version="1.0" encoding="UTF-8"?>
<LiveQA2017-Medical-Test-Set-Full>
  <NLM-QUESTION qid="TQ1">
    <Original-Question qfile="71.txt"><SUBJECT>gluten</SUBJECT><MESSAGE> are they gluten
      free &amp; safe</MESSAGE></Original-Question>
    <NIST-PARAPHRASE>Are they free of gluten?</NIST-PARAPHRASE>
    <NLM-Summary>Do the tablets contain gluten?</NLM-Summary>
    <ANNOTATIONS><FOCUS fid="F1">tablets</FOCUS><TYPE tid="T1">INGREDIENT</TYPE><TYPE tid="T2">USE</TYPE></ANNOTATIONS>
    <ReferenceAnswers>
      <RefAnswer aid="TQ1A1"><ANSWER> They do
        not. </ANSWER><AnswerURL>x</AnswerURL></RefAnswer>
      <ReferenceAnswer aid="TQ1A2"><ANSWER>Ask your pharmacist.</ANSWER><COMMENT></COMMENT></ReferenceAnswer>
    </ReferenceAnswers>
  </NLM-QUESTION>
</LiveQA2017-Medical-Test-Set-Full>
"""
TRAIN = """<NLM-QUESTIONS><NLM-QUESTION questionid="Q1" fRef="1"><SUBJECT>What is it?</SUBJECT><MESSAGE> </MESSAGE>
<SUB-QUESTIONS><SUB-QUESTION subqid="Q1-S1"><ANNOTATIONS><TYPE>information</TYPE></ANNOTATIONS>
<ANSWERS><ANSWER answerid="a">This.</ANSWER></ANSWERS></SUB-QUESTION><SUB-QUESTION subqid="Q1-S2">
<ANSWERS><ANSWER answerid="b">And that.</ANSWER></ANSWERS></SUB-QUESTION></SUB-QUESTIONS></NLM-QUESTION></NLM-QUESTIONS>
"""


def live(root: Path) -> None:
    for folder, name, text in (
        ("TestDataset", "TREC-2017-LiveQA-Medical-Test-Questions-w-summaries.xml", TEST),
        ("TrainingDatasets", "TREC-2017-LiveQA-Medical-Train-1.xml", TRAIN),
    ):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_text(text)


def health(root: Path) -> None:
    (root / "all.csv").write_text('id,question\n7,How serious is it?\n8,"Is it, or not?"\n')


def spec_of(task: str, root: Path) -> TaskSpec:
    return load_config(["model=m", f"task={task}", f"task.{task}.root={root}"]).task[task]


def built(task: str, root: Path) -> tuple[Task, list[Example]]:
    spec = spec_of(task, root)
    return build_task(task, spec), read_examples(task, spec, spec.source)


def test_liveqa(tmp_path: Path) -> None:
    live(tmp_path)
    task, (query,) = built("liveqa", tmp_path)
    assert query.id == "TQ1"
    assert query.turn.question == "Question: Do the tablets contain gluten?\nAnswer:"
    assert query.golds == ("They do not.", "Ask your pharmacist.")
    assert query.kind == "ingredient"
    (shown,) = task.episode("TQ1", 1, 0).demos
    assert (shown.question, shown.text) == ("Question: What is it?\nAnswer:", " This.")
    spec = spec_of("liveqa", tmp_path)
    spec.source.fields = {"question": "MESSAGE"}
    assert read_examples("liveqa", spec, spec.source)[0].turn.question.startswith(
        "Question: are they gluten free & safe"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<NLM-Summary>", "<Summary>", "is not XML: mismatched tag"),
        ("Do the tablets contain gluten?", " ", "question 1 has no 'NLM-Summary'"),
        (' qid="TQ1"', "", "question 1 has null as 'qid'"),
        ("<LiveQA2017-", '<!DOCTYPE a [<!ENTITY b "c">]><LiveQA2017-', "has a document type of its own"),
        ("ANSWER>", "REPLY>", "question 1 has no answer"),
        ("NLM-QUESTION", "QUESTION", "has no image with an answer: it has no row"),
    ],
)
def test_another_xml_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(TEST.replace(old, new))
    source = SourceSpec(format="liveqa", path=str(tmp_path / "t.xml"))
    with pytest.raises(UserError, match=message):
        read_examples("liveqa", TaskSpec(source=source), source)


def test_healthsearchqa_has_no_answers_and_is_still_a_task(tmp_path: Path) -> None:
    health(tmp_path)
    task, queries = built("healthsearchqa", tmp_path)
    assert [(query.id, query.golds) for query in queries] == [("7", ("",)), ("8", ("",))]
    episode = task.episode("7", 0, 0)
    assert (task.score("Not very.", episode), task.score("", episode)) == (1, 0)
    (tmp_path / "all.csv").write_text("Question\nHow?\n")
    assert [query.id for query in built("healthsearchqa", tmp_path)[1]] == ["0"]
    (tmp_path / "all.csv").write_text("query\nHow?\n")
    with pytest.raises(UserError, match="row 1 has no 'question'"):
        built("healthsearchqa", tmp_path)


HEADER = ("Question", "Focus (Drug)", "Question Type", "Answer", "Section Title", "URL")
ROWS = (
    ("how does it work", "it", "Action", "It blocks\npain.", "Action", "x"),
    (None,) * 6,
    ("is 5 enough?", "it", None, "Yes.", None, None),
)


def test_medicationqa_as_excel_and_as_a_table(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (HEADER, *ROWS):
        book.active.append(row)
    book.save(tmp_path / "MedInfo2019-QA-Medications.xlsx")
    found = built("medicationqa", tmp_path)[1]
    assert [(q.id, q.golds, q.kind) for q in found] == [("0", ("It blocks pain.",), "action"), ("1", ("Yes.",), "")]
    source = SourceSpec(format="medicationqa", path=str(tmp_path / "m.csv"))
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, ROWS[0], ROWS[2]])
    again = read_examples("m", TaskSpec(source=source), source)
    assert [(q.id, q.golds, q.kind) for q in again] == [(q.id, q.golds, q.kind) for q in found]
    (tmp_path / "MedInfo2019-QA-Medications.xlsx").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="cannot be read as an Excel file"):
        built("medicationqa", tmp_path)


def talk(*turns: str, image: str | None = "a.png") -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": "t", "conversations": said} | ({"image": image} if image else {})


def test_conversations_are_asked_turn_by_turn(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    (tmp_path / "talks.json").write_text(json.dumps([talk("<image>\nWhat is\nit?", "A lung.", "Is it ill?", "No.")]))
    spec = load_config(["model=m", "task=conversations", f"task.conversations.source.path={tmp_path}/talks.json"])
    task = build_task("conversations", spec.task["conversations"])
    assert sorted(task.query_ids()) == ["t.1", "t.2"]
    first, second = (task.episode(name, 0, 0) for name in ("t.1", "t.2"))
    assert first.query.question == "Question: What is it?\nAnswer:"
    assert second.query.question == "Question: What is it?\nAnswer: A lung.\nQuestion: Is it ill?\nAnswer:"
    assert (first.golds, second.golds) == (("A lung.",), ("No.",))
    assert (first.kind, second.kind) == ("turn 1", "turn 2")
    assert first.cluster == second.cluster  # turns of one conversation are not independent
    assert second.query.image is not None


class Counting(Constant):
    """A model whose answer is how often it was answered before in its prompt; it remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("")
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[EncodedPrompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        texts = [prompt.turns[-1][1] for prompt in prompts]
        self.asked += texts
        return [Completion(f"said {text.count('Answer:') - 1}\nand more", True) for text in texts]


def test_a_conversation_goes_on_from_the_models_own_answers(tmp_path: Path) -> None:
    talks = [talk("One?", "a", "Two?", "b", "Three?", "c"), talk("Uno?", "a", "Due?", "said 1") | {"id": "u"}]
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    words = ["model=m", "task=conversations", f"task.conversations.source.path={tmp_path}/talks.json"]
    given, own = (
        build_task("conversations", load_config([*words, *more]).task["conversations"])
        for more in ([], ["task.conversations.history=own"])
    )
    assert given.hash != own.hash
    model = Counting()
    samples, _ = run({"c": own}, Grid([0], [0], ["real"]), model)
    by_id = {sample.query_id: sample for sample in samples}
    assert by_id["t.3"].turns[-1][1] == (
        "Question: One?\nAnswer: said 0\nQuestion: Two?\nAnswer: said 1\nQuestion: Three?\nAnswer:"
    )
    assert by_id["t.3"].golds == ("c",)
    assert by_id["u.2"].score == 1
    assert len(model.asked) == 5  # every turn once, although later ones need the earlier answers
    for limit in range(1, 5):  # what is asked does not depend on which turns are scored
        some, _ = run({"c": own}, Grid([0], [0], ["real"], limit=limit), Counting())
        assert [sample.turns for sample in some] == [by_id[sample.query_id].turns for sample in some]
    first, _ = run({"c": given}, Grid([0], [0], ["real"]), Counting())
    assert {s.query_id: s.turns[-1][1] for s in first}["t.2"] == "Question: One?\nAnswer: a\nQuestion: Two?\nAnswer:"


def test_own_answers_are_only_for_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    (tmp_path / "talks.json").write_text(json.dumps([talk("One?", "a"), talk("Two?", "b")]))
    words = [f"task.conversations.source.path={tmp_path}/talks.json", "task.conversations.history=own"]
    with pytest.raises(UserError, match=r"two queries have the id 't\.1'"):
        build_task("c", load_config(["model=m", "task=conversations", *words]).task["conversations"])
    with pytest.raises(UserError, match=r"history=own has no effect on a question without \{history\}"):
        load_config(["model=m", "task=conversations", *words, "task.conversations.question='{question}'"])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (talk("a", "b", "c", "d", "e", "f") | {"id": None}, "has null as 'id'"),
        ({"id": "t", "conversations": [{"from": "gpt", "value": "b"}]}, "conversations 1 is not a question of human"),
        ({"id": "t", "conversations": [{"from": "human", "value": "b"}] * 2}, "conversations 2 is not a question"),
        ({"id": "t", "conversations": [{"from": "system", "value": "b"}]}, "conversations 1 is not a question"),
        (talk("a", " ", image=None), "conversations 2 is not a question"),
        (talk("a", "b", image="none.png"), "1 of 1 images are missing"),
    ],
)
def test_what_is_not_a_conversation_is_refused(item: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([item]))
    source = SourceSpec(format="conversations", path=str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=message):
        read_examples("talks", TaskSpec(source=source), source)


def test_long_answers_end_in_rating_sheets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of an answer is rated, although only its first line is scored; without gold answers there is no judging."""
    health(tmp_path)
    queries = built("healthsearchqa", tmp_path)[1]
    answers = [
        sample(query.id, "It can be.", raw="It can be.\nSee a doctor.", golds=query.golds, turns=((None, "How?"),))
        for query in queries
    ]
    run = write_run(tmp_path / "run", answers)
    assert main(["rate", str(run), f"out={tmp_path / 'sheets'}", "axes=clinician,lay", "raters=1"]) == 0
    assert "It can be.\\nSee a doctor." in (tmp_path / "sheets" / "R1.html").read_text()
    assert main(["judge", str(run), "url=http://127.0.0.1:9/v1", "model=m", f"out={tmp_path / 'judged'}"]) == 2
    assert "has no gold answers to judge its answers beside" in capsys.readouterr().err
