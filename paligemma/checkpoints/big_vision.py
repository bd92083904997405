"""Checkpoints of big_vision, which PaliGemma was trained with: one `.npz` file of arrays, and no config.json.

Names and shapes are those of github.com/google-research/big_vision (models/vit.py, models/ppp/gemma.py): the arrays of
all layers are stacked, heads have an axis of their own, and matrices are [in, out] where torch has [out, in].
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import PaliGemmaConfig, PaliGemmaError
from ..mask_decoder import FILE_NAMES as MASK_DECODER_FILES
from .formats import CONFIG_FILE

# Before the names of a checkpoint's arrays, unless somebody has saved those of the model alone.
MODEL = "params/"
VISION_LAYERS, TEXT_LAYERS = "img/Transformer/encoderblock/", "llm/layers/"
ATTENTION = "MultiHeadDotProductAttention_0/"
# The scale of queries is not stored; it is the head's size but in the widest of the official decoders.
QUERY_SCALARS = {4608: 144}
# By numpy, which does not know bfloat16 and calls it two bytes of anything; and by safetensors.
DTYPES = {"f4": "F32", "f2": "F16", "V2": "BF16"}


def _flat(array: Tensor) -> Tensor:
    return array.flatten()


def _rows(array: Tensor) -> Tensor:
    """[..., width] to [rows, width]."""
    return array.flatten(0, -2)


def _input_first(array: Tensor) -> Tensor:
    """[in, ...] to [out, in]."""
    return array.flatten(1).T


def _output_last(array: Tensor) -> Tensor:
    """[..., out] to [out, in]."""
    return array.flatten(0, -2).T


def _heads_first(array: Tensor) -> Tensor:
    """[heads, in, head_dim] to [out, in]."""
    return array.transpose(1, 2).flatten(0, 1)


def _patches(array: Tensor) -> Tensor:
    """[height, width, channels, out] to [out, channels, height, width]."""
    return array.permute(3, 2, 0, 1)


class Source(NamedTuple):
    """Where a parameter is: the name of an array, the part of it by its first indices, how that part is arranged."""

    array: str
    part: tuple[int, ...] = ()
    arrange: Callable[[Tensor], Tensor] = _flat


# By module, the array of its weight; the array of its bias differs in the last part of the name.
VISION_MODULES = {
    "vision_tower.embeddings.patch_embedding": Source("img/embedding/kernel", (), _patches),
    "vision_tower.post_layernorm": Source("img/Transformer/encoder_norm/scale"),
    "multi_modal_projector.linear": Source("img/head/kernel", (), _input_first),
}
VISION_LAYER = {
    "layer_norm1": Source("LayerNorm_0/scale"),
    "layer_norm2": Source("LayerNorm_1/scale"),
    "mlp.fc1": Source("MlpBlock_0/Dense_0/kernel", (), _input_first),
    "mlp.fc2": Source("MlpBlock_0/Dense_1/kernel", (), _input_first),
    "self_attn.q_proj": Source(ATTENTION + "query/kernel", (), _input_first),
    "self_attn.k_proj": Source(ATTENTION + "key/kernel", (), _input_first),
    "self_attn.v_proj": Source(ATTENTION + "value/kernel", (), _input_first),
    "self_attn.out_proj": Source(ATTENTION + "out/kernel", (), _output_last),
}
# The decoder's modules have no biases.
TEXT_LAYER = {
    "self_attn.q_proj": Source("attn/q_einsum/w", (), _heads_first),
    "self_attn.k_proj": Source("attn/kv_einsum/w", (0,), _heads_first),
    "self_attn.v_proj": Source("attn/kv_einsum/w", (1,), _heads_first),
    "self_attn.o_proj": Source("attn/attn_vec_einsum/w", (), _output_last),
    "mlp.gate_proj": Source("mlp/gating_einsum", (0,), _input_first),
    "mlp.up_proj": Source("mlp/gating_einsum", (1,), _input_first),
    "mlp.down_proj": Source("mlp/linear", (), _input_first),
    "input_layernorm": Source("pre_attention_norm/scale"),
}
# In the official layout the norm before the MLP is named by what is before it: attention, or in Gemma 2 another norm.
GEMMA_NORMS = {"post_attention_layernorm": Source("pre_ffw_norm/scale")}
GEMMA2_NORMS = {
    "post_attention_layernorm": Source("post_attention_norm/scale"),
    "pre_feedforward_layernorm": Source("pre_ffw_norm/scale"),
    "post_feedforward_layernorm": Source("post_ffw_norm/scale"),
}
PARAMETERS = {
    "vision_tower.embeddings.position_embedding.weight": Source("img/pos_embedding", (), _rows),
    "language_model.embed_tokens.weight": Source("llm/embedder/input_embedding", (), _rows),
    "language_model.norm.weight": Source("llm/final_norm/scale"),
}


class Array(NamedTuple):
    """Where the numbers of an array begin in its file, in bytes, and how they lie there."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]


