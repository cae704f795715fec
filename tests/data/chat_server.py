"""An OpenAI-compatible endpoint on loopback that answers as told, or fails, stalls, is over quota or talks nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What is sent instead of a reply."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    stalls: bool = False
    """Nothing is sent until the server ends."""
    drops: bool = False
    """The connection is closed without an answer."""


def error(status: int, message: str, **headers: str) -> Fault:
    """An error as such endpoints write it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(status, json.dumps({"error": {"message": message, "type": message}}), names)


def completion(text: str | None, finish: str = "stop", tokens: int | None = 10) -> Fault:
    """A reply whose other fields matter."""
    body: dict[str, Any] = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
    return Fault(body=json.dumps(body | ({} if tokens is None else {"usage": {"total_tokens": tokens}})))


@dataclass
class ChatServer:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies, in the order in which they came."""
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    """Most requests that were served at the same time."""


Answer = Callable[[dict[str, Any], int], str | Fault]
"""(body of the request, how many came before it) to the reply."""


@contextmanager
def chatting(answer: Answer) -> Iterator[ChatServer]:
    """Serve on a free port."""
    lock, end, state = threading.Lock(), threading.Event(), ChatServer("")
    running = [0]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.requests)
                state.requests.append(body)
                state.keys.append(self.headers.get("Authorization"))
                running[0] += 1
                state.at_once = max(state.at_once, running[0])
            try:
                found = answer(body, number)
                self.reply(completion(found) if isinstance(found, str) else found)
            finally:
                with lock:
                    running[0] -= 1

        def reply(self, found: Fault) -> None:
            if found.stalls:
                end.wait(60)
            if found.stalls or found.drops:
                self.close_connection = True
                return
            content = found.body.encode()
            self.send_response(found.status)
            for name, value in {**found.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        end.set()
        server.shutdown()
        thread.join()
        server.server_close()


def last(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return str(body["messages"][-1]["content"])
