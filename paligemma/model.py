"""PaliGemma (arXiv 2407.07726, 2412.03555): vision encoder, linear projector, decoder, and the mask of a prefix and its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .config import PaliGemmaConfig
from .gemma import GemmaModel
from .kv_cache import KVCache, Write
from .siglip import SiglipVisionModel


class PaliGemma(nn.Module):
    """Image and token ids to logits.

    Every row of ids starts with `config.vision.num_patches` placeholders for each image, in whose place the image features
    go.
    `forward` runs whole rows; `prefill` and `decode` run sequences step by step through the same layers.
    """

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision)
        self.multi_modal_projector = nn.ModuleDict(
            {"linear": nn.Linear(config.vision.hidden_size, config.text.hidden_size)}
        )
        self.language_model = GemmaModel(config.text)
        # A few checkpoints have an output layer of their own; in the others the token embedding is it as well.
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        )

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Float [..., hidden_size], the decoder's last, to float32 [..., vocab_size]."""
        output_layer = self.language_model.embed_tokens.logits if self.lm_head is None else self.lm_head
        logits, softcap = output_layer(hidden_states).float(), self.config.text.final_logit_softcapping
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    @property
    def device(self) -> torch.device:
        return self.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.language_model.norm.weight.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights: int8, int4, or that of the activations."""
        embedding = self.language_model.embed_tokens
        return getattr(embedding, "weight_dtype", embedding.weight.dtype)

    def image_features(self, pixel_values: Tensor, after_layer: Callable[[], None] | None = None) -> Tensor:
        """Float [B, 3, H, W] to float [B, patches, hidden_size], as they enter the decoder (unscaled).

        Of N images a row, float [B, N, 3, H, W], the features follow each other: [B, N * patches, hidden_size].
        """
        encoded = self.vision_tower(pixel_values.flatten(0, -4), after_layer)
        return self.multi_modal_projector["linear"](encoded).view(len(pixel_values), -1, self.config.text.hidden_size)

    def encoder_version(self) -> tuple:
        """A key that changes when a parameter of encoder or projector is replaced or written to, as by fine-tuning."""
        return _version((*self.vision_tower.parameters(), *self.multi_modal_projector.parameters()))

    def version(self) -> tuple:
        """As `encoder_version`, of all parameters."""
        return _version(self.parameters())

    def hidden_states(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        prefix_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        first: int = 0,
        write: Write | None = None,
        after_layer: Callable[[], None] | None = None,
    ) -> Tensor:
        """The decoder's last hidden states over whole rows, from the position `first` on.

        Others as for `forward`, `GemmaModel` and `prefill`.

        Returns:
            float [B, T - first, hidden_size].
        """
        length, window = input_ids.shape[1], self.config.text.sliding_window
        mask = window_mask = prefix_lm_mask(length, prefix_lengths, attention_mask)
        if window is not None and window < length:
            window_mask = prefix_lm_mask(length, prefix_lengths, attention_mask, window)
        embeddings = self._embed(image_features, input_ids)
        return self.language_model(embeddings, slice(0, length), mask, window_mask, write, first, after_layer)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        prefix_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits at every position of whole rows.

        Args:
            pixel_values: float [B, 3, H, W], or [B, N, 3, H, W] of N images a row, in -1 to 1.
            input_ids: int64 [B, T], the image placeholders first.
            prefix_lengths: int64 [B], how many positions of each row attend to each other both ways; those after
                are causal. None: the whole row is prefix.
            attention_mask: [B, T], 0 or False at right padding, else 1 or True. None: no padding.

        Returns:
            float32 [B, T, vocab_size].
        """
        hidden_states = self.hidden_states(self.image_features(pixel_values), input_ids, prefix_lengths, attention_mask)
        return self.logits(hidden_states)

    def prefill(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        cache: KVCache,
        slot: int = 0,
        prefix_lengths: Tensor | None = None,
        after_layer: Callable[[], None] | None = None,
    ) -> Tensor:
        """Read images and prompts, and what of the answers is there already, into B slots of `cache` from `slot` on.

        Args:
            image_features: float [B, patches, hidden_size].
            input_ids: int64 [B, T], unpadded, the image placeholders first.
            cache: with a capacity of at least T positions.
            prefix_lengths: as for `forward`; None where there is no answer yet.
            after_layer: called after each layer of the decoder but the last; steps over other slots may run meanwhile.

        Returns:
            float32 [B, vocab_size], the logits of the token after these.
        """
        rows, length = input_ids.shape
        hidden_states = self.hidden_states(
            image_features,
            input_ids,
            prefix_lengths,
            first=length - 1,
            write=cache.prefill_writer(slot),
            after_layer=after_layer,
        )
        cache.start(slot, rows, length)
        return self.logits(hidden_states[:, -1])

    def prefill_at(self, image_features: Tensor, input_ids: Tensor, cache: KVCache, slot: Tensor) -> Tensor:
        """As `prefill` of one row, but without a pause, and with the slot in a tensor, int64 [1]: to be compiled.

        `cache.start` is left to the caller.
        """
        length = input_ids.shape[1]
        hidden_states = self.language_model(
            self._embed(image_features, input_ids),
            slice(0, length),
            mask=None,
            window_mask=None,
            write=cache.scatter_writer(slot, length),
            first=length - 1,
        )
        return self.logits(hidden_states[:, -1])

    def decode(self, input_ids: Tensor, cache: KVCache, limit: int, mask: Tensor | None = None) -> Tensor:
        """Append one token to each of the first B slots of `cache`.

        Args:
            input_ids: int64 [B, 1].
            cache: each of the slots holds a sequence, or is ignored.
            limit: how many positions are read: at least as many as the longest of the sequences has with its new token.
            mask: `cache.mask(B, limit)`; None where all of the sequences have exactly `limit` positions with the new one.

        Returns:
            float32 [B, vocab_size], the logits of the token after it.
        """
        rows, window = len(input_ids), self.config.text.sliding_window
        hidden_states = self.language_model(
            self.language_model.embed(input_ids),
            cache.lengths[:rows, None],
            mask,
            mask if window is None or limit <= window else cache.mask(rows, limit, window),
            cache.step_writer(rows, limit),
        )
        cache.advance(rows)
        return self.logits(hidden_states[:, -1])

    def _embed(self, image_features: Tensor, input_ids: Tensor) -> Tensor:
        text = self.language_model.embed(input_ids[:, image_features.shape[1] :])
        return torch.cat((image_features, text), dim=1)


