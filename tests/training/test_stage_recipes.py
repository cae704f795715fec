"""Pages of docs/recipes that build on the demo, block by block, on a demo of the tests' size."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.__main__ import main as prepare_data
from data.batches.tokenize import SpecialTokens, tokenize_document
from data.prepare.sources import toy
from data.shards.writer import read_documents
from eval.__main__ import main
from eval.compose import load_config
from eval.prompting.prompts import Completion, PromptBuilder
from eval.prompting.strategies import PromptingSettings, Query, plain, two_stage
from eval.tasks.build import build_task
from flamingo import FlamingoProcessor
from flamingo.training.compose import compose
from flamingo.training.stages import stages_of
from tests.training.commands import lines
from train import train

PAGES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
SMALL = ["run.threads=1", "run.device=cpu", "run.tensorboard=false", "run.log_every=1", "optim.warmup_steps=1"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with `runs/demo`: some shards, and two backbones of two updates."""
    folder = tmp_path_factory.mktemp("recipes")
    counts = {"captions": 40, "vqa": 40, "long": 12, "scene_pairs": 64, "text": 40}
    toy.prepare(folder / "runs" / "demo" / "data" / "toy", train=counts, heldout={"scene_pairs": 24})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DEMO", raising=False)
        vision = compose(["experiment=demo_vision", "run.steps=2", *SMALL])
        del vision.data.datasets["digits"]
        vision.data.datasets["scenes"]["batch_size"] = 16
        train(vision)
        train(compose(["experiment=demo_language", "run.steps=2", *SMALL]))
        yield folder


