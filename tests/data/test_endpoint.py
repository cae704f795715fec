"""The client of OpenAI-compatible endpoints against a real one that fails, stalls, is over quota and talks nonsense."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from data.instruct.endpoint import Endpoint, EndpointConfig, Message
from data.instruct.reply_log import Reply, ReplyLog
from data.instruct.settings import settings_of
from flamingo.errors import UserError
from tests.data.chat_server import Answer, Fault, chatting, completion, error, last


def ask(url: str, folder: Path, questions: list[str], **settings: Any) -> list[Reply]:
    config = EndpointConfig(url=url, model="m", **{"pause_s": 0.001, "retries": 2, **settings})
    messages: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    return Endpoint(config, ReplyLog(folder / "log.jsonl")).ask(messages)


def echo(body: dict[str, Any], number: int) -> str:
    return f"re: {last(body)}"


QUESTIONS = [f"question {number}" for number in range(12)]


def test_replies_come_in_the_order_of_the_questions_and_only_once(tmp_path: Path) -> None:
    with chatting(echo) as server:
        replies = ask(server.url, tmp_path, [*QUESTIONS, QUESTIONS[0]], concurrency=3)
        assert [reply.text for reply in replies] == [f"re: {question}" for question in [*QUESTIONS, QUESTIONS[0]]]
        assert len(server.requests) == 12
        assert server.at_once <= 3
        assert ask(server.url, tmp_path, QUESTIONS[::-1]) == replies[11::-1]
        assert len(server.requests) == 12
        ask(server.url, tmp_path, QUESTIONS[:2], temperature=0.5)  # another request altogether
        assert len(server.requests) == 14


def test_the_request_is_what_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    options = {"max_tokens": None, "max_completion_tokens": 7, "seed": 1}
    with chatting(echo) as server:
        ask(f"{server.url}/", tmp_path, ["x"], key_env="JUDGE_KEY", options=options)
    assert server.keys == ["Bearer secret"]
    message = {"role": "user", "content": "x"}
    assert server.requests == [
        {"model": "m", "messages": [message], "temperature": 0.0, "max_completion_tokens": 7, "seed": 1}
    ]
    assert "secret" not in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize(
    "fault",
    [
        error(500, "oops"),
        error(503, "busy", Retry_After="0"),
        error(429, "slow down", Retry_After="0.01"),
        error(429, "slow down", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        Fault(body="<html>nonsense</html>"),
        Fault(body="[1, 2]"),
        Fault(body='{"choices": []}'),
        Fault(body='{"choices": [{"message": "text"}]}'),
        Fault(body="[" * 100_000),
        Fault(drops=True),
        Fault(stalls=True),
    ],
)
def test_what_passes_is_tried_again(fault: Fault, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> str | Fault:
        return fault if number < 2 else "fine"

    with chatting(answer) as server:
        replies = ask(server.url, tmp_path, ["x"], timeout_s=2.0 if fault.stalls else 20.0)
    assert [reply.text for reply in replies] == ["fine"]
    assert len(server.requests) == 3


def always(fault: Fault) -> Answer:
    return lambda body, number: fault


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (error(500, "oops"), "does not answer (status 500: oops, at each of 3 tries", 3),
        (Fault(body="<html>\x1b[2J"), "does not answer (no chat completion: <html>\\x1b[2J, at each", 3),
        (error(401, "wrong key"), "wants a key, and none is in NO_KEY (key_env names the variable): status 401", 1),
        (error(404, "no such model"), "does not serve model=m: status 404: no such model", 1),
        (Fault(307, headers={"Location": "/elsewhere"}), "does not serve model=m: status 307", 1),
        (error(429, "insufficient_quota"), "has no quota left for this key", 1),
        (error(429, "later", Retry_After="3600"), "wants a pause of 3600 s, and 60 are waited", 1),
        (Fault(stalls=True), "does not answer (no reply in 0.2 s, at each of 3 tries", 3),
    ],
)
def test_an_endpoint_that_is_down_ends_the_run(fault: Fault, message: str, requests: int, tmp_path: Path) -> None:
    timeout_s = 0.2 if fault.stalls else 20.0
    with (
        chatting(always(fault)) as server,
        pytest.raises(UserError, match=re.escape(message)) as raised,
    ):
        ask(server.url, tmp_path, QUESTIONS, concurrency=1, timeout_s=timeout_s, key_env="NO_KEY")
    assert str(raised.value).endswith(": none of 12 replies came")
    assert not (tmp_path / "log.jsonl").exists()
    assert fault.stalls or len(server.requests) == requests  # of those that stall, the last may come too late


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{messages: null}", "options has messages"),
        ("{model: other}", "options has model"),
        ("{since: 2024-01-01}", "cannot be sent as JSON"),
        ("{top_p: .nan}", "cannot be sent as JSON"),
    ],
)
def test_options_that_no_request_can_have_are_refused(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_of(EndpointConfig, {"url": "http://127.0.0.1:9", "model": "m", "options": options})


def test_a_refused_key_is_named_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-123")
    with (
        chatting(always(error(403, "no"))) as server,
        pytest.raises(UserError, match="refuses the key in JUDGE_KEY") as e,
    ):
        ask(server.url, tmp_path, ["x"], key_env="JUDGE_KEY")
    assert server.keys == ["Bearer sk-123"]
    assert "sk-123" not in str(e.value)


def test_a_key_that_no_header_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "“secret”")
    with pytest.raises(UserError, match="the key in JUDGE_KEY has letters that no key has"):
        ask("http://127.0.0.1:9", tmp_path, ["x"], key_env="JUDGE_KEY")


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="no connection"):
            ask(url, tmp_path, ["x"])
    with pytest.raises(UserError, match="must begin with http"):
        ask("localhost:80", tmp_path, ["x"])
    with pytest.raises(UserError, match=r"is not one|no connection"):
        ask("http://[::1", tmp_path, ["x"])


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """Killed in the middle of a line: the whole lines are kept, the others asked again."""
    with chatting(echo) as server:
        expected = ask(server.url, tmp_path, QUESTIONS)
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:5], b"not json\n", lines[6][:-20]]))
    assert ReplyLog(log).unreadable == 1
    with chatting(echo) as server:
        assert ask(server.url, tmp_path, QUESTIONS) == expected
        assert len(server.requests) == 7


def test_one_bad_question_does_not_stop_the_others(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> str | Fault:
        if "3" in last(body):
            return error(500, "poison")
        return error(400, "too long") if "4" in last(body) else "fine"

    message = re.escape("questions have failed (1 times: status 500: poison): 11 of 12")
    with chatting(answer) as server, pytest.raises(UserError, match=message):
        ask(server.url, tmp_path, QUESTIONS, concurrency=1)
    known = ReplyLog(tmp_path / "log.jsonl").known.values()
    assert sorted((reply.finish, reply.text) for reply in known)[0] == ("refused", "status 400: too long")
    with chatting(echo) as server:
        replies = ask(server.url, tmp_path, QUESTIONS)
    assert [last(body) for body in server.requests] == ["question 3"]
    assert replies[4].finish == "refused"  # it is not asked again and again


def test_the_budget_holds_over_runs(tmp_path: Path) -> None:
    """No question is begun that could pass it: each may take 13 of prompt and 20 of reply, and takes 30."""
    with chatting(always(completion("fine", tokens=30))) as server:
        with pytest.raises(UserError, match=r"tokens=100 is spent: 90 are in the log, 0 on their way, .* may take 33"):
            ask(server.url, tmp_path, QUESTIONS, max_tokens=20, tokens=100, concurrency=1)
        assert len(server.requests) == 3
        with pytest.raises(UserError, match="tokens=100 is spent"):
            ask(server.url, tmp_path, QUESTIONS, max_tokens=20, tokens=100)
        assert len(server.requests) == 3
        ask(server.url, tmp_path, QUESTIONS, max_tokens=20, tokens=393, concurrency=1)
    assert ReplyLog(tmp_path / "log.jsonl").tokens == 12 * 30


def test_tokens_are_estimated_where_nobody_counts(tmp_path: Path) -> None:
    with chatting(always(completion("x" * 300, tokens=None))) as server:
        (reply,) = ask(server.url, tmp_path, ["y" * 30])
    assert reply.tokens == 10 + 10 + 100 + 10


@pytest.mark.parametrize(
    ("found", "reply"),
    [
        (completion(None, "content_filter"), Reply("", "content_filter", 10)),
        (completion("half", "length"), Reply("half", "length", 10)),
        (completion("\ud800 half a pair"), Reply("? half a pair", "stop", 10)),
    ],
)
def test_odd_completions_are_kept_as_they_are(found: Fault, reply: Reply, tmp_path: Path) -> None:
    with chatting(always(found)) as server:
        assert ask(server.url, tmp_path, ["x"]) == [reply]
        ask(server.url, tmp_path, ["x"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"url": "http://x"}, "model"),
        ({"url": "http://x", "model": "m", "retries": "-1"}, "retries"),
        ({"url": "http://x", "model": "m", "timeout_s": "0"}, "timeout_s"),
        ({"url": "http://x", "model": "m", "options": "[1]"}, "options"),
        ({"url": "http://x", "model": "m", "temperature": "hot"}, "temperature"),
    ],
)
def test_wrong_settings_are_named(texts: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_of(EndpointConfig, texts)
