"""Scenes: a few objects and sometimes a word on a background, and the truth about each of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .artwork import FOLDER, Sprites
from .augmentation import photograph, random_shape
from .colors import COLORS, main_color, random_color
from .words import WORDS

MAX_OVERLAP = 0.15  # of the smaller of two boxes
REPEAT_KIND = 0.4  # how often a further object is of a kind that the scene already has
PAINT_WORD = 0.3  # how often a scene has a word
# Range of an object's longer side, as a fraction of the image's, by the number of objects; a word counts as one.
SIDE_RANGES = {1: (0.35, 0.85), 2: (0.3, 0.55), 3: (0.27, 0.45), 4: (0.25, 0.4), 5: (0.23, 0.36), 6: (0.22, 0.33)}
CROP_SIDE_RANGE = (0.5, 0.95)
MAX_OBJECTS = max(SIDE_RANGES)
LETTER_WIDTHS = (0.14, 0.185)  # range of the distance of letters, as a fraction of the image's side
MAX_TRIES = 40  # to find a free place
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)

Box = tuple[float, float, float, float]  # y_min, x_min, y_max, x_max as fractions of the image's side


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, height) * max(0.0, width)


@dataclass(frozen=True)
class SceneObject:
    """One object: an index into `KINDS`, its box, its color if it has mostly one, its number in the scene's `owners`."""

    kind: int
    box: Box
    color: str | None = None
    owner: int = 0


