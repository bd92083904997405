"""int8 weights of a checkpoint: made once, kept on the disk where that is possible, put into a model."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import PaliGemmaError
from ..hardware import give_back_freed_memory
from ..model import PaliGemma
from ..quantization import InputMemo, Int8Embedding, Int8Linear, pack, packing, quantize
from .weights import EMBEDDING, OUTPUT, Progress, Tensors, ignore, open_file, read_tensor, set_by_name

INT8_FORMAT = 2  # part of the names of stores: a new number makes them anew
SHARD_BYTES = 256 * 2**20
UNFINISHED = "unfinished-"
SOURCES = "sources"  # in the metadata of each file, beside the checksum of each tensor under its key

log = logging.getLogger(__name__)


def load_int8_weights(model: PaliGemma, tensors: Tensors, progress: Progress = ignore) -> None:
    """Put `tensors` into `model`, which was built on `meta`, with int8 layers in place of linear ones.

    The int8 weights are kept on the disk; where they cannot be, they are made in memory, anew each time.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)} | {EMBEDDING}
    store = find_store({name: tensors[name] for name in tensors if name in linear}, sizes, progress)
    memo = InputMemo()
    damaged: set[Path] = set()

    def int8_weight(name: str) -> tuple[Tensor, Tensor]:
        if store is not None:
            rounded, scale = (_read_checked(store[key], key, damaged) for key in (name, _scale_of(name)))
            if rounded is not None and scale is not None:
                return rounded, scale
        return quantize(read_tensor(*tensors[name]))

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
            if (
                store is not None and store[name] not in damaged
            ):  # of this mapping only the rows of the tokens in use become resident
                rounded = read_tensor(store[name], name)
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
    for file in damaged:
        log.warning("%s holds damaged int8 weights; the next start makes them anew", file)
        with suppress(OSError):
            file.unlink()


def find_store(weights: Tensors, sizes: Mapping[str, int], progress: Progress = ignore) -> dict[str, Path] | None:
    """Where the int8 weights of a checkpoint are kept, written if they are not there yet, or not whole.

    Args:
        weights: those to be had in int8.
        sizes: how many numbers each has.

    Returns:
        the file that holds each weight and each scale, under keys of `weights` and of `_scale_of`; None if none can be
        written.
    """
    from huggingface_hub.utils import WeakFileLock

    folder = int8_folder(sorted({file for place in weights.values() for file in place.files}))
    keys = {key for name in weights for key in (name, _scale_of(name))}
    stored = _stored_files(folder, keys)
    if stored is not None:
        return stored
    progress("Turning the weights into int8", 0.0)
    needed = sum(sizes[name] for name in weights)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.parent.with_suffix(".lock")):  # one process writes, others wait and find what it wrote
            stored = _stored_files(folder, keys)
            if stored is None:
                for leftover in (folder, *folder.parent.glob(f"{UNFINISHED}*")):  # damaged, or of a process that died
                    shutil.rmtree(leftover, ignore_errors=True)
                if shutil.disk_usage(folder.parent).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _write(weights, sizes, folder, progress)
                _remove_outdated(folder.parent)
                stored = _stored_files(folder, keys)
            return stored
    except (OSError, SafetensorError) as error:
        advice = f"please set HF_HOME to a place with {needed / 1e9:.2g} GB for them"
        log.warning("int8 weights cannot be kept in %s (%s), so each start makes them anew; %s", folder, error, advice)
        return None


def int8_folder(files: list[Path]) -> Path:
    """Where the int8 weights of the checkpoint in `files` belong: next to the Hub's cache, and new when a file changes."""
    from huggingface_hub import constants

    files = [file.resolve() for file in files]  # in the Hub's cache the name of the file itself tells its content
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(files[0].parent)).strip("-")[-80:]
    digest = hashlib.sha256(_state_of(files).encode()).hexdigest()[:16]
    return Path(constants.HF_HUB_CACHE).parent / "paligemma-int8" / f"{name}-{digest}"


def _state_of(files: Iterable[Path]) -> str:
    """What tells one version of a checkpoint, and of this module, from another."""
    stats = [(file, file.stat()) for file in files]
    return json.dumps([INT8_FORMAT, *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)])


def _remove_outdated(parent: Path) -> None:
    """Remove the int8 weights of checkpoints that have changed since, or are gone."""
    for folder in parent.iterdir():
        is_current = False
        try:
            with open_file(next(folder.glob("*.safetensors"))) as mapped:
                state = (mapped.metadata() or {})[SOURCES]
            is_current = state == _state_of(Path(file) for file, *_ in json.loads(state)[1:])
        except (OSError, StopIteration, PaliGemmaError, KeyError):
            pass
        if not is_current:
            shutil.rmtree(folder, ignore_errors=True)


def _write(weights: Tensors, sizes: Mapping[str, int], folder: Path, progress: Progress) -> None:
    """Quantize tensor by tensor into files of `folder`: memory holds little of them at any time."""
    unfinished = folder.with_name(UNFINISHED + folder.name)
    state = _state_of(sorted({file.resolve() for place in weights.values() for file in place.files}))
    done, total = 0, sum(sizes[name] for name in weights)
    shard: dict[str, Tensor] = {}
    try:
        unfinished.mkdir()
        for number, (name, place) in enumerate(weights.items(), start=1):
            progress("Turning the weights into int8", done / total)
            shard[name], shard[_scale_of(name)] = quantize(read_tensor(*place))
            done += sizes[name]
            if number == len(weights) or sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                checksums = {key: _checksum(tensor) for key, tensor in shard.items()}
                save_file(shard, unfinished / f"{number:05}.safetensors", metadata={SOURCES: state, **checksums})
                shard = {}
        unfinished.rename(folder)  # under its own name only once it is whole
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        give_back_freed_memory()  # which packing needs


def _stored_files(folder: Path, keys: Collection[str]) -> dict[str, Path] | None:
    """The file in `folder` that holds each of the keys, None if one is missing or a file damaged."""
    found: dict[str, Path] = {}
    try:
        for file in folder.iterdir():
            with open_file(file) as mapped:
                found |= dict.fromkeys(mapped.keys(), file)
    except (OSError, PaliGemmaError):
        return None
    return found if found.keys() >= set(keys) else None


def _read_checked(file: Path, key: str, damaged: set[Path]) -> Tensor | None:
    """A stored tensor; None, and the file is added to `damaged`, if it is not what was written."""
    with open_file(file) as mapped:
        tensor = mapped.get_tensor(key)
        if (mapped.metadata() or {}).get(key) == _checksum(tensor):
            return tensor
    damaged.add(file)
    return None


def _checksum(tensor: Tensor) -> str:
    """Of the bytes of a contiguous tensor; its 4 GB/s are a fraction of what packing takes."""
    return f"{zlib.crc32(tensor.view(torch.uint8).numpy().data):08x}"


def _scale_of(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"
