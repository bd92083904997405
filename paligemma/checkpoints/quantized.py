"""int8 weights of a checkpoint: made once, kept on the disk, put into a model."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import PaliGemmaError
from ..hardware import give_back_freed_memory
from ..model import PaliGemma
from ..quantization import Int8Embedding, Int8Linear, pack, packing, quantize
from .weights import EMBEDDING, Progress, find_tensors, no_progress, open_file, read_tensor, set_by_name

# Part of the names of int8 files: a new number makes them anew.
INT8_FORMAT = 1
SHARD_BYTES = 256 * 2**20
SCALE_SUFFIX = ".scale"


def load_int8_weights(model: PaliGemma, files: list[Path], progress: Progress = no_progress) -> None:
    """Put the tensors of `files` into `model`, which was built on `meta`, with int8 layers in place of linear ones.

    The int8 weights of a checkpoint are made once, in a folder of their own.

    Raises:
        PaliGemmaError: as `find_tensors`, or there is no room for them on the disk.
    """
    source, folder = find_tensors(model, files), int8_folder(files)
    try:
        found = _file_of_each_key(folder)
    except (OSError, PaliGemmaError):  # not there yet, or damaged
        shutil.rmtree(folder, ignore_errors=True)
        write_int8_weights(model, source, folder, progress)
        give_back_freed_memory()  # packing needs the room
        found = _file_of_each_key(folder)

    def put(name: str) -> None:
        owner = name.removesuffix(".weight")
        if owner + SCALE_SUFFIX not in found:
            if name.removesuffix(".bias") + SCALE_SUFFIX not in found:  # other biases go with their weights
                set_by_name(model, name, nn.Parameter(read_tensor(found[name], name), requires_grad=False))
            return
        scale = read_tensor(found[owner + SCALE_SUFFIX], owner + SCALE_SUFFIX)
        bias = read_tensor(found[f"{owner}.bias"], f"{owner}.bias") if f"{owner}.bias" in found else None
        layer = Int8Linear(pack(read_tensor(found[name], name), scale), bias, single_twice=name == EMBEDDING)
        # Read anew: of this mapping only the rows of the tokens in use become resident, of the other all have.
        set_by_name(
            model, owner, Int8Embedding(read_tensor(found[name], name), scale, layer) if name == EMBEDDING else layer
        )

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    done, total = 0, sum(sizes.values())
    progress("Packing the int8 weights", 0.0)
    with packing(), ThreadPoolExecutor(torch.get_num_threads()) as threads:  # packing one keeps one core busy
        # The largest first, while there is room for both forms of it.
        tasks = {threads.submit(put, name): name for name in sorted(sizes, key=lambda name: name != EMBEDDING)}
        for task in as_completed(tasks):
            task.result()
            done += sizes[tasks[task]]
            progress("Packing the int8 weights", done / total)


def int8_folder(files: list[Path]) -> Path:
    """Where the int8 weights of the checkpoint in `files` belong: next to the Hub's cache, and new when a file changes."""
    from huggingface_hub import constants

    files = [file.resolve() for file in files]  # in the Hub's cache the name of the file itself tells its content
    state = [INT8_FORMAT, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(files[0].parent)).strip("-")[-80:]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return Path(constants.HF_HUB_CACHE).parent / "paligemma-int8" / f"{name}-{digest}"


def write_int8_weights(
    model: PaliGemma, found: dict[str, tuple[Path, str]], folder: Path, progress: Progress = no_progress
) -> None:
    """Quantise what `find_tensors` found into `folder`, tensor by tensor: memory holds little of it at any time.

    The weights of linear layers and the embedding become int8, each with its scale, see `quantize`; the rest float32.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)} | {EMBEDDING}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    done, total = 0, sum(sizes.values())
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
        shard: dict[str, Tensor] = {}
        for number, (name, source) in enumerate(found.items(), start=1):
            progress("Turning the weights into int8", done / total)
            if name in linear:
                shard[name], shard[name.removesuffix(".weight") + SCALE_SUFFIX] = quantize(read_tensor(*source))
            else:
                shard[name] = read_tensor(*source).float().contiguous()
            done += sizes[name]
            if number == len(found) or sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                save_file(shard, unfinished / f"{number:05}.safetensors")
                shard = {}
        # Under its own name only once it is whole. Somebody else may have been faster, with the same result.
        if not folder.exists():
            unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise PaliGemmaError(
            f"The int8 weights cannot be written to {folder.parent} ({error}); please make room there for "
            f"{total / 1e9:.1f} GB, set HF_HOME to another place, or choose another dtype."
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _file_of_each_key(folder: Path) -> dict[str, Path]:
    """Where the tensors of all safetensors files in a folder are."""
    found = {}
    for file in sorted(folder.iterdir()):
        with open_file(file) as mapped:
            found |= dict.fromkeys(mapped.keys(), file)
    return found