def run_page(name: str, settings: Mapping[str, Sequence[str]], shrink: dict[str, str]) -> list[str]:
    """Run all blocks of a page in their order; return the commands. `settings` go to commands with these words."""
    ran = []
    for kind, block in re.findall(r"```(python|bash)\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL):
        if kind == "python":
            for text, smaller in shrink.items():
                block = block.replace(text, smaller)
            exec(compile(block, f"{name}.md", "exec"), {"__name__": "page"})
            continue
        for command in block.strip().splitlines():
            words = shlex.split(command)
            more = [setting for word, given in settings.items() if word in words for setting in given]
            if words[:2] == ["python", "train.py"]:
                train(compose([*words[2:], *more, *SMALL]))
            elif words[:3] == ["python", "-m", "data"]:
                assert prepare_data(words[3:]) == 0
            elif words[:4] == ["python", "-m", "eval", "shards"]:
                assert main(words[3:]) == 0
            else:
                assert words[:3] == ["python", "-m", "eval"]
                assert main([*words[3:], *more, "progress=false", "cache=null", "gallery=0", "device=cpu"]) == 0
            ran.append(command)
    return ran


def results(folder: str) -> dict[str, Any]:
    (row,) = json.loads((Path(folder) / "results.json").read_text())["rows"]
    return row


def test_llava_med(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["stages.instruct.run.steps=2", "stages.tune.run.steps=2"]
    short += ["stages.instruct.data.datasets.instructions.batch_size=2", "stages.tune.data.datasets.vqa.batch_size=2"]
    first = ["stages.align.run.steps=2", "stages.align.data.datasets.captions.batch_size=4"]
    settings = {"experiment=llava_med": short, "run.dir=runs/llava_med": first, "plan=true": first}
    ran = run_page("llava_med", settings, {})
    assert len(ran) == 7
    said = capsys.readouterr().out
    for stage in ("align", "instruct", "tune"):
        assert f"stage {stage}: memory of each of 1" in said
        assert results(f"runs/llava_med/eval/{stage}")["task"] == "toy_vqa"
    assert not Path("runs/llava_med_unaligned/align").exists()
    assert results("runs/llava_med_unaligned/eval")["n"] == 24
    own = "model.layers.0.mlp.up_proj.weight"
    before = load_file("runs/demo/language/model/model.safetensors")[own]
    kept = {
        stage: load_file(f"runs/llava_med/{stage}/model/model.safetensors")[f"language_model.{own}"]
        for stage in ("align", "instruct")
    }
    assert torch.equal(kept["align"], before)
    assert not torch.equal(kept["instruct"], before)
    assert {line["lr"] for line in lines(Path("runs/llava_med/tune"))} != {
        line["lr"] for line in lines(Path("runs/llava_med/align"))
    }


def test_llava_med_from_a_model_that_is_aligned() -> None:
    (words,) = re.findall(r"`(stages\.align=null model\.init=FOLDER\s[^`]*)`", (PAGES / "llava_med.md").read_text())
    stages, problems = stages_of(compose(["experiment=llava_med", *words.split()]))
    assert problems == []
    assert [(stage.name, stage.config.model.init) for stage in stages] == [
        ("instruct", "FOLDER"),
        ("tune", "runs/demo/llava_med/instruct/model"),
    ]
    assert [stage.planned.problems() for stage in stages] == [[], []]


@pytest.fixture(scope="module")
def pretrained(demo: Path) -> Path:
    """`runs/demo/flamingo/model`, of one update."""
    start = ["experiment=llava_med", "stages.instruct=null", "stages.tune=null", "run.dir=runs/start", *SMALL]
    made = train(compose([*start, "stages.align.run.steps=1"]))
    model = demo / "runs" / "demo" / "flamingo" / "model"
    model.parent.mkdir(parents=True)
    return made.rename(model)


@pytest.mark.usefixtures("pretrained")
def test_multimodal_cot() -> None:
    short = ["run.steps=2", "stages.rationale.data.datasets.rationale.batch_size=4"]
    two = [*short, "stages.answer.data.datasets.answer.batch_size=4"]
    asked = ["rationale_tokens=8", "limit=6"]
    controls = ("direct", "joint", "direct_unseen", "joint_unseen")
    settings = {"run.dir=runs/cot": two, "task=jsonl": asked}
    settings |= {f"run.dir=runs/cot_{control}": short for control in controls}
    ran = run_page("multimodal_cot", settings, {"6000": "40", "400}": "24}"})
    assert len(ran) == 17
    rationale, answer = results("runs/cot/eval/rationale"), results("runs/cot/eval/answer")
    for row in (rationale, answer, results("runs/cot_joint/eval"), results("runs/cot_joint_unseen/eval")):
        assert (row["strategy"], row["shots"], row["n"]) == ("two_stage", 0, 6)
        assert row["metrics"]["rationale_rouge_l"]["n"] == 6
    assert rationale["metrics"] == answer["metrics"]  # the second run reads what the first has written
    for control in ("direct", "direct_unseen"):
        direct = results(f"runs/cot_{control}/eval")
        assert (direct["strategy"], direct["metrics"]) == ("plain", {})
    processor = FlamingoProcessor.from_pretrained("runs/cot/answer/model")
    assert processor.image_token_id not in _first_ids(processor, "shards/cot/joint_unseen")
    _training_rows_are_prompts(processor)


def _training_rows_are_prompts(processor: FlamingoProcessor) -> None:
    """Token for token: what a stage was trained on is what it is asked, and its answer."""
    table = ["task=jsonl", "task.jsonl.source.path=cot/train/questions.jsonl", "model=none"]
    spec = load_config([*table, "task.jsonl.queries=5", 'task.jsonl.lead=" "']).task["jsonl"]
    task = build_task("jsonl", spec)
    special = SpecialTokens(processor.image_token_id, processor.eoc_token_id, eos=0, pad=0)
    rows = {
        name: [
            tokenize_document(document.nodes, processor.encode_text, special).ids
            for document in read_documents(next(Path(f"shards/cot/{name}").glob("*.tar")))
        ]
        for name in ("rationale", "answer", "direct", "joint")
    }
    for query_id in task.query_ids():
        episode, number = task.episode(query_id, 0, 0), int(query_id.rpartition(".")[2])
        query = Query(task, episode, PromptBuilder(processor), PromptingSettings(), 0)
        steps = two_stage(query)
        first = next(steps)[0].prompt.ids
        second = steps.send([Completion(episode.query.rationale, True)])[0].prompt.ids
        prompts = {"rationale": first, "joint": first, "answer": second, "direct": next(plain(query))[0].prompt.ids}
        golds = {"rationale": f" {episode.query.rationale}", "answer": f" {episode.golds[0]}"}
        golds |= {"direct": golds["answer"], "joint": f"{golds['rationale']}\nAnswer:{golds['answer']}"}
        for name, prompt in prompts.items():
            end = processor.encode_text(golds[name])
            assert rows[name][number] == [*prompt, *end, special.eoc, special.eos]


def _first_ids(processor: FlamingoProcessor, shards: str) -> list[int]:
    """Return the training ids of a folder's first document, all that is in one row."""
    special = SpecialTokens(processor.image_token_id, processor.eoc_token_id, eos=0, pad=0)
    (first, *_) = sorted(Path(shards).glob("*.tar"))
    return tokenize_document(next(iter(read_documents(first))).nodes, processor.encode_text, special).ids


@pytest.mark.usefixtures("pretrained")
def test_otter() -> None:
    settings = {"experiment=otter": ["run.steps=2", "data.datasets.instructions.batch_size=4"]}
    settings |= {"task=jsonl": ["limit=6"]}
    assert len(run_page("otter", settings, {"6000": "40", "400)": "40)"})) == 8
    for name in ("before", "after", "random", "alone"):
        rows = json.loads(Path(f"runs/otter_eval/{name}/results.json").read_text())["rows"]
        assert [(row["shots"], row["n"]) for row in rows] == [(shots, 6) for shots in (0, 1, 2, 4)]
    processor = FlamingoProcessor.from_pretrained("runs/otter/model")
    shown, asked = (Path(f"otter/{name}.jsonl").read_text().splitlines()[0] for name in ("shown", "heldout"))
    assert json.loads(shown)["kind"] == json.loads(asked)["kind"] == "colour"
    related, alone = _first_ids(processor, "shards/otter"), _first_ids(processor, "shards/otter_alone")
    assert related.count(processor.image_token_id) > alone.count(processor.image_token_id) == 1
    source = ["task.jsonl.source.path=otter/heldout.jsonl", "task.jsonl.support={format:jsonl,path:otter/shown.jsonl}"]
    spec = load_config(["task=jsonl", *source, "task.jsonl.demos=same_kind", "task.jsonl.lead=' '", "model=none"])
    task = build_task("jsonl", spec.task["jsonl"])
    for query_id in task.query_ids()[:8]:  # a row of training, but for its answers, is a prompt with demonstrations
        episode = task.episode(query_id, 4, 0)
        prompt = PromptBuilder(processor).build(episode, 8)
        turn = prompt.ids[-(len(alone) - len(processor.encode_text(" red")) - 2) :]
        assert list(turn) == alone[: len(turn)]
        assert prompt.ids.count(processor.eoc_token_id) == 4


@pytest.mark.usefixtures("pretrained")
def test_dolphins() -> None:
    short = ["stages.instruct.run.steps=2", "stages.instruct.data.datasets.instructions.batch_size=2"]
    first = ["stages.grounded.run.steps=2", "stages.grounded.data.datasets.chains.batch_size=2"]
    settings = {"experiment=dolphins": short, "run.dir=runs/dolphins": first, "task=jsonl": ["limit=6"]}
    assert len(run_page("dolphins", settings, {"4000": "12", "2000": "12", "400}": "12}"})) == 7
    assert not Path("runs/dolphins_direct/grounded").exists()
    for name in ("before", "after", "direct"):
        rows = json.loads(Path(f"runs/dolphins_eval/{name}/results.json").read_text())["rows"]
        assert [(row["images"], row["n"]) for row in rows] == [("real", 6), ("unordered", 6)]
        assert set(rows[0]["score_by_kind"]) == {"motion", "order"}
    processor = FlamingoProcessor.from_pretrained("runs/dolphins/instruct/model")
    source = "task.jsonl.source.path=dolphins/heldout.jsonl"
    spec = load_config(["task=jsonl", source, "task.jsonl.lead=' '", "model=none"]).task["jsonl"]
    task = build_task("jsonl", spec)
    ids = _first_ids(processor, "shards/dolphins/instruct")
    asked = {task.episode(query_id, 0, 0) for query_id in task.query_ids()}
    prompts = {PromptBuilder(processor).build(episode, 8).ids for episode in asked}
    assert any(tuple(ids[: len(prompt)]) == prompt for prompt in prompts)


@pytest.mark.usefixtures("pretrained")
def test_multimodal_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"experiment=multimodal_gpt": ["run.steps=2", "data.datasets.mine.batch_size=2"]}
    settings |= {"task=toy_caption": ["limit=6"]}
    assert len(run_page("multimodal_gpt", settings, {"3000": "12", "200}": "4}"})) == 4
    assert re.search(r"of 4: first turn right \d, second \d, both \d", capsys.readouterr().out)
    assert results("runs/multimodal_gpt_eval/after")["n"] == 6
    before, after = (
        load_file(f"{folder}/model.safetensors") for folder in ("runs/demo/flamingo/model", "runs/multimodal_gpt/model")
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "cross_attn_blocks"}
