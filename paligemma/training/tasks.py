"""What is asked about a scene, and the true answer: prompts in the official syntax."""

from __future__ import annotations

import numpy as np

from .artwork import KINDS
from .scenes import Scene

CAPTION_PROMPT = "caption en"
# Boxes are told in 1024ths, but a pixel of the small picture is nine of them: steps of eight lose nothing.
LOC_STEP = 8
ASK_ABOUT_ABSENT = 0.2  # how often a question is about a kind that is not there


def caption(scene: Scene) -> str:
    """Kinds with their counts, from left to right by first appearance: `2 cats, an apple and a guitar`."""
    kinds = dict.fromkeys(thing.kind for thing in sorted(scene.objects, key=lambda thing: thing.box[1]))
    parts = []
    for kind in kinds:
        count = scene.count(kind)
        parts.append(KINDS[kind].with_article if count == 1 else f"{count} {KINDS[kind].plural}")
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def count_prompt(kind: int) -> str:
    return f"answer en how many {KINDS[kind].plural} are there?"


def detect_prompt(kind: int) -> str:
    return f"detect {KINDS[kind].name}"


def detections(scene: Scene, kind: int) -> str:
    """Four loc tokens and the name for each object of a kind, in reading order; empty when there is none."""
    boxes = [thing.box for thing in scene.objects if thing.kind == kind]
    return " ; ".join("".join(_loc(side) for side in box) + f" {KINDS[kind].name}" for box in boxes)


def prompts_and_answers(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """One row a task for a scene: its caption, one count, one detection."""
    counted, detected = _kind_to_ask_about(rng, scene), _kind_to_ask_about(rng, scene)
    return [
        (CAPTION_PROMPT, caption(scene)),
        (count_prompt(counted), str(scene.count(counted))),
        (detect_prompt(detected), detections(scene, detected)),
    ]


def every_text() -> list[str]:
    """Every phrase the tasks can use, for the tokenizer to learn its words from."""
    texts = [CAPTION_PROMPT, "answer en how many are there?", "detect", "a cat, a dog and an apple ;"]
    for index, kind in enumerate(KINDS):
        texts += [count_prompt(index), detect_prompt(index), f"{kind.with_article} and {kind.with_article},"]
        texts += [f"{count} {kind.plural}, {kind.plural}" for count in range(2, 10)]
    return texts


def _kind_to_ask_about(rng: np.random.Generator, scene: Scene) -> int:
    if rng.random() < ASK_ABOUT_ABSENT:
        return int(rng.integers(len(KINDS)))
    return scene.objects[rng.integers(len(scene.objects))].kind


def _loc(side: float) -> str:
    step = min(round(side * 1024 / LOC_STEP), 1024 // LOC_STEP - 1)
    return f"<loc{step * LOC_STEP:04d}>"
