"""What an answer says about places: its `<loc>` tokens as boxes, its `<seg>` tokens as masks.

    <loc0256><loc0128><loc0512><loc0768> <seg114>…16 of them…<seg097> hot dog ; <loc0000>…

Official answers write an object so: a box, perhaps the codes of its mask, its label, and ` ; ` before the next one. Those of
fine-tuned checkpoints have other white space between the three or none, and may lack the label or the ` ; `.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .config import CODEBOOK_SIZE, CODES_PER_MASK, LOC_STEPS, LOCS_PER_BOX

_UNIT = re.compile(r"<loc([0-9]{4})>|<seg([0-9]{3})>|(\s+)|([<>;])|([^\s<>;]+)")
_LOC, _SEG, _SPACE, _STOP, _WORD = range(1, 6)  # the groups of a unit
_LOC_LENGTH = len("<loc0000>")
_STRIP_PIXELS = 2**20
# The beginning of a mark at the end of a text: its rest may come with the next token.
_CUT_MARK = re.compile(r"(?:<(?:l(?:o(?:c[0-9]{0,4})?)?|s(?:e(?:g[0-9]{0,3})?)?)?)?\Z")


@dataclass(frozen=True)
class Detection:
    """A named box (y_min, x_min, y_max, x_max), each in parts of the image's height or width, from 0 to 1.

    codes: the 16 of its mask, each below 128, or none.
    """

    label: str
    box: tuple[float, float, float, float]
    codes: tuple[int, ...] = ()

    def in_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(x_min, y_min, x_max, y_max) in pixels of an image of this size."""
        y_min, x_min, y_max, x_max = self.box
        return round(x_min * width), round(y_min * height), round(x_max * width), round(y_max * height)


@dataclass(frozen=True)
class Part:
    """A stretch of an answer.

    detection: the object that it describes, if any. problem: what is broken in it, as half a sentence, if anything.
    """

    text: str
    detection: Detection | None = None
    problem: str | None = None


@dataclass
class _Draft:
    """The last part of a growing answer: plain text, or an object if it has marks.

    last: the kind of the last unit that is no white space. is_spaced: whether white space follows it.
    """

    text: str = ""
    locs: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    label: str = ""
    last: int | None = None
    is_spaced: bool = False

    @property
    def is_plain(self) -> bool:
        return not self.locs and not self.codes

    def takes(self, kind: int | None, text: str) -> bool:
        """Whether this unit belongs to the part; else it begins the next one."""
        if self.is_plain:
            return kind not in (_LOC, _SEG) or not self.text
        if kind == _SEG:
            return self.last == _LOC or self.last == _SEG and not self.is_spaced
        if kind == _LOC:
            return self.last == _LOC and not self.is_spaced
        return kind == _WORD or kind == _SPACE and not (self.last == _WORD and "\n" in text)

    def add(self, kind: int | None, text: str) -> None:
        self.text += text
        if kind == _LOC:
            self.locs.append(int(text[4:-1]))
        elif kind == _SEG:
            self.codes.append(int(text[4:-1]))
        elif not self.is_plain and _WORD in (kind, self.last):
            self.label += text
        self.is_spaced = kind == _SPACE
        self.last = self.last if self.is_spaced else kind

    def split_run(self) -> list[Part]:
        """Of several boxes in one run, take away all but the last."""
        last = len(self.locs) - LOCS_PER_BOX
        if last <= 0 or last % LOCS_PER_BOX:
            return []
        parts = []
        for first in range(0, last, LOCS_PER_BOX):
            end = first + LOCS_PER_BOX
            parts.append(_Draft(self.text[first * _LOC_LENGTH : end * _LOC_LENGTH], self.locs[first:end]).read())
        self.text, self.locs = self.text[last * _LOC_LENGTH :], self.locs[last:]
        return parts

    def read(self, is_growing: bool = False) -> Part:
        """The part without the white space after an object; problems that may pass are none while it grows."""
        if self.is_plain:
            return Part(self.text)
        text, may_run_on = self.text.rstrip(), is_growing and not self.is_spaced
        if self.last == _LOC and may_run_on:
            return Part(text)
        if len(self.locs) != LOCS_PER_BOX:
            return Part(text, problem=f"a box of {len(self.locs)} instead of {LOCS_PER_BOX} locations")
        y_min, x_min, y_max, x_max = (loc / LOC_STEPS for loc in self.locs)
        if max(self.locs) >= LOC_STEPS:
            return Part(text, problem="a box that reaches out of the picture")
        if y_min >= y_max or x_min >= x_max:
            return Part(text, problem="a box that ends before it begins")
        count, codes = len(self.codes), tuple(self.codes[:CODES_PER_MASK])
        is_mask = len(codes) == CODES_PER_MASK and max(codes) < CODEBOOK_SIZE
        detection = Detection(self.label.rstrip(), (y_min, x_min, y_max, x_max), codes if is_mask else ())
        is_unfinished = self.last == _SEG and may_run_on and count < CODES_PER_MASK
        if not codes or is_unfinished or is_mask and count == CODES_PER_MASK:
            return Part(text, detection)
        return Part(text, detection, f"a mask of {count} instead of {CODES_PER_MASK} codes below {CODEBOOK_SIZE}")


