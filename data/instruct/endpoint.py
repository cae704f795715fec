"""Asks an OpenAI-compatible endpoint many questions at once, and stops in one sentence when that cannot go on.

What passes (no connection, no answer in time, status 429 or 5xx, a body that is not a chat completion) is tried again.
A question that the endpoint refuses (status 400, 413 or 422) has that as its reply. When a run's first question fails
at every try, or more in a row than are asked at once, the endpoint is down and nothing more is asked; otherwise the
others go on, and the run ends with a count of what failed. Every reply is in the log by then, so the same command asks
only for the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
from pydantic import Field

from data.instruct.reply_log import Reply, ReplyLog, request_key
from data.records import parse_json
from flamingo.configs.validate import AboveZero, AtLeast0, AtLeast1
from flamingo.errors import UserError, first_line
from flamingo.terminal import printable

Message = dict[str, str]
REFUSED = "refused"
_REFUSALS = (400, 413, 422)
_PASSING = (408, 409, 429)
LONGEST_PAUSE_S = 60.0


@dataclass(kw_only=True)
class EndpointConfig:
    """The settings of an endpoint, for the command lines that have one."""

    url: str
    """Where the endpoint begins, such as http://localhost:8000/v1."""
    model: str
    """The model's name there."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if it wants one."""
    max_tokens: AtLeast1 = 1024
    """Longest reply, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: always the likeliest token."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keys of the request; null takes a key out, for endpoints that refuse it."""
    tokens: AtLeast1 | None = None
    """Tokens that all replies in the log may have together, prompts included; null: no limit."""
    concurrency: AtLeast1 = 4
    """Questions asked at the same time."""
    retries: AtLeast0 = 5
    """Further tries of a question."""
    timeout_s: AboveZero = 120.0
    """Seconds that a reply may take."""
    pause_s: AboveZero = 0.5
    """Seconds before the second try, doubled before each further one."""

    def conflicts(self) -> Iterator[str]:
        """Yield a clause for each impossible combination of values."""
        for key in ("model", "messages"):
            if key in self.options:
                yield f"options has {key}, which is sent already: take it out"
        try:
            json.dumps(self.options, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            yield f"options cannot be sent as JSON ({error}): put dates and the like in quotes"


class Endpoint:
    """One endpoint and the log of its replies. `ask` returns the replies in the order of the questions."""

    def __init__(self, config: EndpointConfig, log: ReplyLog) -> None:
        if not config.url.startswith(("http://", "https://")):
            raise UserError(f"url={config.url} must begin with http:// or https://, as in http://localhost:8000/v1")
        self.config, self.log = config, log
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._stop: UserError | None = None
        self._failed: Counter[str] = Counter()
        self._answered = self._failed_in_a_row = 0
        self._in_flight = 0  # tokens that the questions on their way may need
        self._told = time.monotonic()

    def ask(self, questions: Sequence[Sequence[Message]]) -> list[Reply]:
        """Return the reply to each question, from the log where it is there.

        Raises:
            UserError: the endpoint is down, refuses the key or the model, the budget is spent, or questions failed.
        """
        bodies = [self._body(question) for question in questions]
        keys = [request_key(body) for body in bodies]
        todo = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self.log.known}
        if todo:
            try:
                asyncio.run(self._ask(deque(todo.items()), len(todo)))
            except KeyboardInterrupt:
                self._stop = UserError("stopped")
        left = sum(key not in self.log.known for key in todo)
        if left:
            reasons = "; ".join(f"{count} times: {why}" for why, count in self._failed.most_common())
            why = str(self._stop) if self._stop is not None else f"questions have failed ({reasons})"
            if left == len(todo):
                raise UserError(f"{why}: none of {len(todo)} replies came")
            raise UserError(
                f"{why}: {len(todo) - left} of {len(todo)} replies came and are kept in {self.log.path}, the same "
                "command asks only for the others"
            )
        return [self.log.known[key] for key in keys]

    def _body(self, question: Sequence[Message]) -> dict[str, Any]:
        settings = {"max_tokens": self.config.max_tokens, "temperature": self.config.temperature}
        body = {"model": self.config.model, "messages": list(question)} | settings | self.config.options
        return {key: value for key, value in body.items() if value is not None}

    async def _ask(self, todo: deque[tuple[str, dict[str, Any]]], total: int) -> None:
        key = os.environ.get(self.config.key_env, "").strip()
        if not key.isascii():
            raise UserError(f"the key in {self.config.key_env} has letters that no key has: set it again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.config.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=self.config.timeout_s, limits=limits) as client:

            async def work() -> None:
                while todo and self._stop is None:
                    key, body = todo.popleft()
                    need = _tokens_of(body["messages"]) + self.config.max_tokens
                    if self._over_budget(need):
                        return
                    self._in_flight += need
                    try:
                        reply = await self._reply(client, body)
                        if reply is not None:
                            self.log.append(key, body, reply)
                            self._answered += 1
                            self._failed_in_a_row = 0
                            self._tell(total)
                    except UserError as error:
                        self._stop = self._stop or error
                    finally:
                        self._in_flight -= need

            await asyncio.gather(*(work() for _ in range(self.config.concurrency)))

    def _over_budget(self, need: int) -> bool:
        """Say so, and stop, when a question could take more tokens than are left."""
        budget, spent = self.config.tokens, self.log.tokens
        if budget is None or spent + self._in_flight + need <= budget:
            return False
        self._stop = self._stop or UserError(
            f"tokens={budget} is spent: {spent} are in the log, {self._in_flight} on their way, and the next question "
            f"may take {need}; raise it to go on"
        )
        return True

    async def _reply(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply | None:
        """Return the reply to one question; None if it failed at every try. Raises UserError for what ends the run."""
        why = ""
        for attempt in range(self.config.retries + 1):
            if self._stop is not None:
                return None  # another question has found that the run cannot go on
            pause = self.config.pause_s * 2**attempt
            try:
                async with asyncio.timeout(self.config.timeout_s):  # of the whole: httpx's own is for each read
                    response = await client.post(self._url, json=body)
            except (TimeoutError, httpx.TimeoutException):
                why = f"no reply in {self.config.timeout_s:g} s"
            except httpx.InvalidURL as error:
                raise UserError(f"url={self.config.url} is not one ({first_line(error)})") from None
            except (httpx.HTTPError, OSError) as error:
                why = f"no connection ({first_line(error)})"
            else:
                status = response.status_code
                reply = _reply_of(response, body) if status in (200, *_REFUSALS) else None
                if reply is not None:
                    return reply
                why = (
                    f"status {status}{_message(response)}" if status != 200 else f"no chat completion{_head(response)}"
                )
                if status in (401, 403):
                    key = self.config.key_env
                    state = "refuses the key in" if os.environ.get(key, "").strip() else "wants a key, and none is in"
                    raise UserError(f"{self._url} {state} {key} (key_env names the variable): {why}")
                if status != 200 and status not in _PASSING and status < 500:
                    raise UserError(f"{self._url} does not serve model={self.config.model}: {why}")
                pause = self._pause(response, pause, why)
            if attempt < self.config.retries:
                await asyncio.sleep(min(pause, LONGEST_PAUSE_S))
        self._failed_in_a_row += 1
        if not self._answered or self._failed_in_a_row > self.config.concurrency:
            tries = self.config.retries + 1
            raise UserError(f"{self._url} does not answer ({why}, at each of {tries} tries of one question)")
        self._failed[why] += 1
        return None

    def _pause(self, response: httpx.Response, pause: float, why: str) -> float:
        """Return the seconds to wait. Raises UserError when the quota is used up or the endpoint wants a long pause."""
        if response.status_code == 429 and "insufficient_quota" in response.text:
            raise UserError(f"{self._url} has no quota left for this key: {why}")
        try:
            wanted = float(response.headers.get("retry-after", pause))
        except ValueError:  # a date
            return pause
        if wanted > LONGEST_PAUSE_S:
            raise UserError(f"{self._url} wants a pause of {wanted:g} s, and {LONGEST_PAUSE_S:g} are waited ({why})")
        return max(wanted, 0.0)

    def _tell(self, total: int) -> None:
        if time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            print(f"{self._answered} of {total} replies, {self.log.tokens} tokens", file=sys.stderr, flush=True)


def _tokens_of(messages: Sequence[Message]) -> int:
    """Return an estimate of a prompt's tokens that is rather high: a third of its bytes, and ten for each message."""
    return sum(len(message["content"].encode()) // 3 + 10 for message in messages)


def _reply_of(response: httpx.Response, body: Mapping[str, Any]) -> Reply | None:
    """Return the reply in a response; None if it is not a chat completion."""
    if response.status_code != 200:
        return Reply(f"status {response.status_code}{_message(response)}", REFUSED, 0)
    try:
        content = parse_json(response.content)
        choice = content["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        if not isinstance(text, str):
            return None
        usage = content.get("usage") or {}
        counted = usage.get("total_tokens")
        estimate = _tokens_of([*body["messages"], {"content": text}])
        tokens = counted if isinstance(counted, int) and counted > 0 else estimate
        return Reply(text, str(choice.get("finish_reason") or ""), tokens)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _message(response: httpx.Response) -> str:
    """Return the endpoint's own words about an error, shortened."""
    try:
        error = parse_json(response.content)["error"]
        return f": {printable(' '.join(str(error['message'] if isinstance(error, dict) else error).split()))[:200]}"
    except (ValueError, KeyError, TypeError):
        return _head(response)


def _head(response: httpx.Response) -> str:
    text = printable(" ".join(response.text.split()))[:80]
    return f": {text}" if text else ""
