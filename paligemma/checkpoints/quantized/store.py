"""Files of int8 and int4 weights, and the folders beside the Hub's cache that keep those of each checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...config import PaliGemmaError
from ...hardware import give_back_freed_memory
from ...quantization.int4 import layout
from ..formats import INT4_FORMAT, INT8_FORMAT
from ..weights import Place, Progress, Tensors, ignore, open_file

SHARD_BYTES = 256 * 2**20
UNFINISHED = "unfinished-"
SOURCES = "sources"  # in the metadata of each file of a store, beside the checksum of each tensor under its key

log = logging.getLogger(__name__)


# What a weight is made of in each form: the ends of the keys, in place of `weight`.
FORMS = {"int8": ("weight", "scale"), "int4": ("weight", "scale", "factors")}
# Makes those tensors of the weight of this name.
Make = Callable[[str], tuple[Tensor, ...]]


def find_store(
    form: str, weights: Tensors, sizes: Mapping[str, int], make: Make, progress: Progress = ignore
) -> Tensors | None:
    """Where the weights of a checkpoint are kept in a form, written if they are not there yet, or not whole.

    Args:
        form: `int8` or `int4`.
        weights: those to be had in it.
        sizes: how many bytes each takes.

    Returns:
        where each tensor is, under the `keys_of` each weight; None if none can be written.
    """
    files = sorted({file for place in weights.values() for file in place.files})
    folder = store_folder(form, files)
    keys = {key for name in weights for key in keys_of(form, name)}
    stored = _stored_tensors(folder, keys)
    if stored is not None:
        return stored
    progress(f"Turning the weights into {form}", 0.0)
    needed = sum(sizes[name] for name in weights)
    try:
        with one_writer():  # others wait and find what it wrote
            stored = _stored_tensors(folder, keys)
            if stored is None:
                for leftover in (folder, *folder.parent.glob(f"{UNFINISHED}*")):  # damaged, or of a process that died
                    shutil.rmtree(leftover, ignore_errors=True)
                with whole_folder(folder, needed) as unfinished:
                    metadata = {SOURCES: _state_of(_version(form), [file.resolve() for file in files])}
                    write_files(form, {name: sizes[name] for name in weights}, make, unfinished, metadata, progress)
                remove_outdated()
                stored = _stored_tensors(folder, keys)
            return stored
    except (OSError, SafetensorError) as error:
        advice = f"please set HF_HOME to a place with {needed / 1e9:.2g} GB for them"
        log.warning(
            "%s weights cannot be kept in %s (%s), so each start makes them anew; %s", form, folder, error, advice
        )
        return None


def keys_of(form: str, name: str) -> list[str]:
    """The keys of what a weight is made of in this form; in int8 its name, and its `scale_name`."""
    return [f"{name.removesuffix('weight')}{kind}" for kind in FORMS[form]]


def store_folder(form: str, files: list[Path]) -> Path:
    """Where the weights of the checkpoint in `files` belong: next to the Hub's cache, and new when a file changes."""
    files = [file.resolve() for file in files]  # in the Hub's cache the name of the file itself tells its content
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(files[0].parent)).strip("-")[-80:]
    digest = hashlib.sha256(_state_of(_version(form), files).encode()).hexdigest()[:16]
    return stores_folder() / f"{name}-{digest}"