class TensorSlice(NamedTuple):
    """Shape and dtype of a tensor that is not read yet, the dtype as safetensors calls it."""

    shape: list[int]
    dtype: str

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


class BigVisionFile:
    """The tensors of a checkpoint under their names in `PaliGemma`, with the methods of `safetensors.safe_open`.

    For a tensor only its part of the file is read: memory never holds the stacked array of all layers.

    Raises:
        PaliGemmaError: the file is damaged or compressed, or holds no PaliGemma.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._arrays = _find_arrays(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise PaliGemmaError(
                f"{file} is truncated or damaged ({error}), expected a whole npz file; please fetch it again."
            ) from error
        try:
            self.config = config_from_shapes({name: array.shape for name, array in self._arrays.items()})
        except (KeyError, ValueError) as error:
            raise PaliGemmaError(
                f"{file} does not hold the arrays of a PaliGemma ({error}); is this another kind of model?"
            ) from error
        self._sources = _sources(self._arrays.keys(), self.config)

    def __enter__(self) -> BigVisionFile:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close: the file is open only while a tensor is read."""

    def keys(self) -> list[str]:
        """Names of the tensors; an array that is none of PaliGemma's keeps its own."""
        return list(self._sources)

    def metadata(self) -> None:
        """None: the file has nothing to say of itself."""

    def get_slice(self, key: str) -> TensorSlice:
        """Shape and dtype of a tensor."""
        source = self._sources[key]
        array = self._arrays[source.array]
        try:
            shape = source.arrange(torch.empty(array.shape, device="meta")[source.part]).shape
        except (IndexError, RuntimeError) as error:
            raise PaliGemmaError(
                f"{self.file}: {source.array} has the shape {list(array.shape)}; is this another kind of model?"
            ) from error
        return TensorSlice(list(shape), DTYPES.get(array.dtype.str[1:], array.dtype.str))

    def get_tensor(self, key: str) -> Tensor:
        """A tensor in the dtype of the file."""
        source = self._sources[key]
        array = self._arrays[source.array]
        mapped = np.memmap(self.file, array.dtype, "r", array.offset, array.shape, array.order)
        part = np.array(mapped[source.part], order="C")  # copied first, since a file does not align its arrays
        if array.dtype.kind == "V":
            return source.arrange(torch.from_numpy(part.view(np.int16)).view(torch.bfloat16)).contiguous()
        return source.arrange(torch.from_numpy(part)).contiguous()


