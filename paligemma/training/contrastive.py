"""Contrastive learning: which text belongs to which image: `python -m paligemma.training.contrastive --output FOLDER`.

A vision encoder and a small text tower learn it from your own pairs, `--data pairs.jsonl` with one JSON object a line,
`{"image": "a.jpg", "text": "a red car"}`; or, without, from crops of single objects in drawn scenes, about ten minutes on two
cores. In the end it prints how well pairs that were held back find each other, draws their similarities, and writes both
towers, which `load_towers` reads. The same command goes on from the last save of an interrupted run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import paligemma

from ..config import PaliGemmaError, VisionConfig
from ..hardware import choose_device
from ..images import open_image
from ..processor import Processor
from ..scenes.artwork import KINDS, load_sheet
from ..scenes.colors import COLORS
from ..scenes.painter import Painter
from ..scenes.questions import caption, caption_of_one
from ..siglip import SiglipVisionModel
from .data import hold_back, images_of, read_rows, text_of
from .loop import Run
from .losses import clip_loss, siglip_loss
from .plot import draw_matrices

VISION = VisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
)
TEXT_LAYERS = 2
MAX_TEXT_TOKENS = 64
# SigLIP's own start (section 3.2): nearly all pairs of a batch are negative, and this bias predicts so from the beginning.
FIRST_SCALE, FIRST_BIAS = 10.0, -10.0
PAIRS_A_BATCH = 128
STEPS = 1500
PEAK = 1e-3
TRAINING_SEED, EVALUATION_SEED = 0, 1
EVALUATION_CROPS = 500
DRAWN_PAIRS = 24  # of the picture of similarities
VISION_FILE, TEXT_FILE, CONFIG_FILE = "vision_tower.safetensors", "text_tower.safetensors", "vision_config.json"

Pair = tuple[Image.Image, str]


class TextTower(nn.Module):
    """Token ids to one vector: transformer layers over learned positions, and the mean of their outputs."""

    def __init__(self, vocab_size: int, width: int, heads: int, pad_token_id: int, max_tokens: int):
        super().__init__()
        self.pad_token_id = pad_token_id
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(max_tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, TEXT_LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Int64 [B, T], right-padded, T up to max_tokens, to float [B, width]."""
        is_padding = input_ids == self.pad_token_id
        embedded = self.embedding(input_ids) + self.positions[: input_ids.shape[1]]
        hidden_states = self.encoder(embedded, src_key_padding_mask=is_padding)
        is_text = ~is_padding[..., None]
        return (hidden_states * is_text).sum(1) / is_text.sum(1)


