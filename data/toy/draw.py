"""Rasters: many tiny images at once, antialiased, with numpy alone.

Shapes are star-shaped regions: the boundary is a radius as a function of the angle, kept in a table, and a pixel's
cover is the clipped distance to that boundary along the ray. Glyphs are dense points along strokes: a pixel's cover
follows from the distance to the nearest point, found for all pixels by one matrix product. Both draw a whole batch
without a Python loop over pixels or images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from data.toy.glyphs import POINTS, Glyph
from data.toy.scenes import COLOURS, SHAPES, SIZE, Scene

_ANGLES = 256
_BATCH = 32  # images drawn at once: the work arrays (about 8 MB) stay near the cache
_RING_HOLE = 0.52


def _polygon(corners: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return the radius at each angle of a polygon around the origin, corners (K, 2) in order."""
    start, edge = corners, np.roll(corners, -1, axis=0) - corners
    ray = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # start + u * edge = r * ray, for every edge and ray; the boundary is the farthest crossing.
    determinant = edge[None, :, 1] * ray[:, None, 0] - edge[None, :, 0] * ray[:, None, 1]
    determinant = np.where(np.abs(determinant) < 1e-9, 1e-9, determinant)
    radius = (edge[None, :, 1] * start[None, :, 0] - edge[None, :, 0] * start[None, :, 1]) / determinant
    along = (ray[:, None, 1] * start[None, :, 0] - ray[:, None, 0] * start[None, :, 1]) / determinant
    hit = (radius > 0) & (along >= -1e-6) & (along <= 1 + 1e-6)
    return np.where(hit, radius, 0.0).max(axis=1)


@cache
def _boundaries() -> np.ndarray:
    """Return (shapes, angles) float32: the radius of every shape at every angle, in units of the shape's radius."""
    angles = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)

    def spikes(count: int, inner: float, outer: float) -> np.ndarray:
        turn = np.arange(2 * count) * np.pi / count - np.pi / 2
        radius = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
        return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)

    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.88
    triangle = np.array([[0, -1.15], [1.05, 0.75], [-1.05, 0.75]])
    arm = 0.34
    quarter = np.array([[arm, -1.05], [arm, -arm], [1.05, -arm], [1.05, arm]])
    cross = np.concatenate([quarter, [[arm, arm], [arm, 1.05]], -quarter, [[-arm, -arm], [-arm, -1.05]]])
    table = {
        "circle": np.ones(_ANGLES),
        "ring": np.ones(_ANGLES) * 1.05,
        "square": _polygon(square, angles),
        "triangle": _polygon(triangle, angles),
        "star": _polygon(spikes(5, 0.48, 1.2), angles),
        "cross": _polygon(cross, angles),
    }
    return np.stack([table[name] for name in SHAPES]).astype(np.float32)


def draw_scenes(scenes: Sequence[Scene]) -> np.ndarray:
    """Return (N, 32, 32, 3) uint8 images of N scenes."""
    parts = [_draw_scenes(scenes[i : i + _BATCH]) for i in range(0, len(scenes), _BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def _draw_scenes(scenes: Sequence[Scene]) -> np.ndarray:
    owner = np.array([i for i, scene in enumerate(scenes) for _ in scene.shapes])
    flat = [shape for scene in scenes for shape in scene.shapes]
    at = np.array([(s.x, s.y, s.radius, s.turn) for s in flat], np.float32)[:, :, None, None]
    kind = np.array([SHAPES.index(s.shape) for s in flat])
    paint = np.array([COLOURS[s.colour] for s in flat], np.float32)

    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    dx, dy = grid[None, None, :] - at[:, 0], grid[None, :, None] - at[:, 1]
    distance = np.sqrt(dx * dx + dy * dy)
    angle = (np.arctan2(dy, dx) - at[:, 3]) * np.float32(_ANGLES / (2 * np.pi))
    radius = _boundaries()[kind[:, None, None], np.rint(angle).astype(np.int32) % _ANGLES] * at[:, 2]
    cover = np.clip(radius - distance + 0.5, 0.0, 1.0)
    ring = kind == SHAPES.index("ring")
    cover[ring] *= np.clip(distance[ring] - _RING_HOLE * at[ring, 2] + 0.5, 0.0, 1.0)

    # The shapes of a scene never overlap, so their covers add up and the order of painting does not matter.
    ground = np.array([scene.ground for scene in scenes], np.float32)
    image = np.broadcast_to(ground[:, None, None, :], (len(scenes), SIZE, SIZE, 3)).copy()
    layer = cover[..., None] * (paint - ground[owner])[:, None, None, :]
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    image += np.add.reduceat(layer, starts, axis=0)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def draw_glyphs(glyphs: Sequence[Glyph]) -> np.ndarray:
    """Return (N, 32, 32, 3) uint8 images of N glyphs."""
    parts = [_draw_glyphs(glyphs[i : i + _BATCH]) for i in range(0, len(glyphs), _BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, SIZE, SIZE, 3), np.uint8)


@cache
def _pixels() -> np.ndarray:
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    y, x = np.meshgrid(grid, grid, indexing="ij")
    return np.stack([-2 * x.ravel(), -2 * y.ravel(), np.ones(SIZE * SIZE, np.float32)])


def _draw_glyphs(glyphs: Sequence[Glyph]) -> np.ndarray:
    points = np.stack([glyph.points for glyph in glyphs], axis=1).reshape(-1, 2)  # (POINTS * N, 2), pixels
    # |pixel - point|^2 without its |pixel|^2, which does not matter for the nearest point: one product for the batch.
    partial = np.concatenate([points, (points**2).sum(1, keepdims=True)], axis=1) @ _pixels()
    nearest = partial.reshape(POINTS, len(glyphs), SIZE * SIZE).min(axis=0)
    own = (_pixels()[:2] ** 2).sum(0) / 4
    distance = np.sqrt(np.maximum(nearest + own, 0.0)).reshape(-1, SIZE, SIZE, 1)
    width = np.array([glyph.width for glyph in glyphs], np.float32)
    ink = np.array([glyph.ink for glyph in glyphs], np.float32)
    ground = np.array([glyph.ground for glyph in glyphs], np.float32)
    cover = np.clip(width[:, None, None, None] - distance + 0.5, 0.0, 1.0)
    image = ground[:, None, None, :] + cover * (ink - ground)[:, None, None, :]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
