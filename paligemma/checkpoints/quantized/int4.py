"""int4 layers of a model, which do decode steps of few rows in place of its int8 layers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...model import PaliGemma
from ...quantization import INT4, Int4Linear, Int8Embedding, int4, quantize_int4
from ..weights import EMBEDDING, OUTPUT, Progress, Tensors, ignore, int4_weights, set_by_name
from .loading import load_int8_weights
from .store import find_store, keys_of, read_checked, remove_damaged

RANDOM_TOKENS = 512  # that the decoder reads, to see how large what its layers read is


def load_int4_weights(model: PaliGemma, tensors: Tensors, scales: Tensors, progress: Progress = ignore) -> None:
    """As `load_int8_weights`, and then `int4_weights` in int4 as well, made of the int8 ones and kept on the disk."""
    groups = int4_weights(model)
    sizes = {name: int4.bytes_of(model.get_parameter(name), group) for name, group in groups.items()}
    int8_weight = load_int8_weights(model, tensors, scales, progress)

    @cache
    def inputs() -> dict[str, Tensor]:
        return measure_inputs(model, list(groups))

    def make(name: str) -> tuple[Tensor, ...]:
        return quantize_int4(*int8_weight(name), inputs()[name], groups[name])

    weights = {name: tensors[name] for name in groups}
    stored = find_store("int4", weights, sizes, make, progress) if groups else None
    damaged: set[Path] = set()
    made: dict[str, tuple[Tensor, ...]] = {}
    for name in groups:
        places = [stored[key] for key in keys_of("int4", name)] if stored else []
        found = [read_checked(place.file, place.key, damaged) for place in places]
        whole = tuple(tensor for tensor in found if tensor is not None)
        made[name] = whole if places and len(whole) == len(places) else make(name)
    remove_damaged(damaged, "int4")
    embedding = model.language_model.embed_tokens
    assert isinstance(embedding, Int8Embedding)
    embedding.weight_dtype = INT4
    for name, (packed, steps, factors) in made.items():
        owner = name.removesuffix(".weight")
        if name == EMBEDDING:
            embedding.output = Int4Linear(embedding.output, packed, steps, factors)
        else:
            set_by_name(model, owner, Int4Linear(model.get_submodule(owner), packed, steps, factors))


@torch.inference_mode()
def measure_inputs(model: PaliGemma, names: list[str]) -> dict[str, Tensor]:
    """How large each channel is that layers of the decoder read, while it reads random tokens.

    Args:
        names: of their weights.

    Returns:
        the root of the mean square, float32 [in], under each name.
    """
    seen: dict[str, Tensor] = {}

    def see(name: str, hidden_states: Tensor) -> None:
        seen[name] = hidden_states.flatten(0, -2).square().mean(dim=0).sqrt()

    decoder, text = model.language_model, model.config.text
    count = min(RANDOM_TOKENS, text.max_position_embeddings)
    ids = torch.randint(text.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    modules = {
        name: model.get_submodule(name.removesuffix(".weight")) for name in names if name not in (EMBEDDING, OUTPUT)
    }
    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name, module in modules.items()
    ]
    try:
        hidden_states = decoder(decoder.embed(ids), slice(0, count), None, None)
    finally:
        for handle in handles:
            handle.remove()
    for name in set(names) - modules.keys():  # the output layer
        see(name, hidden_states)
    return seen
