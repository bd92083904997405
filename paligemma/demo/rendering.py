"""An answer as others take it: marks on the image, colored words, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..annotations import Detection, Part, place_mask, run_lengths
from .serving import Answer

# One color after another: white letters on each of them, and each on white, have a contrast above 4.5 (WCAG 2, AA).
COLORS = ("#c62828", "#1565c0", "#2e7d32", "#7b1fa2", "#9a4a00", "#00695c", "#ad1457", "#4a5568")
UNNAMED = "object"
MAX_LINKED = 64  # objects that light up together with their words
MASK_OPACITY = 0.45
NAME_SCALE = 1 / 28  # height of the letters of a name, in parts of the image's longer side
LETTER_WIDTH, NAME_PADDING, NAME_HEIGHT = 0.58, 0.4, 1.4  # in heights of a letter: SVG cannot measure a text


@dataclass(frozen=True)
class Mask:
    """A decoded mask, float32 [64, 64] and above zero inside."""

    values: np.ndarray

    @cached_property
    def outline(self) -> str:
        """The border of what is inside as an SVG path, in units of a mask's pixels, from 0 to 64 over its box."""
        return "".join(
            f"M{' '.join(f'{x:.1f},{y:.1f}' for x, y in _loosened(loop))}z" for loop in _contours(self.values)
        )


class MaskCache:
    """Decoded masks by their codes: of an answer that grows, each is decoded once.

    Args:
        decode_mask: that of the model, if it is loaded.
    """

    def __init__(self, decode_mask: Callable[[Sequence[int]], np.ndarray | None] | None):
        self._decode_mask = decode_mask
        self._masks: dict[tuple[int, ...], Mask | None] = {(): None}

    def __call__(self, codes: tuple[int, ...]) -> Mask | None:
        if codes not in self._masks:
            values = self._decode_mask(codes) if self._decode_mask else None
            self._masks[codes] = None if values is None else Mask(values)
        return self._masks[codes]


@dataclass(frozen=True)
class MarkedObject:
    """A detection with its color, and its mask where it has one."""

    detection: Detection
    color: str
    mask: Mask | None = None

    @property
    def label(self) -> str:
        return self.detection.label or UNNAMED


def mark_objects(detections: Iterable[Detection], masks: MaskCache) -> list[MarkedObject]:
    """Give each detection a color, and its mask if there is one."""
    return [
        MarkedObject(found, COLORS[place % len(COLORS)], masks(found.codes)) for place, found in enumerate(detections)
    ]


def to_json(objects: Iterable[MarkedObject], size: tuple[int, int], with_masks: bool = True) -> list[dict[str, object]]:
    """Objects for programs.

    Args:
        size: width and height of the image in pixels.

    Returns:
        for each object `label`, `box` [x_min, y_min, x_max, y_max] in pixels, and `mask`, None or COCO's run lengths.
    """
    return [
        {
            "label": marked.label,
            "box": list(marked.detection.in_pixels(*size)),
            "mask": run_lengths(marked.mask.values, marked.detection, *size) if marked.mask and with_masks else None,
        }
        for marked in objects
    ]


