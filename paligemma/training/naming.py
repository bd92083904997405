"""Stage 1: the eye learns to name crops of single objects, first as their artists drew them, then restyled as well."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VisionConfig
from ..siglip import SiglipVisionModel
from .artwork import KINDS
from .contrastive import CROP_SIZE
from .scenes import Scene

CROPS_A_BATCH = 128


class NamingModel(nn.Module):
    """The eye on small crops, and a linear layer from its mean feature to the kinds."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_tower = SiglipVisionModel(replace(config, image_size=CROP_SIZE))
        self.kinds = nn.Linear(config.hidden_size, len(KINDS))

    def losses(self, pixel_values: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        return {"kinds": F.cross_entropy(self.kinds(self.vision_tower(pixel_values).mean(1)), kinds)}


def kinds_of(crops: list[Scene]) -> Tensor:
    """What the naming stage is told of crops: int64 [crops]."""
    return torch.tensor([crop.objects[0].kind for crop in crops])
