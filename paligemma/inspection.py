"""What a step of an answer was like inside, worked out by replaying that step: `Inspection` and its parts.

    answer = vlm.stream(image, "detect cat")
    text = "".join(token.text for token in answer)
    seen = answer.inspect(0)          # of the first token: rivals, attention, logit lens, cache
    other = answer.branch(0, seen.rivals[0].id)

Nothing is recorded while an answer is made. Arrays are NumPy's, float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from .sampling import Sampler

RIVALS, CANDIDATES = 5, 50
IMAGE, PROMPT, ANSWER = "image", "prompt", "answer"
FULL, CAUSAL, NOTHING = "full", "causal", "nothing"


@dataclass(frozen=True)
class Candidate:
    """A token that a step could choose.

    id, text: its number and how the vocabulary writes it, such as `<loc0123>`, `<eos>` or ` cat`.
    logit: the model's, after the last soft-cap.
    probability: the model's own, or under the settings of a `Distribution`.
    is_cut_off: whether top-k or top-p leaves it out; its probability is then 0.
    """

    id: int
    text: str
    logit: float
    probability: float
    is_cut_off: bool = False


@dataclass(frozen=True)
class Span:
    """Positions from `start` to before `end`, of an image, the prompt, or the answer: `kind` is one of these words."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class MaskBlock:
    """Which positions of `columns` those of `rows` attend to: all (`full`), those up to themselves (`causal`), `nothing`."""

    rows: Span
    columns: Span
    kind: str


@dataclass(frozen=True)
class LensEntry:
    """The likeliest token if the decoder ended after layer `layer` (from 0): its last norm and output layer come next."""

    layer: int
    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class CacheFacts:
    """What the cache holds at a step, and what it saved in the answer up to that step.

    positions: whose keys and values the step reads, its own included.
    bytes: of these keys and values.
    bytes_without_groups: if every query head had a key/value head of its own.
    prefill_seconds: of the prefix; None where it was not computed for this answer, as in a branch.
    step_seconds: of each decode step of the answer, which may have served others as well.
    operations, operations_without_cache: multiply-adds in the decoder for all tokens up to this one.
    """

    positions: int
    bytes: int
    bytes_without_groups: int
    prefill_seconds: float | None
    step_seconds: tuple[float, ...]
    operations: int
    operations_without_cache: int


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a token's step was like inside.

    index: which token of the answer, from 0.
    token: the one that was chosen; `rivals`: the five likeliest others, the likeliest first.
    candidates: the `CANDIDATES` likeliest tokens of all, the likeliest first.
    position: the one that attends, whose output is the token.
    attention: float32 [layers, heads, position + 1], how much each head of each layer attends to each position; sums to 1.
    spans: the positions of each image, of the prompt, and of the answer before the token (none for the first).
    grid: rows and columns of an image's patches, which fill its span row by row.
    shares: of the attention, mean of all layers and heads, on images, prompt and answer, by these words.
    lens: after each layer; the last is what the model itself finds likeliest.
    mask: of the whole answer, as blocks, from top to bottom and from left to right.
    window: how many positions up to itself an answer's position attends to in layers 0, 2, 4 ..., see `TextConfig`.
    cache: positions, bytes and times.
    logits: float32 [vocab_size], for `distribution`.
    texts: of each position after the images, how the vocabulary writes it: the prompt, then the answer before the token.
    """

    index: int
    token: Candidate
    rivals: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    position: int
    attention: np.ndarray
    spans: tuple[Span, ...]
    grid: tuple[int, int]
    shares: dict[str, float]
    lens: tuple[LensEntry, ...]
    mask: tuple[MaskBlock, ...]
    window: int | None
    cache: CacheFacts
    logits: np.ndarray
    texts: tuple[str, ...]

    def heat_map(self, layer: int | None = None, head: int | None = None, image: int = 0) -> np.ndarray:
        """Attention to the patches of an image, float32 [rows, columns]; None: the mean of layers, or of heads."""
        layers = self.attention if layer is None else self.attention[layer : layer + 1]
        heads = layers if head is None else layers[:, head : head + 1]
        span = [span for span in self.spans if span.kind == IMAGE][image]
        return heads.mean(axis=(0, 1))[span.start : span.end].reshape(self.grid)

    def distribution(
        self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, count: int = 20
    ) -> tuple[Candidate, ...]:
        """The `count` likeliest tokens with their probabilities under other settings, those cut off included.

        Args:
            count: at most `CANDIDATES`.

        Raises:
            PaliGemmaError: a setting is out of its range, see `Sampler`.
        """
        ids = [candidate.id for candidate in self.candidates[:count]]
        probabilities = Sampler(temperature, top_k, top_p).distribution(torch.from_numpy(self.logits)[None])[0, ids]
        return tuple(
            replace(candidate, probability=probability, is_cut_off=probability == 0)
            for candidate, probability in zip(self.candidates, probabilities.tolist())
        )

    def to_json(self, with_heads: bool = False) -> dict[str, Any]:
        """All but the logits as plain values; of the attention the mean of the heads of each layer, or every head."""
        attention = self.attention if with_heads else self.attention.mean(axis=1)
        values = asdict(replace(self, attention=attention.round(6).tolist(), logits=()))
        del values["logits"]
        return values


@dataclass(frozen=True, eq=False)
class EncoderInspection:
    """What a patch attends to in the vision encoder.

    patch: its number, row by row from 0.
    grid: rows and columns of the patches.
    attention: float32 [layers, heads, patches], which sums to 1.
    """

    patch: int
    grid: tuple[int, int]
    attention: np.ndarray

    def heat_map(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """Attention to the patches, float32 [rows, columns]; None: the mean of layers, or of heads."""
        layers = self.attention if layer is None else self.attention[layer : layer + 1]
        heads = layers if head is None else layers[:, head : head + 1]
        return heads.mean(axis=(0, 1)).reshape(self.grid)


@dataclass(frozen=True)
class WalkStep:
    """One of the seven steps from pixels to words, with the numbers of this very image.

    name: patches, embeddings, encoder, projector, prefix, prefill or decode.
    text: what happens, in a sentence or two, with sizes and numbers.
    shape: of what comes out.
    values: its first few numbers.
    file, line, function: where it happens, the file from the project's folder on.
    """

    name: str
    text: str
    shape: tuple[int, ...]
    values: tuple[float, ...]
    file: str
    line: int
    function: str
