"""Drawings that scenes are made of: emoji of 125 kinds of objects in five styles, on one sheet that ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "artwork"  # the README credits what lies there
SHEET_COLUMNS = 25
SMALLEST_SIZE = 20  # pixels of a sprite
IRREGULAR_PLURALS = {"mouse": "mice", "fish": "fish", "snowman": "snowmen", "tomato": "tomatoes"}


@dataclass(frozen=True)
class Kind:
    """A kind of object, by its English name."""

    name: str

    @property
    def plural(self) -> str:
        if self.name in IRREGULAR_PLURALS:
            return IRREGULAR_PLURALS[self.name]
        if self.name.endswith(("s", "x", "ch", "sh")):
            return self.name + "es"
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + "s"


# In the order of the sheet.
KIND_NAMES = """
    fox, bear, panda, koala, lion, frog, penguin, duck, owl, butterfly, snail, spider, turtle, snake, octopus,
    crab, dolphin, shark, elephant, banana, watermelon, lemon, pineapple, strawberry, peach, pear, carrot,
    mushroom, hamburger, pizza, taco, cookie, avocado, croissant, lollipop, eggplant, bus, tractor, bicycle,
    airplane, helicopter, rocket, sailboat, ambulance, guitar, violin, trumpet, drum, house, key, umbrella,
    balloon, basketball, watch, pencil, camera, laptop, television, bell, crown, hammer, bed, door, cactus,
    sunflower, rose, star, cloud, ghost, candle, trophy, camel, crocodile, eagle, gorilla, lizard, scorpion, squid,
    unicorn, goat, egg, motorcycle, anchor, saxophone, telephone, envelope, backpack, ring, castle, tent, shield,
    tulip, skull, necktie, dress, cat, dog, rabbit, tiger, cow, pig, monkey, horse, bee, ladybug, whale, apple,
    donut, cake, hot dog, car, truck, fire truck, light bulb, soccer ball, clock, book, tree, gift, pumpkin,
    hourglass, mouse, fish, snowman, tomato
"""
KINDS = tuple(Kind(" ".join(name.split())) for name in KIND_NAMES.split(","))


class Sprites:
    """Every kind in some styles, at halving sizes, so that a small drawing is made from a small one.

    levels: uint8 [kinds, styles, size, size, 4], RGBA; each has half the size of the one before.
    """

    VISIBLE_ALPHA = 64  # a pixel of at least this opacity counts as part of the object

    def __init__(self, sheet: Image.Image):
        """Cut an RGBA sheet, `SHEET_COLUMNS` sprites in a row: each kind in all styles, then the next kind."""
        self.levels = [_tiles(sheet)]
        while self.levels[-1].shape[2] > SMALLEST_SIZE:
            # With colors multiplied by the opacity, so that transparent pixels add nothing to their neighbors.
            sheet = sheet.convert("RGBa").reduce(2).convert("RGBA")
            self.levels.append(_tiles(sheet))
        self.kinds, self.styles = self.levels[0].shape[:2]
        self._outlines: dict[tuple[int, int], np.ndarray] = {}

    def outline(self, kind: int, style: int) -> np.ndarray:
        """Float32 [32, 2], the outermost visible points (x, y) in as many directions, as fractions of the square's side
        from its center: the box of a rotated drawing is computed from them.
        """
        if (kind, style) not in self._outlines:
            sprite = self.levels[0][kind, style]
            rows, columns = np.nonzero(sprite[..., 3] >= self.VISIBLE_ALPHA)
            points = (np.stack([columns, rows], axis=-1) + 0.5) / len(sprite) - 0.5
            angles = np.arange(32) * (2 * np.pi / 32)
            furthest = (points @ np.stack([np.cos(angles), np.sin(angles)])).argmax(axis=0)
            self._outlines[kind, style] = points[furthest].astype(np.float32)
        return self._outlines[kind, style]


def load_sheet() -> Sprites:
    """The sprites that ship with the package."""
    return Sprites(Image.open(FOLDER / "sprites.webp").convert("RGBA"))


def _tiles(sheet: Image.Image) -> np.ndarray:
    """uint8 [kinds, styles, size, size, 4]."""
    size = sheet.width // SHEET_COLUMNS
    tiles = np.asarray(sheet).reshape(-1, size, SHEET_COLUMNS, size, 4).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(len(KINDS), -1, size, size, 4)
