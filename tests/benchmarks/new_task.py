"""Teach the embedded checkpoint a task that it does not know, from 200 examples, in minutes on two cores.

python tests/benchmarks/new_task.py                # how many objects of any kind there are
python tests/benchmarks/new_task.py --task taller  # which of two objects is taller

What it has learned is asked about other scenes, before and after. It was taught to count one kind at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paligemma.scenes.artwork import KINDS, load_sheet
from paligemma.scenes.painter import MAX_OBJECTS, Painter, Scene
from paligemma.training import finetune

CLEARLY_TALLER = 1.15
SIZE = 224  # pixels
Row = tuple[Scene, str, str]


def ask_count(painter: Painter, rng: np.random.Generator) -> Row:
    """A scene of one to six objects, the question, and its answer."""
    scene = painter.scene(rng, SIZE, painter.choose_kinds(rng, int(rng.integers(1, MAX_OBJECTS + 1))))
    return scene, "answer en how many objects are there?", str(len(scene.objects))


def ask_taller(painter: Painter, rng: np.random.Generator) -> Row:
    """A scene of two objects of different kinds, the question, and its answer."""
    while True:
        kinds = rng.choice(len(KINDS), 2, replace=False).tolist()
        scene = painter.scene(rng, SIZE, kinds)
        heights = {thing.kind: thing.box[2] - thing.box[0] for thing in scene.objects}
        if len(heights) == 2 and max(heights.values()) > CLEARLY_TALLER * min(heights.values()):
            one, other = (KINDS[kind].name for kind in kinds)
            prompt = f"answer en which object is taller, the {one} or the {other}?"
            return scene, prompt, KINDS[max(heights, key=lambda kind: heights[kind])].name


TASKS = {"count": ask_count, "taller": ask_taller}


def write_examples(folder: Path, name: str, task: str, count: int, seed: int) -> Path:
    """Draw scenes, and write them with the question and its answer."""
    painter, rng = Painter(load_sheet()), np.random.default_rng(seed)
    path = folder / f"{name}.jsonl"
    (folder / name).mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number in range(count):
            scene, prompt, answer = TASKS[task](painter, rng)
            scene.image.save(folder / name / f"{number}.png")
            row = {"image": f"{name}/{number}.png", "prefix": prompt, "suffix": answer}
            file.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where examples and results go (default: a temporary folder)")
    parser.add_argument("--task", choices=list(TASKS), default="count")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--asked", type=int, default=200)
    parser.add_argument("options", nargs="*", help="after --, further options of paligemma.training.finetune")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    data = write_examples(folder, "train", arguments.task, arguments.examples, seed=0)
    asked = write_examples(folder, "asked", arguments.task, arguments.asked, seed=1)
    start, busy = time.perf_counter(), time.process_time()
    options = ["--data", str(data), "--held-back", str(asked), "--output", str(folder / "tuned")]
    options += ["--learning-rate", "1e-3", "--epochs", "8", *arguments.options]
    finetune.main(options)
    minutes, of_cores = (time.perf_counter() - start) / 60, (time.process_time() - busy) / 60
    print(f"{arguments.examples} examples, {minutes:.1f} minutes ({of_cores:.1f} of a core), both evaluations included")


if __name__ == "__main__":
    main()
