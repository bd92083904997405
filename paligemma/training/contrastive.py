"""Stage 0: the eye learns what belongs to which caption, beside a small text tower, on crops of single objects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VisionConfig
from ..processor import Processor
from ..siglip import SiglipVisionModel, VisionLayer
from .artwork import KINDS
from .colours import COLOURS
from .losses import clip_loss, siglip_loss
from .scenes import Painter, Scene, SceneObject
from .tasks import caption

CROP_SIZE = 56  # pixels, where full size is 112
CROPS_A_BATCH = 192
TEXT_LAYERS = 2
MAX_TEXT_TOKENS = 16
# SigLIP's own start (section 3.2): all pairs but one in a batch are negative, and this bias says so from the beginning.
FIRST_TEMPERATURE, FIRST_BIAS = 10.0, -10.0


class TextTower(nn.Module):
    """Token ids to one vector: the same layers as the eye's, over learned positions, and the mean of their outputs."""

    def __init__(self, config: VisionConfig, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.positions = nn.Parameter(torch.randn(MAX_TEXT_TOKENS, config.hidden_size) * 0.02)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(TEXT_LAYERS))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Int64 [B, MAX_TEXT_TOKENS], padded with a token that is learnt like the others, to float [B, width]."""
        hidden_states = self.embedding(input_ids) + self.positions
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states.mean(1))


class ContrastiveModel(nn.Module):
    """The eye on small crops and the text tower, in one space."""

    def __init__(self, config: VisionConfig, vocab_size: int, use_clip: bool):
        super().__init__()
        self.use_clip = use_clip
        self.vision_tower = SiglipVisionModel(replace(config, image_size=CROP_SIZE))
        nn.init.normal_(self.vision_tower.embeddings.position_embedding.weight, std=0.02)
        self.text_tower = TextTower(config, vocab_size)
        self.temperature = nn.Parameter(torch.tensor(FIRST_TEMPERATURE).log())
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS), requires_grad=not use_clip)

    def embed_pictures(self, pixel_values: Tensor) -> Tensor:
        return self.vision_tower(pixel_values).mean(1)

    def losses(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        pictures, texts = self.embed_pictures(pixel_values), self.text_tower(input_ids)
        if self.use_clip:
            return {"clip": clip_loss(pictures, texts, self.temperature)}
        return {"siglip": siglip_loss(pictures, texts, self.temperature, self.bias)}


def caption_ids(processor: Processor, crops: list[Scene]) -> Tensor:
    """What the contrastive stage is told of crops: int64 [crops, MAX_TEXT_TOKENS]."""
    return text_ids(processor, [caption(crop) for crop in crops])


def text_ids(processor: Processor, texts: list[str]) -> Tensor:
    """Int64 [texts, MAX_TEXT_TOKENS], right-padded."""
    ids = torch.full((len(texts), MAX_TEXT_TOKENS), processor.config.pad_token_id)
    for row, text in enumerate(texts):
        tokens = processor.tokenizer.encode(text, add_special_tokens=False).ids[:MAX_TEXT_TOKENS]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


@torch.inference_mode()
def zero_shot(model: ContrastiveModel, processor: Processor, painter: Painter, crops: int) -> dict[str, float]:
    """How often the nearest text is right, on fresh crops that no step was taken on.

    Returns:
        `retrieval`: among the captions of all these crops; `captions`: how many those are; `classification`: among those
        of all kinds on the crop's own background.
    """
    rng = np.random.default_rng(10_000_000)
    drawn = [painter.crop(rng, CROP_SIZE) for _ in range(crops)]
    pictures = model.embed_pictures(torch.cat([processor.normalize(crop.image) for crop in drawn]))
    texts = {
        (kind, colour): caption(Scene(drawn[0].image, (SceneObject(kind, (0, 0, 1, 1)),), colour))
        for colour in COLOURS
        for kind in range(len(KINDS))
    }
    embedded = model.text_tower(text_ids(processor, list(texts.values())))
    cosines = F.normalize(pictures, dim=-1) @ F.normalize(embedded, dim=-1).T  # [crops, texts]
    index = {pair: number for number, pair in enumerate(texts)}
    pairs = [(crop.objects[0].kind, crop.background) for crop in drawn]
    own = torch.tensor([index[pair] for pair in pairs])
    candidates = own.unique()
    retrieved = candidates[cosines[:, candidates].argmax(-1)] == own
    classified = [
        row[[index[kind, colour] for kind in range(len(KINDS))]].argmax().item() == true
        for row, (true, colour) in zip(cosines, pairs)
    ]
    return {
        "captions": len(candidates),
        "retrieval": retrieved.float().mean().item(),
        "classification": sum(classified) / crops,
    }
