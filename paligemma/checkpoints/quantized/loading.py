"""int8 and int4 layers of a model, from weights of a store or of a checkpoint."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ...config import PaliGemmaError
from ...model import PaliGemma
from ...quantization import (
    INT4,
    InputMemo,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    int4,
    pack,
    packing,
    quantize,
    quantize_int4,
)
from ..weights import (
    EMBEDDING,
    OUTPUT,
    Progress,
    Tensors,
    ignore,
    int4_weights,
    linear_weights,
    read_tensor,
    read_weight,
    scale_name,
    set_by_name,
)
from .store import find_store, read_checked

log = logging.getLogger(__name__)


def load_quantized_weights(
    model: PaliGemma, tensors: Tensors, scales: Tensors, dtype: torch.dtype, progress: Progress = ignore
) -> None:
    """Put `tensors` into `model`, which was built on `meta`, with int8 or int4 layers in place of linear ones.

    Args:
        tensors: the parameters of `model`.
        scales: of a checkpoint with int8 weights, the scale of each, under `scale_name`. Of others, none: their int8
            weights are kept on the disk, or where they cannot be, made in memory, anew each time.
        dtype: torch.int8, or INT4 for the layers of `int4_weights` in both, whose int4 weights are made of the
            int8 ones, and kept on the disk.

    Raises:
        PaliGemmaError: the checkpoint has int8 weights, and these are damaged.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linear = linear_weights(model)
    weights = {name: tensors[name] for name in tensors if name in linear}

    def make_int8(name: str) -> tuple[Tensor, Tensor]:
        return quantize(read_weight(tensors[name], scales.get(scale_name(name))))

    stored = weights | scales if scales else find_store("int8", weights, sizes, make_int8, progress) or {}
    # Of a checkpoint with int8 weights, an adapter's are not.
    int8 = {name for name in weights if scale_name(name) in stored and (not scales or stored[name].update is None)}
    memo = InputMemo()
    damaged: dict[Path, str] = {}

    def int8_weight(name: str) -> tuple[Tensor, Tensor]:
        if name in int8 and (found := read_pair(stored, name, "int8", damaged)):
            return found
        if name in int8 and scales:
            raise PaliGemmaError(f"{stored[name].file} holds damaged int8 weights; please fetch it again.")
        return make_int8(name)

    def make_int4(name: str) -> tuple[Tensor, Tensor]:
        return quantize_int4(*int8_weight(name), groups[name])

    groups = int4_weights(model) if dtype == INT4 else {}
    stored_int4: Tensors = {}
    if groups:
        int4_sizes = {name: int4.bytes_of(sizes[name], group) for name, group in groups.items()}
        stored_int4 = (
            find_store("int4", {name: tensors[name] for name in groups}, int4_sizes, make_int4, progress) or {}
        )

    def layer(name: str, rounded: Tensor, scale: Tensor, bias: Tensor | None = None) -> Int8Linear | Int4Linear:
        int8_layer = Int8Linear(pack(rounded, scale), bias, memo, single_residual=name in (EMBEDDING, OUTPUT))
        if name not in groups:
            return int8_layer
        found = read_pair(stored_int4, name, "int4", damaged) if stored_int4 else None
        return Int4Linear(int8_layer, *(found or quantize_int4(rounded, scale, groups[name])))

    def put(name: str) -> None:
        owner, _, kind = name.rpartition(".")
        module: nn.Module
        if name not in linear:
            if kind != "bias" or f"{owner}.weight" not in linear:  # other biases go with their weights
                set_by_name(model, name, nn.Parameter(read_tensor(*tensors[name]).float(), requires_grad=False))
            return
        rounded, scale = int8_weight(name)
        if name == EMBEDDING:
            output = None if OUTPUT in linear else layer(name, rounded, scale)
            if name in int8 and stored[name].file not in damaged:
                # Of this mapping only the rows of the tokens in use become resident.
                rounded = read_tensor(*stored[name])
            module = Int8Embedding(rounded, scale, output, dtype)
        else:
            bias = read_tensor(*tensors[f"{owner}.bias"]).float() if f"{owner}.bias" in tensors else None
            module = layer(name, rounded, scale, bias)
        set_by_name(model, owner, module)

    done, total = 0, sum(sizes.values())
    progress("Packing the int8 weights", 0.0)
    with packing(), ThreadPoolExecutor(torch.get_num_threads()) as threads:  # packing one keeps one core busy
        # The largest first, while there is memory for both forms of it.
        tasks = {threads.submit(put, name): name for name in sorted(sizes, key=lambda name: name != EMBEDDING)}
        for task in as_completed(tasks):
            task.result()
            done += sizes[tasks[task]]
            progress("Packing the int8 weights", done / total)
    for file, form in damaged.items():
        log.warning("%s holds damaged %s weights; the next start makes them anew", file, form)
        with suppress(OSError):
            file.unlink()


def read_pair(stored: Tensors, name: str, form: str, damaged: dict[Path, str]) -> tuple[Tensor, Tensor] | None:
    """A weight and its scale from where they are stored; None, and the file is added to `damaged`, if one is not whole."""
    places = stored[name], stored[scale_name(name)]
    weight, scale = (read_checked(place.file, place.key) for place in places)
    if weight is not None and scale is not None:
        return weight, scale
    damaged |= {place.file: form for place, tensor in zip(places, (weight, scale)) if tensor is None}
    return None
