"""`TokenSequence`: a prompt about images on its way to an answer, between its reader's thread and the engine's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .sampling import Sampler

if TYPE_CHECKING:
    from .engine import Engine

MAX_AHEAD = 8  # tokens that are computed before they are read


class Closed(Exception):
    """Ends what is done for a sequence that nobody waits for any more."""


class ChosenToken(NamedTuple):
    """A token of an answer, see `generation.Token`."""

    id: int
    probability: float
    seconds: float


# What a reader gets: a token; or the error that ends a sequence; or None, its end.
Event = ChosenToken | BaseException | None
Events = SimpleQueue[tuple["TokenSequence", Event]]


class TokenSequence:
    """A prompt about one or more images on its way to an answer; see `read` for its tokens.

    Args:
        pixel_values: of each image float32 [1, 3, image_size, image_size], on the CPU.
        input_ids: the placeholders of all images first.
        max_new_tokens: how many tokens there are at most; a token that ends the answer is none of them.
        answer_ids: of an answer that goes on, what is there of it; only the tokens after these are handed out.
        sampler, generator: how they are chosen; the generator is on the model's device.
        events: where its tokens go to; several sequences that are read together share them.
    """

    def __init__(
        self,
        pixel_values: list[Tensor],
        input_ids: list[int],
        max_new_tokens: int,
        sampler: Sampler,
        generator: torch.Generator,
        events: Events,
        answer_ids: Sequence[int] = (),
    ):
        self.pixel_values, self.input_ids, self.max_new_tokens = pixel_values, input_ids, max_new_tokens
        self.sampler, self.generator = sampler, generator
        self.events = events
        self.engine: Engine | None = None
        self.submitted_at = 0.0  # seconds of `time.perf_counter`
        self.answer_ids = list(answer_ids)  # of which the next step appends the last to the cache
        self.length = len(input_ids) + max(0, len(answer_ids) - 1)  # positions that are in the cache
        self.capacity = len(input_ids) + len(answer_ids) + max_new_tokens - 1  # at most; the last token is never read
        # The seconds of the prefill and of each step, in which others may have had theirs.
        self.prefill_seconds, self.step_seconds = 0.0, list[float]()
        self.first_logits: Tensor | None = None  # float32 [1, vocab_size], for its first token, if they are known
        self.is_closed = self.has_failed = self.sits_out = False
        self._held: list[Event] = []  # tokens to be handed over with the next, once it is time
        self._next_handover = 0.0
        # Counted apart by the thread that writes and the one that reads, so that neither needs a lock.
        self.written = self.read_count = 0

    @property
    def ids(self) -> list[int]:
        """Of prefix and answer."""
        return self.input_ids + self.answer_ids

    @cached_property
    def image_digests(self) -> list[bytes]:
        """What tells each image's pixel values from others."""
        return [hashlib.sha256(one.numpy().data).digest() for one in self.pixel_values]

    def again(self, answer_ids: Sequence[int]) -> TokenSequence:
        """One with the same prefix and these tokens of an answer, which has no more."""
        return TokenSequence(
            self.pixel_values, self.input_ids, 0, self.sampler, self.generator, SimpleQueue(), answer_ids
        )

    def close(self) -> None:
        """Nobody waits for it any more: its slot is free at the next step, and who waits in `read` nevertheless goes on."""
        if not self.is_closed:
            self.put(Closed())
            if self.engine is not None:
                self.engine.wake()

    def put(self, event: Event, pause: float = 0.0) -> None:
        """Hand an event to whoever reads; tokens no more often than once in `pause` seconds, or half of `MAX_AHEAD`."""
        self.written += 1
        self.is_closed |= not isinstance(event, ChosenToken)
        self.has_failed |= isinstance(event, BaseException) and not isinstance(event, Closed)
        if isinstance(event, Closed):  # from any thread, and nobody reads on
            self.events.put((self, event))
            return
        self._held.append(event)
        now = time.perf_counter()
        if self.is_closed or now >= self._next_handover or len(self._held) >= MAX_AHEAD // 2:
            for held in self._held:
                self.events.put((self, held))
            self._held.clear()
            self._next_handover = now + pause

    @property
    def is_ahead(self) -> bool:
        """Whether its reader is so far behind that no more should be computed."""
        return self.written - self.read_count >= MAX_AHEAD


def read(events: Events, sequences: Sequence[TokenSequence]) -> Iterator[tuple[TokenSequence, ChosenToken | None]]:
    """Yield the tokens of sequences that were made with the same `events`, as they come, and None at each end.

    If one of them is closed meanwhile, by whatever thread, there are no more. At the end all are closed.

    Raises:
        PaliGemmaError: one of the sequences failed.
    """
    count = len(sequences)
    try:
        while count:
            sequence, event = events.get()
            sequence.read_count += 1
            if sequence.written - sequence.read_count == MAX_AHEAD - 1 and sequence.engine is not None:
                sequence.engine.wake()  # it was too far ahead
            if isinstance(event, Closed):
                return
            if isinstance(event, BaseException):
                raise event
            count -= event is None
            yield sequence, event
    finally:
        for sequence in sequences:
            sequence.close()
