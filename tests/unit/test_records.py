"""Answers that come back from a browser are what they were, or are refused."""

from __future__ import annotations

import json
from array import array

import pytest

from paligemma import PaliGemmaError
from paligemma.demo.records import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, plain_tokens, read_record
from paligemma.demo.serving import Tokens

TOKENS = Tokens(array("i", [5, 257151]), array("f", [0.5, 1]))
RECORD = {
    "path": "/uploads/cats.png",
    "more": ["/uploads/dog.png"],
    "size": (640, 480),
    "checkpoint": "embedded",
    "answers": [("detect cat", "<loc0256><loc0256><loc0768><loc0768> cat"), ("ocr", "")],
    "tokens": [TOKENS, Tokens()],
}
KEPT = RECORD | {"tokens": [plain_tokens(one) for one in RECORD["tokens"]]}


def test_an_answer_comes_back_as_it_was_without_what_is_none_of_its_fields():
    kept = json.loads(json.dumps(KEPT | {"picture": "data:,", "checked": True}))
    assert read_record(kept) == RECORD
    assert read_record(kept | {"tokens": []}) == RECORD | {"tokens": []}


def token(**fields):
    return [{"ids": [5], "probabilities": [0.5], **fields}] * 2


@pytest.mark.parametrize(
    "forged",
    [
        *({name: value} for name in KEPT for value in (None, 5, {}, [None], [[]], [{}])),
        {"path": "x" * 2000},
        {"more": ["x"] * 8},
        {"size": [0, 448]},
        {"size": [448, 1.5]},
        {"size": [448, True]},
        {"size": [448]},
        {"size": [10_000, 10_000]},
        {"size": [10**400, 1]},
        {"size": [float("nan"), 1]},
        {"answers": [["ocr", ""]] * 9},
        {"answers": [["ocr", "", ""], ["ocr", ""]]},
        {"answers": [["ocr", None], ["ocr", ""]]},
        {"answers": [["x" * (MAX_PROMPT_CHARACTERS + 1), ""], ["ocr", ""]]},
        {"answers": [["ocr", "x" * 100_000], ["ocr", ""]]},
        {"answers": [["ocr", "<loc0000>" * (MAX_NEW_TOKENS + 1)], ["ocr", ""]]},
        {"tokens": token()[:1]},
        {"tokens": token(ids=[-1])},
        {"tokens": token(ids=[2**31])},
        {"tokens": token(ids=["5"])},
        {"tokens": token(ids=[5, 6])},
        {"tokens": token(ids=[5] * 257, probabilities=[0.5] * 257)},
        {"tokens": token(probabilities=[1.5])},
        {"tokens": token(probabilities=[float("nan")])},
        {"tokens": token(probabilities="a")},
    ],
    ids=lambda forged: json.dumps(forged)[:60],
)
def test_what_no_answer_of_the_page_holds_is_refused(forged):
    with pytest.raises(
        PaliGemmaError, match="^This answer is forgotten; please choose one of those below, or ask again"
    ):
        read_record(KEPT | forged)


@pytest.mark.parametrize("value", [None, "record", [], 5, {}])
def test_what_is_no_answer_is_refused(value):
    with pytest.raises(PaliGemmaError, match="^This answer is forgotten"):
        read_record(value)
