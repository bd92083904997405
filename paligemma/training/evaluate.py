"""How good a checkpoint is on fresh scenes: what it is asked, and how its answers are scored."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from ..annotations import Detection, find_detections, place_mask
from ..generation import VisionLanguageModel
from ..kv_cache import KVCache
from .artwork import KINDS
from .scenes import MAX_OBJECTS, Painter, Scene
from .tasks import (
    BACKGROUND_PROMPT,
    CAPTION_PROMPT,
    DESCRIBE_PROMPT,
    DIRECTIONS,
    LARGEST_PROMPT,
    OCR_PROMPT,
    caption,
    count_prompt,
    description,
    detect_prompt,
    largest,
    neighbour,
    neighbour_prompt,
    presence_prompt,
    segment_prompt,
)

SCENE_SIZE = 448  # as a visitor would give it: larger than what the model sees
SEED = 20_000_000  # far from the seeds of training
IOU_TO_MATCH = 0.5
SCENES_AT_ONCE = 100
MAX_NEW_TOKENS = 160

PLURALS = {kind.plural: kind.name for kind in KINDS}
# What a figure is called, in the order of the table.
FIGURES = (
    "caption: exactly right",
    "caption: kinds, intersection over union",
    "describe: exactly right",
    "how many, kind present",
    "how many, kind absent",
    "is there, kind present",
    "is there, kind absent",
    "what is left of, right of, above, below",
    "how many / is there / where",
    "what is the largest object",
    "what color is the background",
    "detect: F1 at IoU 0.5",
    "detect: nothing of an absent kind",
    "segment: mean IoU of masks of found objects",
    "segment: share of objects found",
    "ocr: word exactly right",
)


@torch.inference_mode()
def answer_all(vlm: VisionLanguageModel, scenes: list[Scene], asked: list[tuple[int, str]]) -> list[str]:
    """What `vlm.generate` answers to each (number of the scene, prompt), many at a time."""
    pixel_values = torch.cat([vlm.processor.pixel_values(scene.image) for scene in scenes])
    features = vlm.model.image_features(pixel_values.to(vlm.device, vlm.dtype))
    by_length: dict[int, list[int]] = defaultdict(list)
    prompts = [vlm.processor.input_ids(prompt) for _, prompt in asked]
    for number, ids in enumerate(prompts):
        by_length[len(ids)].append(number)  # rows of a batch share one cache, and so their length
    answers = [""] * len(asked)
    for numbers in by_length.values():
        for start in range(0, len(numbers), SCENES_AT_ONCE):
            batch = numbers[start : start + SCENES_AT_ONCE]
            pictures = torch.tensor([asked[number][0] for number in batch])
            input_ids = torch.tensor([prompts[number] for number in batch], device=vlm.device)
            for number, answer in zip(batch, _greedy(vlm, features[pictures], input_ids)):
                answers[number] = answer
    return answers


def _greedy(vlm: VisionLanguageModel, features: torch.Tensor, input_ids: torch.Tensor) -> list[str]:
    rows, length = input_ids.shape
    cache = KVCache(vlm.config.text, rows, length + MAX_NEW_TOKENS, vlm.dtype, vlm.device)
    next_ids = vlm.model.prefill(features, input_ids, cache).argmax(-1)
    written = [next_ids]
    ended = torch.isin(next_ids, torch.tensor(vlm.config.eos_token_ids))
    while not ended.all() and len(written) < MAX_NEW_TOKENS:
        next_ids = vlm.model.decode(next_ids[:, None], cache, length + len(written)).argmax(-1)
        written.append(next_ids)
        ended |= torch.isin(next_ids, torch.tensor(vlm.config.eos_token_ids))
    answers = []
    for row in torch.stack(written, dim=1).tolist():
        end = next((place for place, id in enumerate(row) if id in vlm.config.eos_token_ids), len(row))
        answers.append(vlm.processor.tokenizer.decode(row[:end], skip_special_tokens=False))
    return answers


def draw_scenes(painter: Painter, count: int, size: int = SCENE_SIZE) -> list[Scene]:
    """Fresh scenes of one to six objects, as many of each."""
    rng = np.random.default_rng(SEED)
    return [painter.random_scene(rng, size, number % MAX_OBJECTS + 1) for number in range(count)]


class Scores:
    """Sums over scenes, and the figures made of them."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: float, of: float = 1.0) -> None:
        self.sums[name] += value
        self.counts[name] += of

    def figures(self) -> dict[str, float]:
        """By the names of `FIGURES`, those that something was asked for."""
        return {name: self.sums[name] / self.counts[name] for name in FIGURES if self.counts[name]}


