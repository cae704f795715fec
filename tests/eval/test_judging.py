"""A judge of planted habits, on loopback: its scores are recovered, and its bias for a place is found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.instruct.reply_log import Reply
from data.instruct.settings import read_prompt
from eval.__main__ import main
from eval.judging.judge import PROMPTS, JudgePrompt, scores_in
from tests.data.chat_server import Fault, chatting, error, last
from tests.eval.finished import sample, write_answers, write_run

SHOWN = "{question}{first}{second}"
KINDS = ("conversation", "detail")


def answers_in(prompt: str) -> tuple[str, str]:
    """The two answers that the judge is shown, in their order."""
    first, second = re.findall(r"\[Assistant [12]\]\n(.*?)\n\n\[End", prompt, re.DOTALL)
    return first, second


def worth(answer: str) -> int:
    """Answers of the tests say themselves how good they are."""
    return int(answer.rsplit(" ", 1)[1])


def fair(body: dict[str, Any], number: int) -> str:
    first, second = answers_in(last(body))
    return f"{worth(first)} {worth(second)}\nBecause."


def judge(url: str, out: Path, *arguments: object) -> dict[str, Any]:
    words = [*map(str, arguments), f"url={url}", "model=m", f"out={out}", "pause_s=0.001", "retries=1"]
    assert main(["judge", *words]) == 0
    return json.loads((out / "judge.json").read_text())


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Thirty questions of two kinds: the first system is worth 4, the second 6, and 2 on every third."""
    first = [sample(f"q{n}", f"a{n} 4", kind=KINDS[n % 2]) for n in range(30)]
    second = [sample(f"q{n}", f"b{n} {2 if n % 3 == 0 else 6}", kind=KINDS[n % 2]) for n in range(30)]
    return write_run(tmp_path / "one", first), write_run(tmp_path / "two", second)


def test_a_fair_judge(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(fair) as server:
        summary = judge(server.url, tmp_path / "out", *runs)
        assert len(server.requests) == 60
        again = judge(server.url, tmp_path / "out", *runs)
        assert len(server.requests) == 60  # all from the log
    assert again == summary
    overall = summary["relative"][0]
    assert overall["relative"] == pytest.approx((10 * 2 / 4 + 20 * 6 / 4) / 30)  # the mean of ratios
    assert overall["by_order"] == [overall["relative"]] * 2
    assert overall["scores"] == pytest.approx([4, 140 / 30])
    assert overall["interval"][0] < overall["relative"] < overall["interval"][1]
    assert {row["group"]: row["n"] for row in summary["relative"]} == {
        "overall": 30,
        "talk: conversation": 15,
        "talk: detail": 15,
    }
    wins = summary["wins"][0]
    assert (wins["first"]["share"], wins["second"]["share"]) == pytest.approx((1 / 3, 2 / 3))
    assert wins["ties"] == pytest.approx(0)
    assert wins["same_in_both_orders"] == 1
    assert summary["position"]["points"] == 0
    assert summary["notes"] == []
    assert "116.7 %" in capsys.readouterr().out
    assert "talk: detail" in (tmp_path / "out" / "judge.html").read_text()


@pytest.mark.parametrize(("extra", "place"), [((2, 0), "first"), ((0, 1), "second")])
def test_a_judge_that_looks_at_the_place_is_found(
    extra: tuple[int, int], place: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    def biased(body: dict[str, Any], number: int) -> str:
        first, second = answers_in(last(body))
        return f"{worth(first) + extra[0]} {worth(second) + extra[1]}"

    with chatting(biased) as server:
        summary = judge(server.url, tmp_path / "out", *runs)
    bias = summary["position"]
    assert bias["points"] == extra[0] - extra[1]
    assert bias["p"] < 0.001
    assert summary["notes"][0].startswith(
        f"the judge is biased towards the {place} place ({bias['points']:+.2f} points"
    )
    assert "biased" in (tmp_path / "out" / "judge.html").read_text()


def test_a_judge_that_only_knows_the_place_decides_nothing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with chatting(lambda body, number: "9 3") as server:
        summary = judge(server.url, tmp_path / "out", *runs)
    assert summary["wins"][0]["ties"] == 1
    assert summary["wins"][0]["same_in_both_orders"] == 0
    assert (summary["position"]["first"], summary["position"]["second"]) == (30, 0)


def test_one_run_is_judged_beside_the_gold_answers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [sample(f"q{n}", f"a{n} 5", golds=(f"gold{n} 10",)) for n in range(12)])
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"id": f"q{n}", "context": f"seen {n}"}) + "\n" for n in range(12))
    )
    with chatting(fair) as server:
        summary = judge(server.url, tmp_path / "out", run, "prompt=llava_med", f"context={tmp_path / 'c.jsonl'}")
    asked = [last(body) for body in server.requests]
    assert sum("[Context]\nseen 3\n\n[Question]\nWhat about q3?\n" in prompt for prompt in asked) == 2
    assert summary["systems"] == ["gold answers", "run"]
    assert summary["relative"][0]["relative"] == 0.5


