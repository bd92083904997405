"""Scenes: a few objects and sometimes a word on a background, and the truth about each of them."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .artwork import Sprites
from .augmentation import LUMINANCE, photograph, random_shape, restyle
from .colours import COLOURS, random_colour, ruling_colour
from .words import WORDS

MAX_OVERLAP = 0.15  # of the smaller of two boxes
REPEAT_KIND = 0.4  # how often a further object is of a kind that the scene already has
PAINT_WORD = 0.3  # how often a scene has a word
PAINT_WORD_IN_TRAINING = 0.45  # letters are slow to learn
RANDOM_LETTERS = 0.4  # how often such a word is none, in training, so that letters are read and words not guessed
# How long an object's longer side is, in parts of the picture, by how many there are; a word counts as one.
SIDE_RANGES = {1: (0.35, 0.85), 2: (0.3, 0.55), 3: (0.27, 0.45), 4: (0.25, 0.4), 5: (0.23, 0.36), 6: (0.22, 0.33)}
MAX_OBJECTS = max(SIDE_RANGES)
LETTER_WIDTHS = (0.14, 0.185)  # how far letters are apart, in parts of the picture
TRIES = 40  # to find a free place

Box = tuple[float, float, float, float]  # y_min, x_min, y_max, x_max in parts of the picture


@dataclass(frozen=True)
class SceneObject:
    """One object: an index into `KINDS`, its box, its name for a colour if one rules it, its number in `owners`."""

    kind: int
    box: Box
    colour: str | None = None
    owner: int = 0


@dataclass(frozen=True)
class Scene:
    """A picture, and what is on it.

    objects: in reading order (top to bottom, then left to right).
    background: the name of its colour.
    word: what is painted, or nothing.
    owners: uint8 [size, size], whose each pixel is: 0 the background's, then the letters' from left to right, then the
        objects', as they say.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    background: str = "white"
    word: str = ""
    owners: np.ndarray | None = None

    def count(self, kind: int) -> int:
        return sum(thing.kind == kind for thing in self.objects)

    def mask(self, thing: SceneObject) -> np.ndarray:
        """Bool [height, width] within the object's box, in pixels of the picture: what is seen of it."""
        y_min, x_min, y_max, x_max = (round(side * len(self.owners)) for side in thing.box)
        return self.owners[y_min:y_max, x_min:x_max] == thing.owner


