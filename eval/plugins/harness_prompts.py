"""From the texts and images of another harness to our prompts, with demonstrations.

A harness gives a text and a list of images. Images replace the `<image>` tags of the text; those left over come first.
Demonstrations are drawn here (a pure function of task, seed and query, the leakage guard on), because the harnesses
draw theirs without images; each ends in the end-of-chunk token, as in training.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from eval.demonstrations.samplers import draw
from eval.inference.engine import Engine
from eval.inference.feature_cache import FeatureCache
from eval.inference.model import FlamingoResponder, context_length, load_responder
from eval.prompting.prompts import Completion, EncodedPrompt, Request, shared_start
from eval.task import EncodedImage, Example, Turn, hash_order
from flamingo.errors import UserError
from flamingo.processor import IMAGE_TOKEN
from flamingo.vision.transform import as_seen, read_source

MOST_SUPPORT = 2048
"""Examples of the harness's few-shot split that may be shown: as many as in the papers."""


@dataclass(frozen=True)
class HarnessPrompt:
    """A text with `<image>` tags (at most as many as images), and for a demonstration its answer."""

    text: str
    images: tuple[EncodedImage, ...]
    answer: str = ""


def image_of(value: Any, where: str = "an image of the harness") -> EncodedImage:
    """Return a harness's image: PIL, array, bytes, path, URL, `datasets`' {bytes, path}, or a list of frames (a clip).

    What is not a file yet becomes one as the model would see it (`flamingo.vision.transform.to_rgb`). `where` is what
    messages call it.
    """
    if isinstance(value, list | tuple):
        frames = [image_of(item, f"{where}, frame {index + 1}") for index, item in enumerate(value)]
        names = tuple(name for image in frames for name in image.names)
        return EncodedImage(tuple(data for image in frames for data in image.frames), names)
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        value, where = value.get("bytes") or value["path"], f"{where} ({value.get('path') or 'bytes'})"
    if isinstance(value, str):
        value = read_source(value, where)
    if isinstance(value, Path):
        where = f"{where} ({value})"
        try:
            value = value.read_bytes()
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror or error}") from None
    if isinstance(value, Image.Image | np.ndarray | torch.Tensor):
        buffer = io.BytesIO()
        as_seen(value, f"{where}{_file_of(value)}").save(buffer, format="PNG", compress_level=1)
        value = buffer.getvalue()
    if not isinstance(value, bytes):
        raise UserError(f"{where} is a {type(value).__name__}; it must be PIL, an array, bytes or a path")
    return EncodedImage((value,), (where,))


def _file_of(value: object) -> str:
    name = getattr(value, "filename", "")  # where Pillow opened a file
    return f" ({name})" if name else ""


def shown(text: str, images: Any, answer: str = "", where: str = "a prompt of the harness") -> HarnessPrompt:
    """Return a harness's text and images (None, one, or a list); `where` is what messages call it.

    Raises:
        UserError: there are more tags than images, or an image cannot be read.
    """
    listed = [] if images is None else images if isinstance(images, list | tuple) else [images]
    given = [image for image in listed if image is not None]
    encoded = tuple(image_of(image, f"image {number} of {where}") for number, image in enumerate(given, 1))
    tags = text.count(IMAGE_TOKEN)
    if tags > len(encoded):
        raise UserError(
            f"{where} has {tags} {IMAGE_TOKEN} tags and {len(encoded)} images: its own few-shot "
            "examples come without images; leave num_fewshot at 0 and give shots=N in model_args"
        )
    return HarnessPrompt(text, encoded, answer)


