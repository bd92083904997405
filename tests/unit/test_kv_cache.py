"""Sequences in the slots of one cache are decoded together as if each were alone."""

from __future__ import annotations

import psutil
import pytest
import torch
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma.kv_cache import KVCache
from paligemma.model import PaliGemma

CAPACITY = 60
BOUND = 1e-4


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def model(request, tmp_path_factory):
    reference = make_reference(family=request.param, kv_heads=2, std=0.2)  # gemma2 with a window of 24 positions
    return paligemma.load(save_reference(reference, tmp_path_factory.mktemp(request.param))).model


class Alone:
    """A sequence with a cache of its own, and the logits of its next token."""

    def __init__(self, model, prompt_length, seed):
        generator = torch.Generator().manual_seed(seed)
        patches = model.config.vision.num_patches
        self.model, self.length = model, patches + prompt_length
        self.features = torch.randn(1, patches, model.config.text.hidden_size, generator=generator)
        self.input_ids = torch.randint(4, 1000, (1, self.length), generator=generator)
        self.cache = empty_cache(model, 1)
        self.logits = model.prefill(self.features, self.input_ids, self.cache)

    def next_id(self):
        return self.logits.argmax(-1, keepdim=True)

    def step(self):
        self.length += 1
        self.logits = self.model.decode(self.next_id(), self.cache, self.length)


def empty_cache(model, slots):
    return KVCache(model.config.text, slots, CAPACITY, torch.float32, "cpu")


def step_together(model, cache, rows, sequences):
    """One step over the first `rows` slots; `sequences`, by slot, are stepped alone as well and compared."""
    input_ids = torch.zeros(rows, 1, dtype=torch.int64)
    for slot, sequence in sequences.items():
        input_ids[slot] = sequence.next_id()
    limit = max(sequence.length for sequence in sequences.values()) + 1
    logits = model.decode(input_ids, cache, limit, cache.mask(rows, limit))
    for slot, sequence in sequences.items():
        sequence.step()
        assert (logits[slot] - sequence.logits[0]).abs().max() <= BOUND


@torch.inference_mode()
def test_sequences_of_any_length_join_and_leave_without_changing_the_others(model):
    cache, sequences = empty_cache(model, 4), {}
    arrivals = {0: (0, 7), 3: (2, 1), 5: (1, 19), 11: (0, 3)}  # at a step: slot, length of the prompt
    for number in range(20):
        if number in arrivals:
            slot, prompt_length = arrivals[number]
            sequences[slot] = sequence = Alone(model, prompt_length, seed=number)
            logits = model.prefill(sequence.features, sequence.input_ids, cache, slot)
            assert (logits - sequence.logits).abs().max() <= BOUND
        step_together(model, cache, max(sequences) + 1 + number % 2, sequences)
        if number == 8:
            cache.release(0)
            del sequences[0]


@torch.inference_mode()
def test_a_step_leaves_a_slot_that_is_being_prefilled_as_it_is(model):
    cache, running, newcomer = empty_cache(model, 2), Alone(model, 5, seed=0), Alone(model, 9, seed=1)
    model.prefill(running.features, running.input_ids, cache, slot=1)
    write = cache.prefill_writer(slot=0)
    for layer in range(model.config.text.num_hidden_layers):
        write(
            layer, *(cached[layer, :, :, : newcomer.length] for cached in (newcomer.cache.keys, newcomer.cache.values))
        )
        step_together(model, cache, 2, {1: running})
    cache.start(slot=0, rows=1, length=newcomer.length)
    for _ in range(3):
        step_together(model, cache, 2, {0: newcomer, 1: running})


@torch.inference_mode()
def test_a_full_slot_keeps_what_it_holds_and_its_neighbor_goes_on(model):
    cache, full, other = empty_cache(model, 2), Alone(model, CAPACITY - 16, seed=0), Alone(model, 3, seed=1)
    for slot, sequence in enumerate((full, other)):
        model.prefill(sequence.features, sequence.input_ids, cache, slot)
    held = cache.keys[:, 0, :, :CAPACITY].clone()
    for _ in range(3):
        step_together(model, cache, 2, {1: other})
    assert torch.equal(cache.keys[:, 0, :, :CAPACITY], held)
    assert cache.lengths.tolist() == [CAPACITY, other.length]


@torch.inference_mode()
def test_rows_of_one_length_are_prefilled_and_decoded_together_without_a_mask(model):
    rows = [Alone(model, 6, seed) for seed in range(3)]
    cache = empty_cache(model, 3)
    features, input_ids = (torch.cat([getattr(row, name) for row in rows]) for name in ("features", "input_ids"))
    logits = model.prefill(features, input_ids, cache)
    for _ in range(4):
        assert (logits - torch.cat([row.logits for row in rows])).abs().max() <= BOUND
        next_ids = logits.argmax(-1, keepdim=True)
        for row in rows:
            row.step()
        logits = model.decode(next_ids, cache, rows[0].length)


@torch.inference_mode()
def test_a_prefill_whose_slot_is_in_a_tensor_writes_the_same(model):
    row, (cache, other) = Alone(model, 6, 0), (empty_cache(model, 3) for _ in range(2))
    expected = model.prefill(row.features, row.input_ids, cache, slot=2)
    logits = model.prefill_at(row.features, row.input_ids, other, torch.tensor([2]))
    assert (logits - expected).abs().max() <= BOUND
    assert (other.keys - cache.keys).abs().max() <= BOUND
    assert (other.values - cache.values).abs().max() <= BOUND
    assert cache.values[:, 2].any()


@torch.inference_mode()
def test_a_step_takes_lengths_and_writes_without_reading_values(model):
    """On `meta` there are none, so that whatever waited for the device would fail."""
    meta_model = PaliGemma(model.config).to("meta")
    cache = KVCache(model.config.text, 3, CAPACITY, torch.float32, "meta")
    patches = model.config.vision.num_patches
    features = torch.empty(1, patches, model.config.text.hidden_size, device="meta")
    input_ids = torch.zeros(1, patches + 4, dtype=torch.int64, device="meta")
    meta_model.prefill(features, input_ids, cache, slot=1)
    meta_model.prefill_at(features, input_ids, cache, torch.zeros(1, dtype=torch.int64, device="meta"))
    logits = meta_model.decode(torch.zeros(3, 1, dtype=torch.int64, device="meta"), cache, 30, cache.mask(3, 30))
    cache.release(1)
    assert logits.shape == (3, model.config.text.vocab_size)


def test_slots_take_memory_only_as_they_are_used(model):
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache(model.config.text, 256, 4096, torch.float32, "cpu")
    assert process.memory_info().rss - before < cache.keys.nbytes / 100
    assert not cache.keys[0, 0].any()
    cache.keys[:, :64] = 1.0
    assert cache.keys.nbytes / 8 < process.memory_info().rss - before < cache.keys.nbytes / 2
