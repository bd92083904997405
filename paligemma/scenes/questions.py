"""What is asked about a scene, in the official prompt syntax, and the true answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import LOC_STEPS, LOC_TOKENS
from .artwork import KINDS
from .painter import Scene, SceneObject, area

CAPTION_PROMPT = "caption en"
DESCRIBE_PROMPT = "describe en"
OCR_PROMPT = "ocr"
BACKGROUND_PROMPT = "answer en what color is the background?"
LARGEST_PROMPT = "answer en what is the largest object?"
LOC_STRIDE = 8  # the embedded checkpoint knows every eighth of the loc tokens
LARGE, SMALL = 0.16, 0.06  # of the image's area: from and up to which a box is called so
CLEARLY_LARGER = 1.25  # times the area of the second largest box
CLEARLY_BESIDE = 0.05  # of the image's side: smaller differences are not asked about
# The words for a direction, its axis (0: y, 1: x), and the sign of the way along it.
DIRECTIONS = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)


@dataclass(frozen=True)
class Question:
    """A prompt and its true answer, which is without the codes of masks.

    task: the sort of question. kind: what it is about, if it is about one kind.
    """

    task: str
    prompt: str
    answer: str
    kind: int | None = None


def questions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """One question of each task that has a clear answer, and `detect` for every kind in the scene."""
    present = sorted({thing.kind for thing in scene.objects})
    absent = int(rng.choice([kind for kind in range(len(KINDS)) if kind not in present]))
    one = int(rng.choice(present))
    direction = str(rng.choice(list(DIRECTIONS)))
    asked = [
        Question("caption", CAPTION_PROMPT, caption(scene)),
        Question("describe", DESCRIBE_PROMPT, description(scene)),
        Question("how many, kind present", count_prompt(one), str(scene.count(one)), one),
        Question("how many, kind absent", count_prompt(absent), "0", absent),
        Question("is there, kind present", presence_prompt(one), "yes", one),
        Question("is there, kind absent", presence_prompt(absent), "no", absent),
        Question("what color is the background", BACKGROUND_PROMPT, scene.background),
        Question("detect, kind absent", detect_prompt(absent), "", absent),
        Question("segment", segment_prompt(one), detections(scene, one), one),
        *(Question("detect", detect_prompt(kind), detections(scene, kind), kind) for kind in present),
    ]
    if (name := neighbor(scene, direction, one)) is not None:
        asked.append(Question("what is left of, right of, above, below", neighbor_prompt(direction, one), name, one))
    if (name := largest(scene)) is not None:
        asked.append(Question("what is the largest object", LARGEST_PROMPT, name))
    if scene.word:
        asked.append(Question("ocr", OCR_PROMPT, scene.word))
    return asked


def count_prompt(kind: int) -> str:
    return f"answer en how many {KINDS[kind].plural} are there?"


def presence_prompt(kind: int) -> str:
    return f"answer en is there {_with_article(KINDS[kind].name)}?"


def neighbor_prompt(direction: str, kind: int) -> str:
    return f"answer en what is {direction} the {KINDS[kind].name}?"


def detect_prompt(*kinds: int) -> str:
    return "detect " + " ; ".join(KINDS[kind].name for kind in kinds)


def segment_prompt(*kinds: int) -> str:
    return "segment " + " ; ".join(KINDS[kind].name for kind in kinds)


def caption(scene: Scene) -> str:
    """Kinds with their counts, from left to right by first appearance: `2 cats and a guitar on a blue background`."""
    parts = []
    for kind in dict.fromkeys(thing.kind for thing in _from_left_to_right(scene)):
        count = scene.count(kind)
        parts.append(_with_article(KINDS[kind].name) if count == 1 else f"{count} {KINDS[kind].plural}")
    return _on_background(parts, scene.background)


def caption_of_one(kind: int, background: str) -> str:
    """The caption of a scene with a single object: `a guitar on a blue background`."""
    return _on_background([_with_article(KINDS[kind].name)], background)


def description(scene: Scene) -> str:
    """Size, color and place of each object, from left to right: `a large red apple on the left and …`."""
    parts = []
    for thing in _from_left_to_right(scene):
        size = "large" if area(thing.box) >= LARGE else "small" if area(thing.box) <= SMALL else None
        phrase = " ".join(filter(None, (size, thing.color, KINDS[thing.kind].name)))
        row, column = (min(2, int(3 * middle)) for middle in _center(thing))
        parts.append(f"{_with_article(phrase)} {PLACES[row][column]}")
    return _on_background(parts, scene.background)


def neighbor(scene: Scene, direction: str, kind: int) -> str | None:
    """The kind of the object nearest in a direction; None where the question has no clear answer.

    It is asked only about the one object of a kind. An object lies left of it if its center does and is further away
    sideways than up or down; for the answer to be clear no object is near the border of that, and all that lie there
    are of one kind. Where none lies there, the answer is `nothing`.
    """
    if scene.count(kind) != 1:
        return None
    axis, sign = DIRECTIONS[direction]
    (origin,) = (_center(thing) for thing in scene.objects if thing.kind == kind)
    names = set()
    for thing in scene.objects:
        if thing.kind == kind:
            continue
        offset = _center(thing) - origin
        along, aside = sign * offset[axis], abs(offset[1 - axis])
        if along > 0 and abs(along - aside) < CLEARLY_BESIDE:
            return None
        if along > aside:
            names.add(KINDS[thing.kind].name)
    if len(names) > 1:
        return None
    return names.pop() if names else "nothing"


def largest(scene: Scene) -> str | None:
    """The kind of the largest object, by its box; None where it is not clear."""
    areas: dict[int, float] = {}
    for thing in scene.objects:
        areas[thing.kind] = max(areas.get(thing.kind, 0), area(thing.box))
    first, *others = sorted(areas, key=lambda kind: areas[kind], reverse=True)
    if others and areas[first] < CLEARLY_LARGER * areas[others[0]]:
        return None
    return KINDS[first].name


def detections(scene: Scene, *kinds: int) -> str:
    """Four loc tokens and the name for each object of the kinds, in reading order; empty when there is none.

    Answers to `segment` have the codes of a mask between the two.
    """
    return " ; ".join(
        f"{''.join(map(_loc_token, thing.box))} {KINDS[thing.kind].name}"
        for thing in scene.objects
        if thing.kind in kinds
    )


def _loc_token(side: float) -> str:
    """The token of a box's side, a fraction of the image's height or width."""
    return LOC_TOKENS[min(LOC_STRIDE * round(side * LOC_STEPS / LOC_STRIDE), LOC_STEPS - LOC_STRIDE)]


def _from_left_to_right(scene: Scene) -> list[SceneObject]:
    return sorted(scene.objects, key=lambda thing: thing.box[1])


def _center(thing: SceneObject) -> np.ndarray:
    """Float64 [2], (y, x)."""
    return (np.array(thing.box[:2]) + thing.box[2:]) / 2


def _on_background(parts: list[str], background: str) -> str:
    """`a on a red background`, `a and b on …`, `a, b and c on …`."""
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return f"{listed} on {_with_article(background)} background"


def _with_article(noun: str) -> str:
    has_vowel_sound = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if has_vowel_sound else 'a'} {noun}"
