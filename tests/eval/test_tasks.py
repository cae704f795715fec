"""Every published task, on files in its published form, through the real runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.check_data import check, main
from eval.compose import load_config
from eval.inference.model import FlamingoResponder
from eval.metrics.wordnet import wordnet
from eval.reports.results import rows_of
from eval.runner import Grid, run
from eval.tasks.build import build_task
from flamingo.configs.compose import CONFIGS
from tests.eval.published import COUNT, WRITERS, dump
from tests.eval.test_metrics_table import small_wordnet
from tests.eval.worlds import Constant
from tests.model import tiny

OWN = {path.stem for path in (CONFIGS / "task").glob("*.yaml")} - {"csv", "jsonl"}
TEXT_ONLY = {"medqa", "medmcqa", "pubmedqa", "mmlu_medicine"}
# Of one query each: its id, question node, gold answers, kind, number of candidates.
EXPECTED: dict[str, tuple[str, str, tuple[str, ...], str, int]] = {
    "coco": ("100", "Output:", ("a thing number 0",) * 5, "", 0),
    "flickr30k": ("3", "Output:", ("a thing number 3",) * 5, "", 0),
    "nocaps": ("2", "Output:", tuple(f"caption {n}" for n in range(2, 60, 6)), "near-domain", 0),
    "textcaps": ("im1", "Output:", tuple(f"a sign 1 {n}" for n in range(5)), "", 0),
    "vqav2": ("20", "Question: What colour? Answer:", ("other", *["red"] * 9), "other", 0),
    "okvqa": ("20", "Question: What colour? Answer:", ("others", *["reds"] * 9), "other", 0),
    "textvqa": ("4", "Question: what is written? Answer:", ("stop",) * 9 + ("go",), "", 0),
    "vizwiz": (
        *("VizWiz_val_00000002", "Question: What is this? Answer:"),
        *(("unanswerable",) * 6 + ("can",) * 4, "other", 0),
    ),
    "hateful_memes": (
        *("1", 'is an image with written: "look at {this}" on it. Is it hateful? Answer:'),
        *(("yes",), "", 2),
    ),
    "imagenet": ("n02012849/ILSVRC_val_0.JPEG", "Output:", ("crane, bird",), "", 3),
    "scienceqa": (
        *("1", "Question: Which?\nContext: A map.\nA. north\nB. south\nC. west\nAnswer:"),
        *(("B",), "SOC TXT IMG G1-6", 3),
    ),
    "vqa_rad": ("1", "Question: How many? Answer:", ("4",), "OPEN", 0),
    "slake": ("2", "Question: Is it normal? Answer:", ("No",), "CLOSED", 0),
    "pathvqa": ("1", "Question: is it? Answer:", ("yes",), "CLOSED", 0),
    "mmmu": (
        *("validation_Accounting_2", "Question: What is it?\nA. $6\nB. it's 7\nAnswer:"),
        *(("B",), "validation_Accounting", 2),
    ),
    "winoground": ("3.1", "Output:", ("a cat on a dog",), "Object", 2),
    "msvd_qa": ("5", "Question: who is singing? Answer:", ("man",), "who", 0),
    "msrvtt_qa": ("5", "Question: who is singing? Answer:", ("man",), "who", 0),
    "ivqa": ("v2.2", "Question: what? Answer:", ("spoon", "spoon", "fork", "cup", "pan"), "", 0),
    "vatex": ("a_2_000001_000011", "Output:", ("cap 2",) * 10, "", 0),
    "nextqa": ("0.3", "Question: why run Answer:", ("fun", "joy"), "TN", 0),
    "nextqa_choice": (
        *("4.1", "Question: why\nA. reason 0\nB. reason 1\nC. reason 2\nD. reason 3\nE. reason 4\nAnswer:"),
        *(("C",), "CW", 5),
    ),
    "star": (
        *("Interaction_T1_2", "Question: Which?\nA. The bag 0.\nB. The bag 1.\nC. The bag 2.\nD. The bag 3.\nAnswer:"),
        *(("B",), "Interaction", 4),
    ),
    "youcook2": ("y2.0", "Output:", ("cut 2 onions",), "", 0),
    "rareact": ("3", "Caption: a person", ("wash phone",), "verb", 2),
    "medqa": ("2", "Question: Which, test?\nA. aspirin\nB. rest\nC. surgery\nD. none\nAnswer:", ("B",), "step1", 4),
    "medmcqa": ("dev2", "Question: Which?\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer:", ("C",), "Anatomy", 4),
    "pubmedqa": ("3", "Abstract: We saw.\nQuestion: Does it?\nAnswer:", ("maybe",), "", 3),
    "mmlu_medicine": (
        *("anatomy.1", "Question: Which anatomy, is it?\nA. one\nB. two\nC. three\nD. four, or five\nAnswer:"),
        *(("D",), "anatomy", 4),
    ),
}


def test_every_published_task_has_files_here() -> None:
    specs = {name: load_config(["model=m", f"task={name}"]).task[name] for name in OWN}
    # The long-form ones are in XML and Excel: tests/eval/test_long_form.py has their files.
    published = {name for name, spec in specs.items() if spec.published and spec.form != "long_form"}
    apart = {"imagenet_zero_shot", "coco_retrieval", "flickr30k_retrieval"}  # no prompt; VL-ICL: test_vl_icl.py
    apart |= {name for name in published if name.startswith("vl_icl_")}
    assert published - apart == WRITERS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_published_task_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "mmmu":
        pytest.importorskip("pyarrow", reason="MMMU's files are parquet, which needs pyarrow")
    monkeypatch.setenv("WNHOME", str(small_wordnet(tmp_path / "wordnet")))
    wordnet.cache_clear()
    root = tmp_path / "data"
    root.mkdir()
    WRITERS[name](root)
    lines, complete = check(name, root)
    assert complete, lines
    assert lines[-1] == f"  run it with task={name} task.{name}.root={root}"

    task = build_task(name, load_config(["model=m", f"task={name}", f"task.{name}.root={root}"]).task[name])
    query_id, question, golds, kind, candidates = EXPECTED[name]
    shots = 0 if task.max_shots() == 0 else 2
    episode = task.episode(query_id, shots, 0)
    assert (episode.query.question, episode.golds, episode.kind) == (question, golds, kind)
    assert len(episode.candidates) == candidates
    assert not candidates or set(golds) <= set(episode.candidates)
    assert (episode.query.image is None) == (name in TEXT_ONLY)

    said = max(golds, key=golds.count)
    samples, cache = run({name: task}, Grid([0, shots][: 1 + bool(shots)], [0], ["real"]), Constant(said))
    rows = rows_of(samples, {name: task})
    counts = {"imagenet": 6, "winoground": 3 * COUNT}
    assert [row["n"] for row in rows] == [counts.get(name, COUNT)] * len(rows)
    for value in rows[-1]["metrics"].values():
        if value["low"] is None:  # the constant answer is equally good everywhere
            assert value["note"]
        else:
            assert value["low"] - 1e-9 <= value["score"] <= value["high"] + 1e-9
    assert cache.encoded == 0 if name in TEXT_ONLY else cache.encoded > 0
    if not candidates:
        told = next(sample for sample in samples if sample.query_id == query_id)
        assert told.score > 0.3
        assert told.score == task.score(said, episode)


def test_prepare_says_what_is_missing_and_where_it_is_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vizwiz", "--from", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "vizwiz: 4 of 4 files are missing" in said
    assert "  val.json  published by vizwiz.org/tasks-and-datasets/vqa" in said
    WRITERS["vizwiz"](tmp_path)
    assert main(["vizwiz", "--from", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "vizwiz: 6 queries, 6 to show as demonstrations" in said
    assert "the published split has 4319" in said
    (tmp_path / "val" / "VizWiz_val_00000003.jpg").unlink()
    assert main(["vizwiz", "--from", str(tmp_path)]) == 1
    assert "1 of 6 images are missing, the first is" in capsys.readouterr().out
    for arguments, message in (
        (["vizwiz"], "give a task and a folder"),
        (["nope", "--from", str(tmp_path)], "task=nope is not one of coco, "),
        (["toy_vqa", "--from", str(tmp_path)], "no published files"),
        (["vizwiz", "--from", str(tmp_path / "gone")], "is not a folder"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_question_with_too_few_answers_stops_the_run(tmp_path: Path) -> None:
    WRITERS["textvqa"](tmp_path)
    row = {"question": "?", "image_id": "t0", "answers": ["a"] * 9, "question_id": 77}
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": [row]})
    lines, complete = check("textvqa", tmp_path)
    assert not complete
    assert "question 77 has 9 answers, but every question of this data set should have 10" in lines[0]


@pytest.mark.parametrize("name", ["medqa", "hateful_memes", "vatex", "winoground"])
def test_a_real_model_takes_words_alone_images_and_clips(name: str, tmp_path: Path) -> None:
    responder = FlamingoResponder(*tiny.flamingo("llama"))
    WRITERS[name](tmp_path)
    task = build_task(name, load_config(["model=m", f"task={name}", f"task.{name}.root={tmp_path}"]).task[name])
    grid = Grid([0, 1] if name == "vatex" else [0], [0], ["real"], limit=3)  # the model's context is 128 tokens
    samples, _ = run({name: task}, grid, responder)
    rows = rows_of(samples, {name: task})
    assert len(samples) == 3 * len(grid.shots)
    assert all(len(sample.log_probs) == len(sample.candidates) for sample in samples)
    assert all(0 <= row["score"] <= 10 for row in rows)
