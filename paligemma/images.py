"""An image file, or any Pillow image, to upright RGB; and the sentences for files that cannot be."""

from __future__ import annotations

import io
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from .config import PaliGemmaError

# Of all that Pillow reads, what people have; rarer readers start other programs or fail in ways of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
# Of a PNG's compressed texts and color profile, unpacked. Pillow allows 1 MB for each, which editors' metadata exceed.
MAX_PNG_TEXT_BYTES = 64 * 2**20
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_PNG_TEXT_BYTES

# Of images whose pixels are limited: longer sides make a resize keep gigabytes, whatever the pixels.
MAX_SIDE = 2**15
# Each scan of a JPEG goes over the whole image, however few bytes it has; encoders write about ten.
MAX_JPEG_SCANS = 100
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in compressed data, the others are no markers
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, STANDALONE = 0xD8, 0xD9, 0xDA, 0x01
# The processor time that reading one image may take: several times that of 60 million pixels in most formats.
MAX_SECONDS = 15
BLOCK_BYTES = 2**13  # read between two looks at the time

# By EXIF's orientation: what makes the image upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow keeps what may hold the orientation.
METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


class _File(io.BufferedReader):
    """A file that calls `check` before each read; what that raises ends the reading of an image in between."""

    def __init__(self, path: str | os.PathLike, check: Callable[[], None]):
        super().__init__(io.FileIO(path))
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)


def open_image(
    path: str | os.PathLike, max_pixels: int | None = None, is_wanted: Callable[[], bool] = lambda: True
) -> Image.Image:
    """Read an image file whole, upright and in RGB.

    Args:
        path: a file in one of `FORMATS`.
        max_pixels: refuse a larger image before its pixels are unpacked, and one with a side above `MAX_SIDE`, with too
            many scans, or that takes longer than `MAX_SECONDS`.
        is_wanted: asked again and again; the reading ends once it is not. Pillow reads some formats, such as WebP, AVIF
            and most TIFF files, in one piece.

    Raises:
        PaliGemmaError: the file is missing, empty, too large, cut short, no longer wanted or no image.
    """
    name, start = Path(path).name, time.thread_time()

    def check() -> None:
        if max_pixels is not None and time.thread_time() - start > MAX_SECONDS:
            raise PaliGemmaError(f"The picture {name} takes too long to read; please save it anew.")
        if not is_wanted():
            raise PaliGemmaError(f"Nobody waits for the picture {name} any more.")

    try:
        if os.path.isdir(path):
            raise PaliGemmaError(f"{name} is a folder; please choose a picture.")
        if os.path.getsize(path) == 0:
            raise PaliGemmaError(f"The file {name} is empty; please choose another picture.")
        # By a path, Pillow maps gray and RGBA TIFF files into memory, and garbles those that lie on their side.
        with _File(path, check) as file, Image.open(file, formats=FORMATS) as image:
            if max_pixels is not None:
                _check_work(image, name, max_pixels)
            image.decodermaxblock = BLOCK_BYTES
            image.load()
            return to_rgb(image)
    except PaliGemmaError:
        raise
    except MemoryError as error:
        raise PaliGemmaError(f"There is not enough memory for the picture {name}; please make it smaller.") from error
    except UnidentifiedImageError as error:
        raise PaliGemmaError(f"{name} is not a picture; please choose a PNG, JPEG, WebP or GIF file.") from error
    except Image.DecompressionBombError as error:
        raise PaliGemmaError(_too_large(name, "too many pixels", max_pixels)) from error
    except FileNotFoundError as error:
        raise PaliGemmaError(f"There is no file {name}; please check its path.") from error
    except Exception as error:  # Pillow's readers report damage in a dozen ways
        raise PaliGemmaError(_unreadable(f"The picture {name}", error)) from error


