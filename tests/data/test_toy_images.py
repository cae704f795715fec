"""Toy images: what is drawn is what the words say, and every image can be made again alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.toy.clips import MOTIONS, clip_caption, draw_clip
from data.toy.draw import draw_glyphs, draw_scenes
from data.toy.glyphs import HELDOUT_CLASSES, TRAIN_CLASSES, draw_glyph, strokes
from data.toy.png import encode_png
from data.toy.scenes import COLOURS, SIZE, Scene, ask, caption, draw_scene, questions, yes_no
from data.toy.streams import stream


def _scenes(count: int, kind: str | None = None) -> list[Scene]:
    return [draw_scene(stream(3, "test", i), kind) for i in range(count)]


def test_streams_are_equal_for_equal_arguments_and_differ_in_every_one() -> None:
    first = stream(1, "a", 5).random(4)
    assert np.array_equal(first, stream(1, "a", 5).random(4))
    for other in (stream(2, "a", 5), stream(1, "b", 5), stream(1, "a", 6)):
        assert not np.array_equal(first, other.random(4))


def test_png_is_what_pillow_reads_back() -> None:
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    with Image.open(io.BytesIO(encode_png(image))) as read:
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), image)
    with pytest.raises(ValueError, match="uint8"):
        encode_png(np.zeros((4, 4), np.uint8))


def test_a_image_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    scenes = _scenes(40)
    assert np.array_equal(draw_scenes(scenes)[7], draw_scenes(scenes[7:8])[0])
    glyphs = [draw_glyph(stream(3, "glyph", i), i) for i in range(40)]
    # The distances come from a matrix product, whose rounding may depend on the batch: one grey level at most.
    alone, together = draw_glyphs(glyphs[7:8])[0].astype(int), draw_glyphs(glyphs)[7].astype(int)
    assert np.abs(alone - together).max() <= 1


def test_no_two_images_are_alike() -> None:
    drawn = draw_scenes(_scenes(500))
    assert len({image.tobytes() for image in drawn}) == 500


@pytest.mark.parametrize("kind", ["one", "count", "left", "above"])
def test_every_shape_shows_its_colour_where_the_scene_says(kind: str) -> None:
    scenes = _scenes(60, kind)
    for scene, image in zip(scenes, draw_scenes(scenes), strict=True):
        for shape in scene.shapes:
            # The hole of a ring lies at its centre: look at the middle of its band.
            reach = 0.77 * shape.radius if shape.shape == "ring" else 0.0
            seen = image[int(shape.y), int(shape.x + reach)].astype(int)
            assert np.abs(seen - COLOURS[shape.colour]).max() < 60, (caption(scene), shape)


def test_shapes_lie_inside_the_image_and_do_not_touch() -> None:
    for scene in _scenes(400):
        for i, a in enumerate(scene.shapes):
            assert a.x - 0.8 * a.radius >= 0
            assert a.x + 0.8 * a.radius <= SIZE
            for b in scene.shapes[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > 0.9 * (a.radius + b.radius)


def test_relations_in_the_caption_hold_in_the_image() -> None:
    for kind, axis in (("left", "x"), ("above", "y")):
        for scene in _scenes(50, kind):
            first, second = scene.shapes
            assert getattr(first, axis) + 4 < getattr(second, axis)
            assert first.words in caption(scene).split(" left of ")[0].split(" above ")[0]


def test_counts_and_plurals() -> None:
    captions = {caption(scene) for scene in _scenes(400, "count")}
    assert all(c.split()[0] in ("two", "three", "four") for c in captions)
    assert any(c.endswith("crosses") for c in captions)
    assert not any("crosss" in c for c in captions)


def test_answers_follow_from_the_scene() -> None:
    for scene in _scenes(300):
        first, last = scene.shapes[0], scene.shapes[-1]
        found = questions(scene)
        assert len(found) >= (4 if scene.kind in ("one", "count") else 1)
        for kind, (question, answer) in found.items():
            assert question.endswith("?")
            if kind == "size":
                asked = first if scene.kind in ("one", "count") else last
                assert answer == asked.size
            if kind == "relation":
                assert (answer, last.shape in question) == (first.shape, True)


def test_yes_and_no_are_true_and_about_equally_frequent() -> None:
    answers = []
    for i, scene in enumerate(_scenes(300)):
        question, answer = yes_no(scene, stream(4, "yes", i))
        colour, shape = question.removeprefix("is there a ").removesuffix("?").split()
        assert (answer == "yes") == any((s.colour, s.shape) == (colour, shape) for s in scene.shapes)
        answers.append(answer)
    assert 100 < answers.count("yes") < 200


def test_ask_reaches_every_kind_of_question() -> None:
    kinds = {ask(scene, stream(5, "ask", i))[0] for i, scene in enumerate(_scenes(300))}
    assert kinds == {"colour", "shape", "count", "size", "position", "relation", "yes/no"}


def test_unknown_scene_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'heap'"):
        draw_scene(stream(0, "x", 0), "heap")


def test_glyph_classes_are_fixed_and_split() -> None:
    assert not set(TRAIN_CLASSES) & set(HELDOUT_CLASSES)
    assert np.array_equal(strokes(17), strokes.__wrapped__(17))
    for number in (*TRAIN_CLASSES[:50], *HELDOUT_CLASSES[:50]):
        assert np.abs(strokes(number)).max() == pytest.approx(1.0)


def test_two_instances_of_a_class_are_nearer_than_two_classes() -> None:
    def ink(number: int, i: int) -> np.ndarray:
        glyph = draw_glyph(stream(6, "ink", i), number)
        grey = draw_glyphs([glyph])[0].astype(float).mean(axis=2)
        return np.asarray((grey - grey.mean()) / grey.std())

    images = {n: [ink(n, 10 * n + i) for i in range(4)] for n in range(30)}
    same = np.mean([(images[n][0] * images[n][1]).mean() for n in images])
    other = np.mean([(images[n][0] * images[(n + 1) % 30][1]).mean() for n in images])
    assert same > other + 0.1


def test_clips_move_as_their_caption_says() -> None:
    for i in range(40):
        clip, motion = draw_clip(stream(7, "clip", i), 5)
        assert len(clip) == 5
        assert clip_caption(clip, motion).endswith(motion)
        xs, ys = [c.shapes[0].x for c in clip], [c.shapes[0].y for c in clip]
        dx, dy = MOTIONS[motion]
        assert np.sign(round(xs[-1] - xs[0], 6)) == dx
        assert np.sign(round(ys[-1] - ys[0], 6)) == dy
        assert min(*xs, *ys) >= 4
        assert max(*xs, *ys) <= SIZE - 4