def stores_folder() -> Path:
    """The folder of the folders of all checkpoints."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent / "paligemma-int8"


@contextmanager
def one_writer() -> Iterator[None]:
    """Wait until no other process of this user makes weights."""
    from huggingface_hub.utils import WeakFileLock

    stores_folder().mkdir(parents=True, exist_ok=True)
    with WeakFileLock(stores_folder().with_suffix(".lock")):
        yield


@contextmanager
def whole_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A new folder to write `needed` bytes into, which is called `folder` only once all is written, and else removed.

    Raises:
        OSError: there is no space for it, or it cannot be made.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died
    try:
        unfinished.mkdir(parents=True)
        if shutil.disk_usage(unfinished).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        give_back_freed_memory()  # which packing needs


def stores() -> list[tuple[Path, int, bool]]:
    """All folders of weights that are kept here, the bytes that each takes, and whether loading may yet read it.

    It does not if its checkpoint has changed since, or is gone, if another version of this package wrote it, or if it was
    never finished.
    """
    folders = sorted(stores_folder().iterdir()) if stores_folder().is_dir() else []
    return [
        (one, sum(file.stat().st_size for file in one.glob("*") if file.exists()), _is_current(one)) for one in folders
    ]


def remove_outdated() -> None:
    """Remove the folders of weights that no loading will read."""
    for folder, _, is_current in stores():
        if not is_current:
            shutil.rmtree(folder, ignore_errors=True)


def _is_current(folder: Path) -> bool:
    try:
        with open_file(next(folder.glob("*.safetensors"))) as mapped:
            state = (mapped.metadata() or {})[SOURCES]
        version, *files = json.loads(state)
        is_known = version in (_version("int8"), _version("int4"))
        return is_known and state == _state_of(version, (Path(file) for file, *_ in files))
    except (OSError, StopIteration, PaliGemmaError, KeyError):
        return False


def _version(form: str) -> int | str:
    """What tells one version of this module's files from another; int4 is packed for the CPU that it was made on."""
    return INT8_FORMAT if form == "int8" else f"{form} {INT4_FORMAT} {layout()}"


def _state_of(version: int | str, files: Iterable[Path]) -> str:
    """What tells one version of a checkpoint, and of this module, from another."""
    stats = [(file, file.stat()) for file in files]
    return json.dumps([version, *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)])


def write_files(
    form: str, sizes: Mapping[str, int], make: Make, folder: Path, metadata: dict[str, str], progress: Progress
) -> None:
    """Make tensor by tensor into safetensors files of `folder`: memory holds little of them at any time."""
    done, total = 0, sum(sizes.values())
    shard: dict[str, Tensor] = {}
    for number, (name, size) in enumerate(sizes.items(), start=1):
        progress(f"Turning the weights into {form}", done / total)
        shard |= zip(keys_of(form, name), make(name))
        done += size
        if number == len(sizes) or sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            save_checked(shard, folder / f"{number:05}.safetensors", metadata)
            shard = {}


def save_checked(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with the checksum of each tensor in its metadata, under the tensor's key."""
    save_file(tensors, file, metadata={**metadata, **{key: _checksum(tensor) for key, tensor in tensors.items()}})


def _stored_tensors(folder: Path, keys: Collection[str]) -> Tensors | None:
    """Where in `folder` each of the keys is, None if one is missing or a file damaged."""
    found: Tensors = {}
    try:
        for file in folder.iterdir():
            with open_file(file) as mapped:
                found |= {key: Place(file, key) for key in mapped.keys()}
    except (OSError, PaliGemmaError):
        return None
    return found if found.keys() >= set(keys) else None


def read_checked(file: Path, key: str, damaged: set[Path]) -> Tensor | None:
    """A tensor that `save_checked` wrote; None, and the file is added to `damaged`, if it is not what was written."""
    if file in damaged:
        return None
    with open_file(file) as mapped:
        tensor = mapped.get_tensor(key)
        if (mapped.metadata() or {}).get(key) == _checksum(tensor):
            return tensor
    damaged.add(file)
    return None


def remove_damaged(files: Iterable[Path], form: str) -> None:
    """Remove files that are not what was written, and say so in the log."""
    for file in files:
        log.warning("%s holds damaged %s weights; the next start makes them anew", file, form)
        with suppress(OSError):
            file.unlink()


def _checksum(tensor: Tensor) -> str:
    """Of the bytes of a contiguous tensor; its 4 GB/s are a fraction of what packing takes."""
    return f"{zlib.crc32(tensor.view(torch.uint8).numpy().data):08x}"
