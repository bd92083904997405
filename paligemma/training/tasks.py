"""What is asked about a scene, and the true answer: prompts in the official syntax."""

from __future__ import annotations

import numpy as np

from .artwork import KINDS
from .colours import COLOURS
from .scenes import MAX_OBJECTS, Box, Scene, SceneObject

CAPTION_PROMPT = "caption en"
DESCRIBE_PROMPT = "describe en"
OCR_PROMPT = "ocr"
BACKGROUND_PROMPT = "answer en what color is the background?"
LARGEST_PROMPT = "answer en what is the largest object?"
# Boxes are told in 1024ths, in steps of eight: less than two pixels of the largest pictures, and an eighth of the words.
LOC_STEP = 8
LAST_STEP = 1024 // LOC_STEP - 1
ASK_ABOUT_ABSENT = 0.11  # how often a question is about a kind that is not there
LARGE, SMALL = 0.16, 0.06  # of the picture's area: from and up to which a box is called so
CLEARLY_LARGER = 1.25  # times the area of the second largest box
CLEARLY_BESIDE = 0.05  # of the picture: less is not asked about
# Where a neighbour is: the question's words, the axis (0: y, 1: x) and the way along it.
DIRECTIONS = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
Slip = tuple[int, int]  # the first character of what is wrong in a text, and the first after it
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)


def caption(scene: Scene) -> str:
    """Kinds with their counts, from left to right by first appearance: `2 cats and a guitar on a blue background`."""
    parts = [_with_number(kind, scene.count(kind)) for kind in kinds_by_first_appearance(scene)]
    return _on_background(parts, scene)


def caption_with_slip(rng: np.random.Generator, scene: Scene) -> tuple[str, Slip]:
    """The caption with one kind named before its turn, or in a wrong number, and where in it: what follows is right.

    What comes after a slip is what one would say then: neither what has been named again, nor anything left out.
    """
    kinds = kinds_by_first_appearance(scene)
    place = int(rng.integers(len(kinds)))
    counts = {kind: scene.count(kind) for kind in kinds}
    if place + 1 < len(kinds) and rng.random() < 0.5:
        kinds[place], kinds[place + 1] = kinds[place + 1], kinds[place]
    else:
        count = counts[kinds[place]]
        counts[kinds[place]] += 1 if count == 1 or (count < MAX_OBJECTS and rng.random() < 0.5) else -1
    parts = [_with_number(kind, counts[kind]) for kind in kinds]
    # Found by a mark, since "a car" is in "a carrot" as well.
    start = _on_background([*parts[:place], "*", *parts[place + 1 :]], scene).index("*")
    return _on_background(parts, scene), (start, start + len(parts[place]))


def kinds_by_first_appearance(scene: Scene) -> list[int]:
    """Each kind once, by which of its objects begins furthest left."""
    return list(dict.fromkeys(thing.kind for thing in _from_left_to_right(scene)))


def description(scene: Scene) -> str:
    """Each object from left to right, how large, of which colour and where: `a large red apple on the left and …`."""
    parts = []
    for thing in _from_left_to_right(scene):
        y_min, x_min, y_max, x_max = thing.box
        area = (y_max - y_min) * (x_max - x_min)
        size = "large" if area >= LARGE else "small" if area <= SMALL else None
        phrase = " ".join(filter(None, (size, thing.colour, KINDS[thing.kind].name)))
        row, column = (min(2, int(1.5 * (low + high))) for low, high in ((y_min, y_max), (x_min, x_max)))
        parts.append(f"{_with_article(phrase)} {PLACES[row][column]}")
    return _on_background(parts, scene)


def count_prompt(kind: int) -> str:
    return f"answer en how many {KINDS[kind].plural} are there?"


def presence_prompt(kind: int) -> str:
    return f"answer en is there {_with_article(KINDS[kind].name)}?"


def neighbour_prompt(direction: str, kind: int) -> str:
    return f"answer en what is {direction} the {KINDS[kind].name}?"


def neighbour(scene: Scene, direction: str, kind: int) -> str | None:
    """The kind of the object nearest in a direction; None where the question has no clear answer.

    It is asked only about the one object of a kind. An object lies left of it if its centre does and is further away
    sideways than up or down; for the answer to be clear no object is near the border of that, and all that lie there
    are of one kind. Where none lies there, the answer is `nothing`.
    """
    if scene.count(kind) != 1:
        return None
    axis, way = DIRECTIONS[direction]
    (origin,) = (_centre(thing) for thing in scene.objects if thing.kind == kind)
    found = set()
    for thing in scene.objects:
        if thing.kind == kind:
            continue
        offset = _centre(thing) - origin
        along, aside = way * offset[axis], abs(offset[1 - axis])
        if along > 0 and abs(along - aside) < CLEARLY_BESIDE:
            return None
        if along > aside:
            found.add(KINDS[thing.kind].name)
    if len(found) > 1:
        return None
    return found.pop() if found else "nothing"


def largest(scene: Scene) -> str | None:
    """The kind of the largest object, by its box; None where it is not clear."""
    areas = {}
    for thing in scene.objects:
        y_min, x_min, y_max, x_max = thing.box
        areas[thing.kind] = max(areas.get(thing.kind, 0), (y_max - y_min) * (x_max - x_min))
    first, *others = sorted(areas, key=areas.get, reverse=True)
    if others and areas[first] < CLEARLY_LARGER * areas[others[0]]:
        return None
    return KINDS[first].name


def detect_prompt(*kinds: int) -> str:
    return "detect " + " ; ".join(KINDS[kind].name for kind in kinds)


