"""Made-up characters: a class is two or three random strokes, an instance is one hand's rendering of them.

A thousand classes are for training and others are never trained on; which strokes a class has depends on its number
alone, not on the data's seed. Instances differ by stroke wobble, an affine distortion, pen width and colours, so that
only the strokes tell the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.toy.streams import stream

POINTS = 64  # along all strokes of a glyph; strokes of 30 to 60 pixels, so less than a pixel apart
TRAIN_CLASSES = range(0, 1000)
HELDOUT_CLASSES = range(1_000_000, 1_000_200)

_CENTRE = 16.0
_HALF = 10.5  # half the glyph's extent in pixels before distortion


@dataclass(frozen=True, slots=True)
class Glyph:
    """One drawn character: the pen's path and its colours."""

    number: int  # the class
    points: np.ndarray  # (POINTS, 2) float32, x and y in pixels
    width: float  # half the stroke's width, pixels
    ink: tuple[float, float, float]
    ground: tuple[float, float, float]


def classes(split: str) -> range:
    """Return the glyph classes of "train" or "heldout"."""
    return TRAIN_CLASSES if split == "train" else HELDOUT_CLASSES


@lru_cache(maxsize=4096)
def strokes(number: int) -> np.ndarray:
    """Return (S, 4, 2): the control points of the class's S cubic strokes, scaled to the square [-1, 1].

    A stroke starts at a random place, half the time where an earlier one ended or began; straight, bowed or curled.
    """
    rng = stream(0, "glyph class", number)
    curves: list[np.ndarray] = []
    for _ in range(int(rng.integers(2, 4))):
        start = rng.uniform(-1, 1, size=2)
        if curves and rng.random() < 0.5:
            start = curves[int(rng.integers(len(curves)))][3 * int(rng.integers(2))]
        end = rng.uniform(-1, 1, size=2)
        while np.hypot(*(end - start)) < 0.8:
            end = rng.uniform(-1, 1, size=2)
        bend = rng.choice([0.0, 0.6, 1.3])
        inner = start + (end - start) * np.array([[1 / 3], [2 / 3]]) + bend * rng.normal(size=(2, 2))
        curves.append(np.stack([start, *inner, end]))
    path = np.stack(curves)
    low, high = path.min(axis=(0, 1)), path.max(axis=(0, 1))
    half = (high - low) / 2
    # The longer side fills the square; the shorter one is stretched, at most twice, so that few classes are slivers.
    return (path - (low + high) / 2) / np.maximum(half, half.max() / 2)


@lru_cache(maxsize=8)
def _basis(count: int) -> np.ndarray:
    """Return (POINTS, count, 4): the Bernstein weights of points spread evenly over `count` strokes."""
    weights = np.zeros((POINTS, count, 4), np.float32)
    owner = np.arange(POINTS) * count // POINTS
    for s in range(count):
        rows = np.flatnonzero(owner == s)
        t = np.linspace(0, 1, len(rows))
        weights[rows, s] = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    return weights


def draw_glyph(rng: np.random.Generator, number: int) -> Glyph:
    """Return a random instance of class `number`."""
    path = strokes(number)
    wobble = path + 0.06 * rng.normal(size=path.shape)
    points = np.einsum("psk,skc->pc", _basis(len(path)), wobble)
    u = rng.uniform(-1, 1, size=6)
    turn, shear = 0.22 * u[0], 0.18 * u[1]
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    matrix *= (_HALF * (1 + 0.12 * u[2:4]))[:, None]
    points = points @ matrix.T + _CENTRE + 1.5 * u[4:6]
    colours = rng.uniform(size=6)
    ink, ground = 140 + 115 * colours[:3], 70 * colours[3:]
    return Glyph(number, points.astype(np.float32), float(rng.uniform(0.75, 1.9)), tuple(ink), tuple(ground))