class Painter:
    """Draws scenes from sprites and fonts.

    Args:
        kinds: the indices of the kinds to choose from; None for all.
        restyled: the share of objects that are drawn anew in other colours, lines and shades, as is good to learn from,
            or a shared float scalar of it. With none of them, as in pictures to be judged by, words are rarer, and never
            random letters.
    """

    def __init__(
        self, sprites: Sprites, fonts: list[Path], kinds: list[int] | None = None, restyled: float | Tensor = 0.7
    ):
        self.sprites, self.fonts, self.restyled = sprites, fonts, restyled
        self.kinds = list(range(sprites.kinds)) if kinds is None else kinds

    def choose_kinds(self, rng: np.random.Generator, objects: int) -> list[int]:
        """Kinds for a scene of so many objects, some of them alike."""
        kinds: list[int] = []
        while len(kinds) < objects:
            repeat = kinds and rng.random() < REPEAT_KIND
            choices = kinds if repeat else self.kinds
            kinds.append(choices[rng.integers(len(choices))])
        return kinds

    def scene(
        self,
        rng: np.random.Generator,
        size: int,
        kinds: list[int],
        word: str = "",
        sides: tuple[float, float] | None = None,
    ) -> Scene:
        """A square picture of `size` pixels; an object, or the word, that finds no free place is left out.

        `sides` bounds the objects' longer sides, in parts of the picture; None goes by how many there are.
        """
        sides = sides or SIDE_RANGES[min(MAX_OBJECTS, len(kinds) + bool(word))]
        background = COLOURS[rng.integers(len(COLOURS))]
        canvas = _background(rng, size, background)
        owners = np.zeros((size, size), np.uint8)
        word_box = self._paint_word(rng, canvas, owners, word) if word else None
        letters = len(word) if word_box else 0
        boxes: list[Box] = []
        objects = []
        for kind in kinds:
            sprite = self._sprite(rng, kind, rng.uniform(*sides) * size)
            height, width = sprite.shape[:2]
            corner = _free_place(rng, height, width, size, boxes, word_box)
            if corner is None:
                continue
            y, x = corner
            alpha = sprite[..., 3:]
            under = canvas[y : y + height, x : x + width]
            under += (255 * sprite[..., :3] - under) * alpha
            owner = letters + len(objects) + 1
            owners[y : y + height, x : x + width][alpha[..., 0] > self.sprites.VISIBLE_ALPHA / 255] = owner
            boxes.append((y / size, x / size, (y + height) / size, (x + width) / size))
            objects.append(SceneObject(kind, boxes[-1], ruling_colour(sprite[::3, ::3]), owner))
        image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        return Scene(
            image=photograph(rng, image),
            objects=tuple(sorted(objects, key=lambda thing: thing.box)),
            background=background,
            word=word[:letters],
            owners=owners,
        )

    def random_scene(self, rng: np.random.Generator, size: int, objects: int) -> Scene:
        """A scene of so many objects of any kinds; some have a word, and are less full."""
        is_training = bool(float(self.restyled))
        if rng.random() >= (PAINT_WORD_IN_TRAINING if is_training else PAINT_WORD):
            return self.scene(rng, size, self.choose_kinds(rng, objects))
        word = WORDS[rng.integers(len(WORDS))]
        if is_training and rng.random() < RANDOM_LETTERS:
            word = "".join(string.ascii_uppercase[index] for index in rng.integers(0, 26, rng.integers(3, 6)))
        while True:  # mostly once: a long word in the middle may leave no room at all
            scene = self.scene(rng, size, self.choose_kinds(rng, min(objects, MAX_OBJECTS - 2)), word)
            if scene.objects:
                return scene

    def crop(self, rng: np.random.Generator, size: int) -> Scene:
        """One object that nearly fills the picture: what the eye learns from first."""
        return self.scene(rng, size, self.choose_kinds(rng, 1), sides=(0.5, 0.95))

    def _sprite(self, rng: np.random.Generator, kind: int, side: float) -> np.ndarray:
        """Float32 [height, width, 4] in 0 to 1, the longer side `side` pixels long: one of the drawings, varied."""
        style = rng.integers(self.sprites.styles)
        matrix = random_shape(rng)
        outline = self.sprites.outline(kind, style) @ matrix.T
        least, most = outline.min(0), outline.max(0)
        scale = side / (most - least).max()
        width, height = np.maximum(1, np.round((most - least) * scale)).astype(int)
        # The smallest level that is not smaller than what is drawn.
        level = max(
            (level for level in self.sprites.levels if level.shape[2] >= 0.9 * scale),
            key=lambda level: -level.shape[2],
            default=self.sprites.levels[0],
        )
        # Pillow asks where in the sprite each pixel of the result comes from.
        square = level.shape[2]
        back = np.linalg.inv(matrix) * (square / scale)
        origin = back @ (least * scale) + square / 2
        coefficients = (*back[0], origin[0], *back[1], origin[1])
        sprite = Image.fromarray(level[kind, style]).transform(
            (int(width), int(height)), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
        )
        pixels = np.asarray(sprite, np.float32) / 255
        return restyle(rng, pixels) if rng.random() < float(self.restyled) else pixels

    def _paint_word(self, rng: np.random.Generator, canvas: np.ndarray, owners: np.ndarray, word: str) -> Box | None:
        """Paint it where it fits and note its letters in `owners`; returns its box, None if it is too long."""
        size = len(canvas)
        spacing = rng.uniform(*LETTER_WIDTHS) * size
        width, height = round(spacing * (len(word) + 0.3)), round(spacing * 1.35)
        corner = _free_place(rng, height, width, size, [], None)
        if corner is None:
            return None
        y, x = corner
        mask = Image.new("L", (width, height))
        draw = ImageDraw.Draw(mask)
        font = _font(self.fonts[rng.integers(len(self.fonts))], round(spacing * rng.uniform(1.1, 1.3)))
        for place, letter in enumerate(word):
            centre = spacing * (place + 0.65)
            draw.text((centre, height / 2), letter, fill=255, font=font, anchor="mm")
            left, right = round(centre - spacing / 2), round(centre + spacing / 2)
            owners[y : y + height, x + left : x + right] = place + 1
        under = canvas[y : y + height, x : x + width]
        if rng.random() < 0.5:  # on a sign
            under[:] = random_colour(rng, COLOURS[rng.integers(len(COLOURS))])
        # Light on dark or dark on light, so that it can be read.
        is_light = (under @ LUMINANCE).mean() > 105
        ink = 255 * (rng.uniform(0, 0.2, 3) if is_light else rng.uniform(0.8, 1, 3))
        strength = np.asarray(mask, np.float32)[..., None] / 255
        under += (ink - under) * strength
        return y / size, x / size, (y + height) / size, (x + width) / size


@cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _background(rng: np.random.Generator, size: int, colour: str) -> np.ndarray:
    """Float32 [size, size, 3], RGB in 0 to 255: plain, or two shades of a colour in a gradient, pattern or cloud."""
    first, second = random_colour(rng, colour), random_colour(rng, colour)
    choice = rng.random()
    if choice < 0.35:
        blend = np.zeros((size, size))
    elif choice < 0.6:
        blend = np.clip(0.5 + _along(rng, size), 0, 1)
    elif choice < 0.75:  # stripes, or with two of them, checks
        waves = np.sin(_along(rng, size) * rng.uniform(12, 60))
        if rng.random() < 0.5:
            waves = waves * np.sin(_along(rng, size) * rng.uniform(12, 60))
        blend = (waves > 0).astype(float)
    else:
        blend = np.zeros((size, size))
        for cells in (3, 7, 16, 40):
            noise = Image.fromarray(rng.random((cells, cells), np.float32))
            blend += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) * rng.uniform(0, 0.6)
        blend = np.clip(blend, 0, 1)
    return (first + (second - first) * blend[..., None]).astype(np.float32)


def _along(rng: np.random.Generator, size: int) -> np.ndarray:
    """Float [size, size]: how far each pixel lies in a random direction, from about -0.7 to 0.7."""
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-0.5, 0.5, size)
    return np.cos(angle) * across[None, :] + np.sin(angle) * across[:, None]


def _free_place(
    rng: np.random.Generator, height: int, width: int, size: int, boxes: list[Box], word_box: Box | None
) -> tuple[int, int] | None:
    """The top left corner (y, x), in pixels, of a place that hardly overlaps `boxes` and leaves the word free.

    None if there is no such place after many tries.
    """
    if height > size or width > size:
        return None
    for _ in range(TRIES):
        y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
        box = (y / size, x / size, (y + height) / size, (x + width) / size)
        is_word_free = word_box is None or _overlap(box, word_box) == 0
        if is_word_free and all(_overlap(box, other) <= MAX_OVERLAP for other in boxes):
            return y, x
    return None


def _overlap(one: Box, other: Box) -> float:
    """Area that two boxes share, in parts of the smaller box."""
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    if height <= 0 or width <= 0:
        return 0.0
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return height * width / smaller
