"""The objective of each stage."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -100


def answer_loss(hidden_states: Tensor, labels: Tensor, output_layer: Callable[[Tensor], Tensor]) -> Tensor:
    """Teacher forcing: the mean negative log-likelihood, in nats, of each answer token given all true ones before it.

    Args:
        hidden_states: float [B, T, width], the decoder's last.
        labels: int64 [B, T], at each position the next token, `NO_LABEL` where the next token is not of the answer.
        output_layer: maps float [N, width] to logits [N, vocab]; it is run on labelled positions only.

    Returns:
        float scalar.
    """
    labelled = labels != NO_LABEL
    return F.cross_entropy(output_layer(hidden_states[labelled]).float(), labels[labelled])


def cosine_classification_loss(features: Tensor, classes: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the cosines between each feature and one vector a class.

    Args:
        features: float [B, width].
        classes: float [classes, width].
        scale: float scalar, the logarithm of the factor that the cosines are multiplied by.
        targets: int64 [B].

    Returns:
        float scalar, in nats.
    """
    cosines = F.normalize(features, dim=-1) @ F.normalize(classes, dim=-1).T
    return F.cross_entropy(cosines * scale.exp(), targets)
