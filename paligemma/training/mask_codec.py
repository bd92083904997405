"""The codec of masks: a small VQ-VAE (arXiv 1711.00937) on silhouettes, of which the checkpoint ships the decoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..config import CODEBOOK_SIZE as CODES
from ..config import CODES_PER_MASK
from ..mask_decoder import MASK_SIDE, MaskDecoder
from .scenes import Box, Painter

CODE_WIDTH = 32
WIDTH = 64
MASKS_A_BATCH = 64
COMMITMENT = 0.25  # how much the encoder's nearness to its code counts (section 3.2)
SHARPNESS = 4.0  # from the decoder's output, which is 1 inside and -1 outside, to a logit
STEPS_TO_REVIVE = 50  # a code that was not used for so long becomes one of the encoder's present outputs


class MaskCodec(nn.Module):
    """Masks to 16 codes and back."""

    def __init__(self):
        super().__init__()
        # Each cell by itself: what a code depends on can be seen in one place of the picture.
        self.encoder = nn.Sequential(
            nn.Conv2d(1, WIDTH, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(2 * WIDTH, CODE_WIDTH, 1),
        )
        self.mask_decoder = MaskDecoder(CODES, CODE_WIDTH, WIDTH)
        self.register_buffer("unused_for", torch.zeros(CODES, dtype=torch.int64))

    @property
    def codebook(self) -> nn.Parameter:
        return self.mask_decoder._vq_vae["_embedding"]

    def encode(self, masks: Tensor) -> Tensor:
        """Float [N, 64, 64], 0 or 1, to int64 [N, 16]."""
        return self._nearest(self._vectors(masks))

    def losses(self, masks: Tensor) -> dict[str, Tensor]:
        """Arguments as for `encode`; the gradient goes past the choice of a code as if there had been none."""
        vectors = self._vectors(masks)
        codes = self._nearest(vectors)
        chosen = self.codebook[codes]
        if self.training:
            self._revive(vectors.detach(), codes)
        decoded = self.mask_decoder.decode(vectors + (chosen - vectors).detach())
        return {
            "mask": F.binary_cross_entropy_with_logits(SHARPNESS * decoded, masks),
            "codebook": F.mse_loss(chosen, vectors.detach()),
            "commitment": COMMITMENT * F.mse_loss(vectors, chosen.detach()),
        }

    def _vectors(self, masks: Tensor) -> Tensor:
        return self.encoder(2 * masks[:, None] - 1).float().flatten(2).transpose(1, 2)  # [N, 16, code_width]

    def _nearest(self, vectors: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cdist(vectors, self.codebook[None]).argmin(-1)

    @torch.no_grad()
    def _revive(self, vectors: Tensor, codes: Tensor) -> None:
        self.unused_for += 1
        self.unused_for[codes.unique()] = 0
        dead = (self.unused_for > STEPS_TO_REVIVE).nonzero()[:, 0]
        candidates = vectors.flatten(0, 1)
        self.codebook[dead] = candidates[torch.randint(len(candidates), (len(dead),))]
        self.unused_for[dead] = 0


def decoded_loss(decoder: MaskDecoder, logits: Tensor, masks: Tensor) -> Tensor:
    """How far what is decoded of the likeliest codes is from masks: the mean of the pixels' cross-entropies, in nats, and
    of what is missing of a full overlap (the soft intersection over union of Rahman and Wang, 2016), which masks are judged by.

    The decoder learns what these codes mean, in masks of which some are always wrong. To the logits, the gradient goes as if
    the mean of all codes' vectors, each as likely as it is, had been decoded (a straight-through estimate, arXiv 1308.3432).

    Args:
        logits: float32 [M * 16, codes]. masks: float32 [M, 64, 64], 0 or 1; M may be zero.
    """
    codebook = decoder._vq_vae["_embedding"]
    mean = logits.softmax(-1) @ codebook.detach()
    vectors = codebook[logits.argmax(-1)] + mean - mean.detach()
    decoded = SHARPNESS * decoder.decode(vectors.unflatten(0, (len(masks), CODES_PER_MASK))).float()
    losses = F.binary_cross_entropy_with_logits(decoded, masks, reduction="none").mean((1, 2))
    filled = decoded.sigmoid()
    shared = (filled * masks).sum((1, 2))
    overlaps = shared / (filled.sum((1, 2)) + masks.sum((1, 2)) - shared)
    return (losses + 1 - overlaps).sum() / max(1, len(masks))


class MaskBatches(IterableDataset):
    """Endless masks, float32 [MASKS_A_BATCH, 64, 64], of single objects."""

    def __init__(self, painter: Painter, seed: int):
        self.painter, self.seed = painter, seed

    def __iter__(self) -> Iterator[Tensor]:
        rng = np.random.default_rng(self.seed)
        while True:
            scenes = [self.painter.crop(rng, MASK_SIDE) for _ in range(MASKS_A_BATCH)]
            yield torch.stack([fit_mask(scene.mask(thing)) for scene in scenes for thing in scene.objects])


def fit_mask(mask: np.ndarray, box: Box = (0.0, 0.0, 1.0, 1.0)) -> Tensor:
    """What lies in a box, in parts of a mask of any size, bool [height, width], stretched to float32 [64, 64]."""
    height, width = mask.shape
    corners = box[1] * width, box[0] * height, box[3] * width, box[2] * height
    image = Image.fromarray(mask).convert("L").resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR, corners)
    return torch.from_numpy((np.asarray(image) >= 128).astype(np.float32))


@torch.inference_mode()
def reconstruction_iou(codec: MaskCodec, painter: Painter, masks: int) -> float:
    """Mean intersection over union of fresh masks with what is decoded of their codes."""
    rng = np.random.default_rng(10_000_000)
    scenes = [painter.crop(rng, 2 * MASK_SIDE) for _ in range(masks)]
    true = torch.stack([fit_mask(scene.mask(scene.objects[0])) for scene in scenes]).bool()
    decoded = codec.mask_decoder(codec.encode(true.float())) > 0
    return ((true & decoded).sum((1, 2)) / (true | decoded).sum((1, 2))).mean().item()
