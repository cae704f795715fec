"""A conversation that goes on: nothing is computed twice, and it reads as one prompt would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flamingo import UserError
from flamingo.chat import ChatSession, converse, medium_of
from flamingo.processing.chat import CHAT_TEMPLATES
from tests.model import tiny
from tests.model.test_conversations import CHATML


class Counted:
    """How many frames a model encodes and how many tokens its LM runs."""

    def __init__(self, model: Any) -> None:
        self.frames: list[int] = []
        self.tokens: list[int] = []
        model.vision_encoder.register_forward_hook(lambda module, args, out: self.frames.append(len(out)))
        layer = model.language_model.get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda module, args: self.tokens.append(args[0].shape[1]))


def make(template: str = "plain", **options: Any) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model, processor = tiny.flamingo("llama", tokenizer=tokenizer, vocab=TOKENS, **options)
    processor.chat_template = template
    return model, processor


TOKENS = tiny.TOKENS + 2


@pytest.mark.parametrize("template", [*CHAT_TEMPLATES, CHATML])
def test_a_later_turn_encodes_and_computes_only_what_is_new(template: str) -> None:
    model, processor = make(template)
    session, counted = ChatSession(model, processor), Counted(model)
    clip = {"type": "video", "video": [tiny.picture(3), tiny.picture(4)]}
    turns: list[tuple[str, list[Any]]] = [
        ("What?", [tiny.picture(1)]), ("And?", []), ("These?", [tiny.picture(2), clip]), ("So?", [])
    ]  # fmt: skip
    frames = [1, 0, 3, 0]
    total = 0
    for (text, media), new in zip(turns, frames, strict=True):
        counted.frames.clear()
        counted.tokens.clear()
        said = session.say(text, media, max_new_tokens=5, do_sample=False)
        assert sum(counted.frames) == new
        total += sum(counted.tokens)
        length = session._ids.shape[1]  # type: ignore[union-attr]
        assert session._cache.get_seq_length() == total  # every token has been computed once
        assert 1 <= length - total <= 1 + len(session.turns.closing_ids)
        assert session.messages[-1] == {"role": "assistant", "content": said}
    assert len(session.messages) == 8


@pytest.mark.parametrize("template", ["plain", "otter", "multimodal_gpt", CHATML])
def test_what_is_said_is_what_one_prompt_of_the_whole_gives(template: str) -> None:
    """Each answer, from the cache, is that of the session's own ids in one call without a cache."""
    model, processor = make(template)
    session = ChatSession(model, processor)
    images = [tiny.picture(5), tiny.picture(6)]
    for turn, text in enumerate(("What?", "And this?")):
        before = None if session._ids is None else session._ids
        said = session.say(text, [images[turn]], max_new_tokens=6, do_sample=False)
        inputs = processor(images=[images[: turn + 1]], text=["<image>" * (turn + 1)])
        ids = session._ids
        assert ids is not None
        prompt = processor(text=session.messages[:-1])["input_ids"]
        if before is None:
            assert torch.equal(ids[:, : prompt.shape[1]], prompt)
            begin = prompt.shape[1]
        else:
            assert torch.equal(ids[:, : before.shape[1]], before)
            begin = before.shape[1] + session_new(session, before.shape[1])
        media = {name: inputs[name] for name in ("pixel_values", "image_counts")}
        out = model.generate(
            input_ids=ids[:, :begin], **media, max_new_tokens=6, do_sample=False, eos_token_id=session._ends
        )
        assert session.turns.said(session._closed(out[0, begin:].tolist())) == said


def session_new(session: ChatSession, before: int) -> int:
    """How many tokens the last message has: all behind the answer before it, up to where its own answer begins."""
    text, turns = session.turns.turns(session.messages[:-1], "here", add_generation_prompt=True)
    return len(session.turns._ids(text[turns[-1][1] :]))


def test_a_conversation_is_as_training_would_have_it() -> None:
    """Where the answers are tokenised as the model gave them, the ids are those of the messages."""
    model, processor = make("plain")
    session = ChatSession(model, processor, system="Be brief.")
    session.say("What?", [tiny.picture(1)], max_new_tokens=1, do_sample=False)
    session.messages[-1]["content"] = "A cat."
    session._ids = torch.cat([processor(text=session.messages[:-1])["input_ids"],
                              torch.tensor([session.turns.answer("A cat.")])], 1)  # fmt: skip
    session._cache = None
    inputs = session._inputs([*session.messages, {"role": "user", "content": "And?"}])
    whole = processor(text=[*session.messages, {"role": "user", "content": "And?"}])
    assert torch.equal(inputs["input_ids"], whole["input_ids"])


