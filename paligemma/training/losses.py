"""The objective of each stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -100
RISK_WEIGHT = 4.0  # a code at the mean distance costs as many nats


def answer_loss(
    hidden_states: Tensor,
    labels: Tensor,
    weights: Tensor,
    output_layer: Callable[[Tensor], Tensor],
    code_risk: CodeRisk | None = None,
) -> Tensor:
    """Teacher forcing: the weighted sum of the negative log-likelihoods of each answer token given all true ones before.

    Args:
        hidden_states: float [B, T, width], the decoder's last.
        labels: int64 [B, T], at each position the next token, `NO_LABEL` where the next token is not of the answer.
        weights: float [B, T].
        output_layer: maps float [N, width] to logits [N, vocab]; it is run on labelled positions only.
        code_risk: added where the next token is a mask's code.

    Returns:
        float scalar, in nats.
    """
    labelled = labels != NO_LABEL
    logits, wanted = output_layer(hidden_states[labelled]).float(), labels[labelled]
    losses = F.cross_entropy(logits, wanted, reduction="none")
    if code_risk is not None:
        losses = losses + code_risk(logits, wanted)
    return (losses * weights[labelled]).sum()


class CodeRisk:
    """How far, on average, a mask's code drawn from the model lies from the true one (minimum risk, arXiv 1512.02433).

    Many codes look nearly alike, and which of them is right is often open: the likeliest may be far from most of the
    others. With this the one is preferred that is near to all that are likely.

    Args:
        codebook: float [codes, code_width], the vectors of the codes.
        first_id: the token of the first code; the others follow.
    """

    def __init__(self, codebook: Tensor, first_id: int):
        distances = torch.cdist(codebook, codebook) ** 2
        self.distances = RISK_WEIGHT * distances / distances.mean()
        self.first_id = first_id

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits, float [N, vocab], and labels, int64 [N]; float [N], zero where the label is no code."""
        codes = labels - self.first_id
        is_code = (codes >= 0) & (codes < len(self.distances))
        # Labels of other tokens are looked up as well, and not counted: a choice of rows would wait for the device.
        chances = logits[:, self.first_id : self.first_id + len(self.distances)].softmax(-1)
        risks = (chances * self.distances[codes.clamp(0, len(self.distances) - 1)]).sum(-1)
        return risks * is_code


def siglip_loss(pictures: Tensor, texts: Tensor, temperature: Tensor, bias: Tensor, chunk_size: int = 256) -> Tensor:
    """Every picture with every text is a yes-or-no question of its own (SigLIP, arXiv 2303.15343, algorithm 1).

    Minus the sum of log-sigmoid(label * (exp(temperature) * cosine + bias)), divided by the batch size; the label is 1
    for a picture and its own text and -1 for all others. Texts come in chunks, so that memory grows with the batch
    and not with its square.

    Args:
        pictures, texts: float [B, width], not normalised.
        temperature, bias: float scalars, learnt.

    Returns:
        float scalar, in nats.
    """
    pictures, texts = F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1)
    total = pictures.new_zeros(())
    for start in range(0, len(texts), chunk_size):
        chunk = texts[start : start + chunk_size]
        logits = pictures @ chunk.T * temperature.exp() + bias  # [B, chunk]
        labels = torch.full_like(logits, -1)
        labels[start : start + len(chunk)].fill_diagonal_(1)
        total = total - F.logsigmoid(labels * logits).sum()
    return total / len(pictures)


def clip_loss(pictures: Tensor, texts: Tensor, temperature: Tensor) -> Tensor:
    """Which text belongs to this picture, and which picture to this text (CLIP, arXiv 2103.00020, figure 3).

    The mean of the two cross-entropies, in nats; arguments as for `siglip_loss`.
    """
    logits = F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T * temperature.exp()
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
