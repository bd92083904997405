"""Draw the page's example pictures: `python -m paligemma.training.examples`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .artwork import KINDS, load_sprites
from .scenes import draw_scene

FOLDER = Path(__file__).parent.parent / "examples"
SIZE = 448
SPRITE_SIZE = 320
# File name, what is on it, and a seed that was picked because the picture looks good.
EXAMPLES = [
    ("cats", ["cat", "cat", "apple"], 3),
    ("picnic", ["apple", "banana", "apple"], 5),
    ("traffic", ["car", "car", "bus", "car"], 1),
    ("music", ["guitar", "drum"], 2),
]


def main() -> None:
    sprites = load_sprites(SPRITE_SIZE)
    index = {kind.name: number for number, kind in enumerate(KINDS)}
    for name, kinds, seed in EXAMPLES:
        scene = draw_scene(np.random.default_rng(seed), sprites, SIZE, [index[kind] for kind in kinds])
        assert len(scene.objects) == len(kinds), f"{name}: an object found no place, choose another seed"
        palette = scene.image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)  # a third of the bytes
        palette.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
