"""Objects are found in an answer's text, also while it grows, and broken ones do no harm."""

from __future__ import annotations

import itertools
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paligemma.annotations import AnnotatedText, Detection, find_detections, place_mask, run_lengths

CAT_BOX = "<loc0256><loc0128><loc0512><loc0768>"
CAT = Detection("cat", (0.25, 0.125, 0.5, 0.75))
PIECES = [
    "<loc0000>",
    "<loc1023>",
    "<loc0512>",
    CAT_BOX,
    f"{CAT_BOX} {'<seg003>' * 16} wall",
    "<seg001>",
    "<seg002>" * 16,
    " cat",
    "кот, 猫's",
    " ;",
    " ",
    "</s>",
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


@pytest.mark.parametrize("before_codes", ["", " ", "\n", " \t\n "])
@pytest.mark.parametrize("before_label", ["", " ", "\n", " \n  "])
@pytest.mark.parametrize("end", ["", " ", "\n", ";", " ; ", " ; <loc0000>", "</s>", "\nthat is all"])
def test_box_codes_and_label_may_have_any_white_space_between(before_codes, before_label, end):
    codes = range(100, 116)
    text = CAT_BOX + before_codes + "".join(f"<seg{code:03d}>" for code in codes) + before_label + "cat" + end
    assert find_detections(text) == [Detection("cat", CAT.box, tuple(codes))]
    assert find_detections(f"{CAT_BOX}{before_label}cat{end}") == [CAT]


def test_an_official_segmentation_answer_is_read_whole():
    first, second = ("".join(f"<seg{code:03d}>" for code in range(start, start + 16)) for start in (97, 3))
    text = f"<loc0000><loc0000><loc0930><loc1012> {first} wall ; <loc0722><loc0008><loc1023><loc0600> {second} wall"
    answer = AnnotatedText(text)
    answer.finish()
    assert answer.detections == [
        Detection("wall", (0.0, 0.0, 930 / 1024, 1012 / 1024), tuple(range(97, 113))),
        Detection("wall", (722 / 1024, 8 / 1024, 1023 / 1024, 600 / 1024), tuple(range(3, 19))),
    ]
    assert answer.problems == []


@pytest.mark.parametrize(
    "label",
    [
        "hot dog",
        "red, green and blue",
        "dog's bowl",
        "2nd bus (no. 42)",
        "кот",
        "猫",
        "قطة",
        "बिल्ली",
        "a/b: 50%",
        "e\u0301",
    ],
)
def test_labels_hold_what_people_write(label):
    assert find_detections(f"{CAT_BOX} {label} ; {CAT_BOX}{label}") == [Detection(label, CAT.box)] * 2


@pytest.mark.parametrize("codes", ["<seg007>" * 15, "<seg007>" * 15 + "<seg128>"])
def test_a_box_with_broken_codes_stays_a_box(codes):
    assert find_detections(f"{CAT_BOX}{codes} cat") == [CAT]


def test_of_too_many_codes_the_first_count():
    assert find_detections(CAT_BOX + "<seg007>" * 17 + " cat") == [Detection("cat", CAT.box, (7,) * 16)]


def test_an_answer_is_divided_into_its_objects_and_what_is_between():
    answer = AnnotatedText(f"I see {CAT_BOX} cat ; {CAT_BOX}<seg007> dog")
    answer.finish()
    assert [part.text for part in answer.parts] == ["I see ", f"{CAT_BOX} cat", " ; ", f"{CAT_BOX}<seg007> dog"]
    assert answer.detections == [CAT, Detection("dog", CAT.box)]
    assert answer.problems == ["a mask of 1 instead of 16 codes below 128"]


@pytest.mark.parametrize("seam", ["", " "])
def test_an_object_appears_with_the_token_that_completes_it(seam):
    answer = AnnotatedText()
    seen = []
    box = [f"<loc{place}>" for place in ("0256", "0128", "0512", "0768")]
    for token in [*box, f"{seam}<seg007>", *["<seg007>"] * 15, " cat"]:
        answer.push(token)
        assert answer.problems == [], "nothing is broken that can still get whole"
        seen.append(answer.detections)
    assert seen[:4] == [[]] * 4, "a fifth location would make it no box"
    assert seen[4:19] == [[Detection("", CAT.box)]] * 15
    assert seen[19:] == [[Detection("", CAT.box, (7,) * 16)], [Detection("cat", CAT.box, (7,) * 16)]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<loc0256><loc0128><loc0512> cat", "a box of 3 instead of 4 locations"),
        ("<loc0512><loc0128><loc0256><loc0768> cat", "a box that ends before it begins"),
        ("<loc0512><loc0128><loc0512><loc0768> cat", "a box that ends before it begins"),
        ("<loc0000><loc0128><loc9999><loc0768> cat", "a box that reaches out of the picture"),
        ("<loc0000><loc0128><loc1024><loc0768> cat", "a box that reaches out of the picture"),
        (f"{CAT_BOX}<loc0001>", "a box of 5 instead of 4 locations"),
        (f"{CAT_BOX}<loc0001><loc0002> cat", "a box of 6 instead of 4 locations"),
        (f"<loc0001><loc0002> {CAT_BOX[:18]} cat", "a box of 2 instead of 4 locations"),
        ("<seg007>" * 16, "a box of 0 instead of 4 locations"),
    ],
)
def test_broken_boxes_are_left_out_and_reported(text, problem):
    answer = AnnotatedText(text)
    answer.finish()
    assert answer.detections == []
    assert set(answer.problems) == {problem}
    assert find_detections(f"{text} ; {CAT_BOX} cat") == [CAT], "the next one is read all the same"