class HarnessPromptBuilder:
    """A builder of one model's prompts."""

    def __init__(self, responder: FlamingoResponder) -> None:
        self._builder = responder.builder
        self._encoder = responder.processor
        self._start = list(responder.start)
        self.context = context_length(responder.model)
        end = responder.processor.eos_token_id
        self.first_token = self._start[0] if self._start else responder.processor.eoc_token_id if end is None else end
        """Precedes a text of which every token is to be predicted."""

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._builder.encode(text))

    @staticmethod
    def bare(before: Sequence[int], own: Sequence[int]) -> EncodedPrompt:
        """Return a prompt of given ids that continue other ids, without images."""
        return EncodedPrompt(tuple(before), (), (tuple(own),), ((None, ""),), 0)

    def build(
        self, demos: Sequence[HarnessPrompt], query: HarnessPrompt, room: int, continuations: Sequence[str] = ()
    ) -> EncodedPrompt:
        """Return the prompt and, for `continuations`, their ids after what all of them share with the prompt's end.

        Where `room` more tokens would not fit, whole demonstrations are dropped from the far end.
        """
        head, last = self._query(query)
        whole = [self._builder.encode(f"{last}{text}") for text in continuations] or [self._builder.encode(last)]
        # A boundary inside a token: what all continuations share of it belongs to the prompt, at most the text itself.
        own = self._builder.encode(last)
        shared = shared_start([own, *whole])
        shared = min(shared, *(len(ids) - 1 for ids in whole)) if continuations else shared
        candidates = tuple(ids[shared:] for ids in whole) if continuations else ()
        asked = [*head, *own[:shared]]
        demo_ids = [self._demo(demo) for demo in demos]
        room = max([room, *map(len, candidates)])
        while self._too_long(demo_ids, asked, room):
            if not demo_ids:
                tokens = len(asked) + room
                raise UserError(f"a prompt of the harness has {tokens} tokens; the model's context is {self.context}")
            demo_ids.pop(0)
        kept = demos[len(demos) - len(demo_ids) :]
        images = tuple(image for prompt in [*kept, query] for image in prompt.images)
        ids = (*self._start, *(i for ids_of_demo in demo_ids for i in ids_of_demo), *asked)
        assert ids.count(self._encoder.image_token_id) == len(images)
        turns = tuple(((prompt.images or (None,))[0], f"{prompt.text}{prompt.answer}") for prompt in [*kept, query])
        return EncodedPrompt(tuple(ids), images, candidates, turns, len(kept))

    def _too_long(self, demo_ids: Sequence[Sequence[int]], asked: Sequence[int], room: int) -> bool:
        tokens = sum(map(len, demo_ids)) + len(asked) + len(self._start) + room
        return self.context is not None and tokens > self.context

    def _query(self, query: HarnessPrompt) -> tuple[list[int], str]:
        """Return (ids up to the last image, the text after it)."""
        texts = query.text.split(IMAGE_TOKEN)
        head = [self._encoder.image_token_id] * (len(query.images) - len(texts) + 1)
        for text in texts[:-1]:
            head += [*self._builder.encode(text), self._encoder.image_token_id]
        return head, texts[-1]

    def _demo(self, demo: HarnessPrompt) -> list[int]:
        head, last = self._query(demo)
        return [*head, *self._builder.encode(f"{last}{demo.answer}"), self._encoder.eoc_token_id]


class HarnessSupport:
    """The few-shot split of one task of a harness. `show` makes an example of the harness a demonstration."""

    def __init__(self, name: str, examples: Sequence[Any], show: Callable[[Any], HarnessPrompt], seed: int) -> None:
        order = hash_order([str(index) for index in range(len(examples))], "support", name)[:MOST_SUPPORT]
        self._name = name
        self._seed = seed
        self._shown = {str(index): show(examples[index]) for index in order}
        self._examples = [_example(key, prompt) for key, prompt in self._shown.items()]

    def demos(self, query: HarnessPrompt, query_id: str, shots: int) -> list[HarnessPrompt]:
        """Return `shots` of them, nearest last; nested over shots."""
        asked = _example(f"query {query_id}", query)
        demonstrations = draw(self._examples, asked, shots, task_hash=self._name, seed=self._seed)
        return [self._shown[example.id] for example in demonstrations.examples]


def _example(key: str, prompt: HarnessPrompt) -> Example:
    frames = tuple(frame for image in prompt.images for frame in image.frames)
    names = tuple(name for image in prompt.images for name in image.names)
    turn = Turn(EncodedImage(frames, names) if frames else None, prompt.text, "", prompt.answer)
    return Example(key, turn, (prompt.answer,))


def load(pretrained: str, device: str | None, dtype: str) -> FlamingoResponder:
    """Load the model of a folder, by default onto a GPU if there is one. Raises UserError for a folder without a model.

    lm_eval's own command line gives None where its `--device` is left out, or cuda:0 on a machine without one.
    """
    if not torch.cuda.is_available():
        device = "cpu" if device is None or device.startswith("cuda") else device
    return load_responder("pretrained", pretrained, device or "cuda", dtype)


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first of a task's stop strings."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def engine_of(responder: FlamingoResponder, asked: int | str, most: int | None) -> Engine:
    """Return the engine of a harness's arguments; a batch size such as `auto` is the largest one, by default 16."""
    return Engine(responder, FeatureCache(responder), int(asked) if str(asked).isdecimal() else most or 16)


def ask_texts(engine: Engine, asked: Sequence[Request], stops: Sequence[str | Sequence[str] | None]) -> list[str]:
    """Return the text generated for each request, up to the first of its stop strings."""
    texts = []
    for response, until in zip(engine.ask(asked), stops, strict=True):
        assert isinstance(response, Completion)
        texts.append(cut(response.text, [until] if isinstance(until, str) else until or ()))
    return texts


def demonstration(name: str, task: Any, doc: Any, visual: Any) -> HarnessPrompt:
    """Return an example of a harness's task `name` as a demonstration; `visual` are its images, as in `shown`."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    target = target[0] if isinstance(target, list) else target
    answer = f"{task.config.target_delimiter}{target}"
    return shown(task.doc_to_text(doc), visual, answer, f"a demonstration of task {name}")


def stop(error: object) -> NoReturn:
    """End a command by one sentence."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
