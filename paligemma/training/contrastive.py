"""Contrastive pre-training of a vision encoder: `python -m paligemma.training.contrastive --output FOLDER`.

The encoder and a small text tower learn which caption belongs to which image, on crops of single objects in drawn
scenes. In the end it prints how often the nearest caption is right, and writes `vision_tower.safetensors`. The same
command goes on from the last save of an interrupted run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import paligemma

from ..config import VisionConfig
from ..processor import Processor
from ..scenes.artwork import load_sheet
from ..scenes.painter import Painter, Scene
from ..scenes.questions import caption
from ..siglip import SiglipVisionModel
from .loop import Run
from .losses import clip_loss, siglip_loss

VISION = VisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
)
TEXT_LAYERS = 2
MAX_TEXT_TOKENS = 16
# SigLIP's own start (section 3.2): nearly all pairs of a batch are negative, and this bias predicts so from the beginning.
FIRST_SCALE, FIRST_BIAS = 10.0, -10.0
PAIRS_A_BATCH = 128
STEPS = 1500
PEAK = 1e-3
TRAINING_SEED, EVALUATION_SEED = 0, 1
EVALUATION_CROPS = 500


class TextTower(nn.Module):
    """Token ids to one vector: transformer layers over learned positions, and the mean of their outputs."""

    def __init__(self, vocab_size: int, width: int, heads: int, pad_token_id: int):
        super().__init__()
        self.pad_token_id = pad_token_id
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(MAX_TEXT_TOKENS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, TEXT_LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Int64 [B, MAX_TEXT_TOKENS], right-padded, to float [B, width]."""
        is_padding = input_ids == self.pad_token_id
        hidden_states = self.encoder(self.embedding(input_ids) + self.positions, src_key_padding_mask=is_padding)
        is_text = ~is_padding[..., None]
        return (hidden_states * is_text).sum(1) / is_text.sum(1)


class ContrastiveModel(nn.Module):
    """A vision encoder, whose features are averaged, and a text tower, in one space.

    Args:
        processor: of the encoder's sizes and the texts' tokenizer.
        loss: "siglip" or "clip".
    """

    def __init__(self, processor: Processor, loss: str):
        super().__init__()
        config, vision = processor.config, processor.config.vision
        self.loss = loss
        self.vision_tower = SiglipVisionModel(vision)
        nn.init.normal_(self.vision_tower.embeddings.position_embedding.weight, std=0.02)
        self.text_tower = TextTower(
            config.text.vocab_size, vision.hidden_size, vision.num_attention_heads, config.pad_token_id
        )
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS), requires_grad=loss == "siglip")

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Float [B, 3, H, W] to float [B, width]."""
        return self.vision_tower(pixel_values).mean(1)

    def losses(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """The loss of pairs, as `CropPairs` gives them, by its name."""
        images, texts = self.embed_images(pixel_values), self.text_tower(input_ids)
        if self.loss == "clip":
            return {"clip": clip_loss(images, texts, self.log_scale)}
        return {"siglip": siglip_loss(images, texts, self.log_scale, self.bias)}


def pixel_values(processor: Processor, images: Sequence[Image.Image]) -> Tensor:
    """Float32 [B, 3, H, W]."""
    return torch.cat([processor.pixel_values(image) for image in images])


def text_ids(processor: Processor, texts: Sequence[str]) -> Tensor:
    """Int64 [B, MAX_TEXT_TOKENS], right-padded; longer texts are cut."""
    input_ids = torch.full((len(texts), MAX_TEXT_TOKENS), processor.config.pad_token_id)
    for row, text in enumerate(texts):
        ids = processor.tokenizer.encode(text, add_special_tokens=False).ids[:MAX_TEXT_TOKENS]
        input_ids[row, : len(ids)] = torch.tensor(ids)
    return input_ids


def draw_crops(processor: Processor, painter: Painter, seed: Sequence[int], count: int) -> list[Scene]:
    """Scenes of one object each, as large as the encoder's images."""
    rng = np.random.default_rng(seed)
    return [painter.crop(rng, processor.config.vision.image_size) for _ in range(count)]


class CropPairs(Dataset[tuple[Tensor, Tensor]]):
    """Pixel values of crops and token ids of their captions, other ones for each step, the same at each call."""

    def __init__(self, processor: Processor, painter: Painter):
        self.processor, self.painter = processor, painter

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        crops = draw_crops(self.processor, self.painter, [TRAINING_SEED, step], PAIRS_A_BATCH)
        images, texts = [crop.image for crop in crops], [caption(crop) for crop in crops]
        return pixel_values(self.processor, images), text_ids(self.processor, texts)


@torch.inference_mode()
def retrieval(model: ContrastiveModel, processor: Processor, painter: Painter) -> dict[str, float]:
    """How often the nearest of the captions of fresh crops is a crop's own, names its kind, names its background.

    Returns:
        the three shares, from 0 to 1.
    """
    crops = draw_crops(processor, painter, [EVALUATION_SEED], EVALUATION_CROPS)
    facts = [(caption(crop), crop.objects[0].kind, crop.background) for crop in crops]
    distinct = list(dict.fromkeys(facts))
    device = model.bias.device
    images = model.embed_images(pixel_values(processor, [crop.image for crop in crops]).to(device))
    texts = model.text_tower(text_ids(processor, [text for text, _, _ in distinct]).to(device))
    cosines = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # [crops, captions]
    nearest = [distinct[index] for index in cosines.argmax(-1).tolist()]
    shares = np.mean([[one == other for one, other in zip(*pair)] for pair in zip(facts, nearest)], axis=0)
    return dict(zip(("own caption", "right kind", "right background"), shares.tolist()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the encoder, the log and the saves")
    parser.add_argument("--loss", choices=("siglip", "clip"), default="siglip")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {PAIRS_A_BATCH} pairs each")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        train(options.output, options.loss, options.steps, options.device)
    except paligemma.PaliGemmaError as error:
        raise SystemExit(str(error)) from error


def train(output: Path, loss: str, steps: int, device: str) -> None:
    """Train an encoder, print how well it retrieves captions, and write it to `output`."""
    embedded = paligemma.load(device=device)  # for its tokenizer
    processor = Processor(replace(embedded.config, vision=VISION), embedded.processor.tokenizer)
    painter = Painter(load_sheet())
    torch.manual_seed(0)
    model = ContrastiveModel(processor, loss).to(embedded.device)
    run = Run("contrastive", model, output, steps, PEAK)
    run.train(CropPairs(processor, painter), lambda pairs: model.losses(*(part.to(embedded.device) for part in pairs)))
    print(f"Of {EVALUATION_CROPS} fresh crops, how many have as the nearest of all their captions one with the")
    for name, share in retrieval(model, processor, painter).items():
        print(f"{name}: {share:.3f}")
    save_file(model.vision_tower.state_dict(), output / "vision_tower.safetensors")


if __name__ == "__main__":
    main()
