"""int8 layers of a model, packed from int8 weights of a store or of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor, nn

from ...config import PaliGemmaError
from ...model import PaliGemma
from ...quantization import InputMemo, Int8Embedding, Int8Linear, pack, packing, quantize
from ..weights import (
    EMBEDDING,
    OUTPUT,
    Progress,
    Tensors,
    ignore,
    linear_weights,
    read_tensor,
    read_weight,
    scale_name,
    set_by_name,
)
from .store import find_store, read_checked, remove_damaged

# Gives the int8 weight of this name, and its scale.
Int8Weight = Callable[[str], tuple[Tensor, Tensor]]


def load_int8_weights(model: PaliGemma, tensors: Tensors, scales: Tensors, progress: Progress = ignore) -> Int8Weight:
    """Put `tensors` into `model`, which was built on `meta`, with int8 layers in place of linear ones.

    Args:
        tensors: the parameters of `model`.
        scales: of a checkpoint with int8 weights, the scale of each, under `scale_name`. Of others, none: their int8
            weights are kept on the disk, or where they cannot be, made in memory, anew each time.

    Returns:
        what else is to be made of them is made from.

    Raises:
        PaliGemmaError: the checkpoint has int8 weights, and these are damaged.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linear = linear_weights(model)
    weights = {name: tensors[name] for name in tensors if name in linear}

    def make(name: str) -> tuple[Tensor, Tensor]:
        return quantize(read_weight(tensors[name], scales.get(scale_name(name))))

    stored = weights | scales if scales else find_store("int8", weights, sizes, make, progress) or {}
    # Of a checkpoint with int8 weights, an adapter's are not.
    int8 = {name for name in weights if scale_name(name) in stored and (not scales or stored[name].update is None)}
    memo = InputMemo()
    damaged: set[Path] = set()

    def int8_weight(name: str) -> tuple[Tensor, Tensor]:
        if name not in int8:
            return make(name)
        rounded, scale = (read_checked(one.file, one.key, damaged) for one in (stored[name], stored[scale_name(name)]))
        if rounded is not None and scale is not None:
            return rounded, scale
        if scales:
            raise PaliGemmaError(f"{stored[name].file} holds damaged int8 weights; please fetch it again.")
        return make(name)

    def put(name: str) -> None:
        owner, _, kind = name.rpartition(".")
        module: nn.Module
        if name not in linear:
            if kind != "bias" or f"{owner}.weight" not in linear:  # other biases go with their weights
                set_by_name(model, name, nn.Parameter(read_tensor(*tensors[name]).float(), requires_grad=False))
            return
        rounded, scale = int8_weight(name)
        if name == EMBEDDING:
            output = None if OUTPUT in linear else Int8Linear(pack(rounded, scale), None, memo, single_residual=True)
            if name in int8 and stored[name].file not in damaged:
                # Of this mapping only the rows of the tokens in use become resident.
                rounded = read_tensor(*stored[name])
            module = Int8Embedding(rounded, scale, output)
        else:
            bias = read_tensor(*tensors[f"{owner}.bias"]).float() if f"{owner}.bias" in tensors else None
            module = Int8Linear(pack(rounded, scale), bias, memo, single_residual=name == OUTPUT)
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
    remove_damaged(damaged, "int8")
    return int8_weight
