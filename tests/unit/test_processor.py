"""Prompts become the ids that the checkpoint was trained on, or are refused; tokens stream as unbroken text."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoints import VOCABULARY

from paligemma import PaliGemmaError
from paligemma.processor import Processor, TextStream

CONTROL_IDS = frozenset(VOCABULARY.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<image>"))


@pytest.mark.parametrize("token", ["<image>", "<bos>", "<eos>", "<pad>"])
def test_a_reserved_token_in_the_prompt_is_refused(tiny, token):
    with pytest.raises(PaliGemmaError, match=f"reserved token {token}"):
        tiny.processor.input_ids(f"detect {token} cat")


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt_is_refused(tiny, prompt):
    with pytest.raises(PaliGemmaError, match="prompt is empty"):
        tiny.processor.input_ids(prompt)


def test_a_prompt_longer_than_the_context_is_refused(tiny):
    context = tiny.config.vision.num_patches + 16
    text = dataclasses.replace(tiny.config.text, max_position_embeddings=context)
    processor = Processor(dataclasses.replace(tiny.config, text=text), VOCABULARY)
    assert len(processor.input_ids("a" + " cat" * 12)) == context - 1  # the picture, <bos>, 13 words, a line end
    with pytest.raises(PaliGemmaError, match="16 tokens, but 15 fit"):
        processor.input_ids("a" + " cat" * 13)
    with pytest.raises(PaliGemmaError, match="please shorten it"):
        tiny.processor.input_ids("cat " * 25_000)


@pytest.mark.parametrize("prompt", [None, 5, b"caption en"])
def test_a_prompt_that_is_no_text_is_refused(tiny, prompt):
    with pytest.raises(PaliGemmaError, match="please give text"):
        tiny.processor.input_ids(prompt)


def test_a_prompt_that_is_not_unicode_is_refused(tiny):
    with pytest.raises(PaliGemmaError, match="not valid Unicode"):
        tiny.processor.input_ids("cat \ud800")


def stream(ids):
    reader = TextStream(VOCABULARY, CONTROL_IDS)
    return [reader.push(token_id) for token_id in ids]


def encode(text):
    return VOCABULARY.encode(text, add_special_tokens=False).ids


def test_characters_of_several_bytes_come_out_whole():
    pieces = stream(encode("2 cats, 你好 👩‍👩‍👧!"))
    assert "".join(pieces) == "2 cats, 你好 👩‍👩‍👧!"
    assert not any("�" in piece for piece in pieces)
    assert "👩" in pieces
    assert " cats" in pieces


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_streamed_text_equals_the_text(text):
    # Control tokens are no text, and normalising is not what is tested here.
    text = text.replace("▁", "").replace("<", "")
    assert "".join(stream(encode(text))) == text


@given(st.lists(st.integers(0, VOCABULARY.get_vocab_size() - 1), max_size=30))
def test_any_tokens_at_all_stream_without_an_error(ids):
    text = "".join(stream([*ids, VOCABULARY.token_to_id("<loc0000>")]))
    assert text.endswith("<loc0000>")
    assert "<eos>" not in text


def test_location_and_segmentation_tokens_are_part_of_the_text():
    answer = "<loc0008><loc0016><loc0512><loc1000><seg001> cat ; <loc0008>"
    assert "".join(stream(encode(answer))) == answer
