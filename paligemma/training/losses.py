"""What training minimizes: the contrastive losses of SigLIP and CLIP, and the cross-entropy of an answer's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ..model import PaliGemma
    from .data import Batch

NO_LABEL = -100


def answer_loss(model: PaliGemma, batch: Batch) -> Tensor:
    """Teacher forcing: the mean negative log-likelihood of each answer token, given the prefix and all true ones before.

    Only labeled positions go through the output layer. Returns a float32 scalar, in nats.
    """
    features = model.image_features(batch.pixel_values.to(model.dtype))
    hidden_states = model.hidden_states(features, batch.input_ids, batch.prefix_lengths, batch.attention_mask)
    labeled = batch.labels != NO_LABEL
    return F.cross_entropy(model.logits(hidden_states[labeled]), batch.labels[labeled])


def siglip_loss(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    captions: Tensor | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """Each pair of an image and a text is a binary classification of its own (SigLIP, arXiv 2303.15343, algorithm 1).

    Minus the sum of log-sigmoid(label * (exp(log_scale) * cosine + bias)), divided by the batch size; the label is 1
    for an image and its own text and -1 for all others. The logits of a chunk of texts are computed again on the way
    back, so that memory grows with the batch size, not with its square.

    Args:
        images, texts: float [B, width], not normalized.
        log_scale, bias: learned float scalars.
        captions: int64 [B], the same number where two texts are alike: an image and another's text that is alike are no
            negative, and are left out. None: all differ.

    Returns:
        float scalar, in nats.
    """
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    captions = torch.arange(len(texts), device=texts.device) if captions is None else captions
    total = images.new_zeros(())
    for first in range(0, len(texts), chunk_size):
        chunk = texts[first : first + chunk_size]
        total = total + checkpoint(_siglip_chunk, images, chunk, first, captions, log_scale, bias, use_reentrant=False)
    return total / len(images)


def _siglip_chunk(
    images: Tensor, texts: Tensor, first: int, captions: Tensor, log_scale: Tensor, bias: Tensor
) -> Tensor:
    """The sum of the losses of all images with some texts, of which the first belongs to the image `first`."""
    logits = images @ texts.T * log_scale.exp() + bias  # [B, chunk]
    labels = torch.full_like(logits, -1)
    labels.masked_fill_(captions[:, None] == captions[first : first + len(texts)], 0)
    labels[first : first + len(texts)].fill_diagonal_(1)
    return (-F.logsigmoid(labels * logits) * labels.abs()).sum()


def clip_loss(images: Tensor, texts: Tensor, log_scale: Tensor, captions: Tensor | None = None) -> Tensor:
    """Which text belongs to each image, and which image to each text (CLIP, arXiv 2103.00020, figure 3).

    The mean of the two cross-entropies, in nats; arguments as for `siglip_loss`.
    """
    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp()
    own = torch.arange(len(logits), device=logits.device)
    if captions is not None:
        is_alike = (captions[:, None] == captions) & (own[:, None] != own)
        logits = logits.masked_fill(is_alike, -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
