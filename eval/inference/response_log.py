"""An append-only log of the model's responses, so that a killed run continues where it stopped.

One JSON object a line (`flamingo.files.LineLog`): the key of a request (a hash of the weights, the code, the prompt's
tokens, its images and the decoding) and the response. A request whose key is in the log is not asked again, whatever
task, strategy or number of shots it came from; that of a line that cannot be read is. Each process appends to its own
file and reads all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from eval.prompting.prompts import Completion, Response
from flamingo.errors import UserError
from flamingo.files import LineLog, whole_lines

NAME = "responses"


class ResponseLog:
    """The log files `responses*.jsonl` of a folder; `rank` appends to its own."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.known: dict[str, Response] = {}
        self.unreadable = 0
        self._lines = LineLog(folder / (f"{NAME}.jsonl" if rank == 0 else f"{NAME}.{rank}.jsonl"))
        try:
            for path in sorted(folder.glob(f"{NAME}*.jsonl")):
                self._read(path)
        except OSError as error:
            raise UserError(f"the log of responses in {folder} cannot be read: {error}; give another out=") from None

    def _read(self, path: Path) -> None:
        for line in whole_lines(path):
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
            self._lines.append(lines)
        except OSError as error:
            raise UserError(
                f"the log of responses {self._lines.path} cannot be written ({error}): free space, or give another "
                "out=; started again, the evaluation goes on behind the last whole line"
            ) from None
        self.known.update(entries)


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
