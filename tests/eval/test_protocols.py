"""Protocols as the papers have them: the prompt a model gets, the 0-shot rule, what is cut, which faults come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.compose import load_config
from eval.prompting.prompts import PromptBuilder
from eval.protocols import names, settings_of
from eval.task import Episode
from eval.tasks.build import build_task, check_spec
from eval.tasks.examples import ExampleTask
from flamingo.errors import UserError
from tests.eval.published import WRITERS
from tests.eval.worlds import EOC, IMAGE, Letters


def built(root: Path, task: str, *settings: str) -> ExampleTask:
    if not (root / task).exists():
        (root / task).mkdir(parents=True)
        WRITERS[task](root / task)
    config = load_config(["model=m", f"task={task}", f"task.{task}.root={root / task}", *settings])
    found = build_task(task, config.task[task])
    assert isinstance(found, ExampleTask)
    return found


def text(episode: Episode) -> str:
    """The prompt's ids as text, `#` for an image and `$` for the end of a chunk."""
    ids = PromptBuilder(Letters()).build(episode, 5).ids
    return "".join({IMAGE: "#", EOC: "$"}.get(i) or chr(i) for i in ids)


def first(task: ExampleTask, shots: int) -> Episode:
    return task.episode(task.query_ids()[0], shots, 0)


def test_prompts_are_those_of_the_papers(tmp_path: Path) -> None:
    vqa = "Question: What colour?"
    assert text(first(built(tmp_path, "vqav2", "protocol=flamingo"), 1)) == f"#{vqa} Answer: red$#{vqa} Answer:"
    ours = first(built(tmp_path, "vqav2", "protocol=openflamingo"), 1)
    asked = "#Question:What colour? Short answer:"
    assert text(ours) == f"{asked}other$\n{asked}"  # the first annotator's answer, a line end behind it
    instruction = "Instruction: provide an answer to the question. Use the image to answer.\n"
    ours = first(built(tmp_path, "vqav2", "protocol=idefics"), 1)
    assert text(ours) == f"{instruction}Image:#{vqa} Answer: red\nImage:#{vqa} Answer:"
    caption = text(first(built(tmp_path, "coco", "protocol=openflamingo"), 1))
    assert caption.startswith("#Output:a thing number ")
    assert caption.endswith("$\n#Output:")
    label = first(built(tmp_path, "imagenet", "protocol=idefics"), 1)
    prompt = PromptBuilder(Letters()).build(label, 5)
    assert "".join(map(chr, prompt.candidates[0])).endswith(".\n")  # no end-of-chunk token anywhere
    assert EOC not in (*prompt.ids, *prompt.candidates[0])
    meme = text(first(built(tmp_path, "hateful_memes", "protocol=idefics"), 1))
    assert meme.startswith(
        "It's a conversation between a human, the user, and an intelligent visual AI, Bot. The user "
    )
    assert meme.count('#is an image with written "look at {this}" on it. Is it hateful? Answer: ') == 2
    assert meme.endswith("Is it hateful? Answer: ")


def test_zero_shots_show_two_texts_where_the_protocol_does_so(tmp_path: Path) -> None:
    for protocol, images in (("modern", 0), ("flamingo", 2), ("openflamingo", 2), ("idefics", 2)):
        episode = first(built(tmp_path, "vqav2", f"protocol={protocol}"), 0)
        assert len(episode.demos) == images
        assert all(demo.image is None and demo.answer for demo in episode.demos)
        assert episode.query.image is not None
        assert text(episode).count("#") == 1
    assert not first(built(tmp_path, "hateful_memes", "protocol=flamingo"), 0).demos  # ranked: none


def test_the_query_image_is_shown_unless_the_published_fault_is_asked_for(tmp_path: Path) -> None:
    right = built(tmp_path, "hateful_memes", "protocol=openflamingo")
    wrong = built(tmp_path, "hateful_memes", "protocol=openflamingo", "bug_compatible=true")
    assert right.hash != wrong.hash
    own = first(right, 2).query.image
    assert first(right, 0).query.image == own
    assert first(wrong, 2).query.image == own
    assert first(wrong, 0).query.image != own


def test_what_is_cut_and_the_historic_cutting(tmp_path: Path) -> None:
    right = built(tmp_path, "vqav2", "protocol=openflamingo")
    wrong = built(tmp_path, "vqav2", "protocol=openflamingo", "bug_compatible=true")
    episode = first(right, 0)
    said = {"Short sleeve": "Short sleeve", "red Question:What": "red", "red, white": "red", " cat \nQuestion:": "cat"}
    assert {raw: right.parse(raw, episode) for raw in said} == said
    assert wrong.parse("Short sleeve", episode) == ""
    captions = built(tmp_path, "coco", "protocol=openflamingo")
    assert captions.parse('a "big" dog Output:a cat', first(captions, 0)) == "a big dog"
    assert (right.num_beams, right.length_penalty, right.max_new_tokens) == (3, 0.0, 5)
    assert built(tmp_path, "textvqa", "protocol=openflamingo").max_new_tokens == 10


def test_vizwiz_is_scored_by_position_unless_the_published_fault_is_asked_for(tmp_path: Path) -> None:
    right = built(tmp_path, "vizwiz", "protocol=openflamingo")
    wrong = built(tmp_path, "vizwiz", "protocol=openflamingo", "bug_compatible=true")
    assert right.score("unanswerable", first(right, 0)) == 1.0
    assert wrong.score("unanswerable", first(wrong, 0)) == pytest.approx(0.4)


def test_the_command_line_has_the_last_word_and_other_tasks_keep_their_own_form(tmp_path: Path) -> None:
    config = load_config(["model=m", "task=[vqav2,toy_vqa]", "task.vqav2.lead=x", "task.vqav2.num_beams=2"])
    assert (config.task["vqav2"].lead, config.task["vqav2"].num_beams) == ("x", 2)
    assert config.task["vqav2"].question == "Question: {question} Answer:"
    assert config.task["toy_vqa"].question == "{question}"
    config = load_config(["model=m", "task=toy_vqa", "task.toy_vqa.form=vqa", "protocol=flamingo"])
    assert config.task["toy_vqa"].question == "Question: {question} Answer:"


def test_what_a_protocol_cannot_do_is_one_sentence() -> None:
    for arguments, message in (
        (["task=vqav2", "protocol=mine"], "protocol=mine; use one of chat, flamingo, idefics, modern, openflamingo"),
        (["task=toy_vqa", "protocol=flamingo"], "task toy_vqa has no form"),
        (["task=medqa", "protocol=openflamingo"], r"no prompt for task medqa \(form choice\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(["model=m", *arguments])


@pytest.mark.parametrize("protocol", names())
def test_every_setting_of_a_protocol_is_one_of_a_task(protocol: str) -> None:
    reached, forms = [], load_config(["model=m", f"task=[{','.join(WRITERS)}]"]).task
    for name in WRITERS:
        try:
            settings_of(protocol, name, forms[name].form)
        except UserError:
            continue
        reached.append(name)
    for bugs in ("false", "true"):  # all tasks in one composition: hydra needs seconds for each
        arguments = [f"task=[{','.join(reached)}]", f"protocol={protocol}", f"bug_compatible={bugs}"]
        config = load_config(["model=m", *arguments])
        for name in reached:
            check_spec(name, config.task[name])
    assert 2 * len(reached) >= 20
