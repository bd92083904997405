"""What an answer says about places: its `<loc>` tokens as boxes, its `<seg>` tokens as masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

LOC_STEPS = 1024
NUM_LOCS = 4
CODES_A_MASK, NUM_CODES = 16, 128

_LOC, _SEG = r"<loc(\d{4})>", r"<seg(\d{3})>"
# Marks and the label after them. A `<` ends the label: it may begin the next mark, which is not all there yet.
_MARKED = re.compile(r"((?:<loc\d{4}>){0,4})((?:<seg\d{3}>)*) *([^<>;\n]*)")
_FIRST_MARK = re.compile(r"<(?:loc\d{4}|seg\d{3})>")


@dataclass(frozen=True)
class Detection:
    """A named box (y_min, x_min, y_max, x_max), each in parts of the picture's height or width, from 0 to 1.

    codes: the 16 of its mask, each below 128, or none.
    """

    label: str
    box: tuple[float, float, float, float]
    codes: tuple[int, ...] = ()

    def in_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(x_min, y_min, x_max, y_max) in pixels of a picture of this size."""
        y_min, x_min, y_max, x_max = self.box
        return round(x_min * width), round(y_min * height), round(x_max * width), round(y_max * height)


@dataclass(frozen=True)
class Part:
    """A stretch of an answer.

    detection: the object that it tells of, if any. problem: what is broken in it, as half a sentence, if anything.
    """

    text: str
    detection: Detection | None = None
    problem: str | None = None


class AnnotatedText:
    """An answer that grows: its parts, in order, with the objects among them.

    An object is there once its box is, and with its mask once all codes are; only its label may still grow then. What
    is broken is told when it cannot get whole any more.
    """

    def __init__(self, text: str = ""):
        self._settled: list[Part] = []
        self._growing = ""
        self.push(text)

    def push(self, text: str) -> None:
        """Add what a token brought."""
        whole, separator, self._growing = (self._growing + text).rpartition(";")
        self._settled += _parts(whole + separator)

    def finish(self) -> None:
        """Nothing more comes."""
        self._settled += _parts(self._growing)
        self._growing = ""

    @property
    def parts(self) -> list[Part]:
        """All so far; their texts make the whole answer."""
        return self._settled + list(_parts(self._growing, is_growing=True))

    @property
    def detections(self) -> list[Detection]:
        return [part.detection for part in self.parts if part.detection]

    @property
    def problems(self) -> list[str]:
        return [part.problem for part in self.parts if part.problem]


def find_detections(text: str) -> list[Detection]:
    """The boxes of an answer such as `<loc0010><loc0020><loc0500><loc0600> cat ; ...`, and their masks' codes.

    Broken boxes are left out; a box with broken codes stays, without them.
    """
    return AnnotatedText(text + ";").detections


def _parts(text: str, is_growing: bool = False) -> Iterator[Part]:
    while text:
        first = _FIRST_MARK.search(text)
        if first is None or first.start():
            end = first.start() if first else len(text)
            yield Part(text[:end])
        else:
            marked = _MARKED.match(text)
            end = len(marked[0].rstrip())
            # More marks may follow those at the very end.
            yield _read(*marked.groups(), text[:end], is_growing and _FIRST_MARK.sub("", text[:end]) == "")
        text = text[end:]


def _read(locs: str, segs: str, label: str, text: str, is_growing: bool) -> Part:
    box = tuple(int(loc) / LOC_STEPS for loc in re.findall(_LOC, locs))
    codes = tuple(int(code) for code in re.findall(_SEG, segs))
    if len(box) != NUM_LOCS:
        is_unfinished = is_growing and len(box) < NUM_LOCS and not codes
        return Part(text, problem=None if is_unfinished else f"a box of {len(box)} instead of {NUM_LOCS} locations")
    y_min, x_min, y_max, x_max = box
    if max(box) >= 1:
        return Part(text, problem="a box that reaches out of the picture")
    if y_min >= y_max or x_min >= x_max:
        return Part(text, problem="a box that ends before it begins")
    first_codes = codes[:CODES_A_MASK]
    is_mask = len(first_codes) == CODES_A_MASK and max(first_codes) < NUM_CODES
    detection = Detection(label.strip(), box, first_codes if is_mask else ())
    is_unfinished = is_growing and len(codes) < CODES_A_MASK
    if not codes or is_unfinished or is_mask and len(codes) == CODES_A_MASK:
        return Part(text, detection)
    return Part(text, detection, f"a mask of {len(codes)} instead of {CODES_A_MASK} codes below {NUM_CODES}")


def place_mask(mask: np.ndarray, detection: Detection, width: int, height: int) -> np.ndarray:
    """Stretch a decoded mask over its box.

    Args:
        mask: float32 [64, 64], above zero where the object is.
        width, height: of the picture, in pixels.

    Returns:
        bool [height, width].
    """
    x_min, y_min, x_max, y_max = detection.in_pixels(width, height)
    placed = np.zeros((height, width), bool)
    if x_min < x_max and y_min < y_max:
        stretched = Image.fromarray(mask).resize((x_max - x_min, y_max - y_min), Image.Resampling.BILINEAR)
        placed[y_min:y_max, x_min:x_max] = np.asarray(stretched) > 0
    return placed


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask, bool [height, width], in the uncompressed form of COCO.

    Returns:
        `size`, [height, width], and `counts`: how many pixels are outside, then inside, then outside …, column by column.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    begins_inside = [0] if flat.size and flat[0] else []
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": begins_inside + counts}
