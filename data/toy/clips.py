"""Clips: one shape that moves, told by its direction. A single frame shows the shape but never the motion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.toy.scenes import SIZE, Scene, draw_scene

MOTIONS = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
}
_TRAVEL = 9.0  # pixels from first to last frame


def draw_clip(rng: np.random.Generator, frames: int) -> tuple[tuple[Scene, ...], str]:
    """Return `frames` scenes of one moving shape, and the motion's words.

    The middle of the way is uniform in the image, so neither the first nor the last frame tells the direction.
    """
    still = draw_scene(rng, "one")
    shape = still.shapes[0]
    motion = tuple(MOTIONS)[int(rng.integers(len(MOTIONS)))]
    direction = np.array(MOTIONS[motion])
    margin = shape.radius + _TRAVEL / 2 + 0.5
    middle = rng.uniform(min(margin, SIZE / 2), max(SIZE - margin, SIZE / 2), size=2)
    spots = middle + np.linspace(-0.5, 0.5, frames)[:, None] * _TRAVEL * direction
    moved = (replace(shape, x=float(x), y=float(y)) for x, y in spots)
    return tuple(replace(still, shapes=(one,)) for one in moved), motion


def clip_caption(clip: tuple[Scene, ...], motion: str) -> str:
    """Return the one right caption of a clip."""
    return f"a {clip[0].shapes[0].words} {motion}"
