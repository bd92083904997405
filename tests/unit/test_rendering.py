"""Answers as images, colored text and JSON."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageColor, ImageDraw

from paligemma.annotations import Detection
from paligemma.demo.rendering import (
    COLORS,
    Mask,
    MaskCache,
    answers_html,
    draw,
    figure_html,
    mark_objects,
    thumbnails_html,
    to_json,
)
from paligemma.demo.serving import Answer

LEFT_HALF = np.where(np.arange(64) < 32, 1.0, -1.0).astype(np.float32)[None].repeat(64, 0)
CAT = Detection("cat", (0.25, 0.25, 0.75, 0.75), (5,) * 16)
DOG = Detection("dog", (0.0, 0.5, 0.25, 1.0 - 1 / 1024))


@pytest.fixture
def masks():
    """Masks whose left half is inside."""
    return MaskCache(lambda codes: LEFT_HALF)


def luminance(color):
    channels = np.array(ImageColor.getrgb(color)) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("color", COLORS)
def test_white_letters_can_be_read_on_each_color(color):
    assert 1.05 / (luminance(color) + 0.05) >= 4.5


def test_neighbors_in_an_answer_have_different_colors(masks):
    objects = mark_objects([CAT] * (len(COLORS) + 1), masks)
    assert len({marked.color for marked in objects[:-1]}) == len(COLORS)
    assert objects[0].color == objects[-1].color


def test_without_a_decoder_a_mask_is_a_box():
    (cat,) = mark_objects([CAT], MaskCache(None))
    assert cat.mask is None
    assert to_json([cat], (400, 200)) == [{"label": "cat", "box": [100, 50, 300, 150], "mask": None}]


def test_json_has_pixels_of_the_original_image_and_run_lengths(masks):
    cat, dog = to_json(mark_objects([CAT, DOG], masks), (400, 200))
    assert (cat["label"], cat["box"]) == ("cat", [100, 50, 300, 150])
    assert cat["mask"]["size"] == [200, 400]
    # One hundred columns have a hundred pixels of the cat.
    assert sum(cat["mask"]["counts"][1::2]) == pytest.approx(100 * 100, rel=0.02)
    assert dog == {"label": "dog", "box": [200, 0, 400, 50], "mask": None}


def test_marks_are_drawn_in_the_size_of_the_image(masks):
    image = Image.new("L", (400, 200), 255)
    drawn = draw(image, mark_objects([CAT, DOG], masks))
    assert (drawn.mode, drawn.size) == ("RGB", (400, 200))
    cat, dog = (ImageColor.getrgb(color) for color in COLORS[:2])
    assert drawn.getpixel((100, 100)) == cat, "the box"
    assert drawn.getpixel((299, 100)) == cat
    assert drawn.getpixel((200, 40)) == dog
    inside, outside = drawn.getpixel((150, 100)), drawn.getpixel((250, 100))
    assert outside == (255, 255, 255)
    assert inside != outside, "the mask"
    assert image.getpixel((100, 100)) == 255, "the image itself stays as it is"


def test_an_object_on_the_edge_of_a_tiny_image_is_drawn(masks):
    draw(Image.new("RGB", (1, 1)), mark_objects([CAT, DOG], masks))


def test_labels_and_marks_carry_the_same_number_and_color(masks):
    answers = [
        Answer.of("caption en", "a cat"),
        Answer.of(
            "detect cat ; dog", "<loc0256><loc0256><loc0768><loc0768> cat ; <loc0000><loc0512><loc0256><loc1023> dog"
        ),
        Answer.of("detect dog", "<loc0000><loc0512><loc0256><loc1023> dog"),
    ]
    found = [one for answer in answers for one in answer.annotated.detections]
    objects = mark_objects(found, masks)
    pattern = r'data-object="(\d)"[^>]*--color: (#\w+)'
    labels = re.findall(pattern, answers_html(answers, objects, "none"))
    marks = re.findall(pattern, figure_html((400, 200), objects))
    assert labels == marks == [(str(number), COLORS[number]) for number in range(3)]


def test_what_people_and_models_write_is_no_markup(masks):
    answers = [Answer.of("<b>", '<script> & <loc0256><loc0256><loc0768><loc0768> c&"t')]
    objects = mark_objects(answers[0].annotated.detections, masks)
    html = answers_html(answers, objects, "none") + figure_html((4, 4), objects)
    html += thumbnails_html("a & b", [('x" onerror="y', "<script>")])
    assert "<script" not in html
    assert "<code><b>" not in html
    assert html.count("c&amp;&quot;t") == 3, "words, drawing and its description"
    assert 'c&"t' not in html
    assert 'onerror="' not in html


def test_empty_and_broken_answers_are_explained():
    assert "there is none" in answers_html([Answer.of("detect cat", "")], [], "there is none")
    assert "there is none" not in answers_html([Answer("detect cat")], [], "there is none"), "it has only begun"
    broken = answers_html([Answer.of("detect cat", "<loc0256> cat")], [], "")
    assert "a box of 1 instead of 4 locations" in broken
    assert "&lt;loc0256&gt; cat" in broken, "the text stays"


def test_the_masks_of_a_growing_answer_are_decoded_and_outlined_once():
    decoded = []
    masks = MaskCache(lambda codes: decoded.append(codes) or LEFT_HALF)
    (first,), (again, other) = mark_objects([CAT], masks), mark_objects([replace(CAT, label="cats"), DOG], masks)
    assert decoded == [CAT.codes]
    assert first.mask.outline is again.mask.outline
    assert other.mask is None


def test_objects_of_an_unfinished_answer_travel_without_masks(masks):
    objects = mark_objects([CAT, DOG], masks)
    assert [one["mask"] for one in to_json(objects, (400, 200), with_masks=False)] == [None, None]


def polygons(mask):
    """The border of a mask, drawn as an image of 64 * 8 pixels on a side."""
    drawn = Image.new("1", (512, 512))
    for line in mask.outline.split("z")[:-1]:
        points = [tuple(8 * float(one) for one in point.split(",")) for point in line.removeprefix("M").split()]
        other = Image.new("1", drawn.size)
        ImageDraw.Draw(other).polygon(points, fill=1)
        drawn = ImageChops.logical_xor(drawn, other)
    return np.asarray(drawn)


def test_an_outline_encloses_what_is_inside_without_steps():
    rows, columns = np.mgrid[:64, :64]
    radius = np.hypot(rows - 31.5, columns - 31.5)
    ring = np.minimum(28 - radius, radius - 10).astype(np.float32)
    fine_rows, fine_columns = np.mgrid[:512, :512]
    fine = np.hypot(fine_rows - 255.5, fine_columns - 255.5) / 8
    wrong = polygons(Mask(ring)) != ((fine < 28) & (fine > 10))
    assert wrong.mean() < 0.01
    assert polygons(Mask(np.ones((64, 64), np.float32))).mean() > 0.98, "up to the border of the box"
    assert Mask(-np.ones((64, 64), np.float32)).outline == ""


@pytest.mark.parametrize("label", ["cat", "a name that is much longer than its box, and than the image"])
@pytest.mark.parametrize("box", [(0, 0, 0.1, 0.1), (0.9, 0.9, 1, 1), (0, 0.95, 1, 1), (0.5, 0, 0.6, 1)])
def test_a_name_stays_inside_the_image(masks, box, label):
    objects = mark_objects([Detection(label, box)], masks)
    number = r'="(-?[\d.]+)"'
    pattern = rf'<rect class="name" x{number} y{number} width{number} height{number}'
    x, y, width, height = map(float, re.search(pattern, figure_html((400, 300), objects)).groups())
    assert min(x, y) >= 0
    assert x + width <= 400.1
    assert y + height <= 300.1
