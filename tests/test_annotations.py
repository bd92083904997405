"""Boxes are found in an answer's text, and broken ones do no harm."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paligemma.annotations import Detection, find_detections


def test_boxes_are_found_with_their_labels():
    text = "<loc0256><loc0128><loc0512><loc0768> cat ; <loc0000><loc0000><loc1023><loc1023> hot dog"
    assert find_detections(text) == [
        Detection("cat", (0.25, 0.125, 0.5, 0.75)),
        Detection("hot dog", (0.0, 0.0, 1023 / 1024, 1023 / 1024)),
    ]


def test_a_box_is_put_on_the_picture_whatever_its_shape():
    assert Detection("cat", (0.25, 0.125, 0.5, 0.75)).in_pixels(width=800, height=400) == (100, 100, 600, 200)


def test_segmentation_codes_do_not_hide_the_label():
    text = "<loc0256><loc0128><loc0512><loc0768>" + "<seg007>" * 16 + " cat"
    assert [detection.label for detection in find_detections(text)] == ["cat"]


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
