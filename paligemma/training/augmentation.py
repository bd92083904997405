"""How drawings and pictures vary: shape, colour, line and shade of an object; noise, blur, JPEG and light of a picture.

An object must be known again in a drawing style that was never seen, so that everything which differs from artist to
artist, and leaves the kind as it is, is varied here.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

MAX_TURN = 20  # degrees, either way
MAX_SHEAR = 0.15
MAX_STRETCH = 1.25
MAX_BULGE = 0.45  # by how much parts of a drawing grow at the cost of others; below 1
LEAST_LENGTH = 0.6  # of what is drawn lower, or narrower, than it was
MAX_THICKNESS = 0.02  # of a line, beyond two pixels, to either side and in parts of the drawing
GRAINS = (16, 64)  # how many grains long a drawing is in which what is smaller than a grain is left out
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def random_shape(rng: np.random.Generator) -> np.ndarray:
    """A float [2, 2] matrix from the sprite's (x, y) to the picture's: mirror, stretch, shear and turn."""
    stretch = MAX_STRETCH ** rng.uniform(-0.5, 0.5)
    mirrored = np.diag([stretch * rng.choice([-1, 1]), 1 / stretch])
    sheared = np.array([[1, rng.uniform(-MAX_SHEAR, MAX_SHEAR)], [0, 1]])
    turn = np.radians(rng.uniform(-MAX_TURN, MAX_TURN))
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return turned @ sheared @ mirrored


def restyle(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Draw the same thing as another artist might: other colours, other shades, with lines or in nothing but lines.

    Args:
        pixels: float32 [height, width, 4], RGBA in 0 to 1.

    Returns:
        the same, sometimes lower or narrower; what is drawn goes on filling it.
    """
    if rng.random() < 0.5:
        lengths = rng.permutation([1, rng.uniform(LEAST_LENGTH, 1)])
        rows, columns = (max(1, round(side * length)) for side, length in zip(pixels.shape, lengths))
        pixels = _proportion(rng, _proportion(rng, pixels, rows).swapaxes(0, 1), columns).swapaxes(0, 1)
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    is_flat = rng.random() < 0.6
    if is_flat:
        colours = _flatten(rng, colours, alpha)
    lines = None
    if rng.random() < (0.7 if is_flat else 0.35):
        lines = _lines(colours, alpha, thickness=round(max(alpha.shape) * rng.uniform(0, MAX_THICKNESS)))
    if rng.random() < 0.5:
        colours = _recolour(rng, colours)
    if rng.random() < 0.3:
        colours = _shade(rng, colours)
    if lines is not None:
        ink = rng.uniform(0, 0.35, 3).astype(np.float32) * (rng.random() < 0.5)
        if rng.random() < 0.4:  # a colouring book: nothing but the lines, on one pale colour
            colours = np.broadcast_to(rng.uniform(0.75, 1, 3).astype(np.float32), colours.shape)
        colours = colours * (1 - lines) + ink * lines
    return np.concatenate([np.clip(colours, 0, 1), alpha], axis=-1)


def _proportion(rng: np.random.Generator, pixels: np.ndarray, rows: int) -> np.ndarray:
    """Draw it in so many rows, some closer together and others further apart, and not the same ones on the left and on the
    right.

    The first and the last stay where they are.
    """
    height, width = pixels.shape[:2]
    wanted = np.linspace(0, 1, rows)[:, None]
    waves = rng.integers(1, 4)
    bulges = np.interp(np.linspace(0, 1, width), np.linspace(0, 1, 4), rng.uniform(-MAX_BULGE, MAX_BULGE, 4))
    places = wanted + bulges * np.sin(waves * np.pi * wanted) / (waves * np.pi)
    places *= height - 1
    above, columns = np.minimum(places.astype(int), max(0, height - 2)), np.arange(width)
    share = (places - above).astype(np.float32)[..., None]
    return pixels[above, columns] * (1 - share) + pixels[np.minimum(above + 1, height - 1), columns] * share


