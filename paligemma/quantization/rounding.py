"""Weights in float to int8: rotated block by block, then rounded with one scale per output channel."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import torch
from torch import Tensor

LARGEST_WEIGHT = 127
SMALLEST_BLOCK = 128  # channels that an outlier is spread over
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


def rotate(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply each block of channels of float32 [..., channels] by `rotation`, into `out` if that is given."""
    matrix = rotation(rows.shape[-1])
    out = torch.empty(rows.shape) if out is None else out
    torch.mm(rows.reshape(-1, len(matrix)), matrix, out=out.view(-1, len(matrix)))
    return out


def unrotate(rows: Tensor) -> Tensor:
    """Undo `rotate`."""
    matrix = rotation(rows.shape[-1])
    return (rows.reshape(-1, len(matrix)) @ matrix.T).view(rows.shape)


@lru_cache
def rotation(channels: int) -> Tensor:
    """The orthogonal matrix, float32 [block, block], for blocks that divide the channels.

    A discrete Hartley transform, which exists for any size and has no large entry, after random changes of sign, so
    that an even row does not end up in one channel.
    """
    block = next(size for size in range(min(SMALLEST_BLOCK, channels), channels + 1) if channels % size == 0)
    steps = torch.arange(block, dtype=torch.float64)
    angles = 2 * math.pi / block * (torch.outer(steps, steps) % block)
    generator = random.Random(block)  # the same on every machine: what was quantized on one is read on another
    signs = torch.tensor([1.0 if generator.random() < 0.5 else -1.0 for _ in range(block)], dtype=torch.float64)
    return (signs[:, None] * (angles.cos() + angles.sin()) / math.sqrt(block)).float()
