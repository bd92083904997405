"""How much memory a checkpoint takes, from its sizes alone: before a weight is read, or even downloaded."""

from __future__ import annotations

import torch
from torch import nn

from ..config import PaliGemmaError
from ..hardware import dtype_name, smallest_dtype
from ..model import PaliGemma
from ..quantization import INT4, int4
from .weights import EMBEDDING, int4_weights

# What is there besides the tensors: Python, torch and its libraries, the page; on a GPU the context of CUDA.
RUNTIME_BYTES = 10**9
# Prompt and answer, beside the image: the page's longest answer and a long question.
TEXT_POSITIONS = 512
# Tensors of the MLP's width that a prefill holds at once: measured in the widths of PaliGemma 2 3B, at 896 pixels, int8.
WIDE_TENSORS = 8


def weight_bytes(model: PaliGemma, dtype: torch.dtype) -> int:
    """Bytes of the parameters of a model, which may be on `meta`, in this dtype.

    In int8 the matrices of linear layers and the token embedding take one byte a number and four for the scale of each
    row; all other parameters are float32. Of int4 the matrices of `int4_weights` are in memory in both forms.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if dtype not in (torch.int8, INT4):
        return total * dtype.itemsize
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    matrices.append(model.get_parameter(EMBEDDING))
    rounded, rows = sum(matrix.numel() for matrix in matrices), sum(len(matrix) for matrix in matrices)
    groups = int4_weights(model) if dtype == INT4 else {}
    packed = sum(int4.bytes_of(model.get_parameter(name), group) for name, group in groups.items())
    return rounded + 4 * (rows + total - rounded) + packed


def running_bytes(model: PaliGemma, dtype: torch.dtype) -> int:
    """Bytes that it takes to answer one request at a time with a model, which may be on `meta`, in this dtype.

    Counted are the weights; keys and values of the image and 512 more positions, and activations for as many, in their
    dtype, which for int8 and int4 is float32; and a gigabyte for all else. Each further request at the same time takes another
    cache.
    """
    text = model.config.text
    positions = model.config.vision.num_patches + TEXT_POSITIONS
    number = 4 if dtype in (torch.int8, INT4) else dtype.itemsize
    return (
        weight_bytes(model, dtype)
        + positions * (text.cached_numbers + WIDE_TENSORS * text.intermediate_size) * number
        + RUNTIME_BYTES
    )


def check_fits(name: str, model: PaliGemma, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
    """Refuse a checkpoint whose weights alone are larger than the memory.

    Args:
        name: of the checkpoint.
        model: built from its config, and may be on `meta`.
        dtype: of the weights.
        device: where they are to be.
        capacity: bytes of memory that the device has, taken or not.

    Raises:
        PaliGemmaError: it does not fit; the sentence has the sizes, and the dtypes in which it would.
    """
    needed = weight_bytes(model, dtype)
    if needed <= capacity:
        return
    fitting = [
        f"the dtype {dtype_name(other)} ({size / 1e9:.1f} GB)"
        for other in dict.fromkeys((torch.bfloat16, smallest_dtype(device)))
        if (size := weight_bytes(model, other)) <= capacity
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    raise PaliGemmaError(
        f"{name} has {parameters / 1e9:.1f} billion parameters, which in {dtype_name(dtype)} take {needed / 1e9:.1f} GB, but "
        f"{device} has {capacity / 1e9:.1f} GB of memory; please choose {', '.join([*fitting, 'a smaller checkpoint'])} "
        "or a larger machine."
    )
