"""The engine: sequences wait, are prefilled one by one, decoded together, and leave when they end.

One thread owns the model; others submit a `TokenSequence` and read its tokens. The thread lets go whom nobody waits for,
then either prefills the next in line or makes one decode step for all rows.
A prefix attends to itself both ways, so a prefill cannot be cut by positions; it is cut by layers, and the steps of the
others come in between.

    waiting ──> prefilled ──> running: row r of each step is in slot r of the cache ──> over
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import Any, TypeVar

import torch
from torch import Tensor

from .compilation import CompiledModel
from .config import PaliGemmaError
from .gemma import operations
from .hardware import cache_bytes, choose_threads, give_back_freed_memory_later, lack_of_memory, on_device, threads
from .kv_cache import KVCache
from .model import PaliGemma
from .prefill import Prefill
from .sequence import ChosenToken, Closed, TokenSequence

# Between two steps of the others, a prefill may take as long as this many of these steps: who is running then waits at
# most 1 + PREFILL_SHARE times as long for a token, and a newcomer 1 + 1 / PREFILL_SHARE times as long as alone.
PREFILL_SHARE = 1.5
MAX_ROWS = 16
# Of tokens to all readers together, since each costs a page milliseconds; but one waits no longer for the next.
HANDOVERS_PER_SECOND, MAX_PAUSE = 50, 0.1
TEXT_POSITIONS = 768  # of a slot, after the image: the longest prompt of the page and the longest answer to it
NOT_FINITE = (
    "The logits are not finite in {}; please choose the dtype bfloat16, or, if they are not in that either, fetch the "
    "checkpoint again."
)
T = TypeVar("T")


class Engine:
    """Runs a model for any number of sequences at once.

    Each gets the text that it would get alone, but for int4: there a step is computed in int4 while at most three sequences
    are decoded together, and in int8 while there are more.

    Args:
        model: in its final place and dtype; nothing else may run it.
        rows: how many sequences are decoded together at most, if the memory holds their cache, see `cache_bytes`.
    """

    def __init__(self, model: PaliGemma, rows: int = MAX_ROWS):
        self.model, self.rows, self.prefill = model, rows, Prefill(model)
        self._threads, self._step_threads = choose_threads(), choose_threads(operations(model.config.text, 1, 0))
        self._reset()

    def _reset(self) -> None:
        """Begin with no sequence and a thread of this process: a fork, such as ZeroGPU makes, has none of the other's."""
        self._process = os.getpid()
        # The same thread for good, since a CUDA graph belongs to the one that recorded it; it ends with the engine.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._changed = Condition()
        self._is_awake = self._is_in_job = False
        self._jobs: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._waiting: deque[TokenSequence] = deque()
        self._running: list[TokenSequence] = []
        self._step_seconds = self._last_step = 0.0
        self._cache = self._no_cache()

    def compile(self) -> None:
        """Compile what the model is run for, see `CompiledModel`; a prefill then goes on without pauses for others."""
        self.prefill.compiled = CompiledModel(self.model)

    def submit(self, sequence: TokenSequence) -> None:
        """Let a sequence wait for its turn."""
        sequence.engine, sequence.submitted_at = self, time.perf_counter()
        self._wake_for(lambda: self._waiting.append(sequence))

    def call(self, job: Callable[[], T]) -> T:
        """Run what needs the model in the engine's thread, between two steps or layers; returns or raises what it does."""
        future: Future[T] = Future()
        self._wake_for(lambda: self._jobs.append((future, job)))
        return future.result()

    def _wake_for(self, add: Callable[[], None]) -> None:
        if self._process != os.getpid():
            self._reset()
        with self._changed:
            add()
            self._changed.notify()
            if not self._is_awake:
                self._is_awake = True
                self._thread.submit(self._run)

    def figures(self) -> dict[str, int]:
        """What it does at present, for whoever watches it; the two of the feature cache count from the start."""
        figures = {"active_rows": len(self._running), "queue_length": len(self._waiting)}
        figures |= {"feature_cache_hits": self.prefill.hits, "feature_cache_misses": self.prefill.misses}
        figures["cache_bytes"] = self._cache.keys.nbytes + self._cache.values.nbytes
        if self.model.device.type == "cuda":
            figures["gpu_memory_bytes"] = torch.cuda.memory_allocated(self.model.device)
        return figures

    def wake(self) -> None:
        """Tell the thread that a sequence was closed or read."""
        with self._changed:
            self._changed.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        """Work until no sequence is left."""
        torch.set_num_threads(self._threads)
        while self._wait_for_work():
            try:
                if self._jobs:
                    self._do_job()
                elif self._has_place():
                    self._prefill(self._waiting.popleft())
                else:
                    self._step()
            except Exception as error:  # none of them may wait for ever
                explained = lack_of_memory(error, self.model.device)
                # Without the latest, the others may have enough memory.
                for sequence in self._running if explained is error else self._running[-1:]:
                    sequence.put(explained)
        give_back_freed_memory_later()

    def _wait_for_work(self) -> bool:
        """Let go who is closed; False if nobody is left, else True as soon as there is something to compute."""
        with self._changed:
            while True:
                self._let_go()
                if self._jobs or self._has_place() or self._is_any_active():
                    return True
                if not self._running:
                    self._is_awake = False
                    return False
                self._changed.wait()

    def _let_go(self) -> None:
        """Free the slots of sequences that are closed; the last row moves into a hole, so that rows are the first slots."""
        while self._waiting and self._waiting[0].is_closed:
            self._waiting.popleft()
        for row in reversed(range(len(self._running))):
            if self._running[row].is_closed:
                self.prefill.keep(self._running[row], self._cache, row)
                last = self._running.pop()
                if row < len(self._running):
                    self._running[row] = last
                    self._cache.move(len(self._running), row, last.length)
                self._cache.release(len(self._running))

    def _do_job(self) -> None:
        future, job = self._jobs.popleft()
        self._is_in_job = True
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(lack_of_memory(error, self.model.device))
        finally:
            self._is_in_job = False

    def _is_any_active(self) -> bool:
        return any(not self._is_paused(sequence) for sequence in self._running)

    def _is_paused(self, sequence: TokenSequence) -> bool:
        """Whether a running sequence sits out the steps; nobody does whose slot others wait for."""
        return sequence.is_ahead and not self._waiting

    def _has_place(self) -> bool:
        """Whether the first in line can be prefilled, with a cache made for it if nobody else uses the one that is there."""
        if not self._waiting:
            return False
        capacity = self._waiting[0].capacity
        if capacity > self._cache.capacity and not self._running:
            self._cache = self._no_cache()  # its memory goes before that of the next is taken
            try:
                self._cache = self._make_cache(capacity)
            except Exception as error:
                self._waiting.popleft().put(lack_of_memory(error, self.model.device))
                return self._has_place()  # others may need less
        return capacity <= self._cache.capacity and len(self._running) < len(self._cache.lengths)

    def _no_cache(self) -> KVCache:
        # On the CPU, since on ZeroGPU the engine is made where no GPU is.
        return KVCache(self.model.config.text, 0, 0, self.model.dtype, "cpu")

    def _make_cache(self, capacity: int) -> KVCache:
        """As many slots as fit into the bounds, each for `capacity` positions or the usual number of them."""
        text, dtype = self.model.config.text, self.model.dtype
        usual = self.model.config.vision.num_patches + TEXT_POSITIONS
        capacity = min(max(capacity, usual), text.max_position_embeddings)
        position = text.cached_numbers * dtype.itemsize
        slots = max(1, min(self.rows, cache_bytes(self.model.device) // (position * capacity)))
        cache = KVCache(text, slots, capacity, dtype, self.model.device)
        if self.prefill.compiled is not None:
            cache.mark_static()
        return cache

    def _prefill(self, sequence: TokenSequence) -> None:
        """Read a sequence into the first free slot and choose its first token, unless that is there already."""
        slot, start = len(self._running), time.perf_counter()
        try:
            logits = self.prefill.read(sequence, self._cache, slot, self.between_layers(sequence))
        except Closed:
            return
        except Exception as error:
            self._cache.release(slot)
            sequence.put(lack_of_memory(error, self.model.device))
            return
        row = len(self._running)  # less than `slot` if somebody has left meanwhile
        if slot != row:
            self._cache.move(slot, row, sequence.length)
        self._running.append(sequence)
        if logits is not None:
            if not sequence.answer_ids:
                self._choose([sequence], logits)
            sequence.prefill_seconds += time.perf_counter() - start

    def between_layers(self, sequence: TokenSequence) -> Callable[[], None]:
        """What to call after each layer of a prefill: jobs and, at times, a step of the others, not counted in its time."""
        layer_start = time.perf_counter()

        def after_layer() -> None:
            nonlocal layer_start
            self._let_go()
            if sequence.is_closed:
                raise Closed
            now = time.perf_counter()
            # Including the next layer, if it takes as long.
            waited = now - self._last_step + (now - layer_start)
            if waited > PREFILL_SHARE * self._step_seconds and self._is_any_active():
                self._step()
            while self._jobs and not self._is_in_job:  # else the first would wait for all that come later
                self._do_job()
            layer_start = time.perf_counter()
            sequence.prefill_seconds -= layer_start - now

        return after_layer

    def _step(self) -> None:
        """Append one token to every running sequence that is not too far ahead of its reader."""
        with threads(self._step_threads):
            self._decode()

    def _decode(self) -> None:
        start, active = time.perf_counter(), []
        for row, sequence in enumerate(self._running):
            is_paused = self._is_paused(sequence)
            if is_paused != sequence.sits_out:  # the slot of one that does counts as full
                self._cache.start(row, 1, self._cache.capacity if is_paused else sequence.length)
                sequence.sits_out = is_paused
            if not is_paused:
                active.append(row)
        rows, limit = active[-1] + 1, 1 + max(self._running[row].length for row in active)
        if self.prefill.compiled is not None:
            rows, limit = self.prefill.compiled.bucket(rows, limit, self._cache)
        last_ids = [sequence.answer_ids[-1] for sequence in self._running[:rows]]
        last_ids += [0] * (rows - len(last_ids))
        # A single sequence has all positions up to `limit`.
        mask = None if rows == 1 and self.prefill.compiled is None else self._cache.mask(rows, limit)
        input_ids = on_device(last_ids, self.model.device)[:, None]
        logits = (self.prefill.compiled or self.model).decode(input_ids, self._cache, limit, mask)
        sequences = [self._running[row] for row in active]
        for sequence in sequences:
            sequence.length += 1
        self._choose(sequences, logits if len(active) == rows else logits[on_device(active, self.model.device)])
        self._last_step = time.perf_counter()
        self._step_seconds = self._last_step - start
        for sequence in sequences:
            sequence.step_seconds.append(self._step_seconds)

    def _choose(self, sequences: list[TokenSequence], logits: Tensor) -> None:
        """Give each sequence its next token, as its own sampler chooses it from its row of float [N, vocab_size]."""
        ids = logits.argmax(dim=-1)
        for row, sequence in enumerate(sequences):
            if sequence.sampler.temperature:
                ids[row] = sequence.sampler(logits[row, None], sequence.generator)[0]
        probabilities = logits.softmax(dim=-1).gather(-1, ids[:, None])[:, 0]
        # The one place that waits for the device. Doubles hold every id exactly.
        chosen = torch.stack((ids.double(), probabilities.double()), dim=1).tolist()
        for sequence, (token_id, probability) in zip(sequences, chosen):
            if math.isnan(probability):
                sequence.put(PaliGemmaError(NOT_FINITE.format(str(self.model.weight_dtype).removeprefix("torch."))))
            elif int(token_id) in self.model.config.eos_token_ids:
                sequence.put(None)
            else:
                sequence.answer_ids.append(int(token_id))
                seconds = time.perf_counter() - sequence.submitted_at
                pause = min(len(self._running) / HANDOVERS_PER_SECOND, MAX_PAUSE)
                sequence.put(ChosenToken(int(token_id), probability, seconds), pause)
                if sequence.written == sequence.max_new_tokens:
                    sequence.put(None)