class AnnotatedText:
    """An answer that grows: its parts, in order, with the objects among them.

    An object is there with what follows its box, which shows that no more locations come, and its mask once all codes
    are there; only its label may still grow then. A run of five or six locations is no box, one of eight is two. What is
    broken is reported when it cannot get whole any more. No text is parsed twice, however long the answer becomes.
    """

    def __init__(self, text: str = ""):
        self._settled: list[Part] = []
        self._draft = _Draft()
        self._cut = ""
        self.push(text)

    def push(self, text: str) -> None:
        """Add what a token brought."""
        text = self._cut + text
        cut = _CUT_MARK.search(text)
        self._cut = cut[0] if cut else ""
        self._add(text.removesuffix(self._cut))

    def finish(self) -> None:
        """Settle the last part: nothing more comes."""
        cut, self._cut = self._cut, ""
        self._add(cut)
        self._settled += self._draft.split_run()
        while self._draft.text:
            self._settle()

    @property
    def parts(self) -> list[Part]:
        """All so far; their texts make the whole answer."""
        part = self._draft.read(is_growing=True)
        rest = Part(self._draft.text[len(part.text) :] + self._cut)
        return [*self._settled, *(one for one in (part, rest) if one.text)]

    @property
    def detections(self) -> list[Detection]:
        return [part.detection for part in self.parts if part.detection]

    @property
    def problems(self) -> list[str]:
        return [part.problem for part in self.parts if part.problem]

    def _add(self, text: str) -> None:
        for unit in _UNIT.finditer(text):
            if unit.lastindex != _LOC:
                self._settled += self._draft.split_run()
            while not self._draft.takes(unit.lastindex, unit[0]):
                self._settle()
            self._draft.add(unit.lastindex, unit[0])

    def _settle(self) -> None:
        """End the draft; white space after an object begins the plain text that follows."""
        part = self._draft.read()
        if part.text:
            self._settled.append(part)
        self._draft = _Draft(self._draft.text[len(part.text) :])


def find_detections(text: str) -> list[Detection]:
    """The boxes of an answer such as `<loc0010><loc0020><loc0500><loc0600> cat ; ...`, and their masks' codes.

    Broken boxes are left out; a box with broken codes stays, without them.
    """
    answer = AnnotatedText(text)
    answer.finish()
    return answer.detections


def place_mask(mask: np.ndarray, detection: Detection, width: int, height: int) -> np.ndarray:
    """Stretch a decoded mask over its box.

    Args:
        mask: float32 [64, 64], above zero where the object is.
        width, height: of the image, in pixels.

    Returns:
        bool [height, width].
    """
    x_min, y_min, inside = _stretch(mask, detection, width, height)
    placed = np.zeros((height, width), bool)
    placed[y_min : y_min + inside.shape[0], x_min : x_min + inside.shape[1]] = inside
    return placed


def run_lengths(mask: np.ndarray, detection: Detection, width: int, height: int) -> dict[str, list[int]]:
    """A decoded mask, stretched over its box, in the uncompressed form of COCO.

    Args: as for `place_mask`, of whose result only the box is made.

    Returns:
        `size`, [height, width], and `counts`: how many pixels are outside, then inside, then outside …, column by column.
    """
    x_min, y_min, inside = _stretch(mask, detection, width, height)
    columns = np.pad(inside.T, ((0, 0), (1, 1)))  # so that each begins and ends outside
    column, row = np.divmod(np.flatnonzero(np.diff(columns.ravel())), columns.shape[1])
    changes, times = np.unique((column + x_min) * height + row + y_min, return_counts=True)
    # Twice: a run that ends with its column and goes on in the next one is a single run.
    counts = np.diff([0, *changes[times == 1], width * height]).tolist()
    return {"size": [height, width], "counts": counts if counts[-1] else counts[:-1]}


def _stretch(mask: np.ndarray, detection: Detection, width: int, height: int) -> tuple[int, int, np.ndarray]:
    """First column and row of the box, and what is inside, bool [rows, columns] of the box."""
    x_min, y_min, x_max, y_max = detection.in_pixels(width, height)
    if x_min >= x_max or y_min >= y_max:
        return x_min, y_min, np.zeros((0, 0), bool)
    columns, rows = x_max - x_min, y_max - y_min
    source, inside = Image.fromarray(mask), np.empty((rows, columns), bool)
    # In strips, since several bytes a pixel would be hundreds of megabytes for the box of a large image.
    strip = math.ceil(_STRIP_PIXELS / columns)
    for top in range(0, rows, strip):
        bottom = min(top + strip, rows)
        box = (0, top * source.height / rows, source.width, bottom * source.height / rows)
        stretched = source.resize((columns, bottom - top), Image.Resampling.BILINEAR, box)
        inside[top:bottom] = np.asarray(stretched) > 0
    return x_min, y_min, inside
