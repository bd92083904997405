"""How well a checkpoint answers questions about fresh scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from paligemma import VisionLanguageModel
from paligemma.annotations import Detection, find_detections, place_mask
from paligemma.scenes.artwork import KINDS
from paligemma.scenes.painter import MAX_OBJECTS, Painter, Scene
from paligemma.scenes.questions import Question, questions
from paligemma.training.evaluate import match

SCENE_SIZE = 336  # pixels, as the page's new scenes
SEED = 20_000_000
MAX_NEW_TOKENS = 160  # six masks
PLURALS = {kind.plural: kind.name for kind in KINDS}
# In the order of a table. What is named after a task is the share of answers that are exactly right.
FIGURES = (
    "caption",
    "caption: kinds, intersection over union",
    "describe",
    "how many, kind present",
    "how many, kind absent",
    "is there, kind present",
    "is there, kind absent",
    "what is left of, right of, above, below",
    "how many / is there / where",
    "what is the largest object",
    "what color is the background",
    "detect: F1 at IoU 0.5",
    "detect, kind absent",
    "segment: mean IoU of masks of found objects",
    "segment: share of objects found",
    "ocr",
)


def draw_scenes(painter: Painter, count: int) -> list[Scene]:
    """Scenes of one to six objects, about as many of each number; the same ones at each call."""
    rng = np.random.default_rng(SEED)
    return [painter.random_scene(rng, SCENE_SIZE, number % MAX_OBJECTS + 1) for number in range(count)]


def evaluate(vlm: VisionLanguageModel, scenes: Sequence[Scene]) -> dict[int, dict[str, float]]:
    """Ask every question about every scene, greedily.

    Returns:
        figures by their names, from 0 to 1, for each number of objects in a scene, and under 0 for all scenes.
    """
    rng = np.random.default_rng(SEED)
    sums: dict[int, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(2)))
    for scene in scenes:
        asked = questions(rng, scene)
        prompts = [question.prompt for question in asked]
        answers = vlm.generate_batch([scene.image] * len(asked), prompts, max_new_tokens=MAX_NEW_TOKENS)
        for question, answer in zip(asked, answers):
            for name, score, best_score in _scores(vlm, scene, question, answer):
                for group in (0, len(scene.objects)):
                    sums[group][name] += score, best_score
    return {
        group: {name: sums[group][name][0] / sums[group][name][1] for name in FIGURES if name in sums[group]}
        for group in sorted(sums)
    }


def _scores(
    vlm: VisionLanguageModel, scene: Scene, question: Question, answer: str
) -> Iterator[tuple[str, float, float]]:
    """What an answer adds to figures: the name of each, the score, and the best score there could be."""
    if question.task in ("detect", "segment"):
        yield from _detection_scores(vlm, scene, question, answer)
        return
    is_right = answer == question.answer
    yield question.task, is_right, 1
    if question.task == "caption":
        named, true = kinds_in_caption(answer), {KINDS[thing.kind].name for thing in scene.objects}
        yield "caption: kinds, intersection over union", len(named & true) / len(named | true), 1
    if question.task.startswith(("how many", "is there", "what is left of")):
        yield "how many / is there / where", is_right, 1


def _detection_scores(
    vlm: VisionLanguageModel, scene: Scene, question: Question, answer: str
) -> Iterator[tuple[str, float, float]]:
    true = [thing for thing in scene.objects if thing.kind == question.kind]
    pairs = match([one for one in find_detections(answer) if one.label == KINDS[true[0].kind].name], true)
    if question.task == "detect":
        answered = answer.count(";") + bool(answer)  # broken ones and other names count as errors
        yield "detect: F1 at IoU 0.5", 2 * len(pairs), answered + len(true)
        return
    yield "segment: share of objects found", len(pairs), len(true)
    for detection, thing in pairs:
        yield "segment: mean IoU of masks of found objects", _mask_iou(vlm, detection, scene.mask(thing)), 1


def _mask_iou(vlm: VisionLanguageModel, detection: Detection, true: np.ndarray) -> float:
    """Of a detection's mask and the true one, bool [size, size]; zero if it has none."""
    mask = vlm.decode_mask(detection.codes) if detection.codes else None
    if mask is None:
        return 0.0
    placed = place_mask(mask, detection, *true.shape)
    return float((placed & true).sum() / (placed | true).sum())


def kinds_in_caption(text: str) -> set[str]:
    """The kinds that a caption names: `2 cats and an apple on a blue background` gives cat and apple."""
    names = [part.strip().partition(" ")[2] for part in text.rpartition(" on ")[0].replace(" and ", ", ").split(", ")]
    return {PLURALS.get(name, name) for name in names} - {""}
