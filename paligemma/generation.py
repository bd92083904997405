"""`VisionLanguageModel`: prefill once, decode step by step, one `Token` at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import PaliGemmaConfig, PaliGemmaError
from .images import open_image
from .kv_cache import KVCache
from .mask_decoder import MaskDecoder
from .model import PaliGemma
from .processor import Processor, TextStream
from .sampling import Sampler, is_number, shorten

MAX_SEED = 2**63
# A 3B checkpoint has 2 MB of features for an image of 224 pixels, in float32.
MAX_FEATURE_BYTES = 64 * 2**20
# The smallest capacity of a cache for compiled steps. Each capacity is compiled once, so that there are few of them:
# they double.
COMPILED_CAPACITY = 512


@contextmanager
def explained_lack_of_memory(device: torch.device) -> Iterator[None]:
    """Turn a device's running out of memory into a PaliGemmaError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PaliGemmaError(
            f"The memory of {device} is too small; please choose the dtype bfloat16, a smaller checkpoint or a "
            "larger machine."
        ) from error


@dataclass(frozen=True)
class Token:
    """One generated token.

    id: its number in the vocabulary.
    text: what it adds to the answer; empty in the middle of a character of several bytes. A character that is still
        unfinished when the answer ends is left out.
    probability: the model's own, before temperature and filters.
    """

    id: int
    text: str
    probability: float


class Settings(TypedDict, total=False):
    """The settings of `VisionLanguageModel.stream`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None


class FeatureCache:
    """The features of the latest images, so that the next prompt about one needs no run of the vision encoder."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returns, or returned when it was last called for this key."""
        with self._lock:
            features = self._features.pop(key, None)
        if features is None:
            features = compute()
        with self._lock:
            self._features[key] = features  # as the latest
            while sum(kept.nbytes for kept in self._features.values()) > self._max_bytes:
                self._features.popitem(last=False)
        return features


