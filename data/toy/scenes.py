"""Scenes of one to four coloured shapes; caption, questions and answers are read off the scene, never stored beside it.

Three kinds, each with exactly one right caption: one shape at one of five places; two to four equal shapes; two
different shapes side by side or one above the other (the left or the upper one is named first).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 32  # pixels, height and width of every toy image

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (50, 190, 60),
    "blue": (60, 90, 235),
    "yellow": (240, 215, 50),
    "pink": (240, 120, 205),
    "white": (240, 240, 240),
}
KINDS = ("one", "count", "left", "above")
COUNTS = ("zero", "one", "two", "three", "four")
PLACES = {
    "at the top left": (9.5, 9.5),
    "at the top right": (22.5, 9.5),
    "in the centre": (16.0, 16.0),
    "at the bottom left": (9.5, 22.5),
    "at the bottom right": (22.5, 22.5),
}
# Radii in pixels by number of shapes: (small, big). A small star must differ from a small cross
# in 32 pixels, and a small shape of one kind of scene from a big one of another.
_RADII = {1: (4.6, 7.8), 2: (4.4, 6.8), 3: (4.4, 6.8), 4: (4.4, 6.8)}


@dataclass(frozen=True, slots=True)
class Shape:
    """One drawn shape: its words, and where it lies (pixels, radians)."""

    shape: str
    colour: str
    big: bool
    x: float
    y: float
    radius: float
    turn: float

    @property
    def size(self) -> str:
        """Its size in words."""
        return "big" if self.big else "small"

    @property
    def plural(self) -> str:
        """The word for several of it."""
        return PLURALS[self.shape]

    @property
    def words(self) -> str:
        """Size, colour and shape, as captions say them."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes on a dark ground. `kind` is one, count, left or above; `place` is set for kind one only."""

    kind: str
    shapes: tuple[Shape, ...]
    ground: tuple[int, int, int]
    place: str = ""


def _words(rng: np.random.Generator) -> tuple[str, str, bool]:
    shape, colour, big = rng.integers((len(SHAPES), len(COLOURS), 2))
    return SHAPES[shape], tuple(COLOURS)[colour], bool(big)


def _shape(rng: np.random.Generator, words: tuple[str, str, bool], x: float, y: float, total: int) -> Shape:
    shape, colour, big = words
    dx, dy, swell, turn = rng.uniform(-1.0, 1.0, size=4)
    radius = _RADII[total][big] * (1.0 + 0.07 * swell)
    return Shape(shape, colour, big, float(x + 0.8 * dx), float(y + 0.8 * dy), float(radius), float(0.25 * turn))


def draw_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """Return a random scene of `kind` (one, count, left, above), or of a random kind."""
    kind = kind or KINDS[int(rng.integers(len(KINDS)))]
    red, green, blue = rng.integers(0, 56, size=3).tolist()
    ground = (red, green, blue)
    words = _words(rng)
    if kind == "one":
        place = tuple(PLACES)[int(rng.integers(len(PLACES)))]
        return Scene(kind, (_shape(rng, words, *PLACES[place], 1),), ground, place)
    if kind == "count":
        count = int(rng.integers(2, 5))
        cells = rng.permutation(4)[:count]
        spots = [(8.5 + 15 * (cell % 2), 8.5 + 15 * (cell // 2)) for cell in cells]
        return Scene(kind, tuple(_shape(rng, words, x, y, count) for x, y in spots), ground)
    if kind not in KINDS:
        raise ValueError(f"a scene's kind is one, count, left or above, not {kind!r}")
    other = _words(rng)
    while other[:2] == words[:2]:  # two equal shapes would be a count
        other = _words(rng)
    spots = []
    for along in (8.5, 23.5):
        across = float(rng.uniform(14, 18))
        spots.append((along, across) if kind == "left" else (across, along))
    first, second = (_shape(rng, w, x, y, 2) for w, (x, y) in zip((words, other), spots, strict=True))
    return Scene(kind, (first, second), ground)


def caption(scene: Scene, *, shapes_only: bool = False) -> str:
    """Return the one right caption; `shapes_only` leaves out sizes and colours, so that only shapes differ."""
    first, last = scene.shapes[0], scene.shapes[-1]
    if scene.kind == "count":
        what = first.plural if shapes_only else f"{first.size} {first.colour} {first.plural}"
        return f"{COUNTS[len(scene.shapes)]} {what}"
    one, other = (shape.shape if shapes_only else shape.words for shape in (first, last))
    if scene.kind == "one":
        return f"a {one} {scene.place}"
    return f"a {one} {'left of' if scene.kind == 'left' else 'above'} a {other}"


def questions(scene: Scene) -> dict[str, tuple[str, str]]:
    """Return (question, answer) by kind of question; only questions with a single answer for this scene."""
    first, last = scene.shapes[0], scene.shapes[-1]
    if scene.kind == "count":
        plural = first.plural
        return {
            "colour": (f"what colour are the {plural}?", first.colour),
            "shape": ("what shape are they?", first.shape),
            "count": (f"how many {plural} are there?", COUNTS[len(scene.shapes)]),
            "size": (f"are the {plural} big or small?", first.size),
        }
    asked = {}
    if scene.kind == "one":
        asked["position"] = (f"where is the {first.shape}?", scene.place)
        asked["count"] = (f"how many {first.plural} are there?", "one")
        asked["shape"] = ("what shape is it?", first.shape)
    if scene.kind == "one" or first.shape != last.shape:
        asked["colour"] = (f"what colour is the {first.shape}?", first.colour)
        asked["size"] = (f"is the {last.shape} big or small?", last.size)
    if scene.kind != "one" and first.shape != last.shape:
        relation = "left of" if scene.kind == "left" else "above"
        asked["relation"] = (f"what is {relation} the {last.shape}?", first.shape)
    if scene.kind != "one" and first.colour != last.colour:
        asked["shape"] = (f"what shape is {last.colour}?", last.shape)
    return asked


def yes_no(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question that is answered with yes or no, half the time each."""
    shown = {(s.shape, s.colour) for s in scene.shapes}
    shape, colour = scene.shapes[int(rng.integers(len(scene.shapes)))].shape, scene.shapes[0].colour
    answer = bool(rng.integers(2))
    if answer:
        shape, colour = sorted(shown)[int(rng.integers(len(shown)))]
    while not answer and (shape, colour) in shown:
        # Change one word of what is shown: a random pair would mostly be refuted by either word alone.
        shape, colour = sorted(shown)[int(rng.integers(len(shown)))]
        if rng.integers(2):
            shape = SHAPES[int(rng.integers(len(SHAPES)))]
        else:
            colour = tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
    return f"is there a {colour} {shape}?", "yes" if answer else "no"


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """Return a random question about the scene: (kind, question, answer)."""
    asked = questions(scene)
    kinds = (*asked, "yes/no")
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "yes/no":
        return (kind, *yes_no(scene, rng))
    return (kind, *asked[kind])
