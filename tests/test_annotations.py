"""Boxes are found in an answer's text, and broken ones do no harm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma.annotations import Detection, find_detections, place_mask


def test_boxes_are_found_with_their_labels():
    text = "<loc0256><loc0128><loc0512><loc0768> cat ; <loc0000><loc0000><loc1023><loc1023> hot dog"
    assert find_detections(text) == [
        Detection("cat", (0.25, 0.125, 0.5, 0.75)),
        Detection("hot dog", (0.0, 0.0, 1023 / 1024, 1023 / 1024)),
    ]


def test_a_box_is_put_on_the_picture_whatever_its_shape():
    assert Detection("cat", (0.25, 0.125, 0.5, 0.75)).in_pixels(width=800, height=400) == (100, 100, 600, 200)


def test_masks_are_found_with_their_boxes():
    codes = range(100, 116)
    text = "<loc0256><loc0128><loc0512><loc0768>" + "".join(f"<seg{code:03d}>" for code in codes) + " cat"
    assert find_detections(text) == [Detection("cat", (0.25, 0.125, 0.5, 0.75), tuple(codes))]


@pytest.mark.parametrize("codes", ["<seg007>" * 15, "<seg007>" * 17, "<seg007>" * 15 + "<seg128>"])
def test_a_box_with_broken_codes_stays_a_box(codes):
    found = find_detections(f"<loc0256><loc0128><loc0512><loc0768>{codes} cat")
    assert found == [Detection("cat", (0.25, 0.125, 0.5, 0.75))]


def test_a_mask_is_stretched_over_its_box():
    left_half = np.where(np.arange(64) < 32, 1.0, -1.0).astype(np.float32)[None].repeat(64, 0)
    placed = place_mask(left_half, Detection("cat", (0.5, 0.25, 1.0, 0.75)), width=400, height=100)
    expected = np.zeros((100, 400), bool)
    expected[50:, 100:200] = True
    assert (placed != expected).mean() < 0.01


def test_the_mask_of_a_box_without_pixels_is_empty():
    assert not place_mask(np.ones((64, 64), np.float32), Detection("cat", (0.5, 0.5, 0.501, 0.501)), 40, 40).any()


def test_broken_boxes_are_left_out():
    assert find_detections("<loc0256><loc0128><loc0512> cat") == []
    assert find_detections("<loc0512><loc0128><loc0256><loc0768> cat") == []
    assert find_detections("<loc9999><loc0128><loc9999><loc0768> cat") == []
    assert find_detections("a cat") == []


@given(st.lists(st.sampled_from(["<loc0000>", "<loc1023>", "<loc0512>", "<seg001>", " cat", " ;", "<", "loc", "9"])))
def test_no_answer_breaks_the_search(pieces):
    for detection in find_detections("".join(pieces)):
        y_min, x_min, y_max, x_max = detection.box
        assert 0 <= y_min < y_max < 1
        assert 0 <= x_min < x_max < 1