class Towers(nn.Module):
    """A vision encoder, whose features are averaged, and a text tower, in one space.

    Args:
        processor: of the encoder's sizes and the texts' tokenizer.
        loss: "siglip" or "clip".
        max_tokens: of a text; what is longer is cut.
    """

    def __init__(self, processor: Processor, loss: str, max_tokens: int):
        super().__init__()
        config, vision = processor.config, processor.config.vision
        self.processor, self.loss = processor, loss
        self.vision_tower = SiglipVisionModel(vision)
        nn.init.normal_(self.vision_tower.embeddings.position_embedding.weight, std=0.02)
        self.text_tower = TextTower(
            config.text.vocab_size, vision.hidden_size, vision.num_attention_heads, config.pad_token_id, max_tokens
        )
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS), requires_grad=loss == "siglip")

    def losses(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """The loss of pairs, as `tensors` gives them, by its name; equal texts are no negatives of each other."""
        pixel_values, input_ids = (part.to(self.bias.device) for part in (pixel_values, input_ids))
        with torch.autocast(self.bias.device.type, torch.bfloat16, enabled=self.bias.device.type == "cuda"):
            images, texts = self.vision_tower(pixel_values).mean(1), self.text_tower(input_ids)
            captions = input_ids.unique(dim=0, return_inverse=True)[1]
            if self.loss == "clip":
                return {"clip": clip_loss(images, texts, self.log_scale, captions)}
            return {"siglip": siglip_loss(images, texts, self.log_scale, self.bias, captions)}

    def tensors(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Float32 [B, 3, H, W] and int64 [B, max_tokens], right-padded."""
        return self.pixel_values([image for image, _ in pairs]), self.text_ids([text for _, text in pairs])

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Float32 [B, 3, H, W]."""
        return torch.cat([self.processor.pixel_values(image) for image in images])

    def text_ids(self, texts: Sequence[str]) -> Tensor:
        """Int64 [B, max_tokens], right-padded; longer texts are cut."""
        longest = len(self.text_tower.positions)
        input_ids = torch.full((len(texts), longest), self.text_tower.pad_token_id)
        for row, text in enumerate(texts):
            ids = self.processor.tokenizer.encode(text, add_special_tokens=False).ids[:longest]
            input_ids[row, : len(ids)] = torch.tensor(ids)
        return input_ids

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Float [B, width] of length one."""
        device = self.bias.device
        parts = [images[first : first + PAIRS_A_BATCH] for first in range(0, len(images), PAIRS_A_BATCH)]
        features = [self.vision_tower(self.pixel_values(part).to(device)).mean(1) for part in parts]
        return F.normalize(torch.cat(features), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Float [B, width] of length one."""
        return F.normalize(self.text_tower(self.text_ids(texts).to(self.bias.device)), dim=-1)

    def similarity(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Cosines of every image with every text: float32 [images, texts], -1 to 1."""
        return (self.embed_images(images) @ self.embed_texts(texts).T).float().cpu()

    def save(self, folder: Path) -> None:
        """Write both towers, and the sizes of the encoder."""
        save_file(self.vision_tower.state_dict(), folder / VISION_FILE)
        save_file(self.text_tower.state_dict(), folder / TEXT_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.processor.config.vision), indent=2) + "\n")


def load_towers(folder: str | Path, device: str | None = None) -> Towers:
    """The towers that a run has written.

    Raises:
        PaliGemmaError: a file is missing or damaged.
    """
    folder = Path(folder)
    try:
        vision = VisionConfig(**json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        weights = [load_file(folder / name) for name in (VISION_FILE, TEXT_FILE)]
        towers = Towers(processor_of(vision), "siglip", len(weights[1]["positions"]))
        towers.vision_tower.load_state_dict(weights[0])
        towers.text_tower.load_state_dict(weights[1])
    except Exception as error:  # of three libraries, for files that are missing, damaged or of another kind
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PaliGemmaError(
            f"{folder} holds no two towers ({reason}); please give a finished run's folder."
        ) from error
    return towers.to(choose_device(device)).eval()


def processor_of(vision: VisionConfig) -> Processor:
    """For images of an encoder's size, with the embedded checkpoint's tokenizer."""
    embedded = paligemma.load(device="cpu")
    return Processor(replace(embedded.config, vision=vision), embedded.processor.tokenizer)


def draw_pairs(painter: Painter, seed: Sequence[int], count: int, size: int) -> list[Pair]:
    """Crops of one object each, with their captions; the same ones at each call."""
    rng = np.random.default_rng(seed)
    return [(crop.image, caption(crop)) for crop in (painter.crop(rng, size) for _ in range(count))]


class ScenePairs(Dataset[list[tuple[Tensor, Tensor]]]):
    """The batch of each step, of fresh crops."""

    def __init__(self, towers: Towers):
        self.towers, self.painter = towers, Painter(load_sheet())

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]]:
        size = self.towers.processor.config.vision.image_size
        return [self.towers.tensors(draw_pairs(self.painter, [TRAINING_SEED, step], PAIRS_A_BATCH, size))]


class OwnPairs(Dataset[list[tuple[Tensor, Tensor]]]):
    """The batch of each step, of a file's pairs in random order."""

    def __init__(self, towers: Towers, pairs: Sequence[tuple[Path, str]]):
        self.towers, self.pairs = towers, pairs

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([TRAINING_SEED, step])
        chosen = rng.choice(len(self.pairs), min(PAIRS_A_BATCH, len(self.pairs)), replace=False)
        return [self.towers.tensors(open_pairs([self.pairs[one] for one in chosen]))]


def read_pairs(path: Path) -> list[tuple[Path, str]]:
    """Paths of images and texts; raises PaliGemmaError with a sentence for each row that cannot be used."""

    def read(row: Mapping[str, Any], folder: Path) -> tuple[Path, str]:
        text = text_of(row, "text")
        if not text.strip():
            raise PaliGemmaError("“text” is empty; please describe the image.")
        return images_of(row, folder)[0], text

    return read_rows(path, read)


def open_pairs(pairs: Sequence[tuple[Path, str]]) -> list[Pair]:
    return [(open_image(path), text) for path, text in pairs]


def retrieval(towers: Towers, pairs: Sequence[Pair]) -> dict[str, float]:
    """How often, of all images and all different texts of some pairs, the nearest ones belong together, from 0 to 1."""
    texts = list(dict.fromkeys(text for _, text in pairs))
    own = torch.tensor([texts.index(text) for _, text in pairs])
    cosines = towers.similarity([image for image, _ in pairs], texts)
    best = cosines.topk(min(5, len(texts))).indices
    return {
        "the nearest text of an image is its own": float((best[:, 0] == own).float().mean()),
        "it is among the nearest five": float((best == own[:, None]).any(-1).float().mean()),
        "the nearest image of a text is its own": float(
            (own[cosines.argmax(0)] == torch.arange(len(texts))).float().mean()
        ),
    }


def zero_shot(towers: Towers, pairs: Sequence[Pair]) -> dict[str, float]:
    """How often the kind, and the background, of a crop is that with the nearest mean of its captions, from 0 to 1."""
    names = list(product(range(len(KINDS)), COLORS))
    captions = [caption_of_one(kind, color) for kind, color in names]
    places = torch.tensor([captions.index(text) for _, text in pairs])
    texts = towers.embed_texts(captions).view(len(KINDS), len(COLORS), -1)
    images = towers.embed_images([image for image, _ in pairs])
    shares = {}
    for name, axis, true in (("kind", 1, places // len(COLORS)), ("background", 0, places % len(COLORS))):
        nearest = (images @ F.normalize(texts.mean(axis), dim=-1).T).argmax(-1).cpu()
        shares[f"the nearest {name} is the right one"] = float((nearest == true).float().mean())
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the towers, the log and the saves")
    parser.add_argument("--data", type=Path, help="your own pairs (default: crops of drawn scenes)")
    parser.add_argument("--held-back", type=float, default=0.1, help="share of your pairs to measure on (default: 0.1)")
    parser.add_argument("--image-size", type=int, default=VISION.image_size, help="pixels, a multiple of 14")
    parser.add_argument("--loss", choices=("siglip", "clip"), default="siglip")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {PAIRS_A_BATCH} pairs each (default: {STEPS})")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.image_size < VISION.patch_size or options.image_size % VISION.patch_size:
        parser.error(f"--image-size {options.image_size} is no multiple of {VISION.patch_size}")
    try:
        train(options)
    except PaliGemmaError as error:
        raise SystemExit(str(error)) from error


def train(options: argparse.Namespace) -> None:
    """Train both towers, print how well pairs find each other, and write them to `options.output`."""
    device = choose_device(options.device)
    own: list[tuple[Path, str]] = []
    if options.data is None:
        held_back = draw_pairs(Painter(load_sheet()), [EVALUATION_SEED], EVALUATION_CROPS, options.image_size)
    else:
        own, measured = hold_back(read_pairs(options.data), options.held_back, TRAINING_SEED)
        held_back = open_pairs(measured)
    processor = processor_of(replace(VISION, image_size=options.image_size))
    texts = [text for _, text in own or held_back]
    longest = max(len(ids.ids) for ids in processor.tokenizer.encode_batch(texts, add_special_tokens=False))
    torch.manual_seed(0)
    towers = Towers(processor, options.loss, min(MAX_TEXT_TOKENS, max(16, longest))).to(device)
    drawn = list({text: (image, text) for image, text in held_back}.values())[:DRAWN_PAIRS]
    before = towers.similarity(*zip(*drawn))
    run = Run("contrastive", towers, options.output, options.steps, PEAK)
    run.train(OwnPairs(towers, own) if own else ScenePairs(towers), lambda batch: towers.losses(*batch))
    figures = retrieval(towers, held_back) | ({} if own else zero_shot(towers, held_back))
    print(f"Of {len(held_back)} pairs that were held back:")
    for name, share in figures.items():
        print(f"{name}: {share:.3f}")
    after = towers.similarity(*zip(*drawn))
    draw_matrices({"before": before.numpy(), "after": after.numpy()}, options.output / "similarity.png")
    towers.save(options.output)


if __name__ == "__main__":
    main()
