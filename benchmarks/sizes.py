"""Sizes of the models and of their work, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """One model and its work. Widths are those of the transformers' residual streams."""

    vision_width: int
    vision_layers: int
    patch: int
    image_size: int
    lm_width: int
    lm_layers: int
    lm_heads: int
    vocab: int
    latents: int
    depth: int
    """Layers of the resampler."""
    shots: int
    rank_shots: int
    names: int
    new_tokens: int
    """Decode steps that are timed."""
    batch: int
    tokens: int
    """Tokens of a training row."""
    counts: tuple[tuple[int, ...], ...]
    """Images of the training rows, step by step; the first step warms up and is not timed."""
    cost_images: tuple[int, ...]
    cost_tokens: tuple[int, ...]
    eval_queries: int
    eval_support: int
    eval_shots: int
    """Demonstrations of the whole evaluation."""
    eval_ranked: int
    """Queries of the whole evaluation whose answer is a class name."""
    heads: int = 8
    head_dim: int = 64
    """Of resampler and gated blocks; open_flamingo has no other value."""
    ff_mult: int = 4

    @property
    def patches(self) -> int:
        """Return the number of patch tokens of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def inner(self) -> int:
        """Return the width of queries, keys and values."""
        return self.heads * self.head_dim


# Rows of 1 to 5 images, 2.5 on average, after a warm-up step.
COUNTS = ((2, 3), (1, 4), (5, 1), (2, 3), (3, 1), (2, 3))

# ViT-B/32 at 224 px; an OPT of 12 layers x 768.
SMALL = Size(
    vision_width=768,
    vision_layers=12,
    patch=32,
    image_size=224,
    lm_width=768,
    lm_layers=12,
    lm_heads=12,
    vocab=50272,
    latents=64,
    depth=6,
    shots=32,
    rank_shots=4,
    names=100,
    new_tokens=8,
    batch=2,
    tokens=256,
    counts=COUNTS,
    cost_images=(1, 5, 32),
    cost_tokens=(256, 1024, 2048),
    eval_queries=64,
    eval_support=64,
    eval_shots=8,
    eval_ranked=4,
)

SIZES = {
    "small": SMALL,
    # ViT-L/14 at 224 px and 24 layers x 2048, as OpenFlamingo-3B; for a GPU.
    "3b": replace(
        SMALL,
        vision_width=1024,
        vision_layers=24,
        patch=14,
        lm_width=2048,
        lm_layers=24,
        lm_heads=16,
        vocab=50432,
        new_tokens=16,
        batch=16,
        counts=tuple(count * 8 for count in COUNTS),
    ),
    # To see that everything runs, in seconds.
    "tiny": Size(
        vision_width=64,
        vision_layers=2,
        patch=16,
        image_size=32,
        lm_width=64,
        lm_layers=2,
        lm_heads=2,
        vocab=512,
        latents=64,
        depth=6,
        shots=4,
        rank_shots=2,
        names=12,
        new_tokens=3,
        batch=2,
        tokens=48,
        counts=COUNTS[:3],
        cost_images=(1, 5),
        cost_tokens=(64, 128),
        eval_queries=12,
        eval_support=6,
        eval_shots=4,
        eval_ranked=3,
    ),
}
