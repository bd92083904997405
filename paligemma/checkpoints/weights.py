"""The weights of a checkpoint: which safetensors files hold them, under which keys, and how they get into a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import PaliGemmaConfig, PaliGemmaError
from ..hardware import lack_of_memory
from ..model import PaliGemma
from ..quantization import dequantize, int4
from .big_vision import BigVisionFile
from .formats import ADAPTER_CONFIG_FILE, INDEX_FILE, SINGLE_FILE, foreign_tensors

EMBEDDING = "language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
COMPUTED_SUFFIXES = (".position_ids", ".rotary_emb.inv_freq")  # tables in older files, which the model computes
# Of the weights that int4 layers hold, and how many of their channels have a scale in common.
IN_MLP = re.compile(r"language_model\.layers\.\d+\.mlp\..*")
MLP_GROUP, OUTPUT_GROUP = 64, 32
UNUSED_PREFIX = "vision_tower.head."  # a pooling head that SigLIP has and PaliGemma does not use
# How safetensors names what torch calls otherwise.
STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class LowRankUpdate(NamedTuple):
    """What a LoRA adapter (arXiv 2106.09685) adds to a weight: scaling * B @ A.

    file: that of the adapter. down, up: the keys there of A, [rank, in], and B, [out, rank]; those of a convolution have
        its kernel's dimensions as well. is_embedding: whether the weight is that of an embedding, [in, out].
    """

    file: Path
    down: str
    up: str
    scaling: float
    is_embedding: bool = False

    def add_to(self, weight: Tensor) -> Tensor:
        """The weight with the update, float32 of the same shape."""
        down, up = (read_tensor(self.file, key).float().flatten(1) for key in (self.down, self.up))
        product = up @ down
        product = product.T if self.is_embedding else product.view(weight.shape)
        return weight.float().add(product, alpha=self.scaling)


class Place(NamedTuple):
    """Where a parameter is: a file, the key there, and what an adapter adds to it."""

    file: Path
    key: str
    update: LowRankUpdate | None = None

    @property
    def stored(self) -> Place:
        """The place alone, without what an adapter adds."""
        return self._replace(update=None)

    @property
    def files(self) -> set[Path]:
        """All files that the parameter depends on; of an adapter also its config, which has the scaling."""
        if self.update is None:
            return {self.file}
        return {self.file, self.update.file, self.update.file.with_name(ADAPTER_CONFIG_FILE)}


# The names of a model's parameters, each with its place.
Tensors = dict[str, Place]
# Called with what is being done and how much of it is, 0 to 1, or None if that is not known.
Progress = Callable[[str, float | None], None]


def ignore(*_: object) -> None:
    """What callbacks are where nobody listens."""


def weight_names(folder: Path, names: Collection[str]) -> list[str]:
    """The safetensors files of a checkpoint: the single one, as in transformers, or the shards that its index lists.

    Args:
        folder: where the index is, if there is one.
        names: all files that the checkpoint has.

    Raises:
        PaliGemmaError: neither is there, or the index is damaged.
    """
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    if INDEX_FILE not in names:
        raise PaliGemmaError(f"{folder / SINGLE_FILE} is missing; please fetch the checkpoint again.")
    index = folder / INDEX_FILE
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        inside = [not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in shards]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PaliGemmaError(f"{index} is not an index of shards; please fetch the checkpoint again.") from error
    if not shards:
        raise PaliGemmaError(f"{index} lists no shards; please fetch the checkpoint again.")
    if not all(inside) or any("\\" in name or ":" in name for name in shards):
        raise PaliGemmaError(f"{index} lists files outside its folder; please do not use this checkpoint.")
    return shards


def weight_files(folder: Path) -> list[Path]:
    """The files that `weight_names` lists; raises PaliGemmaError also if one is missing."""
    files = [folder / name for name in weight_names(folder, os.listdir(folder))]
    for file in files:
        if not file.exists():
            raise PaliGemmaError(f"{file} is missing; please fetch the checkpoint again.")
    return files


def find_tensors(files: Collection[Path]) -> Tensors:
    """All tensors of some files that a PaliGemma may have.

    Raises:
        PaliGemmaError: a file is damaged, or written by and for other programs.
    """
    found: Tensors = {}
    for file in files:
        with open_file(file) as mapped:
            if content := foreign_tensors(mapped.keys(), mapped.metadata()):
                raise PaliGemmaError(f"{file} holds {content}.")
            for key in mapped.keys():
                name = canonical_name(key)
                if not name.startswith(UNUSED_PREFIX) and not name.endswith(COMPUTED_SUFFIXES):
                    found[name] = Place(file, key)
    return found


def resolve_output_layer(config: PaliGemmaConfig, tensors: Tensors) -> tuple[PaliGemmaConfig, Tensors]:
    """Say in `config` whether the output layer is the token embedding, and name each of the two that there is once.

    The weights decide: an output layer that differs from the embedding was trained apart, one that equals it is left out.
    One that is stored in the embedding's place is the embedding.
    """
    if OUTPUT not in tensors:
        return config, tensors
    rest = {name: place for name, place in tensors.items() if name != OUTPUT}
    if EMBEDDING not in tensors and config.tie_word_embeddings:
        return config, {EMBEDDING: tensors[OUTPUT], **rest}
    is_tied = EMBEDDING in tensors and _are_equal(read_tensor(*tensors[EMBEDDING]), read_tensor(*tensors[OUTPUT]))
    return replace(config, tie_word_embeddings=is_tied), rest if is_tied else tensors


def linear_weights(model: PaliGemma) -> set[str]:
    """The names of the weights that int8 layers can hold: of linear layers, and the token embedding."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)} | {EMBEDDING}


