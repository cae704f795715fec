"""A web server on loopback that drops connections, answers with errors or is slow, as told; it counts what it gave."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Behaviour:
    """What goes wrong, by the number of the request for a path (from 0)."""

    drop_after: int | None = None
    """Bytes of an answer after which the connection is closed, in the first `faults` requests."""
    status: int | None = None
    """Answer with this instead, in the first `faults` requests."""
    faults: int = 0
    seconds: float = 0.0
    """How long every answer takes to begin."""
    ranges: bool = True
    """Whether a part of a file can be asked for."""
    suffix: str | tuple[str, ...] = ".tar"
    """Faults are for these paths only."""
    body: bytes | None = None
    """Answer with this instead, as if all were well, in the first `faults` requests."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with `status`."""
    drip: float = 0.0
    """Seconds between two bytes of an answer, in the first `faults` requests."""


@dataclass
class Server:
    url: str
    behaviour: Behaviour
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)


@contextmanager
def serving(folder: Path, behaviour: Behaviour | None = None) -> Iterator[Server]:
    """The files of a folder, over http on a free port."""
    state = Server("", behaviour or Behaviour())

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            faulty = self.path.endswith(state.behaviour.suffix) and state.requests[self.path] < state.behaviour.faults
            state.requests[self.path] += 1
            time.sleep(state.behaviour.seconds)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            if faulty and state.behaviour.status is not None:
                self.send_response(state.behaviour.status)
                for name, value in {**state.behaviour.headers, "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            body, start = path.read_bytes(), 0
            if faulty and state.behaviour.body is not None:
                body = state.behaviour.body
            if state.behaviour.ranges and (asked := self.headers.get("Range")):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(body):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if faulty and state.behaviour.drop_after is not None:
                body = body[: start + state.behaviour.drop_after]
            state.sent[self.path] += len(body) - start  # before the bytes: who has the last of them may look at once
            if faulty and state.behaviour.drip:
                for at in range(start, len(body)):
                    self.wfile.write(body[at : at + 1])
                    time.sleep(state.behaviour.drip)
            else:
                self.wfile.write(body[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
