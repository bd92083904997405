"""Layers with int8 weights, for the places of `nn.Linear` and of the token embedding."""

from __future__ import annotations

from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from .packing import FbgemmWeight, OneDnnWeight, rotation_dtype
from .rounding import TINY, rotate, unrotate


class PreparedRows(NamedTuple):
    """The input of an `Int8Linear`, rotated, scaled and rounded.

    rounded: [rows + n, in], each row divided by its step, as `weight.round` returns it. The last n are residuals, what
        rounding loses of some of the rows, multiplied by `Int8Linear.residual_scale`.
    step: float32 [rows, 1].
    residual_rows: which rows have a residual; None if n is 0.
    """

    rounded: Tensor
    step: Tensor
    residual_rows: slice | None


class InputMemo:
    """Remembers the last input that int8 layers prepared, so that layers with the same one (q, k, v) prepare it once.

    An input is known by its identity and held weakly: what was prepared from it is freed with it. Threads may share a memo.
    """

    def __init__(self) -> None:
        # Replaced as a whole, so that other threads see one entry or another.
        self._last: tuple[ref[Tensor], tuple, PreparedRows] | None = None

    def get(self, hidden_states: Tensor, layer: Int8Linear) -> PreparedRows:
        """What `layer`, or the last one of its kind, prepares from `hidden_states`."""
        # In inference mode torch counts no versions: nobody may write to an input there while layers read it.
        version = 0 if hidden_states.is_inference() else hidden_states._version
        key, last = (layer.weight.levels, layer.single_residual, version), self._last
        if last is not None and last[0]() is hidden_states and last[1] == key:
            return last[2]
        rows = layer.prepare(hidden_states)
        self._last = ref(hidden_states, self._forget), key, rows
        return rows

    def _forget(self, freed: ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is freed:
            self._last = None


class Int8Linear(nn.Module):
    """Stands in for `nn.Linear`: float32 [B, T, in] or [B, in] to float32 [B, T, out] or [B, out].

    Args:
        weight: packed, see `pack`.
        bias: float32 [out], or None.
        memo: that of the layers which may have inputs in common with this one.
        single_residual: whether also the only position of a sequence has a residual.
    """

    def __init__(
        self,
        weight: FbgemmWeight | OneDnnWeight,
        bias: Tensor | None = None,
        memo: InputMemo | None = None,
        single_residual: bool = False,
    ):
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.memo = memo or InputMemo()
        self.single_residual = single_residual
        self.residual_scale = 2 * weight.levels  # what rounding loses is up to half a step

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = self.memo.get(hidden_states, self)
        count = len(rows.step)
        product = self.weight.multiply(rows.rounded)
        output = product[:count]
        if rows.residual_rows is not None:
            output[rows.residual_rows] += product[count:] / self.residual_scale
        output *= rows.step
        if self.bias is not None:
            output += self.bias
        return output.view(*hidden_states.shape[:-1], -1)

    def prepare(self, hidden_states: Tensor) -> PreparedRows:
        """Rotate, scale and round float32 [B, T, in] or [B, in]; the same for all layers of this width."""
        channels = hidden_states.shape[-1]
        count = hidden_states.numel() // channels
        positions = hidden_states.shape[-2] if hidden_states.dim() > 2 else 1  # of each sequence
        # Chosen within each sequence, so that it gives the same whichever others are computed with it.
        last = slice(positions - 1, count, positions) if positions > 1 or self.single_residual else None
        rows = rotate(hidden_states.reshape(count, channels), torch.float32 if positions == 1 else rotation_dtype())
        step = torch.maximum(rows.amax(dim=1, keepdim=True), rows.amin(dim=1, keepdim=True).neg_()).float()
        step.clamp_min_(TINY).div_(self.weight.levels)
        # With a place for what follows, to spare a copy.
        steps = torch.empty(count if last is None else count + count // positions, channels)
        steps[:count].copy_(rows).div_(step)
        if last is not None:
            torch.sub(steps[last], steps[last].round(), out=steps[count:]).mul_(self.residual_scale)
        return PreparedRows(self.weight.round(steps), step, last)


class Int8Embedding(nn.Module):
    """Stands in for the token embedding, and for the output layer where that is the same.

    Args:
        rounded, scale: what `quantize` returns; the rows of tokens are looked up here.
        output: the same as a layer; None if the output layer is another.
    """

    weight_dtype = torch.int8  # of the model's linear layers

    def __init__(self, rounded: Tensor, scale: Tensor, output: nn.Module | None):
        super().__init__()
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.output = output

    def forward(self, input_ids: Tensor) -> Tensor:
        """Int64 [...] to float32 [..., hidden_size]."""
        return unrotate(self.weight[input_ids].float() * self.scale[input_ids].unsqueeze(-1))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Float32 [..., hidden_size] to float32 [..., vocab_size], where this is the output layer."""
        assert self.output is not None
        return self.output(hidden_states)
