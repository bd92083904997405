"""Two kernels of torch's that multiply int8 weights, and how each wants them packed.

Where the CPU has VNNI instructions, oneDNN's is the faster one. Elsewhere FBGEMM's is: it reads weights four times as fast
for one row. Without VNNI both add pairs of products in 16 bits, which overflow where large weights meet large activations.
Fewer levels for the activations keep nearly all sums below that, and cost less than the overflow would.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # rows and columns of a weight that oneDNN's layout holds together, see `write_layout`
# By shape, a packed weight that is in use and follows this layout.
PACKED: WeakValueDictionary[torch.Size, Tensor] = WeakValueDictionary()


def is_available() -> bool:
    """Whether this CPU and this build of torch have the kernels."""
    return {"fbgemm", "onednn"} <= set(torch.backends.quantized.supported_engines)


class FbgemmWeight:
    """What `quantize` returns, packed for FBGEMM, which rounds the activations while it packs them."""

    def __init__(self, rounded: Tensor, scale: Tensor):
        # Fitted to measured errors, from 48 to 16384 channels: the fewer there are, the closer do the typical values lie
        # to the largest, and the more pairs overflow.
        self.levels = round(60 + 4 * math.log2(rounded.shape[1]))
        zero_points = torch.zeros(len(scale), dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def round(self, steps: Tensor) -> Tensor:
        """What `multiply` takes, of float32 [rows, in] between -levels and levels: the same, which it rounds itself."""
        return steps

    def multiply(self, steps: Tensor) -> Tensor:
        """Float32 [rows, out]."""
        # The overload itself: to look it up takes longer than some of the products.
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        return multiply(steps, 1.0, self.levels, self.packed)


class OneDnnWeight:
    """The same for oneDNN. Activations have to be uint8: for int8 it falls back to a slow reference."""

    levels = 127

    def __init__(self, rounded: Tensor, scale: Tensor):
        self.packed = onednn_prepack(rounded)
        self.scale = scale
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self.round(torch.zeros(1, 1))  # torch warns once that it is deprecated: here, where `packing` keeps that quiet

    def round(self, steps: Tensor) -> Tensor:
        """What `multiply` takes, of float32 [rows, in] between -levels and levels: uint8, with a zero point."""
        # The one operator that scales, shifts, rounds and cuts off in a single pass. Its result holds plain bytes.
        quantized = torch.quantize_per_tensor(steps, 1.0, self.levels + 1, torch.quint8)
        return torch.empty(0, dtype=torch.uint8).set_(quantized.untyped_storage(), 0, steps.shape, steps.stride())

    def multiply(self, rounded: Tensor) -> Tensor:
        """Float32 [rows, out]."""
        return torch.ops.onednn.qlinear_pointwise.default(
            *(rounded, 1.0, self.levels + 1, self.packed, self.scale, self.zero_points, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )


def onednn_prepack(rounded: Tensor) -> Tensor:
    """int8 [out, in] as oneDNN reads it: what torch's `qlinear_prepack` returns, in a quarter of the time.

    That goes weight by weight, 0.2 GB a second and core, since oneDNN has no fast path to this layout. So it packs the
    first weight of each shape only. Where that has the bytes of `write_layout`, as with AVX-512, others are written so.
    """
    known = PACKED.get(rounded.shape)
    if known is not None:
        packed = known.clone()  # there is no other way to a new one
        write_layout(rounded, bytes_of(packed))
        return packed
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    stored = bytes_of(packed)
    expected = torch.empty_like(stored)
    if write_layout(rounded, expected) and torch.equal(stored, expected):
        PACKED[rounded.shape] = packed
    return packed


def write_layout(rounded: Tensor, out: Tensor) -> bool:
    """Write an int8 weight [out, in] into `out`, int8, as VNNI instructions read it; False if it has another size.

    The weight is padded to whole blocks. Those of 64 rows follow each other, the columns of each by fours: [out / 64,
    in / 4, 64, 4]. Then comes what the zero point of activations is multiplied by, the negative sum of each row, int32.
    """
    if any(size % BLOCK for size in rounded.shape):
        rounded = F.pad(rounded, (0, -rounded.shape[1] % BLOCK, 0, -rounded.shape[0] % BLOCK))
    rows, columns = rounded.shape
    if len(out) != rows * columns + 4 * rows:
        return False
    numbers, sums = out.split((rows * columns, 4 * rows))
    fours = rounded.view(torch.int32).view(rows // BLOCK, BLOCK, columns // 4)
    for written, block in zip(numbers.view(torch.int32).view(rows // BLOCK, columns // 4, BLOCK), fours):
        written.copy_(block.T)
    sums.view(torch.int32).numpy()[:] = -rounded.numpy().sum(axis=1, dtype="int32")  # ten times as fast as torch's sum
    return True


def bytes_of(packed: Tensor) -> Tensor:
    """The memory of a tensor that only oneDNN knows to read, int8, as long as that tensor lives."""
    size = torch.ops.mkldnn._nbytes(packed)
    return torch.frombuffer((ctypes.c_int8 * size).from_address(torch.ops.mkldnn.data_ptr(packed)), dtype=torch.int8)


@lru_cache
def rotation_dtype() -> torch.dtype:
    """In which prefills rotate their rows: bfloat16 where the CPU multiplies it, which takes two thirds of the time.

    It adds a tenth to the error of int8.
    """
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


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
