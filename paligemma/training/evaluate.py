"""How well answers agree with the true ones: their words and their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ..annotations import Detection, find_detections
from ..scenes.painter import Box, SceneObject, area, intersection

IOU_TO_MATCH = 0.5
BoxedT = TypeVar("BoxedT", Detection, SceneObject)


def answer_figures(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """How well answers agree with the true ones, from 0 to 1.

    Returns:
        the share that is exactly right, white space at the ends aside; and where true answers hold boxes, the F1 of all
        boxes together: those of the same label that overlap by half, or more, are right.
    """
    figures = {"exact match": float(np.mean([one.strip() == true.strip() for one, true in zip(answers, truths)]))}
    found, true = ([find_detections(text) for text in texts] for texts in (answers, truths))
    if any(true):
        pairs = sum(
            len(match([one for one in ours if one.label == label], [one for one in theirs if one.label == label]))
            for ours, theirs in zip(found, true)
            for label in {one.label for one in theirs}
        )
        figures["box F1"] = 2 * pairs / sum(map(len, [*found, *true]))
    return figures


def match(detections: Sequence[Detection], objects: Sequence[BoxedT]) -> list[tuple[Detection, BoxedT]]:
    """Pairs of a detection and an object whose boxes overlap enough, each used once."""
    free, pairs = list(objects), []
    for detection in detections:
        best = max(free, key=lambda thing: intersection_over_union(thing.box, detection.box), default=None)
        if best is not None and intersection_over_union(best.box, detection.box) >= IOU_TO_MATCH:
            free.remove(best)
            pairs.append((detection, best))
    return pairs


def intersection_over_union(one: Box, other: Box) -> float:
    """Of two boxes, from 0 to 1."""
    shared = intersection(one, other)
    return shared / (area(one) + area(other) - shared)
