"""What an answer says about places: its `<loc>` tokens as boxes, its `<seg>` tokens as masks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

LOC_STEPS = 1024

_DETECTION = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>((?:<seg\d{3}>)*) *([^<>;]*)")
_CODE = re.compile(r"<seg(\d{3})>")
_CODES_A_MASK, _NUM_CODES = 16, 128


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


def find_detections(text: str) -> list[Detection]:
    """The boxes of an answer such as `<loc0010><loc0020><loc0500><loc0600> cat ; ...`, and their masks' codes.

    Broken boxes are left out; a box with broken codes stays, without them.
    """
    detections = []
    for *locs, segs, label in _DETECTION.findall(text):
        box = tuple(int(loc) / LOC_STEPS for loc in locs)
        if max(box) < 1 and box[0] < box[2] and box[1] < box[3]:
            codes = tuple(int(code) for code in _CODE.findall(segs))
            is_whole = len(codes) == _CODES_A_MASK and max(codes) < _NUM_CODES
            detections.append(Detection(label.strip(), box, codes if is_whole else ()))
    return detections


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
