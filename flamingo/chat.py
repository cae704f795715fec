"""A conversation that goes on: `ChatSession` in a program, `python -m flamingo chat MODEL` in a terminal.

A turn runs what is new of it, behind the cache of the turns before: no image is encoded again and no earlier token
computed again. What the model said stays as it said it, token for token, whatever its text would be tokenised to.
"""

from __future__ import annotations

import mimetypes
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo.errors import UserError
from flamingo.inference.media_cache import cached_length
from flamingo.processing.conversation import parts_of, source_of
from flamingo.processor import FlamingoProcessor
from flamingo.terminal import printable

HELP = """Write a message, and the model answers. Lines that begin with a slash are commands:
  /image PATH   show an image or a clip with the next message; again for another one
  /new          begin a new conversation
  /help         this text
  /quit         leave (so does the end of the input)"""
COMMANDS = ("/image", "/new", "/help", "/quit")


class ChatSession:
    """One conversation with a model. `system`: what the system's message says; empty: there is none.

    Raises:
        UserError: the processor has no chat template, or one whose turns have no end.
    """

    def __init__(self, model: Any, processor: FlamingoProcessor, system: str = "") -> None:
        self.model, self.processor, self.turns = model, processor, processor.turns()
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        own = model.generation_config.eos_token_id
        self._ends = sorted({self.turns.end_id, *(own if isinstance(own, list) else [] if own is None else [own])})
        self._ids: Tensor | None = None  # of all turns, (1, T); the cache has not seen the last answer's last token
        self._cache: Any = None

    @torch.inference_mode()
    def say(self, text: str, media: Sequence[Any] = (), **options: Any) -> str:
        """Return the model's answer to a message: images and clips, then text. Both are part of the conversation then.

        `media`: images as the processor takes them, or parts `{"type": "video", ...}`; `options` are `generate`'s.

        Raises:
            UserError: nothing is said, a medium cannot be read, or there is no room left; the conversation stays.
        """
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name) or 1) > 1:
                raise UserError(f"a conversation goes on behind one answer, not behind several; leave {name} out")
        shown = [item if isinstance(item, dict) else {"type": "image", "image": item} for item in media]
        if not shown and not text.strip():
            raise UserError("the message is empty; write something or show an image")
        message = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
        inputs = self._inputs([*self.messages, message])
        begin = inputs["input_ids"].shape[1]
        seen = cached_length(self._cache)
        try:
            out = self.model.generate(
                **inputs,
                past_key_values=self._cache,
                return_dict_in_generate=True,
                **{"max_new_tokens": 256, "eos_token_id": self._ends, **options},
            )
        except BaseException:
            if (more := cached_length(self._cache) - seen) > 0:  # interrupted: the next message begins where this did
                self._cache.crop(-more)
            raise
        answer = self._closed(out.sequences[0, begin:].tolist())
        self._ids = torch.cat([inputs["input_ids"], inputs["input_ids"].new_tensor([answer])], dim=1)
        self._cache = out.past_key_values
        said = self.turns.said(answer)
        self.messages += [message, {"role": "assistant", "content": said}]
        return said

    def _inputs(self, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the ids of the whole conversation, and the images and clips of its last message."""
        text, turns = self.turns.turns(messages, "the conversation", add_generation_prompt=True)
        new = text[turns[-1][1] if turns else 0 :]  # the same whatever the answer before it was
        parts = messages[-1 if turns else 0 :]
        shown = [p for part in parts for p in parts_of(part["content"], "the message") if p["type"] != "text"]
        media = {kind: [source_of(part) for part in shown if part["type"] == kind] for kind in ("image", "video")}
        row = self.processor(
            text=[new],
            images=[media["image"]] if media["image"] else None,
            videos=[media["video"]] if media["video"] else None,
            add_special_tokens=self._ids is None,
        ).to(self.model.device)
        ids = row["input_ids"] if self._ids is None else torch.cat([self._ids, row["input_ids"]], dim=1)
        images = {key: row[key] for key in ("pixel_values", "image_counts", "frame_counts") if key in row}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
            images if shown or self._ids is None else {}
        )

    def _closed(self, answer: list[int]) -> list[int]:
        """Return an answer that ends as the template ends one, whatever stopped the model."""
        if answer and answer[-1] == self.turns.end_id:
            return answer
        return [*(answer[:-1] if answer and answer[-1] in self._ends else answer), *self.turns.closing_ids]


def converse(
    new_session: Callable[[], ChatSession], lines: Iterable[str], write: Callable[[str], None], **options: Any
) -> None:
    """Answer lines as `python -m flamingo chat` does, until they end; mistakes become one line on stderr."""
    session = new_session()
    media: list[dict[str, Any]] = []
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                session, media = new_session(), []
            elif command == "/help":
                write(HELP)
            elif command == "/image":
                media.append(medium_of(rest.strip()))
            elif command.startswith("/") and "/" not in command[1:]:
                raise UserError(f"{command} is not a command; there are {', '.join(COMMANDS)}")
            elif line.strip() or media:
                shown, media = media, []
                write(printable(session.say(line.strip(), shown, **options)) or "(it ended its turn without a word)")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("error: interrupted; the message was not sent", file=sys.stderr)


def medium_of(path: str) -> dict[str, Any]:
    """Return the part of a message for a file. Raises UserError when there is none."""
    if not path:
        raise UserError("/image needs the path of a file")
    try:
        file = Path(path).expanduser()
        found = file.is_file()
    except (OSError, RuntimeError):  # longer than a file's name can be; the home of nobody
        found = False
    if not found:
        raise UserError(f"{path[:200]} is not a file; give the path of an image or a video")
    kind = "video" if (mimetypes.guess_type(file.name)[0] or "").startswith("video/") else "image"
    return {"type": kind, kind: str(file)}


def terminal_lines() -> Iterable[str]:
    """Yield what is typed, behind a prompt where somebody sits in front of it."""
    prompt = "you> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
