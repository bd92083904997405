"""How good a checkpoint of `paligemma/training/` is on fresh scenes, by number of objects and for all together.

python tests/benchmarks/embedded_checkpoint.py --model FOLDER         # the five styles of the artwork
python tests/benchmarks/embedded_checkpoint.py --style 3              # one of them only
python tests/benchmarks/embedded_checkpoint.py --package @iconify-json/openmoji@1.2.29  # a set that it never saw
python tests/benchmarks/embedded_checkpoint.py --artwork FOLDER       # drawings it never saw: cat.png, hot dog.svg, ...

Needs npm, which fetches artwork and fonts, and some minutes. Objects are drawn as the artists drew them, turned and
mirrored, on painted backgrounds, with the noise, blur and light of a photograph; answers are greedy.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import paligemma
from paligemma.training.artwork import STYLES, load_folder, load_fonts, load_sprites
from paligemma.training.evaluate import FIGURES, draw_scenes, evaluate
from paligemma.training.scenes import Painter

SPRITE_SIZE = 320


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; the embedded one if left out")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--style", type=int, action="append", choices=range(len(STYLES)), help=", ".join(STYLES))
    parser.add_argument("--package", help="npm package of drawings in place of the five styles")
    parser.add_argument("--artwork", type=Path, help="folder of drawings named after the kinds, PNG or SVG")
    arguments = parser.parse_args()
    vlm = paligemma.load(arguments.model, dtype="float32")
    if arguments.artwork:
        sprites, kinds = load_folder(arguments.artwork, SPRITE_SIZE)
        print(f"{len(kinds)} of the kinds are in {arguments.artwork}")
    elif arguments.package:
        sprites, kinds = load_sprites(SPRITE_SIZE, [arguments.package]), None
    else:
        sprites, kinds = load_sprites(SPRITE_SIZE), None
        if arguments.style:
            sprites = sprites[arguments.style]
    painter = Painter(sprites, load_fonts(), kinds, restyled=0.0)
    scenes = draw_scenes(painter, arguments.scenes)
    scores = evaluate(vlm, painter, scenes)

    columns = {"all" if group == 0 else f"{group}": scores[group].figures() for group in scores}
    print("| objects in the scene | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in FIGURES:
        cells = (f"{figures[name]:.3f}" if name in figures else "" for figures in columns.values())
        print(f"| {name} | " + " | ".join(cells) + " |")
    start = time.perf_counter()
    for scene in scenes[:20]:
        vlm.generate(scene.image, "caption en")
    print(f"\nA caption takes {(time.perf_counter() - start) / 20:.3f} s.")


if __name__ == "__main__":
    main()
