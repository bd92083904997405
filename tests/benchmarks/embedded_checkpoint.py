"""How well a checkpoint that was trained on drawn scenes answers about fresh ones, by their number of objects and in all.

python tests/benchmarks/embedded_checkpoint.py                   # the embedded checkpoint, in some ten minutes
python tests/benchmarks/embedded_checkpoint.py --model FOLDER    # another one

Objects are drawn as the artists drew them, rotated and mirrored, on painted backgrounds, with the noise, blur and light
of a photograph; answers are greedy.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scene_figures import FIGURES, draw_scenes, evaluate

import paligemma
from paligemma.scenes.artwork import load_sheet
from paligemma.scenes.painter import Painter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; the embedded one if left out")
    parser.add_argument("--scenes", type=int, default=1000)
    arguments = parser.parse_args()
    vlm = paligemma.load(arguments.model, dtype="float32")
    scenes = draw_scenes(Painter(load_sheet()), arguments.scenes)
    by_objects = {"all" if objects == 0 else objects: figures for objects, figures in evaluate(vlm, scenes).items()}
    print(f"| objects in the scene | {' | '.join(map(str, by_objects))} |")
    print(f"| --- |{' ---: |' * len(by_objects)}")
    for name in FIGURES:
        cells = (f"{figures[name]:.3f}" if name in figures else "" for figures in by_objects.values())
        print(f"| {name} | {' | '.join(cells)} |")
    start = time.perf_counter()
    for scene in scenes[:20]:
        vlm.generate(scene.image, "caption en")
    print(f"\nA caption takes {(time.perf_counter() - start) / len(scenes[:20]):.3f} s.")


if __name__ == "__main__":
    main()
