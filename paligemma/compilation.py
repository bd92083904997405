"""What `torch.compile` makes of the three things that the engine runs a model for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kv_cache import KVCache
from .model import PaliGemma
from .projections import merge_projections

SMALLEST_LIMIT = 512  # positions; the larger ones double


class CompiledModel:
    """`image_features`, `prefill` and `decode` of a model, compiled when they are first called, its projections merged.

    The encoder is one graph for each resolution and number of images. The prefill is one graph for prompts of all
    lengths and all slots. The decode step is one for each bucket of rows and limit, on CUDA a CUDA graph.
    """

    def __init__(self, model: PaliGemma):
        torch._dynamo.config.recompile_limit = 64
        merge_projections(model)
        self._model = model
        self._encode = torch.compile(model.image_features, mode="default", fullgraph=True, dynamic=False)
        self._prefill = torch.compile(model.prefill_at, mode="default", fullgraph=True)
        self._decode = torch.compile(model.decode, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def image_features(self, pixel_values: Tensor, after_layer: Callable[[], None] | None) -> Tensor:
        """See `PaliGemma.image_features`; there is one pause, at the end."""
        features = self._encode(pixel_values)
        if after_layer is not None:
            after_layer()
        return features

    def prefill(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        cache: KVCache,
        slot: int,
        prefix_lengths: Tensor | None,
        after_layer: Callable[[], None],
    ) -> Tensor:
        """See `PaliGemma.prefill`; there is no pause, but where some of an answer is there already: it is not compiled."""
        if prefix_lengths is not None:
            return self._model.prefill(image_features, input_ids, cache, slot, prefix_lengths, after_layer)
        torch._dynamo.mark_dynamic(input_ids, 1)
        place = torch.tensor([slot]).to(input_ids.device, non_blocking=True)
        logits = self._prefill(image_features, input_ids, cache, place)
        cache.start(slot, 1, input_ids.shape[1])
        return logits

    def decode(self, input_ids: Tensor, cache: KVCache, limit: int, mask: Tensor | None) -> Tensor:
        """See `PaliGemma.decode`; rows and limit come from `bucket`."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._decode(input_ids, cache, limit, mask)

    @staticmethod
    def bucket(rows: int, limit: int, cache: KVCache) -> tuple[int, int]:
        """The smallest number of rows and limit that are not smaller and for which there is a graph."""
        slots = len(cache.lengths)
        return min(_power_of_two(rows), slots), min(max(_power_of_two(limit), SMALLEST_LIMIT), cache.capacity)


def _power_of_two(number: int) -> int:
    """The smallest one that is not smaller."""
    return 1 << (number - 1).bit_length()