def draw(image: Image.Image, objects: Sequence[MarkedObject]) -> Image.Image:
    """A copy of the image, RGB, with masks, boxes and names drawn on it."""
    drawn = image.convert("RGB")
    for marked in objects:
        if marked.mask is not None:
            inside = place_mask(marked.mask.values, marked.detection, *drawn.size) * round(255 * MASK_OPACITY)
            drawn.paste(marked.color, mask=Image.fromarray(inside.astype(np.uint8)))
    pen = ImageDraw.Draw(drawn)
    line = max(2, min(drawn.size) // 200)
    font = ImageFont.load_default(max(12, min(drawn.size) // 25))
    for marked in objects:
        x_min, y_min, x_max, y_max = marked.detection.in_pixels(*drawn.size)
        pen.rectangle((x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)), outline=marked.color, width=line)
        left, top, right, bottom = pen.textbbox((0, 0), marked.label, font)
        width, height = right + 2 * line, bottom + top
        x, y = _place_of_name((x_min, y_min), (width, height), drawn.size)
        pen.rectangle((x, y, x + width, y + height), fill=marked.color)
        pen.text((x + line, y), marked.label, "white", font)
    return drawn


def figure_html(size: tuple[int, int], objects: Sequence[MarkedObject]) -> str:
    """The marks of an image as SVG, to be laid over it, each object's with the number that `answers_html` gives its words.

    Args:
        size: width and height of the image in pixels, which are the units of the drawing.
    """
    width, height = size
    marks = "".join(_mark_svg(number, marked, size) for number, marked in enumerate(objects))
    names = ", ".join(marked.label for marked in objects)
    return (
        f'<svg class="marks" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Marked on the picture: {escape(names)}">{marks}</svg>'
    )


def _mark_svg(number: int, marked: MarkedObject, size: tuple[int, int]) -> str:
    x_min, y_min, x_max, y_max = marked.detection.in_pixels(*size)
    outline = ""
    if marked.mask is not None:  # a drawing that is stretched over the box
        rows, columns = marked.mask.values.shape
        scale = f"{(x_max - x_min) / columns:.4f} {(y_max - y_min) / rows:.4f}"
        transform = f"translate({x_min} {y_min}) scale({scale})"
        outline = f'<path class="mask" transform="{transform}" d="{marked.mask.outline}"/>'
    letter = max(size) * NAME_SCALE
    letters = LETTER_WIDTH * len(marked.label)
    letter *= min(1, size[0] / ((letters + 2 * NAME_PADDING) * letter))  # a long name is written smaller
    width, height = (letters + 2 * NAME_PADDING) * letter, NAME_HEIGHT * letter
    x, y = _place_of_name((x_min, y_min), (width, height), size)
    return (
        f'<g data-object="{number}" style="--color: {marked.color}">{outline}'
        f'<rect class="box" x="{x_min}" y="{y_min}" width="{x_max - x_min}" height="{y_max - y_min}"/>'
        f'<rect class="name" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
        f'<text x="{x + NAME_PADDING * letter:.1f}" y="{y + height - NAME_PADDING * letter:.1f}" font-size="{letter:.1f}"'
        f' textLength="{letters * letter:.1f}" lengthAdjust="spacingAndGlyphs">{escape(marked.label)}</text></g>'
    )


def _place_of_name(
    corner: tuple[float, float], name: tuple[float, float], size: tuple[int, int]
) -> tuple[float, float]:
    """Where a name begins: above its box, below the box's upper border if there is no space, and never outside the image."""
    x, y = corner
    y = y - name[1] if y >= name[1] else y
    return max(0, min(x, size[0] - name[0])), max(0, min(y, size[1] - name[1]))


def _contours(values: np.ndarray) -> Iterator[list[tuple[float, float]]]:
    """The closed lines where values change their sign, by marching squares with linear interpolation.

    Args:
        values: float [rows, columns], above zero inside; the first value lies at (0.5, 0.5), and beyond the outermost
            ones all is outside.

    Yields:
        the points (x, y) of a line, in order.
    """
    padded = np.pad(values.astype(float), 1, mode="edge")
    for border in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        padded[border] = -np.abs(padded[border])
    inside = padded > 0
    counts = sum(
        inside[y : y + len(values) + 1, x : x + values.shape[1] + 1].astype(int) for y in (0, 1) for x in (0, 1)
    )
    after: dict[frozenset, frozenset] = {}  # the edge of the grid that a line crosses after another
    for row, column in np.argwhere((counts > 0) & (counts < 4)).tolist():
        corners = [(row, column), (row, column + 1), (row + 1, column + 1), (row + 1, column)]
        crossed = [
            (one, other) for one, other in zip(corners, corners[1:] + corners[:1]) if inside[one] != inside[other]
        ]
        for place, (one, other) in enumerate(crossed):
            if inside[one]:
                after[frozenset((one, other))] = frozenset(crossed[(place + 1) % len(crossed)])
    while after:
        start, edge = after.popitem()
        loop = [_crossing(start, padded)]
        while edge != start:
            loop.append(_crossing(edge, padded))
            edge = after.pop(edge)
        yield loop


def _crossing(edge: frozenset[tuple[int, int]], padded: np.ndarray) -> tuple[float, float]:
    """Where on an edge between two neighbors the value is zero, (x, y)."""
    (row, column), (other_row, other_column) = one, other = sorted(edge)
    share = padded[one] / (padded[one] - padded[other])
    return column + share * (other_column - column) - 0.5, row + share * (other_row - row) - 0.5


def _loosened(loop: Sequence[tuple[float, float]]) -> np.ndarray:
    """The points of a closed line, each moved to the mean of itself and its neighbors, [points, 2]."""
    points = np.array(loop)
    return (np.roll(points, 1, 0) + 2 * points + np.roll(points, -1, 0)) / 4


def answers_html(answers: Iterable[Answer], objects: Sequence[MarkedObject], empty: str) -> str:
    """Each prompt with its answer, the words of each object in its color.

    Args:
        objects: those of all answers, in order.
        empty: what is said of a finished answer without words.
    """
    html, first = [], 0
    for answer in answers:
        text = _text_html(answer.annotated.parts, objects, first)
        first += len(answer.annotated.detections)
        if answer.is_finished and not answer.text:
            text = f"<em>{escape(empty)}</em>"
        skipped = "; ".join(answer.annotated.problems)
        note = f'<p class="note">Left out, since it is broken: {escape(skipped)}.</p>' if skipped else ""
        html.append(f'<div class="answer"><code>{escape(answer.prompt)}</code><p class="text">{text}</p>{note}</div>')
    return "".join(html)


def _text_html(parts: Iterable[Part], objects: Sequence[MarkedObject], first: int) -> str:
    html, number = [], first
    for part in parts:
        if part.detection is None:
            kind = "skipped" if part.problem else "plain"
            html.append(f'<span class="{kind}">{escape(part.text)}</span>')
            continue
        marks = part.text.removesuffix(part.detection.label)
        folded = "mask" if part.detection.codes else "box"
        html.append(
            f'<span class="object" data-object="{number}" tabindex="0" style="--color: {objects[number].color}">'
            f'<small data-folded="{folded}">{escape(marks)}</small><b>{escape(part.detection.label)}</b></span>'
        )
        number += 1
    return "".join(html)


def linking_css() -> str:
    """Rules that light up an object's mark and its words together while the pointer or the focus is on either."""
    chosen = 'body:has([data-object="{}"]:is(:hover, :focus))'
    numbers = range(MAX_LINKED)
    marks = ", ".join(f'{chosen.format(number)} .marks g[data-object="{number}"]' for number in numbers)
    labels = ", ".join(f'{chosen.format(number)} .answer [data-object="{number}"]' for number in numbers)
    others = "body:has([data-object]:is(:hover, :focus)) .marks g"
    return f"{others} {{ opacity: 0.15; }} {marks} {{ opacity: 1; }} {labels} {{ outline: 2px solid var(--color); }}"


def thumbnails_html(title: str, choices: Iterable[tuple[str, str]]) -> str:
    """A row of small images to choose from, each a button with its number as `data-choice`; nothing if there are none.

    Args:
        choices: the address of each image, and what is written under it.
    """
    buttons = "".join(
        f'<button type="button" data-choice="{number}"><img src="{escape(url)}" alt=""><span>{escape(text)}</span></button>'
        for number, (url, text) in enumerate(choices)
    )
    return f'<h2 class="title">{escape(title)}</h2><div class="thumbnails">{buttons}</div>' if buttons else ""
