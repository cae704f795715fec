"""An append-only log of an endpoint's replies, so that nothing is asked, or paid for, twice.

One JSON object a line (`flamingo.files.LineLog`): the key of the request (a hash of all that is sent), its last message
and the reply. The request of a line that cannot be read is asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flamingo.errors import UserError
from flamingo.files import LineLog, whole_lines


@dataclass(frozen=True)
class Reply:
    """What came back. `finish` is the endpoint's reason for ending, or "refused" with the error's text in `text`.

    `tokens` of prompt and reply together, estimated where the endpoint does not count.
    """

    text: str
    finish: str
    tokens: int


def request_key(body: Mapping[str, Any]) -> str:
    """Return the hash of a request: equal for equal model, messages and options."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class ReplyLog:
    """The file of replies; `known` has them by key, `unreadable` counts lines that are none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Reply] = {}
        self.tokens = 0  # of all replies
        self.unreadable = 0
        self._lines = LineLog(path)
        try:
            for line in whole_lines(path):
                self._read(line)
        except OSError as error:
            raise UserError(f"the log of replies {path} cannot be read ({error}); give another folder") from None

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            reply = Reply(**entry["reply"])
            if not (isinstance(reply.text, str) and isinstance(reply.finish, str) and isinstance(reply.tokens, int)):
                raise TypeError
            self._keep(entry["key"], reply)
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1

    def _keep(self, key: str, reply: Reply) -> None:
        self.tokens += reply.tokens - (self.known[key].tokens if key in self.known else 0)
        self.known[key] = reply

    def append(self, key: str, body: Mapping[str, Any], reply: Reply) -> None:
        """Write a reply and hand it to the operating system, which keeps it if this process is killed."""
        question = body["messages"][-1]["content"]
        line = json.dumps({"key": key, "question": question, "reply": asdict(reply)}, ensure_ascii=False)
        try:
            self._lines.append([line])
        except OSError as error:
            raise UserError(
                f"the log of replies {self.path} cannot be written ({error}): free space and give the same command "
                "again, which goes on behind the last whole line"
            ) from None
        self._keep(key, reply)
