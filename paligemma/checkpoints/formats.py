"""What the files of a checkpoint are called, and the formats of other programs, refused by their names with a way out."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from ..config import PaliGemmaError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The files of a LoRA adapter, as peft names them.
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

INT8_FORMAT = 3  # of int8 weights, and of the rotation that is in them
INT4_FORMAT = 1  # of int4 weights, which are made of those
# In config.json of a checkpoint that has them: other programs refuse it, and so do we one of another format.
INT8_QUANTIZATION = {"quant_method": "paligemma-int8", "format": INT8_FORMAT}

# In place of weights: which files, what they hold, what to do. `{name}` is the file.
OTHER_FILES = [
    (
        "adapter_model.bin",
        "an adapter only in pickled form ({name})",
        "write it as safetensors: PeftModel.from_pretrained and then save_pretrained of peft do",
    ),
    ("*.gguf", "a GGUF file for llama.cpp", "choose the checkpoint that it was made from"),
    (
        "pytorch_model*.bin",
        "its weights only in pickled form ({name})",
        "write them as safetensors: from_pretrained and then save_pretrained of transformers do",
    ),
    (
        "model-*-of-*.safetensors",
        f"shards ({{name}}), but no {INDEX_FILE} that lists them",
        f"add the {INDEX_FILE} that belongs to them",
    ),
    (
        "model.*.safetensors",
        "only a variant of its weights ({name})",
        f"rename it to {SINGLE_FILE} in a folder of your own, or choose another revision",
    ),
]
# In the keys of tensors.
OTHER_TENSORS = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".scales": "MLX",
}
ADVICE = "please choose the checkpoint that they were made from, with the dtype int8 where memory is short"

log = logging.getLogger(__name__)


def check_format(where: str, folder: Path, names: Collection[str]) -> None:
    """Refuse what other programs wrote for themselves, by the names of files and `config.json`, before weights are read.

    Args:
        where: the checkpoint as errors call it.
        folder: where its JSON files are.
        names: all files that it has.

    Raises:
        PaliGemmaError: says what it is, and what to do.
    """
    if is_adapter(names):
        return
    has_weights = SINGLE_FILE in names or INDEX_FILE in names
    for pattern, content, advice in OTHER_FILES:
        found = sorted(name for name in names if fnmatch(name, pattern))
        if found and not has_weights:
            raise PaliGemmaError(f"{where} holds {content.format(name=found[0])}; please {advice}.")
    config = _read_json(folder / CONFIG_FILE)
    quantization = config.get("quantization_config") or config.get("quantization")
    if quantization and quantization != INT8_QUANTIZATION:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        method = method or ("MLX" if "quantization" in config else "bitsandbytes")
        raise PaliGemmaError(f"{where} holds weights quantized for {method}, which cannot be read here; {ADVICE}.")
    if ADAPTER_CONFIG_FILE in names:
        base = _read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") or "another model"
        log.warning("%s: the LoRA adapter beside the whole weights (for %s) is not applied", where, base)


def is_adapter(names: Collection[str]) -> bool:
    """Whether files of these names are a LoRA adapter, and no whole model."""
    return ADAPTER_CONFIG_FILE in names and ADAPTER_FILE in names and not {SINGLE_FILE, INDEX_FILE} & set(names)


def foreign_tensors(keys: Collection[str], metadata: Mapping[str, str] | None) -> str | None:
    """What a safetensors file of another program holds, and what to do, by its keys and metadata; None if it is ours."""
    if any(".lora_A." in key for key in keys):
        return f"a LoRA adapter; please name it {ADAPTER_FILE}, with its {ADAPTER_CONFIG_FILE} beside it"
    programs = ["MLX"] if (metadata or {}).get("format") == "mlx" else []
    programs += [program for part, program in OTHER_TENSORS.items() if any(part in key for key in keys)]
    return f"weights in the format of {programs[0]}, which cannot be read here; {ADVICE}" if programs else None


def _read_json(file: Path) -> dict:
    """A JSON file's object; empty if there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
