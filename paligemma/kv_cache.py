"""Keys and values of the positions that the decoder has read, in slots: one sequence a slot."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TextConfig

# Stores the keys and values of a layer, each [B, kv_heads, T, head_dim], and returns those to attend to, with S positions.
Write = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros of which a CPU holds only what has been written to, in pages; `torch.zeros` may write all of its memory."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # unmapped with the tensor
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVCache:
    """The keys and values of every layer for up to `slots` sequences, each with a length of its own.

    The memory is allocated once and written in place, and the lengths are a tensor beside it: a step that is compiled
    into a CUDA graph finds all where it was, and nothing here waits for the device. A prefill writes whole sequences
    with a `prefill_writer`, layer by layer, and then calls `start`. A decode step writes one position to each of the
    first slots with a `step_writer`, layer by layer, and then calls `advance`.

    A slot that holds no sequence, or not yet the whole of one, counts as full. Steps may run over it: what they write
    goes to a spare position at its end, which no other slot reads.

    Args:
        config: the decoder's sizes.
        slots: how many sequences there can be.
        capacity: the longest length of a sequence, at most `config.max_position_embeddings`.
        dtype, device: of the keys and values.
    """

    def __init__(self, config: TextConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        kv_heads, self.capacity = config.num_key_value_heads, capacity
        shape = (config.num_hidden_layers, slots, kv_heads, capacity + 1, config.head_dim)
        # Zeros, since a position that is masked still enters with weight 0, and 0 times a NaN is NaN.
        self.keys = lazy_zeros(shape, dtype, device)
        self.values = lazy_zeros(shape, dtype, device)
        self.lengths = torch.full((slots,), capacity, device=device)  # int64
        starts = torch.arange(slots * kv_heads, device=device) * (capacity + 1)
        self._starts = starts.view(slots, kv_heads)  # where a slot's heads begin, in positions of one layer

    def prefill_writer(self, slot: int) -> Write:
        """A function that writes the first T positions of B slots from `slot` on, and returns views of them."""

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            batch, _, length, _ = keys.shape
            own_keys = self.keys[layer, slot : slot + batch, :, :length]
            own_values = self.values[layer, slot : slot + batch, :, :length]
            return own_keys.copy_(keys), own_values.copy_(values)

        return write

    def scatter_writer(self, slot: Tensor, length: int) -> Write:
        """As `prefill_writer(slot)` of one sequence of `length` positions, but with the slot in a tensor, int64 [1].

        A compiled graph serves all slots so. What is written is what comes back.
        """
        targets = (self._starts[slot, :, None] + torch.arange(length, device=slot.device)).view(-1)
        all_keys, all_values = self.keys.flatten(1, 3), self.values.flatten(1, 3)  # [layers, positions, head_dim]

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            all_keys[layer].index_copy_(0, targets, keys.reshape(-1, keys.shape[-1]))
            all_values[layer].index_copy_(0, targets, values.reshape(-1, values.shape[-1]))
            return keys, values

        return write

    def start(self, slot: int, rows: int, length: int) -> None:
        """Let steps go on after position `length` in `rows` slots from `slot` on, once every layer has been written."""
        self.lengths[slot : slot + rows] = length

    def release(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        self.lengths[slot] = self.capacity

    def move(self, source: int, target: int, length: int) -> None:
        """Put the sequence of `length` positions in one slot into another, free one."""
        for cached in (self.keys, self.values):
            cached[:, target, :, :length] = cached[:, source, :, :length]
        self.lengths[target] = length
        self.release(source)

    def copy(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` positions in a slot, each [layers, kv_heads, length, head_dim]."""
        return self.keys[:, slot, :, :length].clone(), self.values[:, slot, :, :length].clone()

    def restore(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put what `copy` returned into a free slot, where steps go on after it."""
        length = keys.shape[2]
        self.keys[:, slot, :, :length], self.values[:, slot, :, :length] = keys, values
        self.start(slot, 1, length)

    def step_writer(self, rows: int, limit: int) -> Write:
        """A function that appends a position (T is 1) to each of the first `rows` slots.

        It returns views of the first `limit` positions of these slots.
        """
        targets = (self._starts[:rows] + self.lengths[:rows, None]).view(-1)
        all_keys, all_values = self.keys.flatten(1, 3), self.values.flatten(1, 3)  # [layers, positions, head_dim]
        read_keys, read_values = self.keys[:, :rows, :, :limit], self.values[:, :rows, :, :limit]

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            all_keys[layer].index_copy_(0, targets, keys.reshape(-1, keys.shape[-1]))
            all_values[layer].index_copy_(0, targets, values.reshape(-1, values.shape[-1]))
            return read_keys[layer], read_values[layer]

        return write

    def advance(self, rows: int) -> None:
        """Count one more position in each of the first `rows` slots, once every layer has been written."""
        self.lengths[:rows].add_(1).clamp_(max=self.capacity)

    def mask(self, rows: int, limit: int, window: int | None = None) -> Tensor:
        """Which of `limit` positions a step over the first `rows` slots attends to, bool [rows, 1, 1, limit].

        Those of its own sequence, the one that the step itself writes included; of these the last `window`, if given.
        """
        distance = self.lengths[:rows, None, None, None] - torch.arange(limit, device=self.lengths.device)
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def mark_static(self) -> None:
        """Tell `torch.compile` that all of this stays where it is, so that a CUDA graph copies none of it."""
        for tensor in (self.keys, self.values, self.lengths, self._starts):
            torch._dynamo.mark_static_address(tensor)


@dataclass(frozen=True, eq=False)
class KeptCache:
    """The keys and values of an answer that is over.

    key: of the images, the prefix and the weights.
    ids: of its positions, prefix and answer.
    keys, values: see `KVCache.copy`.
    prefill_seconds, step_seconds, first_logits: see `TokenSequence`.
    """

    key: Hashable
    ids: list[int]
    keys: Tensor
    values: Tensor
    prefill_seconds: float
    step_seconds: list[float]
    first_logits: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + (0 if self.first_logits is None else self.first_logits.nbytes)


class KeptCaches:
    """The latest kept caches, at most `max_bytes` of them; whichever was not asked for longest goes first."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._kept: list[KeptCache] = []  # the one that was asked for last at the end

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self._kept)

    def keep(self, new: KeptCache) -> None:
        """Add one, in place of those that are a part of it; one that is larger than all may be is not kept."""
        if new.nbytes > self.max_bytes:
            return
        self._kept = [one for one in self._kept if one.key != new.key or one.ids != new.ids[: len(one.ids)]] + [new]
        while self.nbytes > self.max_bytes:
            del self._kept[0]

    def find(self, key: Hashable, ids: Sequence[int]) -> KeptCache | None:
        """One that begins with these ids, unless there is none any more."""
        for one in reversed(self._kept):
            if one.key == key and one.ids[: len(ids)] == ids:
                self._kept.remove(one)
                self._kept.append(one)
                return one
        return None
