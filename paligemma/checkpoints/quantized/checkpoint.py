"""A checkpoint with int8 weights: half as large as one in bfloat16, and there is nothing to be made when it is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from ...config import PaliGemmaConfig, PaliGemmaError
from ...mask_decoder import FILE_NAMES as MASK_DECODER_FILES
from ...quantization import quantize
from ..formats import CONFIG_FILE, INDEX_FILE, INT8_QUANTIZATION
from ..load import open_checkpoint
from ..weights import Progress, ignore, linear_weights, official_name, open_file, read_tensor
from .store import one_writer, save_checked, whole_folder, write_files

CARD = """\
---
{base}pipeline_tag: image-text-to-text
tags:
  - paligemma
  - int8
---

# {source} in int8

The weights of {source}, with one scale for each output channel: {gigabytes:.1f} GB. Other programs cannot read them; this one
can, from a folder or the Hub:

```python
import paligemma

vlm = paligemma.load("{folder}")
```

They come under the license of {source}, whose terms hold for whoever shares or uses them.
"""


def write_int8_checkpoint(
    source: str | os.PathLike | None,
    folder: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    progress: Progress = ignore,
) -> Path:
    """Write the checkpoint `source` with int8 weights into a new folder, from which `load` reads it directly.

    The folder has the name only once it is whole. Memory holds little of the weights at any time.

    Args:
        source, tokenizer, progress: as for `load`.
        folder: what is to be made; may not be there yet.

    Returns:
        the folder.

    Raises:
        PaliGemmaError: the checkpoint cannot be found or read, the folder is there already, or it cannot be written.
    """
    folder = Path(os.path.expanduser(folder))

    def refuse_present(_: PaliGemmaConfig | None = None) -> None:
        if folder.exists():
            raise PaliGemmaError(f"{folder} is there already; please give another folder, or remove it.")

    refuse_present()
    opened = open_checkpoint(source, progress, refuse_present, tokenizer)
    if opened.scales:
        raise PaliGemmaError(f"{source} holds int8 weights already; please copy its folder.")
    parameters, linear = dict(opened.model.named_parameters()), linear_weights(opened.model)
    needed = sum(parameter.numel() * (1 if name in linear else 4) for name, parameter in parameters.items())
    try:
        with one_writer():
            refuse_present()
            with whole_folder(folder, needed) as unfinished:
                weights = {official_name(name): opened.tensors[name] for name in parameters if name in linear}
                sizes = {official_name(name): parameters[name].numel() for name in parameters if name in linear}
                write_files(
                    "int8",
                    sizes,
                    lambda name: quantize(read_tensor(*weights[name])),
                    unfinished,
                    {"format": "pt"},
                    progress,
                )
                others = {
                    official_name(name): read_tensor(*place).float().contiguous()
                    for name, place in opened.tensors.items()
                    if name not in linear
                }
                save_checked(others, unfinished / "others.safetensors", {"format": "pt"})
                config = {**opened.model.config.to_dict(), "quantization_config": INT8_QUANTIZATION}
                (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                opened.processor.tokenizer.save(str(unfinished / "tokenizer.json"), pretty=False)
                _write_index(unfinished)
                for name in MASK_DECODER_FILES:
                    if (opened.folder / name).exists():
                        shutil.copy(opened.folder / name, unfinished / name)
                (unfinished / "README.md").write_text(_card(source, folder, needed), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PaliGemmaError(
            f"{folder} cannot be written ({reason}); please choose a place with {needed / 1e9:.2g} GB for it."
        ) from error
    return folder


def _write_index(folder: Path) -> None:
    """The list of all tensors and their files, as transformers writes it."""
    files: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with open_file(file) as mapped:
            files |= {key: file.name for key in mapped.keys()}
        total += file.stat().st_size
        file.chmod((folder / CONFIG_FILE).stat().st_mode)  # safetensors lets nobody else read what it writes
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _card(source: str | os.PathLike | None, folder: Path, size: int) -> str:
    """The README.md of the checkpoint, whose base the Hub then knows, if it is one of the Hub's."""
    name = "the embedded checkpoint of PaliGemma" if source is None else Path(source).name
    base = ""
    if source is not None and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source)) and not Path(source).exists():
        name = str(source).partition("@")[0]
        base = f"base_model: {name}\n"
    return CARD.format(base=base, source=name, gigabytes=size / 1e9, folder=folder.name)
