"""Tiny worlds for the tests: shards of coloured squares, and models that answer by a known rule."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from data.shards.document import Document, Image, Node, Text
from data.shards.writer import ShardWriter
from eval.inference.protocol import Responder
from eval.prompting.prompts import Completion, EncodedPrompt, PromptBuilder
from eval.task import EncodedImage, Example, Turn
from tests.fixtures import png

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (120, 120, 120)}
NAMES = ["kibo", "lumo", "tavi", "zoda", "pera", "gusi"]
IMAGE, EOC = 1000, 1001


def colour_examples(count: int, kinds: int = 2, seed: int = 0) -> list[Example]:
    """Images named by their colour."""
    names = list(COLOURS)
    found = []
    for index in range(count):
        name = names[index % len(names)]
        turn = Turn(EncodedImage((png(COLOURS[name], seed + index),)), "what colour?", " ", name)
        found.append(Example(f"doc{index:03d}", turn, (name,), kind=f"kind{index % kinds}", label=name))
    return found


def write_scenes(folder: Path, count: int = 40) -> Path:
    """Pairs with a caption, and a question in their meta, as `python -m data prepare toy` writes them."""
    with ShardWriter(folder, "scenes", layout="pairs") as writer:
        for example in colour_examples(count):
            colour, image = example.golds[0], example.turn.image
            assert image is not None
            meta = {"kind": example.kind, "caption": f"a {colour} square"}
            meta |= {"question": "what colour?", "question_kind": "colour", "answer": colour}
            writer.write(Document("", [Image((0,)), Text(f"a {colour} square")], list(image.frames), meta))
    return folder


def write_pool(folder: Path, per_class: int = 6) -> Path:
    """Pages of one image with its class, and names to give, as the digits' held-out folder has them."""
    with ShardWriter(folder, "pool") as writer:
        for index in range(per_class * len(COLOURS)):
            colour = list(COLOURS)[index % len(COLOURS)]
            nodes: list[Node] = [Image((0,)), Text("a", loss=False), Text(f" {colour}")]
            names = [NAMES[index % len(NAMES)], NAMES[(index + 1) % len(NAMES)]]
            writer.write(Document("", [*nodes], [png(COLOURS[colour], 500 + index)], {"class": colour, "names": names}))
    return folder


class Letters:
    """A tokenizer of characters; a text that looks like a special token stays text."""

    image_token_id = IMAGE
    eoc_token_id = EOC

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class Looker(Responder):
    """A model that truly uses the images: it answers with the demonstration whose image is nearest the query's.

    Ranked candidates score the nearness of the nearest image shown with them; without images all are equal.
    """

    def __init__(self, context: int | None = None) -> None:
        self.builder = PromptBuilder(Letters(), context=context)
        self.encode_calls = 0

    def encode(self, images: Sequence[EncodedImage]) -> Tensor:
        self.encode_calls += len(images)
        means = [np.asarray(PILImage.open(io.BytesIO(p.frames[0]))).reshape(-1, 3).mean(0) for p in images]
        return torch.tensor(np.stack(means), dtype=torch.float32)[:, None]

    def _nearness(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[tuple[float, str]]]:
        found, start = [], 0
        for prompt in prompts:
            own = features[start : start + len(prompt.images), 0]
            start += len(prompt.images)
            texts = [text for image, text in prompt.turns[:-1] if image is not None]
            distances = (own[: len(texts)] - own[-1:]).norm(dim=1).tolist() if texts else []
            found.append([(-distance, text) for distance, text in zip(distances, texts, strict=True)])
        return found

    def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
        scores = []
        for prompt, near in zip(prompts, self._nearness(prompts, features), strict=True):
            words = ["".join(map(chr, ids[:-1])) for ids in prompt.candidates]
            scores.append([max((d for d, text in near if text.endswith(word)), default=-1e9) for word in words])
        return scores

    def generate(self, prompts: Sequence[EncodedPrompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        nearest = [max(near, default=(0.0, "?")) for near in self._nearness(prompts, features)]
        return [Completion(text.split()[-1], True) for _, text in nearest]


class Constant(Responder):
    """A model that always says the same, and ranks the first candidate highest."""

    def __init__(self, answer: str) -> None:
        self.builder = PromptBuilder(Letters())
        self._answer = answer

    def encode(self, images: Sequence[EncodedImage]) -> Tensor:
        return torch.zeros(len(images), 1, 1)

    def rank(self, prompts: Sequence[EncodedPrompt], features: Tensor) -> list[list[float]]:
        return [[-float(place) for place in range(len(prompt.candidates))] for prompt in prompts]

    def generate(self, prompts: Sequence[EncodedPrompt], features: Tensor, max_new_tokens: int) -> list[Completion]:
        return [Completion(self._answer, True) for _ in prompts]
