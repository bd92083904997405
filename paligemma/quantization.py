"""Linear layers in int8 for x86 CPUs: weights with one scale per output channel, activations with one per row.

Real activations have outliers: a few channels a hundred times larger than the others. One scale for the row then leaves
nearly nothing of the rest. So each layer first turns its input by an orthogonal matrix, block by block of at least 128
channels, which spreads an outlier over its whole block (as in QuaRot, arXiv 2404.00456); the weights are turned the same
way once, when they are quantised, and the product stays what it was. Some rows give what rounding lost of them to the
kernel as a second row, and the two results are added: those whose largest value is still many times their root mean
square; the last of several, on which the answer's first token depends more than on all others; and that of which logits
are computed. The last two cost a hundredth of the time, and halve what activations contribute to the error of the logits.

Relative error of the output against float32, in %, of 260 rows, by the shape of the layer [in, out]; "outliers" have
0.1 % of the channels 100 times larger, "gated" are GELU(gate) * up of Gaussians, which is what the widest layer sees:

                               [2048, 16384]                 [16384, 2048]
                        Gaussian  outliers  gated     Gaussian  outliers  gated     time of a prefill's kernels
    one scale per row     1.32     10.7      2.81       1.40      16.3     3.25     1
    turned                1.31      1.9      1.36       1.41       1.4     1.48     1.1 to 1.2
    second row always     0.84      0.83     0.83       0.95      0.96     0.94     2.2
    only weights int8     0.83      0.83     0.83       0.95      0.95     0.95

A second row for all would be more exact, but reading a picture would take twice as long.

Two kernels of torch's compute the product. Where the CPU has VNNI instructions, oneDNN's is the faster one. Elsewhere
FBGEMM's is: it reads weights four times as fast for one row. Without VNNI both add pairs of products in 16 bits, which
overflow where large weights meet large activations. Fewer levels for the activations keep nearly all sums below that, and
cost less than the overflow would.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

LARGEST_WEIGHT = 127
SMALLEST_BLOCK = 128  # channels that an outlier is spread over
# Rows with a larger ratio of largest value to root mean square go in twice; Gaussian rows have 3 to 5.
UNEVEN = 8.0
NUMBERS_AT_ONCE = 2**20  # when quantising: what the cache of a CPU holds
TINY = 1e-30  # against division by zero; a 127th of it is still no denormal number


def is_available() -> bool:
    """Whether this CPU and this build of torch have the kernels."""
    return {"fbgemm", "onednn"} <= set(torch.backends.quantized.supported_engines)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Turn and round the weight of a linear layer.

    Args:
        weight: float [out, in].

    Returns:
        int8 [out, in] and its scale, float32 [out]: their product is the turned weight.
    """
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight))
    count = max(1, NUMBERS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        turned = turn(weight[rows].float())
        scale[rows] = turned.abs().amax(dim=1).clamp_min(TINY) / LARGEST_WEIGHT
        rounded[rows] = turned.div_(scale[rows, None]).round_()
    return rounded, scale


def turn(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply each block of channels of float32 [..., channels] by an orthogonal matrix, into `out` if that is given."""
    matrix = rotation(rows.shape[-1])
    out = torch.empty(rows.shape) if out is None else out
    torch.mm(rows.reshape(-1, len(matrix)), matrix, out=out.view(-1, len(matrix)))
    return out


def turn_back(rows: Tensor) -> Tensor:
    """Undo `turn`."""
    matrix = rotation(rows.shape[-1])
    return (rows.reshape(-1, len(matrix)) @ matrix.T).view(rows.shape)


@lru_cache
def rotation(channels: int) -> Tensor:
    """The orthogonal matrix, float32 [block, block], for blocks that divide the channels.

    A discrete Hartley transform, which exists for any size and has no large entry, after random changes of sign, so
    that an even row does not end up in one channel.
    """
    block = next(size for size in range(min(SMALLEST_BLOCK, channels), channels + 1) if channels % size == 0)
    steps = torch.arange(block, dtype=torch.float64)
    angles = 2 * math.pi / block * (torch.outer(steps, steps) % block)
    signs = random.Random(block)  # the same on every machine: what was quantised on one is read on another
    signs = torch.tensor([1.0 if signs.random() < 0.5 else -1.0 for _ in range(block)], dtype=torch.float64)
    return (signs[:, None] * (angles.cos() + angles.sin()) / math.sqrt(block)).float()


class FbgemmWeight:
    """A weight packed for FBGEMM, which rounds the activations while it packs them."""

    def __init__(self, rounded: Tensor, scale: Tensor):
        # Fitted to measured errors, from 48 to 16384 channels: the fewer there are, the closer do the typical values lie
        # to the largest, and the more pairs overflow.
        self.levels = round(60 + 4 * math.log2(rounded.shape[1]))
        zero_points = torch.zeros(len(scale), dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def multiply(self, steps: Tensor) -> Tensor:
        """Float32 [rows, in], rounded here, between -levels and levels, to float32 [rows, out]."""
        # The overload itself: to look it up takes longer than some of the products.
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        return multiply(steps, 1.0, self.levels, self.packed)


class OneDnnWeight:
    """A weight packed for oneDNN. Activations have to be uint8: for int8 it falls back to a slow reference."""

    levels = 127

    def __init__(self, rounded: Tensor, scale: Tensor):
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.scale = scale
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32)

    def multiply(self, steps: Tensor) -> Tensor:
        """As `FbgemmWeight.multiply`."""
        zero_point = self.levels + 1
        return torch.ops.onednn.qlinear_pointwise.default(
            (steps + (zero_point + 0.5)).to(torch.uint8),  # rounds, since it cuts off what follows the point
            1.0,
            zero_point,
            self.packed,
            self.scale,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )


@contextmanager
def packing() -> Iterator[None]:
    """To be entered once around all calls of `pack`, which may come from many threads: what it sets is global."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*are deprecated")
            yield
    finally:
        torch.backends.quantized.engine = engine


def pack(rounded: Tensor, scale: Tensor) -> FbgemmWeight | OneDnnWeight:
    """Pack what `quantize` returns for the kernel that is faster on this CPU, within `packing`."""
    capabilities = torch.cpu.get_capabilities()
    has_vnni = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return (OneDnnWeight if has_vnni else FbgemmWeight)(rounded, scale)


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