def _version(parameters: Iterable[nn.Parameter]) -> tuple:
    # Tensors made in inference mode do not count how often they are written to.
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in parameters)


def prefix_lm_mask(
    length: int, prefix_lengths: Tensor | None, attention_mask: Tensor | None, window: int | None = None
) -> Tensor | None:
    """Which position (row) attends to which (column).

    A prefix of two and an answer of two; the same with the last position as padding, and with a sliding window of two;
    a prefix only:

        1 1 0 0      1 1 0 0      1 1 0 0      1 1 1 1
        1 1 0 0      1 1 0 0      1 1 0 0      1 1 1 1
        1 1 1 0      1 1 1 0      0 1 1 0      1 1 1 1
        1 1 1 1      1 1 1 0      0 0 1 1      1 1 1 1

    Args:
        length: T, the number of positions.
        prefix_lengths: int64 [B], or None if every row is prefix as a whole.
        attention_mask: [B, T], zero at padding, or None.
        window: of the positions up to itself, how many an answer's position attends to; None: all.

    Returns:
        bool [B, 1, T, T], or None where every position attends to every other and attention needs no mask.
    """
    mask = None
    if prefix_lengths is not None:
        positions = torch.arange(length, device=prefix_lengths.device)
        distance = positions[:, None] - positions[None, :]  # [T, T]
        causal = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        in_prefix = positions[None, :] < prefix_lengths[:, None]  # [B, T]
        mask = (causal | (in_prefix[:, :, None] & in_prefix[:, None, :]))[:, None]
    if attention_mask is not None:
        real = attention_mask.bool()[:, None, None, :]  # [B, 1, 1, T]
        mask = real.expand(-1, -1, length, -1) if mask is None else mask & real
    return mask
