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
OUTLINE_STEPS = 96  # rows that a mask is cut into on the page
MASK_OPACITY = 0.45


@dataclass(frozen=True)
class Mask:
    """A decoded mask, float32 [64, 64] and above zero inside."""

    values: np.ndarray

    @cached_property
    def outline(self) -> str:
        """What is inside as an SVG path of bars in `OUTLINE_STEPS` rows and columns."""
        inside = place_mask(self.values, Detection("", (0.0, 0.0, 1.0, 1.0)), OUTLINE_STEPS, OUTLINE_STEPS)
        return "".join(f"M{start} {row}h{end - start}v1h{start - end}z" for row, start, end in _bars(inside))


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
        height = bottom + top
        y = y_min - height if y_min >= height else y_min
        pen.rectangle((x_min, y, x_min + right + 2 * line, y + height), fill=marked.color)
        pen.text((x_min + line, y), marked.label, "white", font)
    return drawn


def figure_html(image_url: str, size: tuple[int, int], objects: Sequence[MarkedObject]) -> str:
    """The image with its marks as SVG, each object's with the number that `answers_html` gives its words."""
    width, height = size
    marks = "".join(_mark_svg(number, marked, size) for number, marked in enumerate(objects))
    names = ", ".join(marked.label for marked in objects)
    return (
        f'<div class="marked" style="aspect-ratio: {width} / {height}; --shape: {width / height:.4f}">'
        f'<img src="{escape(image_url)}" alt="Your picture with {len(objects)} marked: {escape(names)}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{marks}</svg></div>'
    )


def _mark_svg(number: int, marked: MarkedObject, size: tuple[int, int]) -> str:
    x_min, y_min, x_max, y_max = marked.detection.in_pixels(*size)
    text_size = max(size) / 28
    y = y_min if y_min >= 1.4 * text_size else y_min + 1.4 * text_size
    label, letters = escape(marked.label), len(marked.label)
    outline = ""
    if marked.mask is not None:  # a grid that is stretched over the box
        scale = f"{(x_max - x_min) / OUTLINE_STEPS:.4f} {(y_max - y_min) / OUTLINE_STEPS:.4f}"
        transform = f"translate({x_min} {y_min}) scale({scale})"
        outline = f'<path class="mask" transform="{transform}" d="{marked.mask.outline}"/>'
    # The background of the name: SVG cannot measure a text, so its width is that of average letters.
    return (
        f'<g data-object="{number}" style="--color: {marked.color}">{outline}'
        f'<rect class="box" x="{x_min}" y="{y_min}" width="{x_max - x_min}" height="{y_max - y_min}"/>'
        f'<rect class="name" x="{x_min}" y="{y - 1.4 * text_size:.1f}" width="{(0.58 * letters + 0.8) * text_size:.1f}"'
        f' height="{1.4 * text_size:.1f}"/>'
        f'<text x="{x_min + 0.4 * text_size:.1f}" y="{y - 0.4 * text_size:.1f}" font-size="{text_size:.1f}"'
        f' textLength="{0.58 * letters * text_size:.1f}" lengthAdjust="spacingAndGlyphs">{label}</text></g>'
    )


def _bars(inside: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Row, first column and column after the last of each run that is inside."""
    edges = np.diff(np.pad(inside.astype(np.int8), ((0, 0), (1, 1))))
    for (row, start), (_, end) in zip(np.argwhere(edges == 1), np.argwhere(edges == -1)):
        yield int(row), int(start), int(end)


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
        html.append(
            f'<span class="object" data-object="{number}" tabindex="0" style="--color: {objects[number].color}">'
            f"<small>{escape(marks)}</small><b>{escape(part.detection.label)}</b></span>"
        )
        number += 1
    return "".join(html)


def linking_css() -> str:
    """Rules that light up an object's mark and its words together while the pointer or the focus is on either."""
    chosen = '#result:has([data-object="{}"]:is(:hover, :focus))'
    numbers = range(MAX_LINKED)
    marks = ", ".join(f'{chosen.format(number)} .marked g[data-object="{number}"]' for number in numbers)
    labels = ", ".join(f'{chosen.format(number)} .answer [data-object="{number}"]' for number in numbers)
    others = "#result:has([data-object]:is(:hover, :focus)) .marked g"
    return f"{others} {{ opacity: 0.15; }} {marks} {{ opacity: 1; }} {labels} {{ outline: 2px solid var(--color); }}"
