"""What an answer says about places: its `<loc>` tokens as boxes."""

from __future__ import annotations

import re
from dataclasses import dataclass

LOC_STEPS = 1024

_DETECTION = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>(?:<seg\d{3}>)* *([^<>;]*)")


@dataclass(frozen=True)
class Detection:
    """A named box (y_min, x_min, y_max, x_max), each in parts of the picture's height or width, from 0 to 1."""

    label: str
    box: tuple[float, float, float, float]

    def in_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(x_min, y_min, x_max, y_max) in pixels of a picture of this size."""
        y_min, x_min, y_max, x_max = self.box
        return round(x_min * width), round(y_min * height), round(x_max * width), round(y_max * height)


def find_detections(text: str) -> list[Detection]:
    """The boxes of an answer such as `<loc0010><loc0020><loc0500><loc0600> cat ; ...`; broken ones are left out."""
    detections = []
    for *locs, label in _DETECTION.findall(text):
        box = tuple(int(loc) / LOC_STEPS for loc in locs)
        if max(box) < 1 and box[0] < box[2] and box[1] < box[3]:
            detections.append(Detection(label.strip(), box))
    return detections