class VisionLanguageModel:
    """A loaded checkpoint, which answers prompts about images: `stream` and `generate`."""

    def __init__(self, model: PaliGemma, processor: Processor, mask_decoder: MaskDecoder | None = None):
        self.model = model.eval()
        self.processor = processor
        self.mask_decoder = mask_decoder
        self._features = FeatureCache(MAX_FEATURE_BYTES)
        self._compiled_step: Callable[[Tensor, KVCache], Tensor] | None = None
        self._free_caches: dict[int, list[KVCache]] = {}  # for compiled steps, by their capacity

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.model.language_model.norm.weight.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights: int8, or that of the activations."""
        return self.model.language_model.embed_tokens.weight.dtype

    def compile(self) -> None:
        """Compile the step that makes a token, as one graph; on CUDA it is replayed as a CUDA graph.

        The first answer then takes longer, while it is compiled.
        """

        def decode(input_ids: Tensor, cache: KVCache) -> Tensor:
            return self.model.decode(input_ids, cache, cache.capacity, cache.mask(len(input_ids), cache.capacity))

        compiled = torch.compile(decode, mode="reduce-overhead", fullgraph=True, dynamic=False)

        @torch.inference_mode()
        def step(input_ids: Tensor, cache: KVCache) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(input_ids, cache)

        # A CUDA graph belongs to the thread that recorded it, and each token may be asked for from another.
        thread = ThreadPoolExecutor(max_workers=1)
        self._compiled_step = lambda input_ids, cache: thread.submit(step, input_ids, cache).result()

    def stream(
        self,
        image: Image.Image | str | os.PathLike,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[Token]:
        """Answer token by token; closing the iterator ends the work within one token.

        Args:
            image: a Pillow image, or the path of an image file.
            prompt: in the syntax that the checkpoint was trained on, such as `caption en`.
            max_new_tokens: the answer's longest length, if `<eos>` does not end it earlier.
            temperature, top_k, top_p: see `Sampler`; the defaults are greedy.
            seed: the same one gives the same text; None draws a new one.

        Raises:
            PaliGemmaError: at the call, not at the first token, if an argument cannot be used.
        """
        sampler = Sampler(temperature, top_k, top_p)
        input_ids = self.processor.input_ids(prompt)
        longest = self.config.text.max_position_embeddings - len(input_ids)
        if not is_number(max_new_tokens, whole=True) or not 1 <= max_new_tokens <= longest:
            raise PaliGemmaError(
                f"max_new_tokens is {shorten(max_new_tokens)}; after this prompt please give a whole number "
                f"from 1 to {longest}."
            )
        if isinstance(image, (str, os.PathLike)):
            image = open_image(image)
        if not isinstance(image, Image.Image):
            raise PaliGemmaError(
                f"The picture is of type {type(image).__name__}; please give a Pillow picture or a path."
            )
        pixel_values = self.processor.pixel_values(image)
        return self._tokens(pixel_values, input_ids, int(max_new_tokens), sampler, self._generator(seed))

    def generate(self, image: Image.Image | str | os.PathLike, prompt: str, **settings: Unpack[Settings]) -> str:
        """The whole answer at once; arguments and errors as for `stream`."""
        return "".join(token.text for token in self.stream(image, prompt, **settings))

    @torch.inference_mode()
    def decode_mask(self, codes: Sequence[int]) -> np.ndarray | None:
        """The mask that 16 `<seg>` codes stand for, see `annotations.place_mask`.

        Returns:
            float32 [64, 64], above zero where the object is; None if the checkpoint came without a mask decoder.
        """
        if self.mask_decoder is None:
            return None
        return self.mask_decoder(torch.tensor([list(codes)]))[0].numpy()

    def _tokens(
        self,
        pixel_values: Tensor,
        input_ids: list[int],
        max_new_tokens: int,
        sampler: Sampler,
        generator: torch.Generator,
    ) -> Iterator[Token]:
        text = self.processor.text_stream()
        length = len(input_ids)
        # The last token's own keys and values are never needed.
        with explained_lack_of_memory(self.device), self._cache(length + max_new_tokens - 1) as cache:
            logits = self._prefill(pixel_values, input_ids, cache)
            for remaining in reversed(range(max_new_tokens)):
                next_id, probability = self._choose(logits, sampler, generator)
                token = self._token(next_id, probability, text)
                if token is None:
                    return
                yield token
                if remaining:
                    length += 1
                    logits = self._decode(next_id, cache, length)

    def _token(self, next_id: Tensor, probability: Tensor, text: TextStream) -> Token | None:
        """The chosen token, or None if it ends the answer."""
        token_id = int(next_id)  # waits for the device; the probability is ready with it
        chance = float(probability)
        if math.isnan(chance):
            dtype = str(self.weight_dtype).removeprefix("torch.")
            raise PaliGemmaError(
                f"The logits are not finite in {dtype}; please choose the dtype bfloat16, or, if they are not in that "
                "either, fetch the checkpoint again."
            )
        return None if token_id in self.config.eos_token_ids else Token(token_id, text.push(token_id), chance)

    @contextmanager
    def _cache(self, length: int) -> Iterator[KVCache]:
        """A cache of one slot for at least `length` positions; those for compiled steps are used again afterwards."""
        if self._compiled_step is None:
            yield KVCache(self.config.text, 1, length, self.dtype, self.device)
            return
        capacity = COMPILED_CAPACITY
        while capacity < length:
            capacity *= 2
        capacity = min(capacity, self.config.text.max_position_embeddings)
        free = self._free_caches.setdefault(capacity, [])
        try:
            cache = free.pop()
        except IndexError:  # all of this capacity are in use
            cache = KVCache(self.config.text, 1, capacity, self.dtype, self.device)
            cache.mark_static()
        try:
            yield cache
        finally:
            cache.release(0)
            free.append(cache)

    def _generator(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
            return generator
        if not is_number(seed, whole=True) or not 0 <= seed < MAX_SEED:
            raise PaliGemmaError(
                f"seed is {shorten(seed)}; please give none or a whole number from 0 to {MAX_SEED - 1}."
            )
        return generator.manual_seed(int(seed))

    @torch.inference_mode()
    def _prefill(self, pixel_values: Tensor, input_ids: list[int], cache: KVCache) -> Tensor:
        digest = hashlib.sha256(pixel_values.contiguous().numpy().data).digest()
        image_features = self._features.get(
            (digest, self._encoder_version()),
            lambda: self.model.image_features(pixel_values.to(self.device, self.dtype)),
        )
        return self.model.prefill(image_features, torch.tensor([input_ids], device=self.device), cache)

    def _encoder_version(self) -> tuple:
        """A key that changes when a parameter of encoder or projector is replaced or written to, as by fine-tuning."""
        parameters = (*self.model.vision_tower.parameters(), *self.model.multi_modal_projector.parameters())
        # Tensors made in inference mode do not count how often they are written to.
        return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in parameters)

    @torch.inference_mode()
    def _decode(self, token_id: Tensor, cache: KVCache, length: int) -> Tensor:
        """Append a token, int64 [1], as position `length` of the sequence; the next one's logits [1, vocab_size]."""
        if self._compiled_step is not None:
            return self._compiled_step(token_id[:, None], cache)
        return self.model.decode(token_id[:, None], cache, length)

    @torch.inference_mode()
    def _choose(self, logits: Tensor, sampler: Sampler, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The next token's id, int64 [1], and its probability, float32 [1], NaN where logits are not finite."""
        next_id = sampler(logits, generator)
        return next_id, logits.softmax(dim=-1).gather(-1, next_id[:, None])[:, 0]
