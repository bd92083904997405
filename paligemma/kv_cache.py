"""What the decoder remembers: every layer's keys and values, allocated once at full length and written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TextConfig


class KVCache:
    """Room for `max_length` positions of a batch of rows that are equally long.

    A forward pass over T new positions asks where they are and what they may see, lets each layer `update` its slice,
    and then calls `advance(T)` once.
    """

    def __init__(
        self, config: TextConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0

    def positions(self, count: int) -> slice | Tensor:
        """Those of the next `count` tokens, as an index."""
        return slice(self.length, self.length + count)

    def mask(self, count: int) -> Tensor | None:
        """Bool [1, 1, count, S], which of the S positions that `update` returns are there; None: all of them."""
        return None

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `keys` and `values` [B, kv_heads, T, head_dim] after what is there; return views of all so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` positions as written, once every layer has been updated."""
        self.length += count


class StaticKVCache(KVCache):
    """A cache whose steps are all alike: same shapes, same memory, the position in a tensor.

    That is what a compiled step needs, which a CUDA graph replays. A step sees the whole room through a mask; the first
    pass, of several positions, sees just itself. `reset` makes room for the next request.
    """

    def __init__(
        self, config: TextConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ):
        super().__init__(config, batch_size, max_length, dtype, device)
        # What is not there yet is masked, but a NaN left in this memory would come through the mask.
        self.keys.zero_()
        self.values.zero_()
        self.room = torch.arange(max_length, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        for tensor in (self.keys, self.values, self.room, self.length):
            torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        """Forget everything."""
        self.length.zero_()

    def positions(self, count: int) -> slice | Tensor:
        return self.length if count == 1 else slice(0, count)

    def mask(self, count: int) -> Tensor | None:
        return (self.room <= self.length)[None, None, None] if count == 1 else None

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if keys.shape[2] > 1:
            self.keys[layer, :, :, : keys.shape[2]] = keys
            self.values[layer, :, :, : keys.shape[2]] = values
            return keys, values
        self.keys[layer].index_copy_(2, self.length, keys)
        self.values[layer].index_copy_(2, self.length, values)
        return self.keys[layer], self.values[layer]

    def advance(self, count: int) -> None:
        self.length += count
