"""Image files of every kind, odd and damaged ones too, come out upright and in RGB, or are refused with a sentence."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import time
from functools import cache

import numpy as np
import pytest
from conftest import write_png_that_claims
from PIL import ExifTags, Image, PngImagePlugin

from paligemma import PaliGemmaError, images
from paligemma.images import open_image, to_rgb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata


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


def test_sixteen_bit_gray_keeps_its_shades():
    middle = np.full((4, 4), 32768, dtype=np.uint16)
    assert pixel(Image.fromarray(middle)) == pytest.approx((128,) * 3, abs=1)
    assert pixel(Image.fromarray(middle.astype(np.int32))) == pytest.approx((128,) * 3, abs=1)


def test_float_gray_is_taken_as_0_to_1_or_0_to_255():
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


def test_cmyk_jpeg_keeps_its_colors(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = open_image(tmp_path / "red.jpg").getpixel((8, 8))
    assert red > 200 > 60 > max(green, blue)


def tiff(*entries):
    """EXIF: a TIFF header and a directory of (tag, type, count, four bytes of value)."""
    packed = b"".join(struct.pack("<HHL4s", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + packed + bytes(60)


ON_ITS_SIDE = (0x0112, 3, 1, b"\6\0")  # to be rotated by a quarter
TEXT, XMP = (0x010F, 2, 1, b"x"), b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
ODD_ENTRIES = {
    "struct.error: required argument is not an integer": (0x0117, 11, 1, b"\x1a\0"),
    "struct.error: L format": (0x0111, 16, 4, b"\x1a\0"),
    "TypeError: object has no len()": (0x02BC, 12, 2, b"\x1a\0"),
    "TypeError: bad operand for abs()": (0x011A, 2, 4, b"abc"),
    "AttributeError: no attribute encode": (0x0132, 5, 2, b"\1\0"),
    "OverflowError": (0x8769, 16, 1, b"\xff\xff\xff\xff"),
    "ValueError: negative seek": (0x8825, 9, 1, b"\xff\xff\xff\xff"),
    "an entry without an end": (0x010F, 2, 2**31, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("odd", [TEXT, *ODD_ENTRIES.values()], ids=["nothing odd", *ODD_ENTRIES])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_exif_orientation_is_honored_whatever_else_exif_holds(tmp_path, suffix, odd, is_first):
    exif = tiff(odd, ON_ITS_SIDE) if is_first else tiff(ON_ITS_SIDE, odd)
    path = tmp_path / f"rotated.{suffix}"
    image = Image.new("RGB", (20, 10), "blue")
    image.paste("yellow", (0, 0, 10, 10))
    image.save(path, exif=b"Exif\0\0" + exif if suffix == "jpg" else exif)
    upright = open_image(path)
    assert upright.size == (10, 20)
    assert min(upright.getpixel((5, 4))[:2]) > 200 > 60 > max(upright.getpixel((5, 16))[:2]), "the left is now above"
    assert to_rgb(upright).size == (10, 20), "it is rotated once"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"no TIFF", b"II*\0", tiff(ON_ITS_SIDE)[:12], tiff((0x0112, 2, 4, b"six"))])
def test_pixels_are_kept_where_exif_is_none(tmp_path, suffix, exif):
    path = tmp_path / f"odd.{suffix}"
    image = Image.new("RGB", (20, 10), "blue")
    image.save(path, exif=b"Exif\0\0" + exif if suffix == "jpg" else exif)
    assert open_image(path).size == (20, 10)


@pytest.mark.parametrize("exif", [None, b"no TIFF"])
def test_orientation_is_read_in_xmp_as_well(tmp_path, exif):
    path = tmp_path / "rotated.webp"
    Image.new("RGB", (20, 10), "blue").save(path, xmp=XMP, **({"exif": exif} if exif else {}))
    assert open_image(path).size == (10, 20)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_tiff_on_its_side_keeps_its_pixels_in_place(tmp_path, mode):
    image, exif = Image.new(mode, (4, 2)), Image.Exif()
    image.paste(Image.new(mode, (4, 1), "white" if mode != "I;16" else 65535), (0, 1))
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "rotated.tif", exif=exif)
    upright = open_image(tmp_path / "rotated.tif")
    assert upright.size == (2, 4)
    assert [len(set(upright.crop((x, 0, x + 1, 4)).get_flattened_data())) for x in (0, 1)] == [1, 1]


def test_png_with_much_text_and_a_large_color_profile_opens_within_a_limit(tmp_path):
    def save(size):
        texts = PngImagePlugin.PngInfo()
        texts.add_text("history", "x" * size, zip=True)
        texts.add_itxt("layers", "x" * size, zip=True)
        Image.new("RGB", (20, 10)).save(tmp_path / "edited.png", pnginfo=texts, icc_profile=b"x" * size)

    save(5_000_000)
    assert open_image(tmp_path / "edited.png").size == (20, 10)
    save(70_000_000)
    with pytest.raises(PaliGemmaError, match="cannot be read"):
        open_image(tmp_path / "edited.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "avif", "ppm"])
def test_damage_anywhere_in_a_file_is_a_sentence_or_no_matter(tmp_path, suffix):
    path, rng = tmp_path / f"damaged.{suffix}", np.random.default_rng(0)
    Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(80):
        damaged = whole.copy()
        damaged[rng.integers(0, rng.choice([300, len(whole)]), 5).clip(max=len(whole) - 1)] = rng.integers(0, 256, 5)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(PaliGemmaError):
            assert open_image(path, max_pixels=10_000).mode == "RGB"


def test_damage_that_shows_only_when_pixels_are_read_is_a_sentence(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    os.truncate(path, 1000)
    with Image.open(path) as image, pytest.raises(PaliGemmaError, match="The picture cannot be read"):
        to_rgb(image)


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


def test_a_huge_image_is_refused_before_it_is_unpacked(tmp_path):
    write_png_that_claims(tmp_path / "huge.png", 30_000, 30_000)
    with pytest.raises(PaliGemmaError, match="smaller to at most 60 million pixels"):
        open_image(tmp_path / "huge.png", max_pixels=60_000_000)
    write_png_that_claims(tmp_path / "large.png", 9_000, 9_000)
    with pytest.raises(PaliGemmaError, match="9000 × 9000 pixels.* at most 60 million"):
        open_image(tmp_path / "large.png", max_pixels=60_000_000)


def test_an_image_with_a_side_that_no_screen_has_is_refused(tmp_path):
    write_png_that_claims(tmp_path / "thin.png", 1, 60_000_000)
    with pytest.raises(PaliGemmaError, match="1 × 60000000 pixels; please make no side longer than 32768"):
        open_image(tmp_path / "thin.png", max_pixels=60_000_000)


@cache
def progressive(side):
    """A JPEG, but for its end: all until its last scan, and that one."""
    content, thumbnail = io.BytesIO(), Image.Exif()
    thumbnail[ExifTags.Base.Make] = "\xff\xda" * 500  # in metadata, these bytes are no scan
    Image.new("L", (side, side), 77).save(content, "JPEG", progressive=True, exif=thumbnail)
    return re.fullmatch(rb"(.*)(\xff\xda.*)\xff\xd9", content.getvalue(), re.DOTALL).groups()


@pytest.fixture
def repeated_scans(tmp_path):
    """A JPEG whose last scan comes again and again."""

    def save(times, side=7000):
        head, scan = progressive(side)
        (tmp_path / "scans.jpg").write_bytes(head + scan * times + b"\xff\xd9")
        return tmp_path / "scans.jpg"

    return save


@pytest.mark.parametrize("times", [96, 2000])
def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_unpacked(repeated_scans, times):
    path, start = repeated_scans(times), time.process_time()
    with pytest.raises(PaliGemmaError, match=f"a JPEG of {times + 5} scans, but 100 are read"):
        open_image(path, max_pixels=60_000_000)
    assert time.process_time() - start < 1


def test_a_jpeg_of_some_scans_more_is_read_and_what_follows_its_end_does_not_count(repeated_scans):
    path = repeated_scans(5)
    path.write_bytes(path.read_bytes() * 2)
    assert images.jpeg_scans(path.read_bytes()) == 10
    assert open_image(path, max_pixels=60_000_000).size == (7000, 7000)


def test_an_image_that_nobody_waits_for_is_left(repeated_scans):
    path, asked, start = repeated_scans(95), [], time.process_time()
    with pytest.raises(PaliGemmaError, match=r"^Nobody waits for the picture scans.jpg any more"):
        open_image(path, is_wanted=lambda: len(asked) < 5 and not asked.append(1))
    assert time.process_time() - start < 1


def test_an_image_that_takes_too_long_is_left(repeated_scans, monkeypatch):
    monkeypatch.setattr(images, "MAX_JPEG_SCANS", 10_000)
    monkeypatch.setattr(images, "MAX_SECONDS", 0.1)
    start = time.process_time()
    with pytest.raises(PaliGemmaError, match="takes too long to read"):
        open_image(repeated_scans(2000, side=1500), max_pixels=60_000_000)
    assert time.process_time() - start < 5
