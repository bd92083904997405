"""Layers whose weights are int8."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .packing import FbgemmWeight, OneDnnWeight
from .rounding import TINY, turn, turn_back

# Rows with a larger ratio of largest value to root mean square go in twice; Gaussian rows have 3 to 5.
UNEVEN = 8.0


class PreparedRows(NamedTuple):
    """The input of an `Int8Linear`, turned and scaled; layers that have the same input can share it.

    steps: float32 [rows + n, in], each row divided by its step: between -levels and levels of the kernel. The last n are
        what rounding loses of some of the others, multiplied by `finer`.
    step: float32 [rows, 1].
    twice: which rows these are, a slice or int64 [n]; None if n is 0.
    shape: that of the input.
    """

    steps: Tensor
    step: Tensor
    twice: slice | Tensor | None
    shape: torch.Size


class Int8Linear(nn.Module):
    """Stands in for `nn.Linear`: float32 [..., in] to float32 [..., out].

    Args:
        weight: packed, see `pack`.
        bias: float32 [out], or None.
        single_twice: also a row that comes alone gives what rounding loses of it.
    """

    def __init__(self, weight: FbgemmWeight | OneDnnWeight, bias: Tensor | None = None, single_twice: bool = False):
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.single_twice = single_twice
        self.finer = 2 * weight.levels  # what rounding loses is up to half a step

    def prepare(self, hidden_states: Tensor) -> PreparedRows:
        """What `forward` takes in place of float32 [..., in], in all layers of this width."""
        channels, levels = hidden_states.shape[-1], self.weight.levels
        count = hidden_states.numel() // channels
        last_twice = count > 1 or self.single_twice
        steps = torch.empty(count + last_twice, channels)  # with room for what follows, to spare a copy
        rows = turn(hidden_states, out=steps[:count])
        step = rows.abs().amax(dim=1, keepdim=True).clamp_min_(TINY).div_(levels)
        rows /= step
        norms, limit = torch.linalg.vector_norm(rows, dim=1), math.sqrt(channels) * levels / UNEVEN
        twice = slice(count - 1, count) if last_twice else None
        if norms.amin().item() < limit:
            uneven = norms < limit
            uneven[twice or slice(0)] = True
            twice = uneven.nonzero()[:, 0]
            steps = torch.cat((rows, self._rest(rows[twice])))
        elif last_twice:
            steps[count:] = self._rest(rows[twice])
        return PreparedRows(steps, step, twice, hidden_states.shape)

    def forward(self, hidden_states: Tensor | PreparedRows) -> Tensor:
        rows = hidden_states if isinstance(hidden_states, PreparedRows) else self.prepare(hidden_states)
        count = len(rows.step)
        product = self.weight.multiply(rows.steps)
        output = product[:count]
        if rows.twice is not None:
            output[rows.twice] += product[count:] / self.finer
        output *= rows.step
        if self.bias is not None:
            output += self.bias
        return output.view(*rows.shape[:-1], -1)

    def _rest(self, rows: Tensor) -> Tensor:
        return (rows - rows.round()) * self.finer


def prepare_for(layer: nn.Module, hidden_states: Tensor) -> Tensor | PreparedRows:
    """What this layer, and others of its kind, can be given instead of `hidden_states`, so that it is prepared once."""
    return layer.prepare(hidden_states) if isinstance(layer, Int8Linear) else hidden_states


class Int8Embedding(nn.Module):
    """Stands in for the token embedding that is also the output layer.

    Args:
        rounded, scale: what `quantize` returns; the rows of tokens are looked up here.
        output: the same, packed.
    """

    def __init__(self, rounded: Tensor, scale: Tensor, output: Int8Linear):
        super().__init__()
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.output = output

    def forward(self, input_ids: Tensor) -> Tensor:
        """Int64 [...] to float32 [..., hidden_size]."""
        return turn_back(self.weight[input_ids].float() * self.scale[input_ids].unsqueeze(-1))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Float32 [..., hidden_size] to float32 [..., vocab_size]."""
        return self.output(hidden_states)