def _check_work(image: ImageFile.ImageFile, name: str, max_pixels: int) -> None:
    """Refuse an image that is opened, but not unpacked, if that would take much memory or time."""
    size = f"{image.width} × {image.height} pixels"
    if image.width * image.height > max_pixels:
        raise PaliGemmaError(_too_large(name, size, max_pixels))
    if max(image.size) > MAX_SIDE:
        raise PaliGemmaError(f"The picture {name} has {size}; please make no side longer than {MAX_SIDE} pixels.")
    if image.format in ("JPEG", "MPO"):
        assert image.fp is not None
        position = image.fp.tell()
        image.fp.seek(0)
        scans = jpeg_scans(image.fp.read())
        image.fp.seek(position)
        if scans > MAX_JPEG_SCANS:
            raise PaliGemmaError(
                f"The picture {name} is a JPEG of {scans} scans, but {MAX_JPEG_SCANS} are read; please save it anew."
            )


def jpeg_scans(content: bytes) -> int:
    """How often a JPEG goes over its image: scans up to the end of the image, not those of previews in its metadata."""
    scans, position = 0, 2
    while found := JPEG_MARKER.search(content, position):
        marker, position = content[found.start() + 1], found.end()
        if marker == END_OF_IMAGE:
            break
        if marker not in (START_OF_IMAGE, STANDALONE):  # others begin with the length of what belongs to them
            position += int.from_bytes(content[position : position + 2])
        scans += marker == START_OF_SCAN
    return scans


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to upright 8-bit RGB: rotated as its EXIF says, transparency laid over white.

    Raises:
        PaliGemmaError: the pixels come from a file, are read only now, and are damaged.
    """
    try:
        image.load()
    except Exception as error:
        raise PaliGemmaError(_unreadable("The picture", error)) from error
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit_gray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """An image that is rotated and mirrored as the metadata say, and holds no metadata that would do so again.

    Where nothing is to be rotated, it shares its pixels, which may be hundreds of megabytes.
    """
    # Pillow's own `exif_transpose` writes the metadata anew, which fails on many that can be read.
    transposition = _transposition(image)
    image = image._new(image.im) if transposition is None else image.transpose(transposition)
    for name in METADATA:
        image.info.pop(name, None)
    return image


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """What the metadata ask for, as far as they can be read."""
    for read in (_orientation, _orientation_in_exif, _orientation_beside_exif):
        try:
            orientation = read(image)
            if isinstance(orientation, int) and 1 <= orientation <= 8:
                return TRANSPOSITIONS.get(orientation)
        except Exception:  # damaged metadata are no reason to refuse the pixels
            continue
    return None


def _orientation(image: Image.Image) -> object:
    """The orientation as Pillow finds it: in EXIF, else in XMP. It gives up where other entries are damaged."""
    return image.getexif().get(ExifTags.Base.Orientation)


def _orientation_in_exif(image: Image.Image) -> object:
    """The orientation, a 16-bit number, in EXIF's first directory, whatever the other entries hold."""
    tiff = image.info["exif"].removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (start,) = struct.unpack_from(f"{order}4xL", tiff)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(count):
        tag, value = struct.unpack_from(f"{order}H6xH", tiff, start + 2 + 12 * entry)
        if tag == ExifTags.Base.Orientation:
            return value
    return None


def _orientation_beside_exif(image: Image.Image) -> object:
    without_exif = Image.new("1", (1, 1))
    without_exif.info.update((name, value) for name, value in image.info.items() if name != "exif")
    return _orientation(without_exif)


def _to_8_bit_gray(image: Image.Image) -> Image.Image:
    """16-bit and float gray scaled to 0-255; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image, dtype=np.float32)
    if image.mode == "F":
        white = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    else:
        white = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0.0) > 255 else 255.0
    return Image.fromarray(np.clip(np.nan_to_num(values) / white * 255.0 + 0.5, 0, 255).astype(np.uint8))


def _too_large(name: str, size: str, max_pixels: int | None) -> str:
    limit = f" to at most {max_pixels / 1e6:.0f} million pixels" if max_pixels else ""
    return f"The picture {name} has {size}; please make it smaller{limit}."


def _unreadable(subject: str, error: Exception) -> str:
    reason = isinstance(error, OSError) and error.strerror or str(error).partition("\n")[0] or type(error).__name__
    return f"{subject} cannot be read ({reason}); please save it anew."
