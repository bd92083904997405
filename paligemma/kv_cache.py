"""What the decoder remembers: every layer's keys and values, allocated once at full length and written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TextConfig


class KVCache:
    """Room for `max_length` positions of a batch of rows that are equally long.

    A forward pass over T new positions lets each layer `update` its slice and then calls `advance(T)` once.
    """

    def __init__(
        self, config: TextConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `keys` and `values` [B, kv_heads, T, head_dim] after what is there; return views of all so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, positions: int) -> None:
        """Count `positions` as written, once every layer has been updated."""
        self.length += positions
