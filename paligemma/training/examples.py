"""Draw the page's example pictures, and pack what it draws new ones from: `python -m paligemma.training.examples`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from .artwork import KINDS, SHEET, SHEET_FONT, load_fonts, load_sprites, pack_sheet
from .scenes import Painter

FOLDER = Path(__file__).parent.parent / "demo" / "examples"
SIZE = 448
SPRITE_SIZE = 320
SHEET_SPRITE_SIZE = 160  # the whole sheet stays far below 10 MB
# File name, what is on it, the word in it, and a seed: one of a few whose picture looks good and is answered rightly, so
# that they show what the page does; how often the checkpoint is right, its card says.
EXAMPLES = [
    ("cats", ["cat", "cat"], "", 11),
    ("picnic", ["apple", "banana", "apple"], "", 12),
    ("traffic", ["car", "bus", "car"], "", 51),
    ("music", ["guitar", "drum"], "", 28),
    ("sign", ["cactus"], "OPEN", 32),
]


def main() -> None:
    painter = Painter(load_sprites(SPRITE_SIZE), load_fonts(), restyled=0.0)
    index = {kind.name: number for number, kind in enumerate(KINDS)}
    for name, kinds, word, seed in EXAMPLES:
        scene = painter.scene(np.random.default_rng(seed), SIZE, [index[kind] for kind in kinds], word)
        assert len(scene.objects) == len(kinds), f"{name}: an object found no place, choose another seed"
        assert scene.word == word, f"{name}: the word found no place, choose another seed"
        palette = scene.image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)  # a third of the bytes
        palette.save(FOLDER / f"{name}.png", optimize=True)
    pack_sheet(load_sprites(SHEET_SPRITE_SIZE)).save(SHEET, quality=82, method=4)
    shutil.copy(load_fonts()[0], SHEET_FONT)


if __name__ == "__main__":
    main()
