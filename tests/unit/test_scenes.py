"""Scenes match the truth that comes with them, and the answers to questions about them are true."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from benchmarks.scene_figures import kinds_in_caption
from PIL import Image

from paligemma.annotations import find_detections
from paligemma.scenes.artwork import KINDS, load_sheet
from paligemma.scenes.colors import COLORS, main_color, random_color
from paligemma.scenes.painter import MAX_OVERLAP, Painter, Scene, SceneObject, area, intersection
from paligemma.scenes.questions import caption, description, detect_prompt, detections, largest, neighbor, questions
from paligemma.scenes.words import WORDS
from paligemma.training.evaluate import match

LEFT, MIDDLE, RIGHT = (0.3, 0.0, 0.5, 0.2), (0.3, 0.4, 0.5, 0.6), (0.3, 0.8, 0.5, 1.0)


@pytest.fixture(scope="module")
def painter():
    return Painter(load_sheet())


def index(name):
    return next(number for number, kind in enumerate(KINDS) if kind.name == name)


def scene_of(*objects, background="white"):
    """A scene of named objects at given boxes, of which nothing is drawn."""
    things = tuple(SceneObject(index(name), box, *color) for name, box, *color in objects)
    return Scene(Image.new("RGB", (112, 112)), things, background, "", None, np.zeros((112, 112), np.uint8))


def test_drawing_scenes_needs_no_torch():
    script = "import sys, paligemma.scenes.questions; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_sheet_has_every_kind_in_five_styles(painter):
    assert painter.sprites.levels[0].shape == (125, 5, 160, 160, 4)
    for level in painter.sprites.levels:
        is_drawn = level[..., 3] > 0
        sides = np.maximum(is_drawn.any(2).sum(-1), is_drawn.any(3).sum(-1))  # [kinds, styles]
        assert (sides >= 0.95 * level.shape[2]).all(), "the longer side fills the square"


def test_boxes_and_masks_enclose_what_was_drawn(painter):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = painter.scene(rng, 200, painter.choose_kinds(rng, 1))
        (thing,) = scene.objects
        rows, columns = np.nonzero(scene.mask(thing))
        edges = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
        assert edges == pytest.approx([side * 200 for side in thing.box], abs=3)


def test_the_same_seed_draws_the_same_scene(painter):
    one, same, other = (
        np.asarray(painter.random_scene(np.random.default_rng(seed), 112, 3).image) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_objects_hardly_overlap_and_never_cover_the_word(painter):
    rng = np.random.default_rng(0)
    words = set()
    for _ in range(60):
        scene = painter.random_scene(rng, 112, 6)
        for number, one in enumerate(scene.objects):
            for other in scene.objects[:number]:
                smaller = min(area(one.box), area(other.box))
                assert intersection(one.box, other.box) <= MAX_OVERLAP * smaller + 1e-9
            assert not scene.word or intersection(one.box, scene.word_box) == 0
        words.add(scene.word)
    assert len(words) > 5
    assert words <= {"", *WORDS}


def test_a_word_can_be_read_and_a_word_that_is_too_long_is_left_out(painter):
    scene = painter.scene(np.random.default_rng(0), 112, [], word="IIII")
    assert scene.word == "IIII"
    y_min, x_min, y_max, x_max = (round(side * 112) for side in scene.word_box)
    gray = np.asarray(scene.image.convert("L"), float)[y_min:y_max, x_min:x_max]
    assert gray.max() - gray.min() > 60, "ink and ground differ"
    without = painter.scene(np.random.default_rng(0), 112, [], word="MUCH TOO LONG")
    assert (without.word, without.word_box) == ("", None)


@pytest.mark.parametrize("name", COLORS)
def test_what_is_painted_in_a_color_is_called_by_its_name(name):
    rng = np.random.default_rng(0)
    for _ in range(50):
        pixel = np.append(random_color(rng, name) / 255, 1).astype(np.float32)
        assert main_color(np.broadcast_to(pixel, (4, 4, 4))) == name


def test_what_has_many_colors_is_called_by_none():
    motley = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 0]], np.float32)
    assert main_color(motley) is None
    assert main_color(motley[[0, 0, 1, 3]]) == "red", "the transparent pixel does not count"


@pytest.mark.parametrize(
    ("names", "background", "expected"),
    [
        ("cat", "white", "a cat on a white background"),
        ("cat apple", "orange", "a cat and an apple on an orange background"),
        ("cat apple cat", "white", "2 cats and an apple on a white background"),
        ("fish owl strawberry", "red", "a fish, an owl and a strawberry on a red background"),
        ("unicorn mouse mouse", "blue", "a unicorn and 2 mice on a blue background"),
    ],
)
def test_captions_count_from_left_to_right(names, background, expected):
    objects = zip(names.split(), (LEFT, MIDDLE, RIGHT))
    assert caption(scene_of(*reversed([*objects]), background=background)) == expected


def test_descriptions_tell_size_color_and_place():
    scene = scene_of(("apple", (0.0, 0.8, 0.2, 1.0), "red"), ("cat", (0.1, 0.0, 0.9, 0.6)), background="blue")
    assert description(scene) == (
        "a large cat on the left and a small red apple in the top right corner on a blue background"
    )


ROW = (("cat", LEFT), ("guitar", MIDDLE), ("dog", RIGHT))


@pytest.mark.parametrize(
    ("objects", "direction", "kind", "expected"),
    [
        (ROW, "left of", "guitar", "cat"),
        (ROW, "right of", "guitar", "dog"),
        (ROW, "above", "guitar", "nothing"),
        (ROW, "right of", "cat", None),  # a guitar and a dog are
        ((("cat", (0.0, 0.0, 0.2, 0.2)), ("dog", (0.4, 0.4, 0.6, 0.6))), "left of", "dog", None),  # as much above
        ((("cat", LEFT), ("cat", RIGHT), ("dog", MIDDLE)), "left of", "cat", None),  # of which one?
    ],
)
def test_neighbors_are_asked_about_only_where_the_answer_is_clear(objects, direction, kind, expected):
    assert neighbor(scene_of(*objects), direction, index(kind)) == expected


def test_the_largest_object_is_asked_for_only_where_it_is_clear():
    assert largest(scene_of(("cat", LEFT), ("dog", (0.0, 0.3, 0.5, 0.8)))) == "dog"
    assert largest(scene_of(("cat", LEFT), ("dog", MIDDLE))) is None


def test_detections_read_back_as_the_boxes():
    objects = [("cat", (0.1, 0.2, 0.5, 0.6)), ("dog", (0.5, 0.5, 0.9, 1.0)), ("cat", (0.6, 0.0, 0.99, 0.4))]
    scene = scene_of(*objects)
    found = find_detections(detections(scene, index("cat")))
    assert [detection.label for detection in found] == ["cat", "cat"]
    for detection, (_, box) in zip(found, [objects[0], objects[2]]):
        assert detection.box == pytest.approx(box, abs=8 / 1024)
    assert detections(scene, index("owl")) == ""
    both = find_detections(detections(scene, index("cat"), index("dog")))
    assert [detection.label for detection in both] == ["cat", "dog", "cat"]
    assert detect_prompt(index("cat"), index("dog")) == "detect cat ; dog"


def test_every_answer_is_true(painter):
    rng = np.random.default_rng(0)
    tasks = set()
    for number in range(40):
        scene = painter.random_scene(rng, 112, number % 6 + 1)
        names = [KINDS[thing.kind].name for thing in scene.objects]
        for question in questions(rng, scene):
            tasks.add(question.task)
            kind, answer = question.kind, question.answer
            count = 0 if kind is None else scene.count(kind)
            assert kind is None or KINDS[kind].name in question.prompt or KINDS[kind].plural in question.prompt
            assert ("absent" in question.task) <= (count == 0)
            if question.task == "caption":
                assert kinds_in_caption(answer) == set(names)
            elif question.task.startswith(("detect", "segment")):
                found = find_detections(answer)
                matched = match(found, [thing for thing in scene.objects if thing.kind == kind])
                assert len(matched) == len(found) == count == answer.count(" ; ") + bool(answer)
            elif question.task.startswith("how many"):
                assert int(answer) == count
            elif question.task.startswith("is there"):
                assert answer == ("yes" if count else "no")
            elif question.task == "ocr":
                assert answer == scene.word
    assert len(tasks) == 13
