"""The official checkpoints: what they are for, how large they are, and on which hardware of Spaces they run.

`python -m paligemma.checkpoints.official` prints them as a table. Sizes are those of arXiv 2407.07726 and 2412.03555.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from ..config import PaliGemmaConfig
from ..hardware import dtype_name
from ..quantization import INT4
from .load import empty_model
from .memory import running_bytes

DECODER_FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "query_pre_attn_scalar"),
)
DECODERS = {
    ("PaliGemma 2", "3B"): ("gemma2", 2304, 26, 8, 4, 256, 9216, 256),
    ("PaliGemma 2", "10B"): ("gemma2", 3584, 42, 16, 8, 256, 14336, 256),
    ("PaliGemma 2", "28B"): ("gemma2", 4608, 46, 32, 16, 128, 36864, 144),
    ("PaliGemma", "3B"): ("gemma", 2048, 18, 8, 1, 256, 16384, None),
}
ENCODER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
RESOLUTIONS = (224, 448, 896)
PURPOSES = {"mix": "questions, captions, text, boxes, masks", "pt": "to be fine-tuned", "ft-docci": "long captions"}
USABLE = 0.97  # of a memory: the rest is the system's
# Of the smallest machine of each kind, in gigabytes, with the dtype that this package runs best there. ZeroGPU lends a
# slice of an H200, or where that is newer half or all of a card of 96 GB (huggingface.co/docs/hub/spaces-zerogpu).
HARDWARE = {
    "CPU basic": (16, torch.int8),
    "T4": (16, torch.bfloat16),
    "L4, A10G": (24, torch.bfloat16),
    "ZeroGPU": (70, torch.bfloat16),
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of one architecture: parameters, and the bytes that running it takes, see `memory.running_bytes`."""

    parameters: int
    running_bytes: dict[torch.dtype, int]

    def fits(self, hardware: str) -> bool:
        """Whether it runs on the hardware of this name, one of `HARDWARE`."""
        gigabytes, dtype = HARDWARE[hardware]
        return self.running_bytes[dtype] <= USABLE * gigabytes * 10**9


def purposes(family: str, size: str, resolution: int) -> list[str]:
    """What there are official checkpoints for, of `PURPOSES`; one benchmark each, `google/paligemma-3b-ft-*`, is left out."""
    is_for = {
        "mix": resolution < 896,
        "pt": True,
        "ft-docci": family == "PaliGemma 2" and size != "28B" and resolution == 448,
    }
    return [purpose for purpose in PURPOSES if is_for[purpose]]


def official_config(family: str, size: str, resolution: int) -> PaliGemmaConfig:
    """The config that the checkpoints of this family, size and resolution share."""
    text = {"vocab_size": 257216, **dict(zip(DECODER_FIELDS, DECODERS[family, size], strict=True))}
    vision = {**ENCODER, "image_size": resolution}
    return PaliGemmaConfig.from_dict({"model_type": "paligemma", "text_config": text, "vision_config": vision})


@cache
def compute_sizes(family: str, size: str, resolution: int) -> Sizes:
    """Numbers of the architecture that the checkpoints of this family, size and resolution share."""
    model = empty_model(official_config(family, size, resolution))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Sizes(parameters, {dtype: running_bytes(model, dtype) for dtype in (torch.bfloat16, torch.int8, INT4)})


def table() -> str:
    """The checkpoints in Markdown, a row for those that differ in their purpose only, and what the purposes mean."""
    hardware = [f"{name} ({gigabytes} GB)" for name, (gigabytes, _) in HARDWARE.items()]
    titles = ["checkpoint", "parameters", "memory in bfloat16", "in int8", "in int4", *hardware]
    rows = [titles, ["---"] * len(titles)]
    for (family, size), resolution in product(DECODERS, RESOLUTIONS):
        names, sizes = purposes(family, size, resolution), compute_sizes(family, size, resolution)
        listed = f"{{{','.join(names)}}}" if len(names) > 1 else names[0]
        rows.append(
            [
                f"`google/{family.lower().replace(' ', '')}-{size.lower()}-{listed}-{resolution}`",
                f"{sizes.parameters / 1e9:.2f} billion",
                *(f"{needed / 1e9:.1f} GB" for needed in sizes.running_bytes.values()),
                *(dtype_name(dtype) if sizes.fits(name) else "no" for name, (_, dtype) in HARDWARE.items()),
            ]
        )
    legend = "; ".join(f"`{purpose}`: {meaning}" for purpose, meaning in PURPOSES.items())
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", f"{legend}."])


if __name__ == "__main__":
    print(table())
