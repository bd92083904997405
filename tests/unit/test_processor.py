"""Pictures of every kind come out upright and in RGB, prompts are checked, and text streams unbroken."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import write_png_that_claims
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from random_checkpoints import VOCABULARY

from paligemma import PaliGemmaError
from paligemma.processor import Processor, TextStream, open_image, to_rgb

CONTROL_IDS = frozenset(VOCABULARY.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<image>"))


def pixel(image, x=0, y=0):
    return to_rgb(image).getpixel((x, y))


def test_transparency_is_laid_over_white():
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert pixel(half_red) == pytest.approx((255, 127, 127), abs=1)
    assert pixel(Image.new("LA", (4, 4), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 1
    assert pixel(palette) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_shades():
    middle = np.full((4, 4), 32768, dtype=np.uint16)
    assert pixel(Image.fromarray(middle)) == pytest.approx((128,) * 3, abs=1)
    assert pixel(Image.fromarray(middle.astype(np.int32))) == pytest.approx((128,) * 3, abs=1)


def test_float_grey_is_taken_as_0_to_1_or_0_to_255():
    assert pixel(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32))) == pytest.approx((128,) * 3, abs=1)
    assert pixel(Image.fromarray(np.full((4, 4), 128.0, dtype=np.float32))) == pytest.approx((128,) * 3, abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(tiny, mode):
    detour = {"PA": "LA", "RGBa": "RGBA"}.get(mode, "RGB")  # Pillow converts to some modes only from others
    image = to_rgb(Image.new(detour, (5, 3), "white").convert(mode))
    assert image.mode == "RGB"
    assert image.size == (5, 3)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    side = tiny.config.vision.image_size
    assert tiny.processor.pixel_values(image).shape == (1, 3, side, side)


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = open_image(tmp_path / "red.jpg").getpixel((8, 8))
    assert red > 200 > 60 > max(green, blue)


def test_exif_orientation_is_honoured(tmp_path):
    picture = Image.new("RGB", (20, 10), "blue")
    exif = picture.getexif()
    exif[0x0112] = 6  # lies on its side: to be turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("notes.png", b"just some text", "is not a picture"),
        ("empty.png", b"", "is empty"),
        ("cut.png", None, "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is None:
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(PaliGemmaError, match=sentence):
        open_image(path)


def test_a_missing_file_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(PaliGemmaError, match="no file"):
        open_image(tmp_path / "nowhere.png")


def test_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path):
    write_png_that_claims(tmp_path / "huge.png", 30_000, 30_000)
    with pytest.raises(PaliGemmaError, match="smaller to at most 60 million pixels"):
        open_image(tmp_path / "huge.png", max_pixels=60_000_000)
    write_png_that_claims(tmp_path / "large.png", 9_000, 9_000)
    with pytest.raises(PaliGemmaError, match="9000 × 9000 pixels.* at most 60 million"):
        open_image(tmp_path / "large.png", max_pixels=60_000_000)


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
