"""Logits to the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import PaliGemmaError, is_number, shorten

# Below this, dividing by the temperature would overflow; the likeliest token is as good as certain long before.
SMALLEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampler:
    """How to choose a token.

    temperature: logits are divided by it; 0 takes the likeliest token and ignores the other two.
    top_k: only the k likeliest tokens take part; 0 switches this off.
    top_p: of those, only the likeliest whose probabilities add up to p take part, at least one; 1 switches this off
        (nucleus sampling, arXiv 1904.09751).

    Raises:
        PaliGemmaError: one of them is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or self.temperature < 0:
            raise PaliGemmaError(
                f"temperature is {shorten(self.temperature)}; please give 0 (greedy) or a positive number."
            )
        if not is_number(self.top_k, whole=True) or self.top_k < 0:
            raise PaliGemmaError(f"top_k is {shorten(self.top_k)}; please give 0 (off) or a positive whole number.")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise PaliGemmaError(f"top_p is {shorten(self.top_p)}; please give a number above 0 and up to 1 (off).")

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Choose one token a row: float [B, vocab] to int64 [B]; `generator` must be on the same device."""
        if self.temperature < SMALLEST_TEMPERATURE:
            return logits.argmax(dim=-1)
        # Dividing by exponential noise and taking the largest draws from the distribution (the Gumbel-max trick) and
        # needs no synchronization with a GPU. Each token has its own noise, not each rank: two that are nearly as likely
        # change ranks with the rounding, which depends on what else is computed.
        noise = torch.empty_like(logits).exponential_(generator=generator)
        candidates, logits = self._filter(logits / float(self.temperature))
        noise = noise if candidates is None else noise.gather(-1, candidates)
        choice = (logits.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
        return (choice if candidates is None else candidates.gather(-1, choice)).squeeze(-1)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of each token to be chosen: float [B, vocab] to float [B, vocab], minus infinity where it is cut off."""
        cut_off = torch.full_like(logits, float("-inf"))
        if self.temperature < SMALLEST_TEMPERATURE:
            return cut_off.scatter(-1, logits.argmax(dim=-1, keepdim=True), 0.0)
        candidates, filtered = self._filter(logits / float(self.temperature))
        logs = filtered.log_softmax(dim=-1)
        return logs if candidates is None else cut_off.scatter(-1, candidates, logs)

    def _filter(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Candidate ids [B, n] and their logits [B, n]; None for ids when the whole vocabulary takes part in its order.

        top-k leaves k sorted candidates, so that top-p sorts the vocabulary only where it comes alone.
        """
        candidates = None
        if 0 < self.top_k < logits.shape[-1]:
            logits, candidates = logits.topk(int(self.top_k), dim=-1)
        elif self.top_p < 1.0:
            logits, candidates = logits.sort(dim=-1, descending=True)
        if self.top_p < 1.0:
            probabilities = logits.softmax(dim=-1)
            likelier = probabilities.cumsum(dim=-1) - probabilities  # the sum over the candidates before each
            left_out = likelier >= float(self.top_p)
            left_out[..., 0] = False  # even where a float holds no number as small as top_p
            logits = logits.masked_fill(left_out, float("-inf"))
        return candidates, logits
