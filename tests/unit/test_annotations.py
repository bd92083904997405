"""Objects are found in an answer's text, also while it grows, and broken ones do no harm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma.annotations import AnnotatedText, Detection, find_detections, place_mask, run_lengths

CAT_BOX = "<loc0256><loc0128><loc0512><loc0768>"
CAT = Detection("cat", (0.25, 0.125, 0.5, 0.75))
PIECES = [
    "<loc0000>",
    "<loc1023>",
    "<loc0512>",
    CAT_BOX,
    "<seg001>",
    "<seg002>" * 16,
    " cat",
    " ;",
    "<",
    "loc",
    "9",
    "\n",
]


def test_boxes_are_found_with_their_labels():
    text = f"{CAT_BOX} cat ; <loc0000><loc0000><loc1023><loc1023> hot dog"
    assert find_detections(text) == [CAT, Detection("hot dog", (0.0, 0.0, 1023 / 1024, 1023 / 1024))]


def test_a_box_is_put_on_the_picture_whatever_its_shape():
    assert CAT.in_pixels(width=800, height=400) == (100, 100, 600, 200)


def test_masks_are_found_with_their_boxes():
    codes = range(100, 116)
    text = CAT_BOX + "".join(f"<seg{code:03d}>" for code in codes) + " cat"
    assert find_detections(text) == [Detection("cat", CAT.box, tuple(codes))]


@pytest.mark.parametrize("codes", ["<seg007>" * 15, "<seg007>" * 15 + "<seg128>"])
def test_a_box_with_broken_codes_stays_a_box(codes):
    assert find_detections(f"{CAT_BOX}{codes} cat") == [CAT]


def test_of_too_many_codes_the_first_count():
    assert find_detections(CAT_BOX + "<seg007>" * 17 + " cat") == [Detection("cat", CAT.box, (7,) * 16)]


def test_an_answer_is_divided_into_its_objects_and_what_is_between():
    answer = AnnotatedText(f"I see {CAT_BOX} cat ; {CAT_BOX}<seg007> dog")
    answer.finish()
    assert [part.text for part in answer.parts] == ["I see ", f"{CAT_BOX} cat", " ;", " ", f"{CAT_BOX}<seg007> dog"]
    assert answer.detections == [CAT, Detection("dog", CAT.box)]
    assert answer.problems == ["a mask of 1 instead of 16 codes below 128"]


def test_an_object_appears_with_the_token_that_completes_it():
    answer = AnnotatedText()
    seen = []
    for token in [*(f"<loc{place}>" for place in ("0256", "0128", "0512", "0768")), *["<seg007>"] * 16, " cat"]:
        answer.push(token)
        assert answer.problems == [], "nothing is broken that can still get whole"
        seen.append(answer.detections)
    assert seen[:3] == [[]] * 3
    assert seen[3:19] == [[Detection("", CAT.box)]] * 16
    assert seen[19:] == [[Detection("", CAT.box, (7,) * 16)], [Detection("cat", CAT.box, (7,) * 16)]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<loc0256><loc0128><loc0512> cat", "a box of 3 instead of 4 locations"),
        ("<loc0512><loc0128><loc0256><loc0768> cat", "a box that ends before it begins"),
        ("<loc0512><loc0128><loc0512><loc0768> cat", "a box that ends before it begins"),
        ("<loc0000><loc0128><loc9999><loc0768> cat", "a box that reaches out of the picture"),
        ("<seg007>" * 16, "a box of 0 instead of 4 locations"),
    ],
)
def test_broken_boxes_are_left_out_and_told(text, problem):
    answer = AnnotatedText(text)
    answer.finish()
    assert answer.detections == []
    assert answer.problems == [problem]
    assert find_detections(f"{text} ; {CAT_BOX} cat") == [CAT], "the next one is read all the same"


def test_plain_answers_have_no_objects():
    assert find_detections("a cat; 2 < 3") == []


@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_no_answer_breaks_the_reading(pieces):
    answer, before = AnnotatedText(), []
    for piece in pieces:
        answer.push(piece)
        found = answer.detections
        for old, new in zip(before, found):
            assert (old.box, old.codes or new.codes) == (new.box, new.codes), "what is drawn is not taken back"
        assert len(found) >= len(before)
        before = found
    answer.finish()
    assert "".join(part.text for part in answer.parts) == "".join(pieces)
    assert answer.detections == find_detections("".join(pieces))
    for detection in answer.detections:
        y_min, x_min, y_max, x_max = detection.box
        assert 0 <= y_min < y_max < 1
        assert 0 <= x_min < x_max < 1


def test_a_mask_is_stretched_over_its_box():
    left_half = np.where(np.arange(64) < 32, 1.0, -1.0).astype(np.float32)[None].repeat(64, 0)
    placed = place_mask(left_half, Detection("cat", (0.5, 0.25, 1.0, 0.75)), width=400, height=100)
    expected = np.zeros((100, 400), bool)
    expected[50:, 100:200] = True
    assert (placed != expected).mean() < 0.01


def test_the_mask_of_a_box_without_pixels_is_empty():
    assert not place_mask(np.ones((64, 64), np.float32), Detection("cat", (0.5, 0.5, 0.501, 0.501)), 40, 40).any()


@given(st.integers(1, 6), st.integers(1, 6), st.randoms())
def test_run_lengths_tell_a_mask_column_by_column(height, width, random):
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    runs = run_lengths(mask)
    inside = itertools.cycle([False, True])
    told = [value for count, value in zip(runs["counts"], inside) for _ in range(count)]
    assert runs["size"] == [height, width]
    assert np.array_equal(np.array(told).reshape(width, height).T, mask)
