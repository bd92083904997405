"""Stage 1: the eye learns to name crops of single objects, first as their artists drew them, then restyled as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..config import VisionConfig
from ..processor import Processor
from ..siglip import SiglipVisionModel
from .artwork import KINDS
from .contrastive import CROP_SIZE
from .scenes import Painter

CROPS_A_BATCH = 128


class NamingModel(nn.Module):
    """The eye on small crops, and a linear layer from its mean feature to the kinds."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_tower = SiglipVisionModel(replace(config, image_size=CROP_SIZE))
        self.kinds = nn.Linear(config.hidden_size, len(KINDS))

    def losses(self, pixel_values: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        return {"kinds": F.cross_entropy(self.kinds(self.vision_tower(pixel_values).mean(1)), kinds)}


class NamedCrops(IterableDataset):
    """Endless pairs of pixel values, float32 [P, 3, CROP_SIZE, CROP_SIZE], and kinds, int64 [P]."""

    def __init__(self, processor: Processor, painter: Painter, seed: int):
        self.processor, self.painter, self.seed = processor, painter, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(self.seed)
        while True:
            crops = [self.painter.crop(rng, CROP_SIZE) for _ in range(CROPS_A_BATCH)]
            pixel_values = torch.cat([self.processor.normalise(crop.image) for crop in crops])
            yield pixel_values, torch.tensor([crop.objects[0].kind for crop in crops])
