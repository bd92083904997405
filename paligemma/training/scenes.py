"""Scenes: a few objects on a plain or gradient background, and where each of them is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .artwork import KINDS

MAX_TURN = 20  # degrees, either way
MAX_OVERLAP = 0.1  # of the smaller of two boxes
REPEAT_KIND = 0.4  # how often a further object is of a kind that the scene already has
VISIBLE_ALPHA = 64  # from here on a pixel counts as part of the object
# How long an object's longer side is, in parts of the picture, by how many objects there are.
SIDE_RANGES = {1: (0.35, 0.85), 2: (0.3, 0.55), 3: (0.27, 0.45), 4: (0.25, 0.4)}
MAX_OBJECTS = max(SIDE_RANGES)


@dataclass(frozen=True)
class SceneObject:
    """One object: an index into `KINDS`, and its box (y_min, x_min, y_max, x_max) in parts of the picture."""

    kind: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A picture, and what is on it in reading order (top to bottom, then left to right)."""

    image: Image.Image
    objects: tuple[SceneObject, ...]

    def count(self, kind: int) -> int:
        return sum(thing.kind == kind for thing in self.objects)


def choose_kinds(rng: np.random.Generator, objects: int) -> list[int]:
    """Kinds for a scene of so many objects, some of them alike."""
    kinds: list[int] = []
    while len(kinds) < objects:
        repeat = kinds and rng.random() < REPEAT_KIND
        kinds.append(kinds[rng.integers(len(kinds))] if repeat else int(rng.integers(len(KINDS))))
    return kinds


def draw_scene(rng: np.random.Generator, sprites: np.ndarray, size: int, kinds: list[int]) -> Scene:
    """Draw one to four objects on a square of `size` pixels; one that finds no free place is left out.

    `sprites` are those of `artwork.load_sprites`; each object takes one of the styles by chance.
    """
    canvas = _background(rng, size)
    placed: list[SceneObject] = []
    for kind in kinds:
        side = rng.uniform(*SIDE_RANGES[len(kinds)]) * size
        picture = _turned(rng, sprites[kind, rng.integers(sprites.shape[1])], side)
        corner = _free_place(rng, picture.size, size, placed)
        if corner is not None:
            canvas.paste(picture, corner, picture)
            x, y = corner
            box = (y / size, x / size, (y + picture.height) / size, (x + picture.width) / size)
            placed.append(SceneObject(kind, box))
    return Scene(canvas, tuple(sorted(placed, key=lambda thing: thing.box)))


def draw_crop(rng: np.random.Generator, sprites: np.ndarray, size: int) -> tuple[Image.Image, int]:
    """One object that nearly fills a square of `size` pixels, and its kind: what the eye alone learns from first."""
    kind = int(rng.integers(len(KINDS)))
    canvas = _background(rng, size)
    picture = _turned(rng, sprites[kind, rng.integers(sprites.shape[1])], rng.uniform(0.55, 0.95) * size)
    room = (size - picture.width, size - picture.height)
    canvas.paste(picture, tuple(int(rng.integers(min(0, space), max(0, space) + 1)) for space in room), picture)
    return canvas, kind


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    first = rng.integers(0, 256, 3)
    if rng.random() < 0.5:
        return Image.new("RGB", (size, size), tuple(first.tolist()))
    # Blend two colours along a line at a random angle.
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-0.5, 0.5, size)
    blend = np.clip(0.5 + np.cos(angle) * across[None, :] + np.sin(angle) * across[:, None], 0, 1)[..., None]
    pixels = first * (1 - blend) + rng.integers(0, 256, 3) * blend
    return Image.fromarray(pixels.astype(np.uint8))


def _turned(rng: np.random.Generator, sprite: np.ndarray, side: float) -> Image.Image:
    """The sprite mirrored or not, turned, cut to its visible pixels, its longer side `side` pixels long."""
    picture = Image.fromarray(sprite)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-MAX_TURN, MAX_TURN), Image.Resampling.BILINEAR, expand=True)
    visible = np.asarray(picture)[..., 3] >= VISIBLE_ALPHA
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    picture = picture.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.BICUBIC)


def _free_place(
    rng: np.random.Generator, picture: tuple[int, int], size: int, placed: list[SceneObject]
) -> tuple[int, int] | None:
    """The left top corner (x, y) of a place that hardly overlaps the objects before, or None after thirty tries."""
    width, height = picture
    for _ in range(30):
        x, y = (int(rng.integers(0, max(0, size - length) + 1)) for length in (width, height))
        box = (y / size, x / size, (y + height) / size, (x + width) / size)
        if all(_overlap(box, other.box) <= MAX_OVERLAP for other in placed):
            return x, y
    return None


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Area that two boxes share, in parts of the smaller box."""
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    if height <= 0 or width <= 0:
        return 0.0
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return height * width / smaller