def test_boxes_in_one_run_are_as_many_as_they_have_locations_for():
    unnamed = Detection("", CAT.box)
    assert find_detections(f"{CAT_BOX * 3} cat ; {CAT_BOX * 2}") == [unnamed, unnamed, CAT, unnamed, unnamed]


@pytest.mark.parametrize("words", ["", " cat", " cat ;"], ids=["one run", "labels", "official"])
def test_reading_a_long_answer_token_by_token_takes_no_quadratic_time(words):
    answer, start = AnnotatedText(), time.process_time()
    for token in re.findall(r"<\w+>| \S+", f"{CAT_BOX}{words}" * 512):
        answer.push(token)
        _ = answer.detections, answer.problems
    answer.finish()
    assert len(answer.detections) == 512
    assert time.process_time() - start < 1, (
        "it takes 0.1 s, and 15 s or more if each token has the last object read anew"
    )


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
    whole = AnnotatedText("".join(pieces))
    whole.finish()
    assert answer.parts == whole.parts
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


def test_the_mask_of_a_large_box_is_stretched_in_strips_without_a_seam():
    slope = np.linspace(-1, 1, 64, dtype=np.float32)[:, None] + np.linspace(-1, 1, 64, dtype=np.float32)
    placed = place_mask(slope, Detection("cat", (0.0, 0.0, 1.0, 1.0)), width=3000, height=2000)
    whole = np.asarray(Image.fromarray(slope).resize((3000, 2000), Image.Resampling.BILINEAR))
    assert (placed == (whole > 0))[np.abs(whole) > 1e-4].all()


@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 1024), min_size=4, max_size=4), st.randoms())
def test_run_lengths_describe_a_mask_column_by_column(height, width, box, random):
    decoded = np.array([[random.random() - 0.5 for _ in range(8)] for _ in range(8)], np.float32)
    decoded = np.kron(decoded, np.ones((8, 8), np.float32))
    detection = Detection("cat", tuple(loc / 1024 for loc in box))
    runs = run_lengths(decoded, detection, width, height)
    inside = itertools.cycle([False, True])
    values = [value for count, value in zip(runs["counts"], inside) for _ in range(count)]
    assert runs["size"] == [height, width]
    assert all(runs["counts"][1:]), "each run has a length, but for a first one inside"
    assert np.array_equal(np.array(values).reshape(width, height).T, place_mask(decoded, detection, width, height))