def evaluate(vlm: VisionLanguageModel, painter: Painter, scenes: list[Scene]) -> dict[int, Scores]:
    """Ask every task about every scene; the scores by the number of objects, and of all scenes under 0."""
    scores: dict[int, Scores] = defaultdict(Scores)
    rng = np.random.default_rng(SEED)
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        some = scenes[start : start + SCENES_AT_ONCE]
        questions = [(number, *question) for number, scene in enumerate(some) for question in _ask(rng, scene, painter)]
        answers = answer_all(vlm, some, [(number, prompt) for number, prompt, _, _ in questions])
        for (number, _, figure, expected), answer in zip(questions, answers):
            for group in (len(some[number].objects), 0):
                _score(scores[group], vlm, some[number], figure, expected, answer)
    return dict(sorted(scores.items()))


def _ask(rng: np.random.Generator, scene: Scene, painter: Painter) -> list[tuple[str, str, object]]:
    """(prompt, figure, what is expected): a text, or the kind whose objects are to be found."""
    present = sorted({thing.kind for thing in scene.objects})
    absent = int(rng.choice([kind for kind in painter.kinds if kind not in present]))
    one = int(rng.choice(present))
    direction = str(rng.choice(list(DIRECTIONS)))
    questions = [
        (CAPTION_PROMPT, "caption: exactly right", caption(scene)),
        (DESCRIBE_PROMPT, "describe: exactly right", description(scene)),
        (count_prompt(one), "how many, kind present", str(scene.count(one))),
        (count_prompt(absent), "how many, kind absent", "0"),
        (presence_prompt(one), "is there, kind present", "yes"),
        (presence_prompt(absent), "is there, kind absent", "no"),
        (BACKGROUND_PROMPT, "what color is the background", scene.background),
        (detect_prompt(absent), "detect: nothing of an absent kind", ""),
        (segment_prompt(one), "segment: mean IoU of masks of found objects", one),
        *((detect_prompt(kind), "detect: F1 at IoU 0.5", kind) for kind in present),
    ]
    if (place := neighbour(scene, direction, one)) is not None:
        questions.append((neighbour_prompt(direction, one), "what is left of, right of, above, below", place))
    if (kind := largest(scene)) is not None:
        questions.append((LARGEST_PROMPT, "what is the largest object", kind))
    if scene.word:
        questions.append((OCR_PROMPT, "ocr: word exactly right", scene.word))
    return questions


def _score(scores: Scores, vlm: VisionLanguageModel, scene: Scene, figure: str, expected: object, answer: str) -> None:
    if figure.startswith(("detect: F1", "segment")):
        things = [thing for thing in scene.objects if thing.kind == expected]
        found = [box for box in find_detections(answer) if box.label == KINDS[expected].name]
        pairs = match(found, [thing.box for thing in things])
        if figure.startswith("detect"):
            said = answer.count(";") + bool(answer)  # broken ones and wrong names count as errors
            scores.add(figure, 2 * len(pairs), of=said + len(things))
            return
        scores.add("segment: share of objects found", len(pairs), of=len(things))
        for one, other in pairs:
            scores.add(figure, _mask_iou(vlm, scene, found[one], scene.mask(things[other]), things[other].box))
        return
    scores.add(figure, answer == expected)
    if figure.startswith("caption"):
        named, true = kinds_of(answer), {KINDS[thing.kind].name for thing in scene.objects}
        scores.add("caption: kinds, intersection over union", len(named & true) / len(named | true))
    if figure.startswith(("how many", "is there", "what is left")):
        scores.add("how many / is there / where", answer == expected)


def _mask_iou(
    vlm: VisionLanguageModel, scene: Scene, detection: Detection, mask: np.ndarray, box: tuple[float, ...]
) -> float:
    """Of a detection's mask, nothing if it has none, and the true one in its box."""
    size = scene.image.width
    if not detection.codes:
        return 0.0
    said = place_mask(vlm.decode_mask(detection.codes), detection, size, size)
    true = np.zeros((size, size), bool)
    top, left = round(box[0] * size), round(box[1] * size)
    true[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return (said & true).sum() / (said | true).sum()


def kinds_of(text: str) -> set[str]:
    """The kinds that a caption names: `2 cats and an apple on a blue background` gives cat and apple."""
    kinds = set()
    for part in text.rpartition(" on ")[0].replace(" and ", ", ").split(", "):
        _, _, name = part.strip().partition(" ")
        kinds.add(PLURALS.get(name, name))
    return kinds - {""}


def intersection_over_union(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Of two boxes (y_min, x_min, y_max, x_max)."""
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    if height <= 0 or width <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return height * width / (sum(areas) - height * width)


def match(found: list[Detection], true_boxes: list[tuple[float, ...]]) -> list[tuple[int, int]]:
    """Pairs of indices of detections and of true boxes that overlap enough, each used once."""
    free, pairs = set(range(len(true_boxes))), []
    for number, detection in enumerate(found):
        best = max(free, key=lambda index: intersection_over_union(true_boxes[index], detection.box), default=None)
        if best is not None and intersection_over_union(true_boxes[best], detection.box) >= IOU_TO_MATCH:
            free.remove(best)
            pairs.append((number, best))
    return pairs
