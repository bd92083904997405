"""Names of colours: what a background is painted with, and what an object is called if one colour rules it."""

from __future__ import annotations

import colorsys

import numpy as np

# For each name a range of hue (degrees), of saturation and of value to paint with. There are gaps between the ranges,
# so that people, and a picture that is a little too dark, agree on the names.
RANGES = {
    "red": ((-6, 6), (0.75, 1.0), (0.6, 0.95)),
    "orange": ((24, 34), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((48, 58), (0.6, 1.0), (0.88, 1.0)),
    "green": ((95, 150), (0.45, 1.0), (0.35, 0.8)),
    "blue": ((205, 235), (0.55, 1.0), (0.45, 0.95)),
    "purple": ((268, 288), (0.45, 0.9), (0.45, 0.85)),
    "pink": ((322, 346), (0.3, 0.55), (0.9, 1.0)),
    "brown": ((20, 32), (0.5, 0.8), (0.3, 0.5)),
    "black": ((0, 360), (0.0, 1.0), (0.0, 0.12)),
    "gray": ((0, 360), (0.0, 0.06), (0.38, 0.65)),
    "white": ((0, 360), (0.0, 0.05), (0.93, 1.0)),
}
COLOURS = tuple(RANGES)
SHARE_TO_RULE = 0.6  # of the visible pixels


def random_colour(rng: np.random.Generator, name: str) -> np.ndarray:
    """Float [3], RGB in 0 to 255, of that name."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in RANGES[name])
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def ruling_colour(pixels: np.ndarray) -> str | None:
    """The name of the colour that most of a drawing has, or None where no colour rules.

    Args:
        pixels: float32 [..., 4], RGBA in 0 to 1; those that are mostly transparent do not count.
    """
    colours = pixels[pixels[..., 3] > 0.5][:, :3]
    if len(colours) == 0:
        return None
    counts = np.bincount(_name_indices(colours), minlength=len(COLOURS))
    best = int(counts.argmax())
    return COLOURS[best] if counts[best] >= SHARE_TO_RULE * len(colours) else None


def _name_indices(colours: np.ndarray) -> np.ndarray:
    """For float [N, 3] RGB in 0 to 1, the indices into `COLOURS` of the nearest names, int64 [N]."""
    value, least = colours.max(-1), colours.min(-1)
    chroma = value - least
    saturation = chroma / np.maximum(value, 1e-6)
    red, green, blue = colours.T
    hue = np.select(
        [value == red, value == green],
        [(green - blue) / np.maximum(chroma, 1e-6), 2 + (blue - red) / np.maximum(chroma, 1e-6)],
        4 + (red - green) / np.maximum(chroma, 1e-6),
    )
    hue = hue * 60 % 360
    pale = saturation < 0.15
    names = np.select(
        [
            value < 0.2,
            pale & (value > 0.8),
            pale,
            (hue < 40) & (hue >= 12) & (value < 0.65),
            (hue >= 300) & (hue < 350) | (saturation < 0.5) & ((hue < 15) | (hue >= 350)) & (value > 0.8),
            (hue < 15) | (hue >= 350),
            hue < 42,
            hue < 68,
            hue < 175,
            hue < 255,
        ],
        [COLOURS.index(name) for name in "black white gray brown pink red orange yellow green blue".split()],
        COLOURS.index("purple"),
    )
    return names
