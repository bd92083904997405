"""The objective of each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -100
CODE_COST = 4.0  # nats, of a mask's code at the mean distance
COORDINATE_COST = 20.0  # nats, of an error as wide as the picture


def answer_loss(
    hidden_states: Tensor,
    labels: Tensor,
    weights: Tensor,
    output_layer: Callable[[Tensor], Tensor],
    risks: Sequence[TokenRisk] = (),
) -> Tensor:
    """Teacher forcing: the weighted sum of the negative log-likelihoods of each answer token given all true ones before.

    Args:
        hidden_states: float [B, T, width], the decoder's last.
        labels: int64 [B, T], at each position the next token, `NO_LABEL` where the next token is not of the answer.
        weights: float [B, T].
        output_layer: maps float [N, width] to logits [N, vocab]; it is run on labelled positions only.
        risks: added where the next token is one of theirs.

    Returns:
        float scalar, in nats.
    """
    labelled = labels != NO_LABEL
    logits, wanted = output_layer(hidden_states[labelled]).float(), labels[labelled]
    losses = F.cross_entropy(logits, wanted, reduction="none")
    for risk in risks:
        losses = losses + risk(logits, wanted)
    return (losses * weights[labelled]).sum()


class TokenRisk:
    """How far, on average, a token drawn from the model lies from the true one (minimum risk, arXiv 1512.02433).

    For tokens that stand for points, as coordinates and the codes of masks do. Many lie close together, and which of them
    is right is often open: the likeliest may be far from most of the others. With this the one is preferred that is
    near to all that are likely.

    Args:
        first_id: the first of the tokens; the others follow.
        distances: float [tokens, tokens], in nats that it costs to say one where the other is true.
    """

    def __init__(self, first_id: int, distances: Tensor):
        self.first_id, self.distances = first_id, distances

    @classmethod
    def of_codes(cls, first_id: int, codebook: Tensor) -> TokenRisk:
        """By the squared distances of their vectors, float [codes, code_width]."""
        distances = torch.cdist(codebook, codebook) ** 2
        return cls(first_id, CODE_COST * distances / distances.mean())

    @classmethod
    def of_coordinates(cls, first_id: int, coordinates: int) -> TokenRisk:
        """Of so many, evenly spread over a side of the picture."""
        places = torch.linspace(0, 1, coordinates)
        return cls(first_id, COORDINATE_COST * (places[:, None] - places).abs())

    def to(self, device: torch.device) -> TokenRisk:
        return TokenRisk(self.first_id, self.distances.to(device))

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits, float [N, vocab], and labels, int64 [N]; float [N], zero where the label is none of the tokens."""
        tokens = labels - self.first_id
        last = len(self.distances) - 1
        # Labels of other tokens are looked up as well, and not counted: a choice of rows would wait for the device.
        chances = logits[:, self.first_id : self.first_id + len(self.distances)].softmax(-1)
        risks = (chances * self.distances[tokens.clamp(0, last)]).sum(-1)
        return risks * ((tokens >= 0) & (tokens <= last))


def attention_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """How far attention is from where it should be: the mean of the Kullback-Leibler divergences, in nats.

    Args:
        logits: float32 [..., S], before the softmax.
        wanted: float32 [..., patches], which are the first of the S places; with a sum of one; or of a shape that
            expands to that.
    """
    given = logits.log_softmax(-1)[..., : wanted.shape[-1]]
    divergences = (torch.special.xlogy(wanted, wanted) - wanted * given).sum(-1)
    return divergences.sum() / max(1, divergences.numel())


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
