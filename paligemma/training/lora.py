"""LoRA (arXiv 2106.09685): two small matrices beside each frozen linear layer, whose product is learned in its place."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.adapters import LoraConfig
from ..model import PaliGemma

# By the parts of the model, a regular expression of the linear layers in it. Names have `model.` or the like before and
# `.model` or `.vision_model` inside, as releases of transformers call them.
PARTS = {
    "encoder": r"vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "projector": r"multi_modal_projector\.linear",
    "decoder": r"language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}


class LoraLinear(nn.Module):
    """A linear layer that stays as it is, plus scaling * B @ A, which is learned.

    A and B are float32, whatever the dtype of the layer, and are cast to that of its input: small steps of the optimizer
    would be lost in bfloat16. At the beginning B is zero, so that the layer computes what it did.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft does, uniform up to the root of 1 / in_features

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Float [..., in] to float [..., out]."""
        dtype = hidden_states.dtype
        update = F.linear(F.linear(hidden_states, self.lora_A.to(dtype)), self.lora_B.to(dtype))
        return self.base(hidden_states) + self.scaling * update


def target_modules(parts: list[str]) -> str:
    """The regular expression of all linear layers in some of `PARTS`."""
    return rf"(.*\.)?({'|'.join(PARTS[part] for part in parts)})"


def add_lora(model: PaliGemma, config: LoraConfig) -> None:
    """Freeze a model, and put a `LoraLinear` in the place of each linear layer that `target_modules` matches as a whole."""
    assert isinstance(config.target_modules, str)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and re.fullmatch(config.target_modules, name):
            owner, _, attribute = name.rpartition(".")
            rank = config.rank(name)
            lora = LoraLinear(module, rank, config.scaling(name, rank))
            parent = model.get_submodule(owner)
            if isinstance(parent, nn.ModuleDict):
                parent[attribute] = lora
            else:
                setattr(parent, attribute, lora)


def lora_matrices(model: PaliGemma) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the linear layer that they belong to, as `save_adapter` takes them."""
    return {
        name: (module.lora_A, module.lora_B) for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }
