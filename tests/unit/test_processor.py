"""Prompts become the ids that the checkpoint was trained on, or are refused; tokens stream as unbroken text."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from random_checkpoints import TOKENIZER, VOCABULARY

from paligemma import PaliGemmaError
from paligemma.config import LOC_TOKENS, SEG_TOKENS
from paligemma.processor import Processor, TextStream

OFFICIAL_PLACES = [*LOC_TOKENS, *SEG_TOKENS]
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
CONTROL_IDS = frozenset(VOCABULARY.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<image>"))


@pytest.fixture
def from_changed_file(tiny, tmp_path):
    """A function that reads the embedded tokenizer.json after changes to it, beside a config with changes."""

    def read(change=lambda content: None, **settings):
        content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
        change(content)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        vocab_size = settings.pop("vocab_size", tiny.config.text.vocab_size)
        text = dataclasses.replace(tiny.config.text, vocab_size=vocab_size)
        return Processor.from_file(dataclasses.replace(tiny.config, text=text, **settings), path)

    return read


def unlist(*tokens):
    """A change that leaves tokens in the vocabulary, but lists them as tokens of their own no more."""

    def change(content):
        content["model"]["vocab"] |= {one["content"]: one["id"] for one in content["added_tokens"]}
        content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in tokens]

    return change


def without(*tokens):
    def change(content):
        content["model"]["vocab"] = {
            token: id for token, id in content["model"]["vocab"].items() if token not in tokens
        }
        content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in tokens]

    return change


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
TRUNCATION = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "remembered",
    [
        {"padding": {"strategy": {"Fixed": 28}, **PADDING}},
        {"truncation": TRUNCATION},
        {"padding": {"strategy": {"Fixed": 28}, **PADDING}, "truncation": TRUNCATION},
    ],
    ids=lambda remembered: " and ".join(remembered),
)
def test_padding_and_truncation_that_a_tokenizer_remembers_are_off(from_changed_file, tiny, remembered):
    processor = from_changed_file(lambda content: content.update(remembered))
    prompt = "answer en how many cats are there?"
    assert processor.input_ids(prompt) == tiny.processor.input_ids(prompt)


@pytest.mark.parametrize("listed", ["all", "none of the places", "image only"])
def test_places_in_a_prompt_are_single_ids_equal_to_the_reference(from_changed_file, tiny, tmp_path, listed):
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    unlisted = {"all": [], "none of the places": OFFICIAL_PLACES, "image only": [*OFFICIAL_PLACES, "<bos>", "<eos>"]}
    processor = from_changed_file(unlist(*unlisted[listed]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **SPECIAL)
    image_processor = SiglipImageProcessorPil()
    image_processor.image_seq_length = tiny.config.vision.num_patches
    reference, image = PaliGemmaProcessor(image_processor, tokenizer), Image.new("RGB", (8, 8))
    for prompt in (
        "caption <loc0162><loc0000><loc0512><loc1023>",
        "segment cat <seg000> <seg127>, dog<loc0001>",
        "answer en what is at <loc0162>?\n<loc>",
    ):
        ids = processor.input_ids(prompt)
        assert ids == list(reference(images=image, text="<image>" + prompt)["input_ids"][0])
        for token in re.findall(r"<(?:loc|seg)\d+>", prompt):
            assert VOCABULARY.token_to_id(token) in ids
    answer = "<loc0008><loc0016><loc0512><loc1000> <seg001> cat"
    pushed = processor.text_stream()
    assert "".join(map(pushed.push, processor.tokenizer.encode(answer).ids)) == answer


@pytest.mark.parametrize("configured", [VOCABULARY.token_to_id("<loc0000>"), 5, 2401])
def test_the_image_token_of_the_tokenizer_overrules_the_config(from_changed_file, configured):
    processor = from_changed_file(image_token_id=configured)
    image_id = VOCABULARY.token_to_id("<image>")
    assert processor.config.image_token_id == image_id
    assert processor.input_ids("caption en")[0] == image_id
    stream = processor.text_stream()
    assert "".join(stream.push(VOCABULARY.token_to_id(token)) for token in ("<loc0000>", "<image>")) == "<loc0000>"


def test_an_image_token_that_the_tokenizer_lacks_is_the_one_after_its_last(from_changed_file):
    last = VOCABULARY.token_to_id("<image>")
    processor = from_changed_file(without("<image>"), vocab_size=last)
    assert processor.config.image_token_id == processor.tokenizer.token_to_id("<image>") == last
    with pytest.raises(PaliGemmaError, match="reserved token <image>"):
        processor.input_ids("what is <image>?")


@pytest.mark.parametrize(
    ("change", "settings", "problem"),
    [
        (without(*OFFICIAL_PLACES), {}, "has no token <loc0000>"),
        (without("<seg127>"), {}, "has no token <seg127>"),
        (without("<bos>"), {}, "has no token <bos>"),
        (None, {"bos_token_id": 1}, "numbers <bos> 2, but bos_token_id in config.json is 1"),
        (None, {"vocab_size": 2399}, "numbers <seg127> 2399, but vocab_size in config.json is 2399"),
        (
            lambda content: content["model"]["vocab"].update({"<image>": 2405}),
            {},
            "numbers <image> 2405, but vocab_size in",
        ),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(from_changed_file, tmp_path, change, settings, problem):
    with pytest.raises(PaliGemmaError) as caught:
        from_changed_file(change or (lambda content: None), **settings)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'} {problem}")
    assert str(caught.value).endswith("please take both files from the same PaliGemma checkpoint.")


def test_a_token_without_a_row_in_the_embedding_is_refused(from_changed_file):
    processor = from_changed_file(
        lambda content: content["added_tokens"].append(
            {**content["added_tokens"][-1], "id": 2401, "content": "<extra>"}
        )
    )
    assert processor.input_ids("detect cat")
    with pytest.raises(PaliGemmaError, match="contains <extra>, which this checkpoint does not know; please remove it"):
        processor.input_ids("detect <extra> cat")


@pytest.mark.parametrize("typed", ["<image>caption en", "<image> caption en", " <image>\ncaption en"])
def test_an_image_token_at_the_start_of_a_prompt_is_left_out(tiny, typed):
    ids = tiny.processor.input_ids(typed)
    assert ids == tiny.processor.input_ids("caption en")
    assert ids.count(tiny.config.bos_token_id) == 1
    assert ids.count(tiny.config.image_token_id) == tiny.config.vision.num_patches
    with pytest.raises(PaliGemmaError, match="reserved token <image>"):
        tiny.processor.input_ids("<image>" + typed)


@pytest.mark.parametrize("token", ["<image>", "<bos>", "<eos>", "<pad>"])
def test_a_reserved_token_in_the_prompt_is_refused(tiny, token):
    with pytest.raises(PaliGemmaError, match=f"reserved token {token}"):
        tiny.processor.input_ids(f"detect {token} cat")


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "<image>", "<image> \n"])
def test_an_empty_prompt_is_refused(tiny, prompt):
    with pytest.raises(PaliGemmaError, match="prompt is empty"):
        tiny.processor.input_ids(prompt)


def test_a_prompt_longer_than_the_context_is_refused(tiny):
    context = tiny.config.vision.num_patches + 16
    text = dataclasses.replace(tiny.config.text, max_position_embeddings=context)
    processor = Processor(dataclasses.replace(tiny.config, text=text), VOCABULARY)
    assert len(processor.input_ids("a" + " cat" * 12)) == context - 1  # the image, <bos>, 13 words, a line end
    with pytest.raises(PaliGemmaError, match="16 tokens, but 15 fit"):
        processor.input_ids("a" + " cat" * 13)


def test_a_prompt_of_very_many_characters_is_refused_before_it_is_read(tiny):
    longest = max(map(len, VOCABULARY.get_vocab()))
    fitting = longest * (tiny.config.text.max_position_embeddings - tiny.config.vision.num_patches - 1)
    with pytest.raises(PaliGemmaError, match="tokens, but 767 fit; please shorten it"):
        tiny.processor.input_ids("c" * fitting)
    with pytest.raises(PaliGemmaError, match=f"{fitting + 1} characters, but {fitting} fit; please shorten it"):
        tiny.processor.input_ids("c" * (fitting + 1))
    start = time.perf_counter()
    with pytest.raises(PaliGemmaError, match="20000000 characters"):
        tiny.processor.input_ids("cat " * 5_000_000)
    assert time.perf_counter() - start < 1


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
    # Control tokens are no text, and normalizing is not what is tested here.
    text = text.replace("▁", "").replace("<", "")
    assert "".join(stream(encode(text))) == text


@given(st.lists(st.integers(0, VOCABULARY.get_vocab_size() - 1), max_size=30))
def test_any_tokens_at_all_stream_without_an_error(ids):
    text = "".join(stream([*ids, VOCABULARY.token_to_id("<loc0000>")]))
    assert text.endswith("<loc0000>")
    assert "<eos>" not in text


def test_bytes_that_are_no_text_come_out_once_as_replacement_characters():
    ids = [VOCABULARY.token_to_id(token) for token in ("<0x41>", "<0x42>", "<0xFF>", "<loc0000>")]
    assert stream(ids) == ["A", "B", "", "�<loc0000>"]


def test_location_and_segmentation_tokens_are_part_of_the_text():
    answer = "<loc0008><loc0016><loc0512><loc1000><seg001> cat ; <loc0008>"
    assert "".join(stream(encode(answer))) == answer