def int4_weights(model: PaliGemma) -> dict[str, int]:
    """Those among them that int4 layers hold, each with the size of its groups: most of what a decode step reads.

    They are the decoder's MLPs and the output layer, where the kernel takes their shapes. Attention stays in int8: it has
    a twelfth to a fifth of the weights of a 3B decoder's layers, and would cost about half as much accuracy as the MLPs.
    """
    output = EMBEDDING if model.lm_head is None else OUTPUT
    mlps = {name: MLP_GROUP for name in sorted(linear_weights(model)) if IN_MLP.fullmatch(name)}
    groups = {output: OUTPUT_GROUP, **mlps}
    return {name: group for name, group in groups.items() if int4.fits(model.get_parameter(name), group)}


def scale_name(name: str) -> str:
    """The name of the scale, float32 [out], of an int8 weight."""
    return name.removesuffix(".weight") + ".scale"


def split_scales(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The parameters and the scales of a checkpoint; of the latter, only one with int8 weights has any."""
    scales = {scale_name(name): tensors[scale_name(name)] for name in tensors if scale_name(name) in tensors}
    return {name: place for name, place in tensors.items() if name not in scales}, scales


def check_tensors(model: PaliGemma, tensors: Tensors, scales: Tensors, where: Path) -> None:
    """Raise PaliGemmaError unless `tensors` are the parameters of `model`, in their shapes, and `scales` none or all of them."""
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if scales:
        expected |= {scale_name(name): expected[name][:1] for name in linear_weights(model)}
    tensors = tensors | scales
    for name, (file, key, _) in tensors.items():
        if name not in expected:
            raise PaliGemmaError(f"{file} holds an unexpected tensor, {key}; is this another kind of model?")
    for file in dict.fromkeys(place.file for place in tensors.values()):
        with open_file(file) as mapped:
            for name, (of, key, _) in tensors.items():
                shape = mapped.get_slice(key).get_shape() if of == file else expected[name]
                if shape != expected[name]:
                    raise PaliGemmaError(f"{file}: {key} has the shape {shape}, expected {expected[name]}.")
    if missing := [name for name in expected if name not in tensors]:
        raise PaliGemmaError(
            f"{where} lacks {len(missing)} tensors, the first is {official_name(missing[0])} of shape "
            f"{expected[missing[0]]}; please fetch the checkpoint again."
        )


def load_weights(
    model: PaliGemma,
    tensors: Tensors,
    scales: Tensors,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = ignore,
) -> None:
    """Put `tensors` into `model`, which was built on `meta`.

    On a CPU, tensors that already have the right dtype stay where they are: they are views of the mapped file. Others
    are cast one by one, each through a mapping of its own, so that what has been read does not stay resident. Those that
    have one of `scales` are int8, and become again what they stand for.
    """
    mapped = {file: open_file(file) for file in {place.file for place in tensors.values()}}
    for number, (name, place) in enumerate(tensors.items()):
        progress("Reading the weights", number / len(tensors))
        file, is_int8 = mapped[place.file], scale_name(name) in scales
        if not is_int8 and place.update is None and file.get_slice(place.key).get_dtype() == STORED_DTYPES[dtype]:
            tensor = file.get_tensor(place.key)
        else:
            # Before it is moved, since not every device knows float8.
            tensor = read_weight(place, scales.get(scale_name(name)), dtype).to(dtype)
        set_by_name(model, name, nn.Parameter(tensor.to(device), requires_grad=False))
    model.language_model.rotary.to(device)


def read_tensor(file: Path, key: str, update: LowRankUpdate | None = None) -> Tensor:
    """One tensor, as a view of a mapping that ends with it; or its sum with an update, in float32."""
    with open_file(file) as mapped:
        tensor = mapped.get_tensor(key)
    return tensor if update is None else update.add_to(tensor)


def read_weight(place: Place, scale: Place | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `read_tensor`; an int8 weight, which has a scale, becomes what it stands for, in `dtype` or with an update float32."""
    if scale is None:
        return read_tensor(*place)
    rounded, steps = read_tensor(*place.stored), read_tensor(*scale)
    return (
        dequantize(rounded, steps, dtype) if place.update is None else place.update.add_to(dequantize(rounded, steps))
    )


def set_by_name(model: PaliGemma, name: str, value: nn.Parameter | nn.Module) -> None:
    """Replace the parameter or module of this name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def open_file(file: Path) -> safe_open | BigVisionFile:
    """A safetensors or an npz file, of which nothing is read yet; raises PaliGemmaError if it is damaged."""
    if file.suffix == ".npz":
        return BigVisionFile(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        if lack_of_memory(error, torch.device("cpu")) is not error:
            raise MemoryError from error
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


def save_checkpoint(model: PaliGemma, tokenizer: Tokenizer, folder: str | Path, dtype: torch.dtype) -> None:
    """Write `config.json`, `tokenizer.json` and `model.safetensors` in the official layout, weights as `dtype`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = {official_name(name): value.detach().to(dtype) for name, value in model.named_parameters()}
    save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices of any dtypes hold the same numbers; compared in pieces, since each may take gigabytes."""
    return one.shape == other.shape and all(
        torch.equal(rows.float(), others.float()) for rows, others in zip(one.split(4096), other.split(4096))
    )
