"""Linear layers that read the same input, each by itself or all as one product."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projections(nn.Module):
    """A module with linear layers that read the same input; once it is merged, one product computes all.

    Each layer's weight is then a part of the merged one, under its own name still and at no cost of memory. What changes
    weights in place is seen by both; a layer that is replaced afterwards is not.
    """

    merged_weight: Tensor | None
    merged_bias: Tensor | None

    def __init__(self, *names: str):
        super().__init__()
        self._names = names
        # Buffers, since a CUDA graph copies all other tensors at each replay.
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """What each layer makes of float [B, T, in]: float [B, T, out] each, in the order of their names."""
        layers = [getattr(self, name) for name in self._names]
        if self.merged_weight is None:
            return tuple(layer(hidden_states) for layer in layers)
        merged = F.linear(hidden_states, self.merged_weight, self.merged_bias)
        return merged.split([layer.out_features for layer in layers], dim=-1)

    @torch.no_grad()
    def merge(self) -> None:
        """From now on, compute all in one product, unless they are merged already or some are in int8."""
        layers = [getattr(self, name) for name in self._names]
        if self.merged_weight is not None or not all(type(layer) is nn.Linear for layer in layers):
            return
        self.merged_weight = _merge(layers, "weight")
        if layers[0].bias is not None:
            self.merged_bias = _merge(layers, "bias")


def merge_projections(model: nn.Module) -> None:
    """Let all modules of a model compute those of their layers in one product that read the same input."""
    for module in model.modules():
        if isinstance(module, Projections):
            module.merge()


def _merge(layers: Iterable[nn.Module], name: str) -> Tensor:
    """One tensor of which a parameter of each layer becomes a part."""
    parameters = [getattr(layer, name) for layer in layers]
    merged = torch.cat(parameters)
    for layer, part, old in zip(layers, merged.split([len(one) for one in parameters]), parameters):
        setattr(layer, name, nn.Parameter(part, requires_grad=old.requires_grad))
    return merged
