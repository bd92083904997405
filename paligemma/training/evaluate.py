"""How good a checkpoint is on fresh scenes: `python -m paligemma.training.evaluate [--model FOLDER]`.

Prints a table, by number of objects and for all scenes together.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np

from ..annotations import Detection, find_detections
from ..checkpoints import load
from ..generation import VisionLanguageModel
from .artwork import KINDS, load_sprites
from .scenes import MAX_OBJECTS, Scene, choose_kinds, draw_scene
from .tasks import CAPTION_PROMPT, caption, count_prompt, detect_prompt

SPRITE_SIZE = 320
SCENE_SIZE = 448  # as a visitor would give it: larger than what the model sees
SEED = 20_000_000  # far from the seeds of training
IOU_TO_MATCH = 0.5

PLURALS = {kind.plural: kind.name for kind in KINDS}


def kinds_of(text: str) -> set[str]:
    """The kinds that a caption names: `2 cats and an apple` gives cat and apple."""
    kinds = set()
    for part in text.replace(" and ", ", ").split(", "):
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


def count_matches(found: list[Detection], true_boxes: list[tuple[float, ...]]) -> int:
    """How many true boxes are found, each by a box of its own."""
    free, matches = list(true_boxes), 0
    for detection in found:
        best = max(free, key=lambda box: intersection_over_union(box, detection.box), default=None)
        if best is not None and intersection_over_union(best, detection.box) >= IOU_TO_MATCH:
            free.remove(best)
            matches += 1
    return matches


class Scores:
    """Sums over scenes, and the figures made of them."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)

    def add(self, vlm: VisionLanguageModel, scene: Scene, rng: np.random.Generator) -> None:
        present = {thing.kind for thing in scene.objects}
        self.sums["scenes"] += 1
        answer = vlm.generate(scene.image, CAPTION_PROMPT)
        named, true = kinds_of(answer), {KINDS[kind].name for kind in present}
        self.sums["caption exact"] += answer == caption(scene)
        self.sums["caption kinds"] += len(named & true) / len(named | true)
        absent = int(rng.choice([kind for kind in range(len(KINDS)) if kind not in present]))
        for kind in present:
            self.sums["counts"] += 1
            self.sums["count right"] += vlm.generate(scene.image, count_prompt(kind)) == str(scene.count(kind))
            answer = vlm.generate(scene.image, detect_prompt(kind))
            found = [box for box in find_detections(answer) if box.label == KINDS[kind].name]
            boxes = [thing.box for thing in scene.objects if thing.kind == kind]
            self.sums["boxes said"] += answer.count(";") + bool(answer)  # broken ones and wrong names count as errors
            self.sums["boxes true"] += len(boxes)
            self.sums["boxes matched"] += count_matches(found, boxes)
        self.sums["absent counted 0"] += vlm.generate(scene.image, count_prompt(absent)) == "0"
        self.sums["absent not detected"] += vlm.generate(scene.image, detect_prompt(absent)) == ""

    def figures(self) -> dict[str, float]:
        sums = self.sums
        return {
            "scenes": sums["scenes"],
            "caption exactly right": sums["caption exact"] / sums["scenes"],
            "caption kinds, intersection over union": sums["caption kinds"] / sums["scenes"],
            "count right, kind present": sums["count right"] / sums["counts"],
            "count right, kind absent": sums["absent counted 0"] / sums["scenes"],
            "detect, F1 at IoU 0.5": 2 * sums["boxes matched"] / (sums["boxes said"] + sums["boxes true"]),
            "detect says nothing of an absent kind": sums["absent not detected"] / sums["scenes"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; the embedded one if left out")
    parser.add_argument("--scenes", type=int, default=500)
    arguments = parser.parse_args()
    vlm, sprites = load(arguments.model), load_sprites(SPRITE_SIZE)
    rng = np.random.default_rng(SEED)
    by_count: dict[int, Scores] = defaultdict(Scores)
    everything = Scores()
    for number in range(arguments.scenes):
        scene = draw_scene(rng, sprites, SCENE_SIZE, choose_kinds(rng, number % MAX_OBJECTS + 1))
        by_count[len(scene.objects)].add(vlm, scene, rng)
    for scores in by_count.values():
        for name, value in scores.sums.items():
            everything.sums[name] += value

    columns = {f"{count} object{'s' * (count > 1)}": by_count[count] for count in sorted(by_count)}
    columns["all"] = everything
    print("| | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in everything.figures():
        cells = [scores.figures()[name] for scores in columns.values()]
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" if cell <= 1 else f"{cell:.0f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