def _flatten(rng: np.random.Generator, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """A few areas of one colour each, some of them another than it was, and without what is small on the drawing."""
    mean = (colours * alpha).sum((0, 1)) / max(alpha.sum(), 1e-3)
    solid = colours * alpha + mean * (1 - alpha)  # what is not drawn takes no colour of its own
    image = Image.fromarray(np.clip(255 * solid, 0, 255).astype(np.uint8))
    shrinking = min(1.0, rng.integers(*GRAINS) / max(image.size))
    coarse = image.resize([max(1, round(shrinking * side)) for side in image.size], Image.Resampling.BOX)
    coarse = coarse.filter(ImageFilter.MedianFilter(3)).quantize(int(rng.integers(3, 8)))
    image = coarse.convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
    image = image.quantize(palette=coarse, dither=Image.Dither.NONE)
    palette = np.array(coarse.getpalette(), np.float32).reshape(-1, 3) / 255
    if rng.random() < 0.5:
        is_other, is_plain = rng.random((2, len(palette))) < np.array([[0.3], [0.2]])
        palette[is_other] = rng.random((is_other.sum(), 3))
        palette[is_plain] = rng.choice([0.05, 0.95], (is_plain.sum(), 1))  # black or white
    return palette[np.asarray(image)]


def _lines(colours: np.ndarray, alpha: np.ndarray, thickness: int) -> np.ndarray:
    """How much of a line each pixel is, float [height, width, 1].

    Lines are where, within `thickness` pixels, colour or silhouette changes, also where the frame cuts it.
    """
    drawn = np.pad(np.concatenate([colours * alpha, 2 * alpha], axis=-1), ((1, 1), (1, 1), (0, 0)))
    edges = np.zeros(drawn.shape[:2], np.float32)
    down, across = np.abs(np.diff(drawn, axis=0)).max(-1), np.abs(np.diff(drawn, axis=1)).max(-1)
    # The pixels on both sides of a change.
    for side, change in ((np.s_[:-1], down), (np.s_[1:], down), (np.s_[:, :-1], across), (np.s_[:, 1:], across)):
        edges[side] = np.maximum(edges[side], change)
    lines = np.clip(4 * edges - 0.5, 0, 1)
    if thickness:
        image = Image.fromarray((255 * lines).astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * thickness + 1))
        lines = np.asarray(image, np.float32) / 255
    return lines[1:-1, 1:-1, None]


def _recolour(rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
    """Turn the hue, mostly a little, and change saturation and the strength of each channel."""
    turn = rng.normal(0, 0.25) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
    saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.4, 1.6)
    # A turn of the colour cube about its grey diagonal (Rodrigues' formula), then towards or away from grey.
    cosine, sine = np.cos(turn), np.sin(turn)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = cosine * np.eye(3) + sine * cross + (1 - cosine) / 3
    matrix = saturation * hue + (1 - saturation) * LUMINANCE
    matrix = matrix * rng.uniform(0.85, 1.15, (3, 1))
    return np.clip(colours @ matrix.T.astype(np.float32), 0, 1)


def _shade(rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
    """Light from one side, another contrast, or a few flat tones instead of gradients."""
    height, width = colours.shape[:2]
    choice = rng.integers(3)
    if choice == 0:
        across, down = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)
        angle = rng.uniform(0, 2 * np.pi)
        light = np.cos(angle) * across[None, :] + np.sin(angle) * down[:, None]
        return colours * (1 + rng.uniform(0.2, 0.6) * light[..., None]).astype(np.float32)
    if choice == 1:
        return colours ** np.float32(2 ** rng.uniform(-0.8, 0.8))
    tones = rng.integers(3, 6)
    return np.round(colours * tones) / np.float32(tones)


def photograph(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """A picture as a camera and the web might pass it on: light, noise, blur, JPEG, each only sometimes."""
    if rng.random() < 0.4:
        strength, offset = rng.uniform(0.8, 1.15), rng.uniform(-12, 12)
        image = image.point(np.clip(np.arange(256) * strength + offset, 0, 255).astype(np.uint8).tolist() * 3)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7) * image.width / 112))
    if rng.random() < 0.3:
        noise = rng.standard_normal((image.height, image.width, 1 if rng.random() < 0.5 else 3), np.float32)
        pixels = np.asarray(image, np.float32) + noise * np.float32(rng.uniform(2, 14))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(35, 95)))
        image = Image.open(file).convert("RGB")
    return image