def test_mistakes_leave_the_conversation_as_it_was(tmp_path: Path) -> None:
    model, processor = make("plain")
    session = ChatSession(model, processor)
    first = session.say("What?", [tiny.picture(1)], max_new_tokens=3, do_sample=False)
    (broken := tmp_path / "a.png").write_bytes(b"no image")
    before, ids = len(session.messages), session._ids
    for text, media, options, said in (
        (" ", [], {}, "the message is empty"),
        ("Look", [str(broken)], {}, "image 0 of row 0"),
        ("Look", [str(tmp_path / "none.png")], {}, "image 0 of row 0"),
        ("x", [], {"num_beams": 2}, "leave num_beams out"),
        ("x", [], {"num_return_sequences": 2, "do_sample": True}, "leave num_return_sequences out"),
        ("x", [], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            session.say(text, media, **options)
        assert len(session.messages) == before
        assert session._ids is ids
    again = ChatSession(model, processor)
    assert again.say("What?", [tiny.picture(1)], max_new_tokens=3, do_sample=False) == first
    wanted, found = (s.say("And?", max_new_tokens=3, do_sample=False) for s in (again, session))
    assert found == wanted
    with pytest.raises(UserError, match="neither the processor nor the LM's tokenizer has a chat template"):
        ChatSession(model, tiny.flamingo("llama")[1])


def test_an_interrupted_answer_is_forgotten() -> None:
    model, processor = make("plain")
    session, other = ChatSession(model, processor), ChatSession(model, processor)
    for one in (session, other):
        one.say("What?", [tiny.picture(1)], max_new_tokens=3, do_sample=False)

    def stop(ids: Any, scores: Any, **kwargs: Any) -> Any:
        if ids.shape[1] > 40:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        session.say("Interrupt me, please, at some length", max_new_tokens=9, stopping_criteria=[stop], do_sample=False)
    results = [one.say("And?", [tiny.picture(2)], max_new_tokens=4, do_sample=False) for one in (session, other)]
    assert results[0] == results[1]
    assert torch.equal(session._ids, other._ids)  # type: ignore[arg-type]


def test_a_terminal_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = make("plain")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a cat.png")
    lines = [f"/image {tmp_path / 'a cat.png'}", "What?", "", "/imag x", "/image", f"/image {tmp_path}"]
    lines += ["/help", "/new", "Again", "/quit", "never"]
    written: list[str] = []
    converse(lambda: ChatSession(model, processor), lines, written.append, max_new_tokens=3, do_sample=False)
    assert len(written) == 3
    assert "/image PATH" in written[1]
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in errors] == ["/imag", "/image", str(tmp_path)]
    assert all(line.startswith("error: ") for line in errors)
    (tmp_path / "b.mp4").write_bytes(b"x")
    assert medium_of(str(tmp_path / "b.mp4"))["type"] == "video"
    for nothing in ("x" * 400, "~nobody of this name/a.png"):
        with pytest.raises(UserError, match="is not a file"):
            medium_of(nothing)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    model, processor = make("otter")
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")

    def run(*arguments: str, typed: str = "") -> Any:
        command = [sys.executable, "-m", "flamingo", "chat", *arguments]
        root = Path(__file__).parents[2]
        return subprocess.run(command, input=typed, capture_output=True, text=True, cwd=root, timeout=200)

    done = run(str(tmp_path / "m"), "--max-new-tokens", "3", typed=f"/image {tmp_path / 'a.png'}\nWhat?\n/nope\nAnd?\n")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 2
    assert done.stderr.splitlines() == ["error: /nope is not a command; there are /image, /new, /help, /quit"]
    for arguments, said in (
        ([str(tmp_path / "none")], "none"),
        ([str(tmp_path / "m"), "--template", "oter"], "chat_template='oter' is neither"),
        ([str(tmp_path / "m"), "--temperature", "-1"], "--temperature -1.0 must be 0"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
