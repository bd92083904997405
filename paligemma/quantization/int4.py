"""int4 linear layers for x86 CPUs, for decode steps of few rows: groups of weights with a scale and an offset each.

A decode step takes as long as it takes to read the weights, and these are five eighths as many bytes as in int8, in groups of
32: the codes of four bits, and a scale and an offset in bfloat16. From four rows on torch's kernel is slower than that of int8,
and in a prefill several times as slow. So an int8 layer does those, and both forms of the weights are in memory.

Weights and rows are rotated as for int8. Before that each channel of the rows is divided by a factor, and that of the weights
multiplied by it, so that most of the error falls on channels that carry little (as in AWQ, arXiv 2306.00978). The rows are
bfloat16 then, and so is the product.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .layers import Int8Linear
from .rounding import NUMBERS_AT_ONCE, TINY, rotate, unrotate

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs leave it out
MOST_ROWS = 3  # that int4 multiplies as fast as int8, or faster
BLOCK = 64  # output channels that the kernel packs together, or half as many
LOWEST, HIGHEST = -8.0, 7.0  # codes
# Where a search for scale and offset starts: which part of a group's least and largest weight the codes span. To cut off one
# or the other end leaves finer steps for the rest. Two rounds from each of three starts lose 0.0714 of Gaussian weights
# in groups of 32, the root of the mean square; one start alone 0.0737, no search 0.0785; 49 starts 0.0692.
STARTS = ((1.0, 1.0), (1.0, 0.87), (0.87, 1.0))
ROUNDS = 2
SERIAL_NUMBERS = 2**15 - 1  # the most that torch computes in the calling thread alone
SMALLEST_INPUT = 0.01  # of the median: channels below count as that


def is_available() -> bool:
    """Whether this CPU and this build of torch have the kernel; elsewhere than on x86 it takes other forms."""
    return layout() in ("AVX2", "AVX512")


def layout() -> str:
    """The instructions that torch uses here, on which it depends how `quantize_int4` packs."""
    return torch.backends.cpu.get_cpu_capability()


def fits(weight: Tensor, group: int) -> bool:
    """Whether the kernel takes a weight [out, in] in such groups, also if others of the same width are appended to it."""
    outputs, channels = weight.shape
    return outputs % BLOCK == 0 and channels % group == 0


def bytes_of(weight: Tensor, group: int) -> int:
    """Bytes of what `quantize_int4` returns for a weight [out, in], which may be on `meta`."""
    return weight.numel() // 2 + 4 * weight.numel() // group + 4 * weight.shape[1]


def quantize_int4(rounded: Tensor, scale: Tensor, inputs: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round an int8 weight on to four bits, which adds a hundredth to the error.

    Args:
        rounded, scale: what `quantize` returns, int8 [out, in] and float32 [out], of a shape that `fits`.
        inputs: float32 [in], how large each channel of the rows is, such as the root of its mean square.
        group: channels that have a scale and an offset in common; 32, 64, 128 or 256.

    Returns:
        uint8 [out, in / 2], packed for the kernel of this CPU; bfloat16 [in / group, out, 2], scale and offset of each
        group: a weight is code * scale + offset, with codes from -8 to 7; and float32 [in], what to multiply the rows with.
    """
    outputs, channels = rounded.shape
    packed = torch.empty(outputs, channels // 2, dtype=torch.uint8)
    steps = torch.empty(channels // group, outputs, 2, dtype=torch.bfloat16)
    factors = inputs.clamp_min(SMALLEST_INPUT * inputs.median()).clamp_min_(TINY).log_().div_(2)
    factors = factors.sub_(factors.mean()).exp_()

    def put(rows: slice) -> None:
        weight = rotate(unrotate(rounded[rows] * scale[rows, None]).mul_(factors))
        codes = torch.empty(weight.shape, dtype=torch.int32)
        found = steps[:, rows].transpose(0, 1)  # [rows, in / group, 2]
        # In pieces that torch does not share out among threads: those that wait for each other lose all on busy cores.
        count = SERIAL_NUMBERS // group
        numbers = torch.empty(weight.numel() // group, 2, dtype=torch.bfloat16)
        for groups, its_codes, its_numbers in zip(
            *(weight.view(-1, group).split(count), codes.view(-1, group).split(count), numbers.split(count))
        ):
            step, offset = _fit(groups)
            its_codes.copy_(_codes(groups, step, offset).sub_(LOWEST))
            its_numbers.copy_(torch.cat((step, offset), dim=1))
        found.copy_(numbers.view(found.shape))
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    count = max(1, NUMBERS_AT_ONCE // channels // BLOCK) * BLOCK
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(put, (slice(start, start + count) for start in range(0, outputs, count))):
            pass
    return packed, steps, 1 / factors


def _fit(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset [..., 1] of groups of float32 weights [..., group], as bfloat16 rounds them.

    Least squares for given codes and the nearest codes for given scale and offset, in turn; the best of several starts.
    """
    least, largest = torch.aminmax(groups, dim=-1, keepdim=True)
    mean = groups.mean(dim=-1, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for low, high in STARTS:
        step = (largest * high - least * low).div_(HIGHEST - LOWEST).clamp_min_(TINY)
        offset = least * low - step * LOWEST
        for _ in range(ROUNDS):
            codes = _codes(groups, step, offset)
            mean_code = codes.mean(dim=-1, keepdim=True)
            covariance = (codes * groups).mean(dim=-1, keepdim=True).sub_(mean_code * mean)
            variance = codes.square_().mean(dim=-1, keepdim=True).sub_(mean_code.square())
            step = torch.where(variance > 0, covariance / variance, step).clamp_min_(TINY)
            offset = mean - step * mean_code
        found = covariance * step, step, offset  # the first is what least squares explain of the group's variance
        best = tuple(torch.where(found[0] > best[0], new, old) for new, old in zip(found, best)) if best else found
    return best[1].bfloat16().float(), best[2].bfloat16().float()


def _codes(groups: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """The nearest code of each weight, as float32."""
    return (groups - offset).div_(step).round_().clamp_(LOWEST, HIGHEST)


class Int4Linear(nn.Module):
    """Stands in for `nn.Linear`: float32 [B, T, in] or [B, in] to float32 [B, T, out] or [B, out].

    Up to three rows are multiplied in int4, more of them in int8. So what a row gives depends on how many others are
    computed with it.

    Args:
        int8: the same layer in int8.
        packed, steps, factors: what `quantize_int4` makes of its weight.
    """

    def __init__(self, int8: Int8Linear, packed: Tensor, steps: Tensor, factors: Tensor):
        super().__init__()
        self.int8 = int8
        self.packed = packed
        self.steps = steps
        self.factors = factors
        self.group = 2 * packed.shape[1] // len(steps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.numel() // hidden_states.shape[-1]
        return self.multiply_in_int4(hidden_states) if rows <= MOST_ROWS else self.int8(hidden_states)

    def multiply_in_int4(self, hidden_states: Tensor) -> Tensor:
        """As `forward`, in int4 however many rows there are."""
        rows = rotate((hidden_states * self.factors).reshape(-1, len(self.factors))).bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        output = multiply(rows, self.packed, self.group, self.steps).float()
        if self.int8.bias is not None:
            output += self.int8.bias
        return output.view(*hidden_states.shape[:-1], -1)