def _find_arrays(file: Path) -> dict[str, Array]:
    """All arrays of a `.npz` file, or, if it holds the state of a training as well, those of the model."""
    arrays = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as content:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise PaliGemmaError(f"{file} is compressed; please save it anew with numpy.savez.")
            # From byte 26 on, the header before each member has the lengths of its name and of what follows the name.
            content.seek(member.header_offset + 26)
            lengths = np.frombuffer(content.read(4), "<u2")
            content.seek(int(lengths.sum()), os.SEEK_CUR)
            is_first_version = np.lib.format.read_magic(content) == (1, 0)
            header = np.lib.format.read_array_header_1_0 if is_first_version else np.lib.format.read_array_header_2_0
            shape, in_fortran_order, dtype = header(content)
            if not dtype.hasobject:  # those would be pickled
                name = member.filename.removesuffix(".npy")
                arrays[name] = Array(content.tell(), shape, dtype, "F" if in_fortran_order else "C")
    of_model = {name.removeprefix(MODEL): array for name, array in arrays.items() if name.startswith(MODEL)}
    return of_model or arrays


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> PaliGemmaConfig:
    """Sizes, from the shapes of the arrays; what these do not tell is as in the official checkpoints.

    Raises:
        KeyError, ValueError: an array is missing, or has other dimensions.
    """
    patch_size, _, channels, vision_width = shapes["img/embedding/kernel"]
    _, patches, _ = shapes["img/pos_embedding"]
    vision_layers, _, vision_heads, _ = shapes[VISION_LAYERS + ATTENTION + "query/kernel"]
    _, _, vision_mlp_width = shapes[VISION_LAYERS + "MlpBlock_0/Dense_0/kernel"]
    layers, heads, width, head_dim = shapes[TEXT_LAYERS + "attn/q_einsum/w"]
    _, _, kv_heads, _, _ = shapes[TEXT_LAYERS + "attn/kv_einsum/w"]
    _, mlp_width, _ = shapes[TEXT_LAYERS + "mlp/linear"]
    rows, _ = shapes["llm/embedder/input_embedding"]
    is_gemma2 = TEXT_LAYERS + "post_ffw_norm/scale" in shapes
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": vision_mlp_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_heads,
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(patches),
    }
    text = {
        "model_type": "gemma2" if is_gemma2 else "gemma",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **({"query_pre_attn_scalar": QUERY_SCALARS.get(width, head_dim)} if is_gemma2 else {}),
    }
    # The embedding of an official file ends before the placeholder's row, which nothing needs.
    values = {"model_type": "paligemma", "image_token_index": min(257152, rows)}
    return PaliGemmaConfig.from_dict({**values, "vision_config": vision, "text_config": text})


def _sources(arrays: Collection[str], config: PaliGemmaConfig) -> dict[str, Source]:
    """By name in `PaliGemma`, where each parameter is; by its own name, each array that is none of PaliGemma's."""
    sources, modules = dict(PARAMETERS), dict(VISION_MODULES)
    for layer in range(config.vision.num_hidden_layers):
        for module, (array, part, arrange) in VISION_LAYER.items():
            source = Source(VISION_LAYERS + array, (layer, *part), arrange)
            modules[f"vision_tower.encoder.layers.{layer}.{module}"] = source
    for module, source in modules.items():
        sources[f"{module}.weight"] = source
        sources[f"{module}.bias"] = Source(source.array.rpartition("/")[0] + "/bias", source.part)
    is_gemma2 = TEXT_LAYERS + "post_ffw_norm/scale" in arrays
    for layer in range(config.text.num_hidden_layers):
        for module, (array, part, arrange) in (TEXT_LAYER | (GEMMA2_NORMS if is_gemma2 else GEMMA_NORMS)).items():
            source = Source(TEXT_LAYERS + array, (layer, *part), arrange)
            sources[f"language_model.layers.{layer}.{module}.weight"] = source
    sources = {name: source for name, source in sources.items() if source.array in arrays}
    unknown = set(arrays) - {source.array for source in sources.values()}
    return sources | {array: Source(array) for array in sorted(unknown)}


def find_npz(where: str, names: Collection[str]) -> str | None:
    """The name of the checkpoint of big_vision among the files of a folder or repository without a config.json.

    Raises:
        PaliGemmaError: there are several.
    """
    found = sorted(name for name in names if name.endswith(".npz") and name not in MASK_DECODER_FILES)
    if CONFIG_FILE in names or not found:
        return None
    if len(found) > 1:
        raise PaliGemmaError(f"{where} holds several checkpoints ({', '.join(found)}); please give the path of one.")
    return found[0]