def test_nonsense_is_left_out_and_counted(runs: tuple[Path, Path], tmp_path: Path) -> None:
    odd: dict[str, str | Fault] = {
        "a0 ": "Both are good.",
        "a1 ": "8 11",
        "a2 ": "4\n6",
        "a3 ": error(400, "filtered"),
        "a4 ": "",
    }

    def answer(body: dict[str, Any], number: int) -> str | Fault:
        return next((reply for name, reply in odd.items() if name in last(body)), fair(body, number))

    with chatting(answer) as server:
        summary = judge(server.url, tmp_path / "out", *runs)
    assert summary["left_out"] == {
        "the first line is not two scores": 3,
        "a score is not from 1 to 10": 1,
        "the endpoint refused the question": 1,
    }
    assert summary["questions"] == summary["relative"][0]["n"] == 25
    assert "3 of 30 questions are left out: the first line is not two scores" in summary["notes"]


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7", (8, 7)),
        ("\n  **8.5, 7**  \nwhy", (8.5, 7)),
        ("8/7", (8, 7)),
        ("8 7 6", None),
        ("8", None),
        ("Assistant 1: 8, Assistant 2: 7", None),
        ("0 7", None),
        ("-8 7", None),
        ("(8 7).", (8, 7)),
        ("8 7 because 9 3", None),
    ],
)
def test_two_scores_and_nothing_else(text: str, scores: tuple[float, float] | None) -> None:
    assert scores_in(Reply(text, "stop", 1), [1, 10])[0] == scores


def test_every_prompt_of_ours_is_one() -> None:
    assert {path.stem for path in PROMPTS.glob("*.yaml")} == {"llava_med", "text"}
    for path in PROMPTS.glob("*.yaml"):
        assert read_prompt(JudgePrompt, path.stem, PROMPTS).scale == [1, 10]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["judge", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message", "prompt"),
    [
        ([], "judge needs one or two folders", ""),
        (["RUN", "model=m", "out=x"], "url", ""),
        (
            ["RUN", "URL", "model=m", "out=x", "prompt=none"],
            "prompt=none: there is no such file; give llava_med, text",
            "",
        ),
        (["RUN", "URL", "model=m", "out=x", "prompt=llava_med"], "give context=FILE", ""),
        (["RUN", "URL", "model=m", "out=x", "prompt=llava_med", "context=c"], "c does not exist", ""),
        (["RUN", "URL", "model=m", "out=x", "prompt=p.yaml"], "user lacks {second}", "user: '{question} {first}'"),
        (
            ["RUN", "URL", "model=m", "out=x", "prompt=p.yaml"],
            "user has {third}",
            "user: '{question}{first}{second}{third}'",
        ),
        (
            ["RUN", "URL", "model=m", "out=x", "prompt=p.yaml"],
            "both above 0",
            "{user: '{question}{first}{second}', scale: [0, 9]}",
        ),
        (["RUN", "URL", "model=m", "out=x", "temprature=1"], "unknown key 'temprature'", ""),
        (["RUN", "URL", "model=m", "out=x"], "no question of 12 has two scores in both orders", ""),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    message: str,
    prompt: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(prompt)
    write_answers(tmp_path / "RUN", {f"q{n}": f"a {n}" for n in range(12)})
    with chatting(lambda body, number: "hm") as server:
        assert message in refused([word.replace("URL", f"url={server.url}") for word in arguments], capsys)
    assert not (tmp_path / "x" / "judge.json").exists()


def test_a_judge_that_is_down_leaves_no_report(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any], number: int) -> str | Fault:
        return fair(body, number) if number < 20 else error(500, "down")

    words = ["model=m", f"out={tmp_path / 'out'}", "pause_s=0.001", "retries=1", "concurrency=1"]
    with chatting(answer) as server:
        line = refused([*map(str, runs), f"url={server.url}", *words], capsys)
        assert "does not answer (status 500: down" in line
        assert "20 of 60 replies came" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["replies.jsonl"]
    with chatting(fair) as server:
        assert judge(server.url, tmp_path / "out", *runs)["questions"] == 30
        assert len(server.requests) == 40
