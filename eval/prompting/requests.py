"""What is asked of a model and what it says: plain values between strategies, engine, log and model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from eval.prompting.prompts import Prompt


@dataclass(frozen=True)
class Decoding:
    """How text is generated. Temperature 0 is greedy (or beam) search; above it `draw` numbers the samples.

    A sample is a pure function of the request and its `draw`: two draws are independent, the same one is the same text
    whatever shares its batch.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    draw: int = 0

    @property
    def greedy(self) -> bool:
        """Whether nothing but the number of tokens is set."""
        return self.num_beams == 1 and self.temperature == 0.0

    @property
    def kind(self) -> Decoding:
        """What requests of one batch share."""
        return replace(self, draw=0)


@dataclass(frozen=True)
class Completion:
    """Generated text, and whether the model ended it (False: it ran into the limit of new tokens).

    `log_prob` is the mean log-probability of its tokens, the one that ended it included; None where unknown.
    """

    text: str
    ended: bool
    log_prob: float | None = None


Response = Completion | list[float]
"""A completion, or the log-probability of each candidate."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue, or, without a decoding, one whose candidates are ranked."""

    prompt: Prompt
    decoding: Decoding | None = None

    def key(self, model: str) -> str:
        """Hash of everything the response depends on; `model` stands for weights, code, precision and device."""
        material = [
            model,
            self.prompt.ids,
            self.prompt.candidates if self.decoding is None else None,
            [image.sha256 for image in self.prompt.images],
            None if self.decoding is None else asdict(self.decoding),
        ]
        return hashlib.sha256(json.dumps(material).encode()).hexdigest()
