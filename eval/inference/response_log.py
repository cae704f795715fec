"""An append-only log of the model's responses, so that a killed run continues where it stopped.

One JSON object a line: the key of a request (a hash of the weights, the code, the prompt's tokens, its images and the
decoding) and the response. A request whose key is in the log is not asked again, whatever task, strategy or number of
shots it came from. A line counts once it ends in a newline; an incomplete last line is cut off, and the request of a
line that cannot be read is asked again. Each process appends to its own file and reads all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from eval.prompting.prompts import Completion, Response
from flamingo.errors import UserError

NAME = "responses"


class ResponseLog:
    """The log files `responses*.jsonl` of a folder; `rank` appends to its own."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.known: dict[str, Response] = {}
        self.unreadable = 0
        self._path = folder / (f"{NAME}.jsonl" if rank == 0 else f"{NAME}.{rank}.jsonl")
        self._begun = False
        try:
            for path in sorted(folder.glob(f"{NAME}*.jsonl")):
                self._read(path)
        except OSError as error:
            raise UserError(f"the log of responses in {folder} cannot be read: {error}; give another out=") from None

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        for line in content[: content.rfind(b"\n") + 1].splitlines():
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = decode(entry["response"])
            except (ValueError, KeyError, TypeError):
                self.unreadable += 1

    def append(self, responses: Iterable[tuple[str, Response]]) -> None:
        """Write responses and hand them to the operating system, which keeps them if this process is killed."""
        entries = list(responses)
        lines = [
            json.dumps({"key": key, "response": encode(response)}, ensure_ascii=False) for key, response in entries
        ]
        try:
            if not self._begun:
                self._begin()
            with self._path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise UserError(
                f"the log of responses {self._path} cannot be written ({error}): free space, or give another out=; "
                "started again, the evaluation goes on behind the last whole line"
            ) from None
        self.known.update(entries)

    def _begin(self) -> None:
        """Create the folder; cut off the incomplete line of an earlier process that was killed."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            content = self._path.read_bytes()
            if not content.endswith(b"\n"):
                with self._path.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)
        self._begun = True


def encode(response: Response) -> object:
    """Return a response as JSON: scores as a list, a completion as an object."""
    if isinstance(response, Completion):
        return {"text": response.text, "ended": response.ended, "log_prob": response.log_prob}
    return list(response)


def decode(content: object) -> Response:
    """Return the response that `encode` wrote. Raises TypeError or KeyError for anything else, NaN among it."""
    if isinstance(content, dict):
        completion = Completion(str(content["text"]), bool(content["ended"]), content["log_prob"])
        if completion.log_prob is None or completion.log_prob < math.inf:  # NaN is not
            return completion
    if isinstance(content, list) and content and all(value < math.inf for value in content):
        return [float(value) for value in content]
    raise TypeError(f"a {type(content).__name__} is not a response")
