"""Conversations by a model: requests, filters, files; the same bytes however often the run was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from data.__main__ import main
from data.instruct.conversations import PROMPTS, InstructPrompt, turns_in
from data.instruct.settings import read_prompt
from data.prepare.units import Dropped
from data.shards.document import Image, Text
from data.shards.writer import read_documents
from tests.data.chat_server import Fault, chatting, completion, error, last
from tests.fixtures import png

ROOT = Path(__file__).resolve().parents[2]
GOOD = "User: What is it?\nAssistant: It is a red square.\n\nUser: How large?\nAssistant: It fills the image."


def figures(folder: Path, count: int = 12) -> Path:
    lines = [
        {"id": f"f{n}", "image": f"{n}.png", "caption": f"Figure {n}.", "mentions": [f"See {n}."] * (n % 2)}
        for n in range(count)
    ]
    path = folder / "figures.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def instruct(url: str, source: Path, out: Path, *more: str) -> int:
    words = ["--url", url, "--model", "m", "--pause-s", "0.001", "--retries", "1", *more]
    return main(["instruct", str(source), "--out", str(out), *words])


def conversations(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "conversations.json").read_text())


def test_captions_become_conversations_and_shards(tmp_path: Path) -> None:
    with chatting(lambda body, number: GOOD) as server:
        assert instruct(server.url, figures(tmp_path), tmp_path / "out") == 0
    messages = next(body["messages"] for body in server.requests if "Figure 3." in last(body))
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert messages[-1]["content"] == "Figure caption:\nFigure 3.\n\nFigure context:\n- See 3."
    assert last(next(b for b in server.requests if "Figure 4." in last(b))) == "Figure caption:\nFigure 4."
    items = conversations(tmp_path / "out")
    assert [(item["id"], item["image"]) for item in items] == [(f"f{n}", f"{n}.png") for n in range(12)]
    openings = {item["conversations"][0]["value"] for item in items}
    assert openings == {"<image>\nWhat is it?", "What is it?\n<image>"}
    assert [turn["from"] for turn in items[0]["conversations"]] == ["human", "gpt"] * 2
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png((200, 0, 0), number, side=32))
    words = ["--images", str(tmp_path), "--out", str(tmp_path / "shards"), "--workers", "1"]
    assert main(["prepare", "llava", str(tmp_path / "out" / "conversations.json"), *words]) == 0
    (shard,) = (tmp_path / "shards").glob("*.tar")
    documents = list(read_documents(shard))
    assert len(documents) == 12
    assert isinstance(documents[0].nodes[0], Image)
    answers = [node.text.strip() for node in documents[0].nodes if isinstance(node, Text) and node.loss]
    assert answers == ["It is a red square.", "It fills the image."]


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = figures(tmp_path)

    def answer(body: dict[str, Any], number: int) -> str:
        return f"User: What is {len(last(body))}?\nAssistant: One of {last(body)[-9:]}, I think."

    def failing(body: dict[str, Any], number: int) -> str | Fault:
        return answer(body, number) if number < 5 else error(500, "down")

    with chatting(answer) as server:
        assert instruct(server.url, source, tmp_path / "whole", "--concurrency", "3") == 0
    with chatting(failing) as server:
        assert instruct(server.url, source, tmp_path / "again", "--concurrency", "1") == 2
    assert "5 of 12 replies came" in capsys.readouterr().err
    assert not (tmp_path / "again" / "conversations.json").exists()
    with chatting(answer) as server:
        assert instruct(server.url, source, tmp_path / "again", "--concurrency", "4") == 0
        assert len(server.requests) == 7
    for name in ("conversations.json", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed while it waits for its sixth reply; nothing that came before is asked again."""
    source, sixth = figures(tmp_path), threading.Event()

    def answer(body: dict[str, Any], number: int) -> str:
        return f"User: What is {len(last(body))}?\nAssistant: One of {last(body)[-9:]}, I think."

    def stalling(body: dict[str, Any], number: int) -> str | Fault:
        if number < 5:
            return answer(body, number)
        sixth.set()
        return Fault(stalls=True)

    with chatting(stalling) as server:
        words = ["--out", str(tmp_path / "killed"), "--url", server.url, "--model", "m", "--concurrency", "1"]
        process = subprocess.Popen([sys.executable, "-m", "data", "instruct", str(source), *words], cwd=ROOT)
        try:
            assert sixth.wait(120)
        finally:
            process.kill()
            process.wait()
    with chatting(answer) as server:
        assert instruct(server.url, source, tmp_path / "killed") == 0
        assert len(server.requests) == 7
        assert instruct(server.url, source, tmp_path / "whole") == 0
    for name in ("conversations.json", "report.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


REPLIES: dict[str, str | Fault] = {
    "f0": GOOD,
    "f1": "User: A?\nAssistant: I'm sorry, but I cannot see the image.\nUser: B?\nAssistant: It is a chest.",
    "f2": "User: A?\nAssistant: Based on the caption provided, it is a heart.",
    "f3": "User: A?\nAssistant: It is a kidney, as mentioned in the caption.",
    "f4": "User: What does the caption say?\nAssistant: That it is a lung.",
    "f5": "User: A?\nAssistant: Yes.",
    "f6": "A square is shown.",
    "f7": "User: A?\nUser: B?\nAssistant: It is a bone.",
    "f8": completion("User: A?\nAssistant: It is a", "length"),
    "f9": error(400, "filtered"),
    "f10": "User: A?\nAssistant: It is an <image> of a knee.",
    "f11": "**User:** What is it?\n**Assistant:** An arm:\n- the hand\n- the elbow",
}


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any], number: int) -> str | Fault:
        caption = last(body).split("\n")[1]
        return REPLIES[f"f{caption.removeprefix('Figure ').removesuffix('.')}"]

    source = figures(tmp_path)
    with source.open("a") as file:
        for odd in ({"id": "f0", "caption": "again"}, {"id": "x"}, {"caption": "no name"}, {"id": "y", "caption": 3}):
            file.write(json.dumps(odd) + "\n")
    with chatting(answer) as server:
        assert instruct(server.url, source, tmp_path / "out") == 0
    kept = {
        item["id"]: [turn["value"] for turn in item["conversations"][1::2]] for item in conversations(tmp_path / "out")
    }
    assert kept == {
        "f0": ["It is a red square.", "It fills the image."],
        "f1": ["It is a chest."],
        "f2": ["It is a heart."],
        "f11": ["An arm:\n- the hand\n- the elbow"],
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["figures"] == {
        "kept": 4,
        "dropped": {
            "fewer than 1 turns are left": 4,
            "id occurs twice": 1,
            "no caption": 2,
            "no id": 1,
            "reply is not a conversation of User and Assistant in turn": 2,
            "reply was cut off: raise --max-tokens": 1,
            "the endpoint refused the request": 1,
        },
    }
    assert report["turns"]["dropped"] == {
        "answer is a refusal": 1,
        "answer of fewer than 3 words": 1,
        "turn contains <image>": 1,
        "turn gives away that only a text was read": 2,
    }
    shown = capsys.readouterr().out
    assert all(reason in shown for part in ("figures", "turns") for reason in report[part]["dropped"])


def test_llava_meds_own_file_is_read(tmp_path: Path) -> None:
    item = {"pair_id": "p1", "fig_label": "Fig 1", "fig_caption": "A scan.", "in_text_mention": [{"tokens": "See it."}]}
    path = tmp_path / "llava_med.json"
    path.write_text(json.dumps({"mri": [item], "ct_scan": [item | {"pair_id": "p2", "in_text_mention": []}]}, indent=1))
    with chatting(lambda body, number: GOOD) as server:
        assert instruct(server.url, path, tmp_path / "out") == 0
    assert [(item["id"], item["image"]) for item in conversations(tmp_path / "out")] == [
        ("p1", "p1.jpg"),
        ("p2", "p2.jpg"),
    ]
    assert any("- See it." in last(body) for body in server.requests)


@pytest.mark.parametrize("text", ["", "User: a", "Assistant: b\nUser: a", "User: a\nAssistant:", "User: a\nSystem: b"])
def test_what_is_not_a_conversation(text: str) -> None:
    with pytest.raises(Dropped):
        turns_in(text)


def test_our_prompt_passes_its_own_filters() -> None:
    prompt = read_prompt(InstructPrompt, "llava_med", PROMPTS)
    assert len(prompt.examples) == 2
    for example in prompt.examples:
        assert len(turns_in(example.conversation)) >= 2


@pytest.mark.parametrize(
    ("words", "prompt", "message"),
    [
        (["--prompt", "none"], "", "prompt=none: there is no such file; give llava_med"),
        (["--prompt", "p.yaml"], "system: x\nuser: y", "user must have {caption}"),
        (["--prompt", "p.yaml"], "system: x\nuser: '{caption}'\nrefusals: ['(']", "is not a regular expression"),
        (["--prompt", "p.yaml"], "system: x\nuser: '{caption}'\nlead_ins: ['a{99999999999}']", "number is too large"),
        (
            ["--prompt", "p.yaml"],
            "system: x\nuser: '{caption}'\nexamples: [{caption: a, conversation: b}]",
            "the conversation of example 1 is wrong",
        ),
        (["--min-words", "9", "--max-words", "3"], "", "--min-words must not be above --max-words"),
        (["--concurrency", "0"], "", "concurrency"),
        (["--max-words", "2", "--min-words", "0"], "", "not one conversation was kept"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str],
    prompt: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(prompt)
    with chatting(lambda body, number: GOOD) as server:
        assert instruct(server.url, figures(tmp_path, 2), tmp_path / "out", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out" / "conversations.json").exists()


def test_an_input_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert instruct("http://127.0.0.1:9", tmp_path / "empty.jsonl", tmp_path / "out") == 2
    assert instruct("http://127.0.0.1:9", tmp_path / "nowhere.jsonl", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "no figure in" in lines[0]
    assert "nowhere.jsonl does not exist" in lines[1]
