"""From the name of a checkpoint to a model that answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from ..config import PaliGemmaConfig, PaliGemmaError
from ..generation import VisionLanguageModel
from ..hardware import (
    check_dtype,
    choose_device,
    choose_dtype,
    choose_threads,
    explained_lack_of_memory,
    in_own_thread,
    keep_freed_memory,
    smallest_dtype,
    take_over_threads,
    total_memory,
)
from ..mask_decoder import FILE_NAMES as MASK_DECODER_FILES
from ..mask_decoder import MaskDecoder
from ..model import PaliGemma
from ..processor import Processor
from ..quantization import INT4
from .adapters import Adapter
from .big_vision import BigVisionFile, find_npz
from .formats import CONFIG_FILE, check_format, is_adapter
from .hub import download
from .memory import check_fits, weight_bytes
from .quantized import load_int4_weights, load_int8_weights
from .weights import (
    Progress,
    Tensors,
    check_tensors,
    find_tensors,
    ignore,
    load_weights,
    resolve_output_layer,
    scale_name,
    split_scales,
    weight_files,
)

EMBEDDED_FOLDER = Path(__file__).parent.parent / "tiny"


def load(
    source: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = "auto",
    compile: bool = False,
    progress: Progress = ignore,
    make_room: Callable[[int], object] = ignore,
    tokenizer: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
) -> VisionLanguageModel:
    """Load a checkpoint and all that it takes to use it.

    Args:
        source: None for the embedded checkpoint, a folder, or a Hub id such as `google/paligemma-3b-mix-224`, which a
            branch, tag or commit may follow: `google/paligemma-3b-mix-224@bfloat16`. Or an `.npz` file of big_vision. Or
            a LoRA adapter, whose config names its model.
        device: where to run; None takes a GPU if there is one.
        dtype: `float32`, `bfloat16`, `float16`, `int8` or `int4` (x86 CPUs only), or `auto`, see `choose_dtype`, which
            is never int4. Weights in int8 are kept next to the Hub's cache, so that they are made once; a checkpoint
            that `paligemma.checkpoints.quantized` wrote has them already, and `auto` takes them on such a CPU. int4 is
            faster than int8 where one to three answers are made at a time, and less exact: it is int8 but for the
            decode steps of so few rows, and so an answer may depend on how many others are decoded with it. Its weights
            are made of the int8 ones, and are in memory beside them.
        compile: compile encoder, prefill and decode step (CUDA), see `CompiledModel`.
        progress: called as the work goes on, from this thread or another, see `Progress`.
        make_room: called with the bytes that the weights will take, before they are read.
        tokenizer: a `tokenizer.json`, or a folder that holds one; None takes the one beside the checkpoint.
        adapter: a LoRA adapter in peft's files, a folder or a Hub id, which is merged into the weights. Where `source` is
            None, its config names the model.

    Raises:
        PaliGemmaError: the checkpoint cannot be found, reached, read or run; the sentence says what to do.
    """
    device = choose_device(device)
    wanted = None if dtype in (None, "auto") else check_dtype(dtype, device)
    if compile and device.type != "cuda":
        raise PaliGemmaError("Compiling is for CUDA; please leave it out, or choose the device cuda.")
    take_over_threads()
    # On ZeroGPU the calling thread is the one that may load, and there is no thread of OpenMP to get rid of.
    run = in_own_thread(_load) if device.type == "cpu" else _load
    vlm = run(source, device, wanted, progress, make_room, tokenizer, adapter)
    if compile:
        vlm.engine.compile()
    return vlm


def _load(
    source: str | os.PathLike | None,
    device: torch.device,
    wanted: torch.dtype | None,
    progress: Progress,
    make_room: Callable[[int], object],
    tokenizer: str | os.PathLike | None,
    adapter: str | os.PathLike | None,
) -> VisionLanguageModel:
    """As `load`, with what it was given checked; the dtype that is wanted is None for `auto`."""

    def refuse_too_large(config: PaliGemmaConfig) -> None:
        name = "The embedded checkpoint" if source is None else str(source)
        check_fits(name, empty_model(config), wanted or smallest_dtype(device), device, total_memory(device))

    with explained_lack_of_memory(device):
        folder, processor, model, tensors, scales = open_checkpoint(
            source, progress, refuse_too_large, tokenizer, adapter
        )
        if device.type == "cpu":
            torch.set_num_threads(choose_threads())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        weight_dtype = wanted or (smallest_dtype(device) if scales else choose_dtype(device, parameters))
        make_room(weight_bytes(model, weight_dtype))
        if weight_dtype == torch.int8:
            load_int8_weights(model, tensors, scales, progress)
        elif weight_dtype == INT4:
            load_int4_weights(model, tensors, scales, progress)
        else:
            load_weights(model, tensors, scales, weight_dtype, device, progress)
    keep_freed_memory()
    return VisionLanguageModel(model, processor, find_mask_decoder(folder))


class OpenCheckpoint(NamedTuple):
    """A checkpoint of which no weights are read yet.

    folder: where its files are.
    model: on `meta`, in the shapes of its config.
    tensors: the parameters of `model`, with what an adapter adds to them.
    scales: where these are int8, the scale of each weight, under `scale_name`; empty otherwise.
    """

    folder: Path
    processor: Processor
    model: PaliGemma
    tensors: Tensors
    scales: Tensors


def open_checkpoint(
    source: str | os.PathLike | None,
    progress: Progress = ignore,
    check: Callable[[PaliGemmaConfig], object] = ignore,
    tokenizer: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
) -> OpenCheckpoint:
    """Find a checkpoint and whatever it takes to use it, fetched from the Hub if need be; arguments as for `load`.

    Args:
        check: called with the config before weights are fetched, to refuse it.
    """
    folder, change = _find_model(source, adapter, progress, check)
    folder, npz = (
        (folder.parent, folder.name) if folder.is_file() else (folder, find_npz(str(folder), os.listdir(folder)))
    )
    config = BigVisionFile(folder / npz).config if npz else PaliGemmaConfig.from_file(folder / CONFIG_FILE)
    check(config)
    processor = Processor.from_file(config, find_tokenizer(folder if tokenizer is None else Path(tokenizer)))
    tensors = find_tensors([folder / npz] if npz else weight_files(folder))
    config, tensors = resolve_output_layer(processor.config, tensors)
    model = empty_model(config)
    tensors, scales = split_scales(tensors)
    check_tensors(model, tensors, scales, folder)
    if change is not None:
        scale_at = {tensors[name].stored: scales[scale_name(name)] for name in tensors if scale_name(name) in scales}
        config, tensors = change.apply(config, tensors)
        model = empty_model(config)
        scales = {scale_name(name): scale_at[one.stored] for name, one in tensors.items() if one.stored in scale_at}
    return OpenCheckpoint(folder, processor, model, tensors, scales)


def _find_model(
    source: str | os.PathLike | None,
    adapter: str | os.PathLike | None,
    progress: Progress,
    check: Callable[[PaliGemmaConfig], object],
) -> tuple[Path, Adapter | None]:
    """The folder of a model's files, see `find_folder`, and the adapter that changes it, which `source` may be itself."""
    change = None if adapter is None else Adapter(find_folder(adapter, progress))
    if change is not None and source is None:
        source = change.base
    folder = find_folder(source, progress, check)
    if change is None and holds_adapter(folder):
        change = Adapter(folder)
        source = change.base
        folder = find_folder(source, progress, check)
    if holds_adapter(folder):
        raise PaliGemmaError(f"{source} is an adapter itself; please give a whole model for it, and one adapter.")
    return folder, change


