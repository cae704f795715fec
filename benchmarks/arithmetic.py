"""How many operations the mathematics needs, counted by hand: two for each multiply-add of a matrix product.

Every image once, every token of the prompt once whatever the number of beams, causal attention without its upper
half, logits only where they are read. Norms, activations and the optimizer are left out, as FlopCounterMode leaves
them out.
"""

from __future__ import annotations

from benchmarks.sizes import Size
from benchmarks.work import IGNORED, SHOT_TOKENS, Row, class_names, training_steps
from flamingo.inference.scoring import Trie


def encoder(size: Size) -> int:
    """The encoder at one image: patches, then layers of 12 width^2 weights over patches and class token."""
    w, tokens = size.vision_width, size.patches + 1
    return 2 * size.patches * w * 3 * size.patch**2 + size.vision_layers * (24 * w**2 * tokens + 4 * tokens**2 * w)


def resampler(size: Size) -> int:
    """The resampler at one image: latents attend to patches and latents."""
    w, latents, keys = size.vision_width, size.latents, size.patches + size.latents
    attention = 4 * latents * w * size.inner + 4 * keys * w * size.inner + 4 * latents * keys * size.inner
    return size.depth * (attention + 4 * latents * w * size.ff_mult * w)


def keys_values(size: Size) -> int:
    """One image's keys and values in all blocks."""
    return size.lm_layers * 4 * size.latents * size.vision_width * size.inner


def blocks(size: Size, tokens: int) -> int:
    """All gated blocks at some tokens, each of which sees one image."""
    w = size.lm_width
    return size.lm_layers * tokens * (4 * w * size.inner + 4 * size.latents * size.inner + 4 * w * size.ff_mult * w)


def language(size: Size, tokens: int, before: int = 0) -> int:
    """All decoder layers at some tokens behind `before` others."""
    context = tokens * before + tokens * (tokens + 1) // 2
    return size.lm_layers * (24 * size.lm_width**2 * tokens + 4 * size.lm_width * context)


def head(size: Size, positions: int) -> int:
    """Logits at some positions."""
    return 2 * size.lm_width * (size.vocab + 2) * positions


def seeing(size: Size, images: int) -> int:
    """All that is done with images before the text."""
    return images * (encoder(size) + resampler(size) + keys_values(size))


def decode_step(size: Size, shots: int) -> int:
    """One new token; on the average of the timed steps it stands behind the prompt and half of them."""
    before = (shots + 1) * SHOT_TOKENS + (size.new_tokens - 1) // 2
    return language(size, 1, before) + blocks(size, 1) + head(size, 1)


def first_token(size: Size, shots: int) -> int:
    """Images and prompt once; the number of beams does not matter."""
    tokens = (shots + 1) * SHOT_TOKENS
    return seeing(size, shots + 1) + language(size, tokens) + blocks(size, tokens) + head(size, 1)


def ranking(size: Size, shots: int) -> int:
    """The prompt, and every beginning of a name that others continue."""
    trie, tokens = Trie.of(class_names(size)), (shots + 1) * SHOT_TOKENS
    nodes = len(trie.inner)
    own = sum(trie.depths[node] + 1 for node in trie.inner)
    attention = 4 * size.lm_width * (nodes * tokens + own) * size.lm_layers
    layers = size.lm_layers * 24 * size.lm_width**2 * nodes
    return first_token(size, shots) + layers + attention + blocks(size, nodes) + head(size, nodes)


def update(size: Size, rows: list[Row]) -> int:
    """A training step on these rows: forward once; backward once through frozen weights, twice through trained ones."""
    tokens = len(rows[0].ids)
    images = sum(len(row.images) for row in rows)
    labelled = sum(int((row.labels[1:] != IGNORED).sum()) for row in rows)
    total = images * (encoder(size) + 3 * (resampler(size) + keys_values(size)))
    total += 2 * (len(rows) * language(size, tokens) + head(size, labelled))
    return total + 3 * blocks(size, len(rows) * tokens)


def train_step(size: Size) -> int:
    """The mean of the timed steps."""
    steps = training_steps(size)[1:]
    return sum(update(size, rows) for rows in steps) // len(steps)


def forward(size: Size, images: int, tokens: int) -> int:
    """A document with logits of all positions."""
    return seeing(size, images) + language(size, tokens) + blocks(size, tokens) + head(size, tokens)
