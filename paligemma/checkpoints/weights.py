"""The weights of a checkpoint: which safetensors files hold them, and under which keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import PaliGemmaError
from ..model import PaliGemma

INDEX_FILE = "model.safetensors.index.json"
# How safetensors names what torch calls otherwise.
STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

EMBEDDING = "language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
# Older files carry these tables, which the model computes for itself.
COMPUTED_SUFFIXES = (".position_ids", ".rotary_emb.inv_freq")


# Told what is being done, and how much of it, 0 to 1, or None if that is not known.
Progress = Callable[[str, float | None], None]


def no_progress(doing: str, fraction: float | None) -> None:
    """What `load` reports to unless told otherwise."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the shards that its index lists, or the single one."""
    index = folder / INDEX_FILE
    if not index.exists():
        files = [folder / "model.safetensors"]
    else:
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(shards))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PaliGemmaError(f"{index} is not an index of shards; please fetch the checkpoint again.") from error
        if not files:
            raise PaliGemmaError(f"{index} lists no shards; please fetch the checkpoint again.")
    for file in files:
        if not file.exists():
            raise PaliGemmaError(f"{file} is missing; please fetch the checkpoint again.")
    return files


def find_tensors(model: PaliGemma, files: list[Path]) -> dict[str, tuple[Path, str]]:
    """The file and the key there of every parameter of `model`, which was built on `meta`.

    Raises:
        PaliGemmaError: a tensor is missing, unexpected or of another shape, or a file is damaged.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected[OUTPUT] = expected[EMBEDDING]
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        with open_file(file) as mapped:
            for key in mapped.keys():
                name = canonical_name(key)
                if name.endswith(COMPUTED_SUFFIXES):
                    continue
                if name not in expected:
                    raise PaliGemmaError(f"{file} holds an unexpected tensor, {key}; is this another kind of model?")
                shape = tuple(mapped.get_slice(key).get_shape())
                if shape != expected[name]:
                    raise PaliGemmaError(f"{file}: {key} has the shape {list(shape)}, expected {list(expected[name])}.")
                found[name] = file, key

    # The output layer is the embedding again; files may hold it under either name, or under both.
    output = found.pop(OUTPUT, None)
    if output is not None and not torch.equal(read_tensor(*found.setdefault(EMBEDDING, output)), read_tensor(*output)):
        raise PaliGemmaError(f"{files[0].parent}: {OUTPUT} differs from {EMBEDDING}, expected them to be tied.")
    missing = [name for name in expected if name not in found and name != OUTPUT]
    if missing:
        raise PaliGemmaError(
            f"{files[0].parent} lacks {len(missing)} tensors, the first is {official_name(missing[0])} of shape "
            f"{list(expected[missing[0]])}; please fetch the checkpoint again."
        )
    return found


def load_weights(
    model: PaliGemma,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = no_progress,
) -> None:
    """Put the tensors of `files` into `model`, which was built on `meta`.

    On a CPU, tensors that already have the right dtype stay where they are: they are views of the mapped file. Others
    are cast or moved one by one, each through a mapping of its own, so that what has been read does not stay resident.

    Raises:
        PaliGemmaError: as `find_tensors`.
    """
    found = find_tensors(model, files)
    mapped = {file: open_file(file) for file in files}
    for number, (name, (file, key)) in enumerate(found.items()):
        progress("Reading the weights", number / len(found))
        if device.type == "cpu" and mapped[file].get_slice(key).get_dtype() == STORED_DTYPES[dtype]:
            tensor = mapped[file].get_tensor(key)
        else:
            tensor = read_tensor(file, key).to(dtype).to(device)  # cast here, since not every device knows float8
        set_by_name(model, name, nn.Parameter(tensor, requires_grad=False))
    model.language_model.rotary.to(device)


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor, as a view of a mapping that ends with it."""
    with open_file(file) as mapped:
        return mapped.get_tensor(key)


def set_by_name(model: PaliGemma, name: str, value: nn.Parameter | nn.Module) -> None:
    """Replace the parameter or module of this name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def open_file(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PaliGemmaError(
            f"{file} is truncated or damaged ({error}), expected a whole safetensors file; please fetch it again."
        ) from error


def canonical_name(key: str) -> str:
    """The name in `PaliGemma` of a key of any of the layouts in use.

    `model.language_model.norm.weight` and `language_model.model.norm.weight` are both `language_model.norm.weight`;
    `vision_tower.vision_model.*`, with or without `model.` before it, is `vision_tower.*`.
    """
    key = key.removeprefix("model.")
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return OUTPUT
    for outer in ("language_model.model.", "vision_tower.vision_model."):
        if key.startswith(outer):
            return outer.split(".")[0] + "." + key.removeprefix(outer)
    return key


def official_name(name: str) -> str:
    """The key under which the official checkpoints keep a parameter of `PaliGemma`."""
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1)


def save_checkpoint(
    model: PaliGemma,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype,
    in_float8: Callable[[str], bool] = lambda name: False,
) -> None:
    """Write `config.json`, `tokenizer.json` and `model.safetensors` in the official layout, weights as `dtype`.

    Parameters whose names, as `model` has them, are `in_float8` take one byte a number (E4M3, arXiv 2209.05433).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = {
        official_name(name): value.detach().to(torch.float8_e4m3fn if in_float8(name) else dtype)
        for name, value in model.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
