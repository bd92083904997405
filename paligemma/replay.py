"""Steps computed again, to see what the model itself does not hand out: in the engine's thread, and never while it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .attention import attention_weights
from .gemma import GemmaAttention, rotate
from .kv_cache import KeptCache
from .model import PaliGemma
from .siglip import VisionAttention


class Replayed(NamedTuple):
    """A step: float32 logits [vocab_size] and attention [layers, heads, positions], and the logit lens."""

    logits: np.ndarray
    attention: np.ndarray
    lens_ids: list[int]
    lens_probabilities: list[float]


def replay(model: PaliGemma, kept: KeptCache, ids: list[int], prefix: int) -> Replayed:
    """Repeat the step that read the last of `ids`, from the keys and values of the others; in the engine's thread.

    Where that is the prefix's last position, some before it are read again as well: int8 layers compute the last of
    several positions more exactly than a single one, and int4 layers compute more than three positions in int8.

    Args:
        kept: of at least all positions but those that are read.
        ids: of prefix and answer up to the position that is asked for.
        prefix: how many of them are prefix.
    """
    end, decoder, text = len(ids), model.language_model, model.config.text
    start = end - 1 if end > prefix else max(0, end - 4)
    window_mask = None
    if end > prefix and text.sliding_window is not None:
        window_mask = (torch.arange(end, device=model.device) > end - 1 - text.sliding_window)[None, None, None]
    hidden_states: list[Tensor] = []
    attention: list[Tensor] = []
    all_keys: list[Tensor] = []

    def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        all_keys.append(torch.cat((kept.keys[layer, None, :, :start], keys), dim=2))
        return all_keys[-1], torch.cat((kept.values[layer, None, :, :start], values), dim=2)

    def after_attention(module: GemmaAttention, given: tuple, _attended: Tensor) -> None:
        states, (cos, sin), mask, _, first = given
        queries = module.q_proj(states[:, first:]).unflatten(-1, (-1, module.head_dim))
        queries = rotate(queries, cos[first:], sin[first:])[:, -1:]
        attention.append(attention_weights(queries, all_keys[-1], mask, module.scale, module.softcap)[0, :, 0])

    def after_layer(_: nn.Module, __: tuple, output: Tensor) -> None:
        hidden_states.append(output[0, -1])

    attentions = [layer.get_submodule("self_attn") for layer in decoder.layers]
    with _hooked(attentions, after_attention), _hooked(decoder.layers, after_layer):
        embeddings = decoder.embed(torch.tensor([ids[start:]], device=model.device))
        decoder(embeddings, slice(start, end), None, window_mask, write, first=end - start - 1)
    # The last alone, as when the token was chosen: for int4 layers the number of rows makes a difference.
    states = decoder.norm(torch.stack(hidden_states))
    lens = torch.cat((model.logits(states[:-1]), model.logits(states[-1:])))  # [layers, vocab_size]
    logits, lens_ids = lens.max(dim=-1)
    return Replayed(
        lens[-1].cpu().numpy(),
        torch.stack(attention).float().cpu().numpy(),
        lens_ids.tolist(),
        (logits - lens.logsumexp(dim=-1)).exp().tolist(),
    )


def encoder_attention(model: PaliGemma, pixel_values: Tensor, patch: int) -> np.ndarray:
    """What a patch attends to in each layer of the vision encoder, float32 [layers, heads, patches]."""
    attention: list[Tensor] = []

    def after_attention(module: VisionAttention, given: tuple, _: Tensor) -> None:
        (states,) = given
        queries, keys = (
            project(states).unflatten(-1, (module.num_heads, -1)) for project in (module.q_proj, module.k_proj)
        )
        attention.append(attention_weights(queries[:, patch, None], keys.transpose(1, 2))[0, :, 0])

    layers = model.vision_tower.encoder["layers"].children()
    with _hooked((layer.get_submodule("self_attn") for layer in layers), after_attention):
        model.vision_tower(pixel_values.to(model.device, model.dtype))
    return torch.stack(attention).float().cpu().numpy()


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Calls `hook(module, inputs, output)` after each of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