def find_folder(
    source: str | os.PathLike | None,
    progress: Progress = ignore,
    check: Callable[[PaliGemmaConfig], object] = ignore,
) -> Path:
    """The folder that holds a checkpoint's files, or its `.npz` file; fetched from the Hub if need be.

    Args:
        source: as for `load`.
        progress: see `Progress`.
        check: called with the config before weights are fetched, to refuse it.

    Raises:
        PaliGemmaError: there is no such folder, the Hub does not give it, or it is of a format that cannot be read.
    """
    if source is None:
        return EMBEDDED_FOLDER
    for name in (source, str(source).strip()):
        folder = Path(os.path.expanduser(name))
        if folder.is_dir():
            check_format(str(folder), folder, os.listdir(folder))
            return folder
        if folder.is_file() and folder.suffix == ".npz":
            return folder
    if folder.suffix == ".npz":
        raise PaliGemmaError(f"There is no file {folder}; please check its path.")
    repository, _, revision = str(source).strip().partition("@")
    if folder.is_absolute() or repository.startswith((".", "~")) or repository.count("/") != 1:
        raise PaliGemmaError(f"There is no folder {source}; please give a folder or a Hub id such as owner/name.")
    return download(repository, revision or None, progress, check)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is that of a LoRA adapter, and no whole checkpoint."""
    return folder.is_dir() and is_adapter(os.listdir(folder))


def find_tokenizer(place: Path) -> Path:
    """The `tokenizer.json` at a path: the file itself, or in a folder."""
    place = place.expanduser()
    if not place.is_dir():
        return place
    file = place / "tokenizer.json"
    if not file.exists() and any(file.suffix in (".npz", ".model") for file in place.iterdir()):
        raise PaliGemmaError(
            f"{place} has no tokenizer.json, and a SentencePiece model cannot stand in for it; please copy the file from "
            "google/paligemma-3b-pt-224 there, or give its path as the tokenizer."
        )
    return file


def find_mask_decoder(folder: Path) -> MaskDecoder | None:
    """The decoder of masks that lies beside a checkpoint, if one does."""
    for name in MASK_DECODER_FILES:
        if (folder / name).exists():
            return MaskDecoder.load(folder / name)
    return None


def empty_model(config: PaliGemmaConfig) -> PaliGemma:
    """A model on `meta`: shapes without numbers."""
    with torch.device("meta"), WithoutInitialization():
        return PaliGemma(config)


class WithoutInitialization(TorchFunctionMode):
    """Builds modules without drawing weights that are about to be replaced; drawing on `meta` alone takes seconds."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))
