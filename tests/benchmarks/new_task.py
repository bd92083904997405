"""Teach the embedded checkpoint a task that it does not know, from 200 examples, in minutes on two cores.

python tests/benchmarks/new_task.py

The task: which of two objects is taller. What it has learned is asked on 200 other scenes, before and after.
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
from paligemma.scenes.painter import Painter
from paligemma.training import finetune

CLEARLY_TALLER = 1.15
SIZE = 224  # pixels


def write_examples(folder: Path, name: str, count: int, seed: int) -> Path:
    """Draw scenes of two objects of different kinds, and write them with the question and its answer."""
    painter, rng = Painter(load_sheet()), np.random.default_rng(seed)
    rows: list[dict[str, str]] = []
    (folder / name).mkdir(parents=True, exist_ok=True)
    while len(rows) < count:
        kinds = rng.choice(len(KINDS), 2, replace=False).tolist()
        scene = painter.scene(rng, SIZE, kinds)
        heights = {thing.kind: thing.box[2] - thing.box[0] for thing in scene.objects}
        if len(heights) < 2 or max(heights.values()) < CLEARLY_TALLER * min(heights.values()):
            continue
        one, other = (KINDS[kind].name for kind in kinds)
        image = f"{name}/{len(rows)}.png"
        scene.image.save(folder / image)
        prompt = f"answer en which object is taller, the {one} or the {other}?"
        answer = KINDS[max(heights, key=lambda kind: heights[kind])].name
        rows.append({"image": image, "prefix": prompt, "suffix": answer})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where examples and results go (default: a temporary folder)")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--asked", type=int, default=200)
    parser.add_argument("options", nargs="*", help="after --, further options of paligemma.training.finetune")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    data = write_examples(folder, "train", arguments.examples, seed=0)
    asked = write_examples(folder, "asked", arguments.asked, seed=1)
    start, busy = time.perf_counter(), time.process_time()
    options = ["--data", str(data), "--held-back", str(asked), "--output", str(folder / "tuned")]
    options += ["--lora", "16", "--learning-rate", "2e-3", "--epochs", "16", "--batch-size", "8", *arguments.options]
    finetune.main(options)
    minutes, of_cores = (time.perf_counter() - start) / 60, (time.process_time() - busy) / 60
    print(f"{arguments.examples} examples, {minutes:.1f} minutes ({of_cores:.1f} of a core), both evaluations included")


if __name__ == "__main__":
    main()