@dataclass(frozen=True)
class Scene:
    """An image, and what is in it.

    objects: in reading order (top to bottom, then left to right).
    background: the name of its color.
    word: what is written, or nothing; word_box: where.
    owners: uint8 [size, size], the number of the object that each pixel belongs to; 0 for the background and the word.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    background: str
    word: str
    word_box: Box | None
    owners: np.ndarray

    def count(self, kind: int) -> int:
        """The number of objects of a kind."""
        return sum(thing.kind == kind for thing in self.objects)

    def mask(self, thing: SceneObject) -> np.ndarray:
        """Bool [size, size]: the visible pixels of an object."""
        return self.owners == thing.owner


class Painter:
    """Draws scenes from sprites; words in DejaVu Sans Bold."""

    def __init__(self, sprites: Sprites):
        self.sprites = sprites

    def random_scene(self, rng: np.random.Generator, size: int, objects: int) -> Scene:
        """A scene of so many objects of any kinds; some scenes have a word, and fewer objects for it."""
        if rng.random() >= PAINT_WORD:
            return self.scene(rng, size, self.choose_kinds(rng, objects))
        word = WORDS[rng.integers(len(WORDS))]
        while True:  # mostly once: a long word in the middle may leave no free place at all
            scene = self.scene(rng, size, self.choose_kinds(rng, min(objects, MAX_OBJECTS - 2)), word)
            if scene.objects:
                return scene

    def crop(self, rng: np.random.Generator, size: int) -> Scene:
        """A scene of one object that nearly fills the image."""
        return self.scene(rng, size, self.choose_kinds(rng, 1), sides=CROP_SIDE_RANGE)

    def choose_kinds(self, rng: np.random.Generator, objects: int) -> list[int]:
        """Kinds for a scene of so many objects, some of them alike."""
        kinds: list[int] = []
        while len(kinds) < objects:
            is_repeated = kinds and rng.random() < REPEAT_KIND
            kinds.append(kinds[rng.integers(len(kinds))] if is_repeated else int(rng.integers(self.sprites.kinds)))
        return kinds

    def scene(
        self,
        rng: np.random.Generator,
        size: int,
        kinds: list[int],
        word: str = "",
        sides: tuple[float, float] | None = None,
    ) -> Scene:
        """A square image of `size` pixels; an object, or the word, for which there is no free place is left out.

        `sides` is the range of the objects' longer sides, as fractions of the image's; None chooses it by their number.
        """
        sides = sides or SIDE_RANGES[min(MAX_OBJECTS, len(kinds) + bool(word))]
        background = COLORS[rng.integers(len(COLORS))]
        canvas = _background(rng, size, background)
        owners = np.zeros((size, size), np.uint8)
        word_box = _paint_word(rng, canvas, word) if word else None
        objects: list[SceneObject] = []
        for kind in kinds:
            sprite = self._sprite(rng, kind, rng.uniform(*sides) * size)
            height, width = sprite.shape[:2]
            corner = _free_place(rng, height, width, size, [thing.box for thing in objects], word_box)
            if corner is None:
                continue
            y, x = corner
            alpha = sprite[..., 3:]
            under = canvas[y : y + height, x : x + width]
            under += (255 * sprite[..., :3] - under) * alpha
            owner = len(objects) + 1
            owners[y : y + height, x : x + width][alpha[..., 0] > self.sprites.VISIBLE_ALPHA / 255] = owner
            box = (y / size, x / size, (y + height) / size, (x + width) / size)
            objects.append(SceneObject(kind, box, main_color(sprite[::3, ::3]), owner))
        return Scene(
            image=photograph(rng, Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))),
            objects=tuple(sorted(objects, key=lambda thing: thing.box)),
            background=background,
            word=word if word_box else "",
            word_box=word_box,
            owners=owners,
        )

    def _sprite(self, rng: np.random.Generator, kind: int, side: float) -> np.ndarray:
        """One of a kind's drawings, its shape varied: float32 [height, width, 4], RGBA in 0 to 1.

        The longer side has `side` pixels.
        """
        style = int(rng.integers(self.sprites.styles))
        matrix = random_shape(rng)
        outline = self.sprites.outline(kind, style) @ matrix.T
        least, most = outline.min(0), outline.max(0)
        scale = side / (most - least).max()
        width, height = np.maximum(1, np.round((most - least) * scale)).astype(int).tolist()
        # The smallest level that is not smaller than what is drawn.
        large_enough = [level for level in self.sprites.levels if level.shape[2] >= 0.9 * scale]
        level = (large_enough or self.sprites.levels[:1])[-1]
        # Pillow takes the map from a pixel of the result to the place in the sprite that it shows.
        square = level.shape[2]
        inverse = np.linalg.inv(matrix) * (square / scale)
        origin = inverse @ (least * scale) + square / 2
        coefficients = (*inverse[0], origin[0], *inverse[1], origin[1])
        sprite = Image.fromarray(level[kind, style]).transform(
            (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
        )
        return np.asarray(sprite, np.float32) / 255


def _paint_word(rng: np.random.Generator, canvas: np.ndarray, word: str) -> Box | None:
    """Write a word on the canvas where it fits, sometimes on a sign; returns its box, None if it is too long."""
    size = len(canvas)
    spacing = rng.uniform(*LETTER_WIDTHS) * size
    width, height = round(spacing * (len(word) + 0.3)), round(spacing * 1.35)
    corner = _free_place(rng, height, width, size, [], None)
    if corner is None:
        return None
    y, x = corner
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    font = _font(round(spacing * rng.uniform(1.1, 1.3)))
    for place, letter in enumerate(word):
        draw.text((spacing * (place + 0.65), height / 2), letter, fill=255, font=font, anchor="mm")
    under = canvas[y : y + height, x : x + width]
    if rng.random() < 0.5:  # on a sign
        under[:] = random_color(rng, COLORS[rng.integers(len(COLORS))])
    # Light on dark or dark on light, so that it can be read.
    is_light = (under @ LUMINANCE).mean() > 105
    ink = 255 * (rng.uniform(0, 0.2, 3) if is_light else rng.uniform(0.8, 1, 3))
    under += (ink - under) * (np.asarray(mask, np.float32)[..., None] / 255)
    return y / size, x / size, (y + height) / size, (x + width) / size


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FOLDER / "DejaVuSans-Bold.ttf", size)


def _background(rng: np.random.Generator, size: int, color: str) -> np.ndarray:
    """Float32 [size, size, 3], RGB in 0 to 255: plain, or two shades of a color in a gradient, pattern or cloud."""
    first, second = random_color(rng, color), random_color(rng, color)
    choice = rng.random()
    if choice < 0.35:
        blend = np.zeros((size, size))
    elif choice < 0.6:
        blend = np.clip(0.5 + _distance(rng, size), 0, 1)
    elif choice < 0.75:  # stripes, or with two of them, checks
        waves = np.sin(_distance(rng, size) * rng.uniform(12, 60))
        if rng.random() < 0.5:
            waves = waves * np.sin(_distance(rng, size) * rng.uniform(12, 60))
        blend = (waves > 0).astype(float)
    else:
        blend = np.zeros((size, size))
        for cells in (3, 7, 16, 40):
            noise = Image.fromarray(rng.random((cells, cells), np.float32))
            blend += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) * rng.uniform(0, 0.6)
        blend = np.clip(blend, 0, 1)
    return (first + (second - first) * blend[..., None]).astype(np.float32)


def _distance(rng: np.random.Generator, size: int) -> np.ndarray:
    """How far each pixel lies from the center in a random direction: float64 [size, size], -0.7 to 0.7."""
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
    for _ in range(MAX_TRIES):
        y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
        box = (y / size, x / size, (y + height) / size, (x + width) / size)
        is_word_free = word_box is None or intersection(box, word_box) == 0
        if is_word_free and all(
            intersection(box, other) <= MAX_OVERLAP * min(area(box), area(other)) for other in boxes
        ):
            return y, x
    return None
