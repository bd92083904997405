"""Two kernels of torch's that multiply int8 weights, and how each wants them packed.

Where the CPU has VNNI instructions, oneDNN's is the faster one. Elsewhere FBGEMM's is: it reads weights four times as fast
for one row. Without VNNI both add pairs of products in 16 bits, which overflow where large weights meet large activations.
Fewer levels for the activations keep nearly all sums below that, and cost less than the overflow would.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


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
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
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
