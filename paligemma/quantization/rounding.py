"""Weights in float to int8: rotated block by block, then rounded with one scale per output channel."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import torch
from torch import Tensor

LARGEST_WEIGHT = 127
SMALLEST_BLOCK, LARGEST_GROUP = 128, 16  # channels, and blocks of them: an outlier is spread over their product
NUMBERS_AT_ONCE = 2**20  # when quantizing: what the cache of a CPU holds
TINY = 1e-30  # against division by zero; a 127th of it is still no denormal number


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate and round the weight of a linear layer.

    Args:
        weight: float [out, in].

    Returns:
        int8 [out, in] and its scale, float32 [out]: their product is the rotated weight.
    """
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight))
    count = max(1, NUMBERS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        rotated = rotate(weight[rows].float())
        scale[rows] = rotated.abs().amax(dim=1).clamp_min(TINY) / LARGEST_WEIGHT
        rounded[rows] = rotated.div_(scale[rows, None]).round_()
    return rounded, scale


def dequantize(rounded: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] in a floating dtype that an int8 weight and its scale stand for."""
    weight = torch.empty(rounded.shape, dtype=dtype)
    count = max(1, NUMBERS_AT_ONCE // rounded.shape[1])
    for rows, part, steps in zip(weight.split(count), rounded.split(count), scale.split(count), strict=True):
        rows.copy_(unrotate(part.float() * steps[:, None]))
    return weight


def rotate(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply each row of float32 [..., channels] by an orthogonal matrix, see `rotation`, computed in `dtype`."""
    across, within = rotation(rows.shape[-1], dtype)
    blocks = (rows.to(dtype).reshape(-1, len(within)) @ within).view(-1, len(across), len(within))
    return torch.bmm(across.expand(len(blocks), -1, -1), blocks).view(rows.shape)


def unrotate(rows: Tensor) -> Tensor:
    """Undo `rotate`."""
    across, within = rotation(rows.shape[-1])
    blocks = rows.reshape(-1, len(across), len(within))
    blocks = torch.bmm(across.T.expand(len(blocks), -1, -1), blocks)
    return (blocks.view(-1, len(within)) @ within.T).view(rows.shape)


@lru_cache
def rotation(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices [blocks, blocks] and [block, block]: each block is multiplied by the second, and then as many
    blocks with each other as the first has rows. Their product with all that is between costs a seventh of one matrix.

    They are discrete Hartley transforms, which exist for any size and have no large entry, after random changes of sign, so
    that an even row does not end up in one channel.
    """
    block = next(size for size in range(min(SMALLEST_BLOCK, channels), channels + 1) if channels % size == 0)
    count = channels // block
    together = next(size for size in range(min(LARGEST_GROUP, count), 0, -1) if count % size == 0)
    return (_hartley(together) * _signs(together)).to(dtype), (_signs(block)[:, None] * _hartley(block)).to(dtype)


def _signs(size: int) -> Tensor:
    """Ones with random signs, float64 [size]: the same on every machine, since what one quantizes is read on another."""
    generator = random.Random(size)
    return torch.tensor([1.0 if generator.random() < 0.5 else -1.0 for _ in range(size)], dtype=torch.float64)


def _hartley(size: int) -> Tensor:
    """The discrete Hartley transform, orthogonal, float64 [size, size]."""
    steps = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi / size * (torch.outer(steps, steps) % size)
    return (angles.cos() + angles.sin()) / math.sqrt(size)