def segment_prompt(*kinds: int) -> str:
    return "segment " + " ; ".join(KINDS[kind].name for kind in kinds)


def detections(scene: Scene, *kinds: int, codes: dict[int, list[int]] | None = None) -> str:
    """Four loc tokens and the name for each object of the kinds, in reading order; empty when there is none.

    With `codes`, the mask codes of each object by owner, the 16 seg tokens of each come after its box.
    """
    parts = []
    for thing in scene.objects:
        if thing.kind in kinds:
            mask = "" if codes is None else "".join(f"<seg{code:03d}>" for code in codes[thing.owner])
            parts.append(f"{loc_tokens(thing)}{mask} {KINDS[thing.kind].name}")
    return " ; ".join(parts)


def loc_tokens(thing: SceneObject) -> str:
    return "".join(f"<loc{step * LOC_STEP:04d}>" for step in loc_steps(thing.box))


def loc_steps(box: Box) -> list[int]:
    """Where the sides of a box are told to be, in steps of `LOC_STEP` 1024ths of the picture."""
    return [min(round(side * 1024 / LOC_STEP), LAST_STEP) for side in box]


def prompts_and_answers(
    rng: np.random.Generator, scene: Scene, codes: dict[int, list[int]], kinds: list[int]
) -> list[tuple[str, str]]:
    """The mixture: what to ask about a scene, each task as often as its answers are long and hard.

    Args:
        codes: the mask codes of each object, by owner.
        kinds: those that absent ones are taken from.
    """
    pairs = [(CAPTION_PROMPT, caption(scene))] if rng.random() < 0.9 else [(DESCRIBE_PROMPT, description(scene))]
    one, other = _kind_to_ask_about(rng, scene, kinds), _kind_to_ask_about(rng, scene, kinds)
    pairs.append((detect_prompt(one), detections(scene, one)))
    if one != other:
        both = rng.random() < 0.4
        pairs.append(
            (detect_prompt(one, other), detections(scene, one, other))
            if both
            else (detect_prompt(other), detections(scene, other))
        )
    if scene.word or rng.random() < 0.05:
        pairs.append((OCR_PROMPT, scene.word))
    if rng.random() < 0.6:
        segmented = _kind_to_ask_about(rng, scene, kinds)
        pairs.append((segment_prompt(segmented), detections(scene, segmented, codes=codes)))
    if rng.random() < 0.1:
        pairs.append((BACKGROUND_PROMPT, scene.background))
    questions = questions_and_answers(rng, scene, kinds)
    pairs.extend(questions[index] for index in rng.permutation(len(questions))[:2])
    return pairs


def questions_and_answers(rng: np.random.Generator, scene: Scene, kinds: list[int]) -> list[tuple[str, str]]:
    """One prompt of each sort of question about objects that has a clear answer."""
    counted, present = (_kind_to_ask_about(rng, scene, kinds, absent) for absent in (0.25, 0.5))
    pairs = [
        (count_prompt(counted), str(scene.count(counted))),
        (presence_prompt(present), "yes" if scene.count(present) else "no"),
    ]
    direction = tuple(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
    known = scene.objects[rng.integers(len(scene.objects))].kind
    for prompt, answer in (
        (LARGEST_PROMPT, largest(scene)),
        (neighbour_prompt(direction, known), neighbour(scene, direction, known)),
    ):
        if answer is not None:
            pairs.append((prompt, answer))
    return pairs


def every_text() -> list[str]:
    """Every phrase the tasks can use, for the tokenizer to learn its words from."""
    texts = [
        CAPTION_PROMPT,
        DESCRIBE_PROMPT,
        OCR_PROMPT,
        BACKGROUND_PROMPT,
        LARGEST_PROMPT,
        "yes",
        "no",
        "nothing",
        " ;",
    ]
    texts += [f"a large cat {place}, a small dog {place} and a dog" for row in PLACES for place in row]
    for colour in COLOURS:
        texts += [colour, f"on {_with_article(colour)} background", f"a large {colour} cat and a small {colour} dog"]
    for index, kind in enumerate(KINDS):
        texts += [count_prompt(index), presence_prompt(index), detect_prompt(index, index), segment_prompt(index)]
        texts += [neighbour_prompt(direction, index) for direction in DIRECTIONS]
        texts += [f"{_with_article(kind.name)} and {_with_article(kind.name)},", kind.name]
        texts += [f"{count} {kind.plural}, {kind.plural}" for count in range(2, MAX_OBJECTS + 1)]
    return texts  # and none of the words that are painted: those are read letter by letter


def _kind_to_ask_about(
    rng: np.random.Generator, scene: Scene, kinds: list[int], absent: float = ASK_ABOUT_ABSENT
) -> int:
    if rng.random() < absent:
        return kinds[rng.integers(len(kinds))]
    return scene.objects[rng.integers(len(scene.objects))].kind


def _from_left_to_right(scene: Scene) -> list[SceneObject]:
    return sorted(scene.objects, key=lambda thing: thing.box[1])


def _centre(thing: SceneObject) -> np.ndarray:
    """(y, x)."""
    return (np.array(thing.box[:2]) + thing.box[2:]) / 2


def _on_background(parts: list[str], scene: Scene) -> str:
    return f"{_list(parts)} on {_with_article(scene.background)} background"


def _with_number(kind: int, count: int) -> str:
    return _with_article(KINDS[kind].name) if count == 1 else f"{count} {KINDS[kind].plural}"


def _with_article(noun: str) -> str:
    vowel_sound = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel_sound else 'a'} {noun}"


def _list(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
