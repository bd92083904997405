"""What a step of an answer was like inside, worked out by replaying that step: `Inspection` and its parts.

    answer = vlm.stream(image, "detect cat")
    text = "".join(token.text for token in answer)
    seen = answer.inspect(0)          # of the first token: rivals, attention, logit lens, cache
    other = answer.branch(0, seen.rivals[0].id)

Nothing is recorded while an answer is made. Arrays are NumPy's, float32.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import PaliGemmaError, is_number, shorten
from .engine import Engine
from .gemma import operations
from .kv_cache import KeptCache
from .processor import Processor
from .replay import Replayed, replay
from .sampling import Sampler
from .sequence import TokenSequence
from .walk import WalkStep, walk_through

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
    prefill_seconds: of images and prefix; where the keys and values had to be read again, of all positions at once.
    step_seconds: of each decode step of the answer, which may have served others as well; none where they were read again.
    operations, operations_without_cache: multiply-adds in the decoder for all tokens up to this one.
    """

    positions: int
    bytes: int
    bytes_without_groups: int
    prefill_seconds: float
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
        span = [span for span in self.spans if span.kind == IMAGE][image]
        return self.mean(layer, head)[span.start : span.end].reshape(self.grid)

    def mean(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """Attention to each position, float32 [position + 1]; None: the mean of layers, or of heads."""
        return _mean(self.attention, layer, head)

    def shares_of(self, layer: int | None, head: int | None) -> dict[str, float]:
        """As `shares`, of a layer or head; None: the mean of layers, or of heads."""
        return _shares(self.mean(layer, head), self.spans)

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
        logs = Sampler(temperature, top_k, top_p).log_probabilities(torch.tensor(self.logits)[None])[0, ids]
        return tuple(
            replace(candidate, probability=math.exp(log), is_cut_off=log == -math.inf)
            for candidate, log in zip(self.candidates, logs.tolist())
        )

    def to_json(self, with_heads: bool = False) -> dict[str, Any]:
        """All but the logits as plain values; of the attention the mean of the heads of each layer, or every head."""
        attention = self.attention if with_heads else self.attention.mean(axis=1)
        values = asdict(self) | {"attention": attention.round(6).tolist()}
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
        return _mean(self.attention, layer, head).reshape(self.grid)


def _mean(attention: np.ndarray, layer: int | None, head: int | None) -> np.ndarray:
    """Float32 [layers, heads, positions] to [positions]."""
    of_layers = attention if layer is None else attention[[layer]]
    return (of_layers if head is None else of_layers[:, [head]]).mean(axis=(0, 1))


def _shares(mean: np.ndarray, spans: tuple[Span, ...]) -> dict[str, float]:
    """The sums of float32 [positions] over the spans of images, prompt and answer, by these words."""
    shares = {kind: 0.0 for kind in (IMAGE, PROMPT, ANSWER)}
    for span in spans:
        shares[span.kind] += float(mean[span.start : span.end].sum())
    return shares


class Inspector:
    """Looks inside an answer that is over.

    Whatever it asks the model is computed in the engine's thread, from the answer's keys and values, which are read again
    where they are not kept any more.

    Args:
        sequence: with all of the answer in its `answer_ids`, and not submitted.
    """

    def __init__(self, engine: Engine, processor: Processor, sequence: TokenSequence):
        self._engine, self._processor, self._sequence = engine, processor, sequence
        self._model, self._prefix = engine.model, len(sequence.input_ids)

    def inspect(self, index: int) -> Inspection:
        """See `Answer.inspect`."""
        index = self._check(index)
        replayed, kept = self._replay(index)
        text, ids = self._model.config.text, self._sequence.ids
        position = self._prefix + index - 1
        logits = torch.from_numpy(replayed.logits)
        likeliest = logits.topk(min(CANDIDATES, len(logits))).indices.tolist()
        chosen, *candidates = self._candidates([ids[position + 1], *likeliest], logits)
        spans = self._spans(position + 1)
        lens = zip(replayed.lens_ids, replayed.lens_probabilities)
        return Inspection(
            index=index,
            token=chosen,
            rivals=tuple(one for one in candidates if one.id != chosen.id)[:RIVALS],
            candidates=tuple(candidates),
            position=position,
            attention=replayed.attention,
            spans=spans,
            grid=(self._model.config.vision.patches_per_side,) * 2,
            shares=_shares(replayed.attention.mean(axis=(0, 1)), spans),
            lens=tuple(
                LensEntry(layer, token_id, self._processor.token_text(token_id), probability)
                for layer, (token_id, probability) in enumerate(lens)
            ),
            mask=mask_blocks(self._spans(len(ids))),
            window=text.sliding_window,
            cache=self._cache_facts(index, kept),
            logits=replayed.logits,
            texts=tuple(self._processor.token_text(one) for one in ids[self._images_end : position + 1]),
        )

    def probability(self, index: int, token_id: int) -> float:
        """The model's own probability of any token at a step."""
        if not is_number(token_id, whole=True) or not 0 <= token_id < self._model.config.text.vocab_size:
            raise PaliGemmaError(
                f"token_id is {shorten(token_id)}; please give a whole number from 0 to "
                f"{self._model.config.text.vocab_size - 1}."
            )
        logits = torch.from_numpy(self._replay(index)[0].logits)
        return logits.softmax(dim=-1)[int(token_id)].item()

    def seconds_without_cache(self) -> list[float]:
        """See `Answer.seconds_without_cache`."""
        self._check(0)
        ends = range(self._prefix, len(self._sequence.ids))
        return [self._engine.call(partial(self._time_whole, end)) for end in ends]

    def walk_through(self) -> tuple[WalkStep, ...]:
        """See `Answer.walk_through`."""
        self._check(0)
        return self._engine.call(lambda: walk_through(self._model, self._processor, self._sequence, self._recall()))

    @property
    def _images_end(self) -> int:
        return len(self._sequence.pixel_values) * self._model.config.vision.num_patches

    def _spans(self, end: int) -> tuple[Span, ...]:
        """Of the first `end` positions."""
        patches = self._model.config.vision.num_patches
        images = [Span(IMAGE, start, start + patches) for start in range(0, self._images_end, patches)]
        prompt = Span(PROMPT, self._images_end, self._prefix)
        return (*images, prompt, *([Span(ANSWER, self._prefix, end)] if end > self._prefix else []))

    def _candidates(self, ids: list[int], logits: Tensor) -> list[Candidate]:
        probabilities = logits.softmax(dim=-1)[ids].tolist()
        return [
            Candidate(token_id, self._processor.token_text(token_id), logit, probability)
            for token_id, logit, probability in zip(ids, logits[ids].tolist(), probabilities)
        ]

    def _recall(self) -> KeptCache:
        sequence = self._sequence
        return self._engine.prefill.recall(sequence, self._engine.between_layers(sequence))

    def _check(self, index: int) -> int:
        """The number of a token that is there, as an int."""
        answered = len(self._sequence.answer_ids)
        if not answered:
            raise PaliGemmaError("This answer has no token to look inside of; please ask something else.")
        if not is_number(index, whole=True) or not 0 <= index < answered:
            raise PaliGemmaError(
                f"There is no token {shorten(index)} in this answer; please give a whole number from 0 to {answered - 1}."
            )
        return int(index)

    def _replay(self, index: int) -> tuple[Replayed, KeptCache]:
        ids, end = self._sequence.ids, self._prefix + self._check(index)

        def job() -> tuple[Replayed, KeptCache]:
            kept = self._recall()
            return replay(self._model, kept, ids[:end], self._prefix), kept

        replayed, kept = self._engine.call(job)
        if not np.isfinite(replayed.logits).all():
            raise PaliGemmaError("The logits of this step are not finite; please choose the dtype bfloat16.")
        return replayed, kept

    def _cache_facts(self, index: int, kept: KeptCache) -> CacheFacts:
        text, positions = self._model.config.text, self._prefix + index
        size = positions * text.cached_numbers * self._model.dtype.itemsize
        lengths = range(self._prefix, positions + 1)
        whole = [operations(text, length, length) for length in lengths]
        return CacheFacts(
            positions=positions,
            bytes=size,
            bytes_without_groups=size * text.num_attention_heads // text.num_key_value_heads,
            prefill_seconds=kept.prefill_seconds,
            step_seconds=tuple(kept.step_seconds[: len(self._sequence.answer_ids) - 1]),
            operations=whole[0] + sum(operations(text, 1, length) for length in lengths[1:]),
            operations_without_cache=sum(whole),
        )

    def _time_whole(self, end: int) -> float:
        """Seconds of the decoder over the first `end` positions at once, whose last gives the next token."""
        features = self._engine.prefill.image_features(self._sequence)
        device = self._model.device
        input_ids = torch.tensor([self._sequence.ids[:end]], device=device)
        start = time.perf_counter()
        hidden_states = self._model.hidden_states(
            features, input_ids, torch.tensor([self._prefix], device=device), first=end - 1
        )
        self._model.logits(hidden_states)[0, 0].argmax().item()  # waits for the device
        return time.perf_counter() - start


def mask_blocks(spans: tuple[Span, ...]) -> tuple[MaskBlock, ...]:
    """The prefix-LM mask of a sequence with these spans: images and prompt see each other, the answer all before itself."""

    def kind(rows: Span, columns: Span) -> str:
        if columns.kind != ANSWER:
            return FULL
        return CAUSAL if rows.kind == ANSWER else NOTHING

    return tuple(MaskBlock(rows, columns, kind(rows, columns)) for rows in spans for columns in spans)
