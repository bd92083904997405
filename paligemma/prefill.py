"""`Prefill` reads sequences into slots of a cache, and remembers what may be asked for again."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .compilation import CompiledModel
from .hardware import on_device
from .kv_cache import KeptCache, KeptCaches, KVCache
from .model import PaliGemma
from .sequence import TokenSequence

MAX_FEATURE_BYTES = 64 * 2**20  # a 3B checkpoint has 2 MB of features for an image of 224 pixels, in float32
MAX_KEPT_BYTES = 256 * 2**20  # a 3B checkpoint of PaliGemma 2 has 213 kB of keys and values for a position, in float32


class Prefill:
    """Reads sequences with a model, for the one thread that owns it.

    The features of the latest images are kept, and so are the keys and values of the latest answers, for whoever looks
    inside one, lets it go on with another token, or asks the same again.
    """

    def __init__(self, model: PaliGemma):
        self.model = model
        self.compiled: CompiledModel | None = None
        self.kept = KeptCaches(MAX_KEPT_BYTES)
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()  # the newest last
        self.hits = self.misses = 0  # images whose features, or all that follows from them, were there, and were not

    def read(
        self, sequence: TokenSequence, cache: KVCache, slot: int, after_layer: Callable[[], None]
    ) -> Tensor | None:
        """Put into a slot the keys and values of images, prompt, and all tokens of the answer that are there but the last.

        Args:
            after_layer: called after each layer.

        Returns:
            float32 [1, vocab_size], the logits of the next token; None if there are tokens and all was kept.
        """
        kept = self._find(sequence)
        if kept is not None and (sequence.answer_ids or kept.first_logits is not None):
            cache.restore(slot, kept.keys[:, :, : sequence.length], kept.values[:, :, : sequence.length])
            sequence.prefill_seconds, sequence.first_logits = kept.prefill_seconds, kept.first_logits
            sequence.step_seconds = kept.step_seconds[: max(0, len(sequence.answer_ids) - 1)]
            self.hits += len(sequence.pixel_values)
            return None if sequence.answer_ids else kept.first_logits
        features = self.image_features(sequence, after_layer)
        input_ids = on_device([sequence.ids[: sequence.length]], self.model.device)
        prefix_lengths = None
        if len(sequence.input_ids) < sequence.length:
            prefix_lengths = on_device([len(sequence.input_ids)], self.model.device)
        logits = (self.compiled or self.model).prefill(features, input_ids, cache, slot, prefix_lengths, after_layer)
        if not sequence.answer_ids:
            sequence.first_logits = logits
        return logits

    def image_features(self, sequence: TokenSequence, after_layer: Callable[[], None] | None = None) -> Tensor:
        """The features of a sequence's images, float [1, patches, hidden_size], computed unless they are kept."""
        all_features = []
        for digest, pixel_values in zip(sequence.image_digests, sequence.pixel_values):
            key = digest, self.model.encoder_version()
            features = self._features.pop(key, None)
            if features is None:
                pixel_values = pixel_values.to(self.model.device, self.model.dtype, non_blocking=True)
                features = (self.compiled or self.model).image_features(pixel_values, after_layer)
                self.misses += 1
            else:
                self.hits += 1
            self._features[key] = features
            while sum(kept.nbytes for kept in self._features.values()) > MAX_FEATURE_BYTES:
                self._features.popitem(last=False)
            all_features.append(features)
        return torch.cat(all_features, dim=1)

    def keep(self, sequence: TokenSequence, cache: KVCache, slot: int) -> None:
        """Keep the keys and values of an answer that is over, unless it has no token, it failed, or they are too large."""
        size = sequence.length * self.model.config.text.cached_numbers * self.model.dtype.itemsize
        if not sequence.answer_ids or sequence.has_failed or size > self.kept.max_bytes:
            return
        try:
            self.kept.keep(self._copy(sequence, cache, slot))
        except RuntimeError:  # there is no memory for what can be computed again
            return

    def recall(self, sequence: TokenSequence, after_layer: Callable[[], None]) -> KeptCache:
        """The keys and values of an answer that is over; they are computed again if they are not kept any more."""
        kept = self._find(sequence)
        if kept is not None:
            return kept
        start, text = time.perf_counter(), self.model.config.text
        cache = KVCache(text, 1, sequence.length, self.model.dtype, self.model.device)
        self.read(sequence, cache, 0, after_layer)
        sequence.prefill_seconds += time.perf_counter() - start
        kept = self._copy(sequence, cache, 0)
        self.kept.keep(kept)
        return kept

    def _find(self, sequence: TokenSequence) -> KeptCache | None:
        return self.kept.find(self._key(sequence), sequence.ids[: sequence.length])

    def _copy(self, sequence: TokenSequence, cache: KVCache, slot: int) -> KeptCache:
        keys, values = cache.copy(slot, sequence.length)
        ids, seconds = sequence.ids[: sequence.length], (sequence.prefill_seconds, sequence.step_seconds)
        return KeptCache(self._key(sequence), ids, keys, values, *seconds, sequence.first_logits)

    def _key(self, sequence: TokenSequence) -> Hashable:
        return tuple(sequence.image_digests), tuple(sequence.input_ids), self.model.version()
