"""Random changes: the shape of a drawing; the light, blur, noise and JPEG artifacts of an image."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

MAX_ROTATION = 20  # degrees, either way
MAX_SHEAR = 0.15
MAX_STRETCH = 1.25


def random_shape(rng: np.random.Generator) -> np.ndarray:
    """Mirror, stretch, shear and rotate: float64 [2, 2], a matrix from the sprite's (x, y) to the image's."""
    stretch = MAX_STRETCH ** rng.uniform(-0.5, 0.5)
    mirror = np.diag([stretch * rng.choice([-1, 1]), 1 / stretch])
    shear = np.array([[1, rng.uniform(-MAX_SHEAR, MAX_SHEAR)], [0, 1]])
    angle = np.radians(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return rotation @ shear @ mirror


def photograph(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """An image as a camera and the web might pass it on: light, blur, noise, JPEG, each only sometimes."""
    if rng.random() < 0.4:
        gain, offset = rng.uniform(0.8, 1.15), rng.uniform(-12, 12)
        image = image.point(np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8).tolist() * 3)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7) * image.width / 112))
    if rng.random() < 0.3:
        channels = 1 if rng.random() < 0.5 else 3
        noise = rng.standard_normal((image.height, image.width, channels), np.float32)
        pixels = np.asarray(image, np.float32) + noise * np.float32(rng.uniform(2, 14))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(35, 95)))
        image = Image.open(file).convert("RGB")
    return image
