"""Names of colors: of a background to paint, and of an object that has mostly one color."""

from __future__ import annotations

import colorsys

import numpy as np

# For each name, the ranges of hue (degrees), saturation and value to paint with. There are gaps between the ranges, so
# that people, and an image that is a little too dark, agree on the names.
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
COLORS = tuple(RANGES)
MAIN_SHARE = 0.6  # of the visible pixels


def random_color(rng: np.random.Generator, name: str) -> np.ndarray:
    """A color of that name: float64 [3], RGB in 0 to 255."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in RANGES[name])
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def main_color(pixels: np.ndarray) -> str | None:
    """The name of the color that most of a drawing has; None if there is no such color.

    Args:
        pixels: float32 [..., 4], RGBA in 0 to 1; those that are mostly transparent do not count.
    """
    visible = pixels[pixels[..., 3] > 0.5][:, :3]
    if len(visible) == 0:
        return None
    counts = np.bincount(_name_indices(visible), minlength=len(COLORS))
    best = int(counts.argmax())
    return COLORS[best] if counts[best] >= MAIN_SHARE * len(visible) else None


def _name_indices(pixels: np.ndarray) -> np.ndarray:
    """Float [N, 3], RGB in 0 to 1, to the indices into `COLORS` of the nearest names, int64 [N]."""
    value, least = pixels.max(-1), pixels.min(-1)
    chroma = value - least
    saturation = chroma / np.maximum(value, 1e-6)
    red, green, blue = pixels.T
    hue = np.select(
        [value == red, value == green],
        [(green - blue) / np.maximum(chroma, 1e-6), 2 + (blue - red) / np.maximum(chroma, 1e-6)],
        4 + (red - green) / np.maximum(chroma, 1e-6),
    )
    hue = hue * 60 % 360
    pale = saturation < 0.15
    tests = {
        "black": value < 0.2,
        "white": pale & (value > 0.8),
        "gray": pale,
        "brown": (hue < 40) & (hue >= 12) & (value < 0.65),
        "pink": (hue >= 300) & (hue < 350) | (saturation < 0.5) & ((hue < 15) | (hue >= 350)) & (value > 0.8),
        "red": (hue < 15) | (hue >= 350),
        "orange": hue < 42,
        "yellow": hue < 68,
        "green": hue < 175,
        "blue": hue < 255,
    }  # the first that is true
    return np.select(list(tests.values()), [COLORS.index(name) for name in tests], COLORS.index("purple"))
