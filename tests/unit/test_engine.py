"""Sequences that come and go at any time are decoded together, and each says what it would say alone."""

from __future__ import annotations

import gc
import os
import queue
import threading
import time
import weakref

import pytest
import torch
from conftest import EXAMPLES, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import make_reference, save_reference
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import paligemma
from paligemma import PaliGemmaError, engine, hardware
from paligemma import VisionLanguageModel as VLM
from paligemma.engine import PREFILL_SHARE
from paligemma.sampling import Sampler
from paligemma.sequence import MAX_AHEAD, ChosenToken, TokenSequence

IMAGES = [EXAMPLES / name for name in ("cats.png", "sign.png", "music.png")]
PROMPTS = ["caption en", "detect cat ; dog", "answer en how many cats are there on the left?"]


@pytest.fixture
def vlm(long_winded: paligemma.VisionLanguageModel) -> paligemma.VisionLanguageModel:
    """A model whose answers do not end by themselves, with an engine of its own."""
    return paligemma.VisionLanguageModel(long_winded.model, long_winded.processor)


@pytest.fixture
def log(vlm, monkeypatch):
    """What the model is run for, in order: "layer" of a prefill, or the number of rows of a step."""
    log = []
    prefill, decode, encode = vlm.model.prefill, vlm.model.decode, vlm.model.image_features

    def logged(run):
        def run_logged(*arguments):
            *others, after_layer = arguments

            def logged_after_layer():
                log.append("layer")
                after_layer()

            return run(*others, logged_after_layer)

        return run_logged

    monkeypatch.setattr(vlm.model, "prefill", logged(prefill))
    monkeypatch.setattr(vlm.model, "image_features", logged(encode))
    monkeypatch.setattr(vlm.model, "decode", lambda ids, *others: log.append(len(ids)) or decode(ids, *others))
    return log


request = st.fixed_dictionaries(
    {
        "image": st.sampled_from(IMAGES),
        "prompt": st.sampled_from(PROMPTS),
        "max_new_tokens": st.integers(1, 24),
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([1.0, 0.5]),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(request, st.integers(0, 12), st.integers(1, 30)), min_size=1, max_size=8))
def test_a_sequence_says_the_same_whoever_else_is_served(long_winded, requests):
    vlm = paligemma.VisionLanguageModel(long_winded.model, long_winded.processor)
    vlm.engine.rows = 4  # so that some have to wait
    answers = [vlm.stream(**request) for request, _, _ in requests]
    tokens = [[] for _ in requests]
    for tick in range(50):
        for (_, arrival, stop), answer, received in zip(requests, answers, tokens):
            if arrival <= tick < arrival + stop and (token := next(answer, None)) is not None:
                received.append((token.id, token.text))
            elif tick == arrival + stop:
                answer.close()
    for (request, _, stop), received in zip(requests, tokens):
        alone = [(token.id, token.text) for token in long_winded.stream(**request)]
        assert received == alone[:stop]


def test_a_batch_is_answered_in_the_same_steps(vlm, log):
    texts = vlm.generate_batch(IMAGES * 2, PROMPTS * 2, max_new_tokens=30)
    assert max(entry for entry in log if entry != "layer") == 6
    assert texts == [vlm.generate(image, prompt, max_new_tokens=30) for image, prompt in zip(IMAGES * 2, PROMPTS * 2)]
    with pytest.raises(PaliGemmaError, match="2 images for 1 prompts"):
        vlm.generate_batch(IMAGES[:2], PROMPTS[:1])


def test_prompts_about_one_image_share_its_features(vlm, monkeypatch):
    encoded = []
    encode = vlm.model.image_features
    monkeypatch.setattr(vlm.model, "image_features", lambda *arguments: encoded.append(1) or encode(*arguments))
    vlm.generate_batch([IMAGES[0]] * 3, PROMPTS, max_new_tokens=2)
    assert len(encoded) == 1


def test_a_stopped_answer_is_computed_no_further_and_its_slot_is_used_again(vlm, log):
    vlm.engine.rows = 1
    first, second = vlm.stream(IMAGES[0], "caption en", max_new_tokens=500), vlm.stream(IMAGES[1], "caption en")
    next(first)
    waiting = threading.Thread(target=lambda: next(second))
    waiting.start()
    steps = log.count(1)
    first.close()
    waiting.join(timeout=20)
    assert not waiting.is_alive()
    assert log.count(1) - steps <= MAX_AHEAD + 1
    second.close()
    wait_until(lambda: not vlm.engine._running)
    assert next(first, None) is None


@pytest.mark.parametrize("ask", [VLM.stream, lambda vlm, image, prompt: vlm.stream_batch([image] * 2, [prompt] * 2)])
def test_an_answer_can_be_closed_while_another_thread_waits_for_its_next_token(vlm, log, monkeypatch, ask):
    decode, go_on = vlm.model.decode, threading.Event()
    monkeypatch.setattr(vlm.model, "decode", lambda *arguments: go_on.wait(60) and decode(*arguments))
    answer = ask(vlm, IMAGES[0], "caption en")
    reading = threading.Thread(target=list, args=(answer,), daemon=True)
    reading.start()
    wait_until(lambda: vlm.engine._running)
    time.sleep(0.2)  # the first step is under way
    answer.close()
    reading.join(timeout=20)
    assert not reading.is_alive()
    go_on.set()
    wait_until(lambda: not vlm.engine._running)
    assert len([entry for entry in log if entry != "layer"]) <= 1


def test_an_answer_that_nobody_waits_for_is_read_no_further_than_its_layer(vlm, log):
    answer = vlm.stream(IMAGES[0], "caption en")
    layer = vlm.model.vision_tower.encoder["layers"][1]
    handle = layer.register_forward_hook(lambda *_: answer.close())
    assert list(answer) == []
    vlm.engine.call(handle.remove)
    assert log == ["layer"] * 2


def test_of_an_answer_that_is_closed_while_it_waits_for_its_reader_only_what_was_read_remains(vlm):
    answer = vlm.stream(IMAGES[0], "caption en", max_new_tokens=60)
    tokens = [next(answer) for _ in range(2)]
    wait_until(lambda: answer._sequence.is_ahead)
    before = answer.token_ids
    answer.close()
    try:
        wait_until(lambda: not vlm.engine._running)
    finally:
        vlm.engine.wake()  # else its thread would keep a failed run from its end
    assert before == answer.token_ids == [token.id for token in tokens]


def test_an_answer_that_nobody_reads_waits_while_the_others_go_on(vlm, log):
    unread, read = (vlm.stream(image, "caption en", max_new_tokens=60) for image in IMAGES[:2])
    alone = [token.id for token in vlm.stream(IMAGES[0], "caption en", max_new_tokens=60)]
    first = next(unread).id
    assert len(list(read)) == 60
    before = len(log)
    wait_until(lambda: vlm.engine._running and all(one.is_ahead for one in vlm.engine._running))
    assert vlm.engine._running[0].written == MAX_AHEAD + 1
    assert [first, *(token.id for token in unread)] == alone
    assert len(log) > before


def test_an_answer_that_nobody_reads_keeps_its_slot_from_nobody(vlm):
    vlm.engine.rows = 1
    unread = vlm.stream(IMAGES[0], "caption en", max_new_tokens=20)
    next(unread)
    wait_until(lambda: unread._sequence.is_ahead)
    other = threading.Thread(
        target=vlm.generate, args=(IMAGES[1], "caption en"), kwargs={"max_new_tokens": 2}, daemon=True
    )
    other.start()
    other.join(timeout=20)
    is_waiting = other.is_alive()
    assert len(list(unread)) == 19
    assert not is_waiting


def test_those_who_stream_get_their_tokens_while_a_newcomer_is_prefilled(vlm, log, monkeypatch):
    # A clock that a step moves by ten, and a layer of a prefill by three.
    monkeypatch.setattr(engine.time, "perf_counter", lambda: sum(3 if entry == "layer" else 10 for entry in log))
    running = vlm.stream(IMAGES[0], "caption en", max_new_tokens=200)
    next(running)
    reading = threading.Thread(target=list, args=(running,), daemon=True)
    reading.start()
    wait_until(lambda: log.count(1) > 3)
    before = len(log)
    next(vlm.stream(IMAGES[1], "caption en"))
    during = log[before:]
    layers = vlm.config.vision.num_hidden_layers + vlm.config.text.num_hidden_layers - 1
    assert during.count("layer") == layers
    runs = "".join("." if entry == "layer" else "|" for entry in during).strip("|").split("|")
    assert max(map(len, runs)) == int(10 * PREFILL_SHARE / 3)
    running.close()


def test_what_does_not_fit_waits_in_order_and_a_long_one_gets_a_longer_cache(vlm, monkeypatch):
    monkeypatch.setattr(hardware, "MAX_CACHE_BYTES", 0)  # one slot
    longest = vlm.config.text.max_position_embeddings - vlm.config.vision.num_patches - 20
    order = []

    def ask(number, max_new_tokens):
        for _ in vlm.stream(IMAGES[0], "caption en", max_new_tokens=max_new_tokens):
            if number not in order:
                order.append(number)

    threads = [threading.Thread(target=ask, args=arguments) for arguments in enumerate([30, longest, 3])]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: order and len(vlm.engine._waiting) == number or len(order) > number)
    for thread in threads:
        thread.join(timeout=60)
    assert order == [0, 1, 2]


def test_a_failed_sequence_gets_its_sentence_and_the_others_go_on(vlm, monkeypatch):
    alone = vlm.generate(IMAGES[0], "caption en", max_new_tokens=20)
    decode, prefill = vlm.model.decode, vlm.model.prefill

    def run_out(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(vlm.model, "decode", lambda ids, *others: (run_out if len(ids) > 1 else decode)(ids, *others))
    events = [vlm.stream(image, "caption en", max_new_tokens=20) for image in IMAGES[:2]]
    first = next(events[0])
    with pytest.raises(PaliGemmaError, match="memory of cpu is too small"):
        list(events[1])
    assert first.text + "".join(token.text for token in events[0]) == alone

    monkeypatch.setattr(vlm.model, "prefill", run_out)
    with pytest.raises(PaliGemmaError, match="memory of cpu is too small"):
        vlm.generate(IMAGES[2], "caption en")
    monkeypatch.setattr(vlm.model, "prefill", prefill)
    assert vlm.generate(IMAGES[0], "caption en", max_new_tokens=20) == alone


def test_the_thread_ends_with_the_model(long_winded):
    vlm = paligemma.VisionLanguageModel(long_winded.model, long_winded.processor)
    vlm.generate(IMAGES[0], "caption en", max_new_tokens=2)
    (thread,) = vlm.engine._thread._threads
    gone = weakref.ref(vlm.engine)
    del vlm
    gc.collect()
    thread.join(timeout=20)
    assert gone() is None
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_a_fork_of_the_process_answers_as_well(vlm):
    expected = vlm.generate(IMAGES[0], "caption en", max_new_tokens=4)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        os._exit(vlm.generate(IMAGES[0], "caption en", max_new_tokens=4) != expected)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_compiled_graphs_answer_the_same_and_are_never_compiled_again(tmp_path, monkeypatch, family):
    torch._dynamo.reset()
    eager = paligemma.load(
        save_reference(make_reference(family=family, kv_heads=2, std=0.2, layers=2), tmp_path / family)
    )
    graphs, products, compile_graph = [], {}, torch.compile

    def compile_here(function, mode, **others):
        def backend(graph, inputs):
            graphs.append(function.__name__)
            products[function.__name__] = sum(node.target is torch._C._nn.linear for node in graph.graph.nodes)
            return aot_eager(graph, inputs)

        return compile_graph(function, backend=backend, **others)

    monkeypatch.setattr(torch, "compile", compile_here)
    prompts = [*PROMPTS, "ocr"]
    expected = eager.generate_batch([*IMAGES, IMAGES[0]], prompts, max_new_tokens=20)
    vlm = paligemma.VisionLanguageModel(eager.model, eager.processor)
    vlm.engine.compile()
    for _ in range(2):
        assert vlm.generate_batch([*IMAGES, IMAGES[0]], prompts, max_new_tokens=20) == expected
    # Prompts of four lengths in four slots; one, two and four rows.
    assert graphs.count("image_features") == graphs.count("prefill_at") == 1
    assert graphs.count("decode") <= 3
    before = len(graphs)
    long = "answer en " + "cat " * 600  # its positions are in the next bucket
    assert vlm.generate(IMAGES[0], long, max_new_tokens=5) == eager.generate(IMAGES[0], long, max_new_tokens=5)
    assert graphs[before:] == ["decode"]
    text, vision = vlm.config.text.num_hidden_layers, vlm.config.vision.num_hidden_layers
    # Of each layer one for queries, keys and values, the attention's output, one for gate and up, the MLP's output; in the
    # last layer of a prefill queries are of the last position only.
    assert products == {"image_features": 4 * vision + 1, "prefill_at": 4 * text + 3, "decode": 4 * text + 1}


def test_who_needs_a_cache_that_the_memory_does_not_hold_is_told_and_others_are_answered(vlm, monkeypatch):
    make, failures = vlm.engine._make_cache, [RuntimeError("DefaultCPUAllocator: can't allocate memory")]

    def fail_once(capacity):
        if failures:
            raise failures.pop()
        return make(capacity)

    monkeypatch.setattr(vlm.engine, "_make_cache", fail_once)
    with pytest.raises(PaliGemmaError, match="The memory of cpu is too small"):
        vlm.generate_batch(IMAGES[:2], PROMPTS[:2], max_new_tokens=3)
    assert vlm.generate(IMAGES[0], PROMPTS[0], max_new_tokens=3)


def test_freed_memory_is_given_back_once_nothing_has_been_asked_for_a_while(vlm, monkeypatch):
    given_back = threading.Event()
    monkeypatch.setattr(hardware, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(hardware, "give_back_freed_memory", given_back.set)
    for _ in range(3):
        vlm.generate(IMAGES[0], PROMPTS[0], max_new_tokens=2)
        assert not given_back.wait(0.3)
    assert given_back.wait(10)


def test_who_asks_the_same_again_waits_for_no_prefill_and_reads_the_same(vlm, monkeypatch):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    first = vlm.stream(IMAGES[0], "caption en", **settings)
    expected, seen = list(first), first.inspect(0).cache
    prefills, prefill = [], vlm.model.prefill
    monkeypatch.setattr(vlm.model, "prefill", lambda *given: prefills.append(given) or prefill(*given))
    hits = vlm.engine.prefill.hits
    again = vlm.stream(IMAGES[0], "caption en", **settings)
    assert list(again) == expected
    assert vlm.engine.prefill.hits == hits + 1
    assert not prefills
    assert again.inspect(0).cache.prefill_seconds == pytest.approx(seen.prefill_seconds, abs=0.01), (
        "what reading it took, not copying it"
    )
    assert vlm.generate(IMAGES[0], "caption en", **settings | {"seed": 4}) != "".join(token.text for token in expected)
    vlm.generate(IMAGES[0], "caption de", max_new_tokens=1)
    vlm.generate(IMAGES[1], "caption en", max_new_tokens=1)
    assert len(prefills) == 2


def test_an_answer_that_was_read_again_tells_nothing_of_its_first_token(vlm, monkeypatch):
    answer = vlm.stream(IMAGES[0], "caption en", max_new_tokens=3)
    expected = list(answer)
    wait_until(lambda: vlm.engine.prefill.kept._kept)
    vlm.engine.prefill.kept._kept.clear()
    answer.inspect(1)  # keeps keys and values that come without the logits of the prefix
    (kept,) = vlm.engine.prefill.kept._kept
    assert kept.first_logits is None
    assert list(vlm.stream(IMAGES[0], "caption en", max_new_tokens=3)) == expected


def test_tokens_are_handed_over_several_together_but_the_first_and_the_end_at_once():
    def there():
        return [
            None if event is None else event.id for _, event in iter(lambda: events.get() if events.qsize() else 0, 0)
        ]

    events = queue.SimpleQueue()
    sequence = TokenSequence([], [1], 99, Sampler(), torch.Generator(), events)
    for number in range(3):
        sequence.put(ChosenToken(number, 1.0, 0.0), pause=60)
    assert there() == [0]
    for number in range(3, 2 + MAX_AHEAD // 2):
        sequence.put(ChosenToken(number, 1.0, 0.0), pause=60)
    assert there() == [*range(1, 1 + MAX_AHEAD // 2)], "so many are enough"
    sequence.put(None)
    assert there() == [1 + MAX_AHEAD // 2, None]
    slow = TokenSequence([], [1], 99, Sampler(), torch.Generator(), events)
    for number in range(3):
        slow.put(ChosenToken(number, 1.0, 0.0), pause=0.001)
        time.sleep(0.002)
    assert there() == [0, 1, 2]


def test_the_steps_of_a_small_checkpoint_are_made_by_one_thread(vlm, monkeypatch):
    monkeypatch.setattr(hardware, "THREADS", 2)
    monkeypatch.setattr(hardware, "available_cores", lambda: 2)
    own, seen = VLM(vlm.model, vlm.processor), {}
    for name in ("prefill", "decode"):
        method = getattr(vlm.model, name)
        monkeypatch.setattr(
            vlm.model,
            name,
            lambda *given, name=name, method=method: seen.update({name: torch.get_num_threads()}) or method(*given),
        )
    own.generate(IMAGES[0], "caption en", max_new_tokens=3)
    assert seen == {"prefill": 2, "decode": 1}


def test_tokens_before_an_error_are_read_before_it(vlm, monkeypatch):
    decode, left = vlm.model.decode, [1] * 3

    def run_out(*arguments):
        if not left:
            raise torch.OutOfMemoryError("out of memory")
        left.pop()
        return decode(*arguments)

    expected = [token.id for token in vlm.stream(IMAGES[0], "caption en", max_new_tokens=4)]
    monkeypatch.setattr(vlm.model, "decode", run_out)
    batch, ids = vlm.stream_batch(IMAGES[:1], ["caption en"]), []
    ids += [token.id for _, token in batch.take()]
    wait_until(lambda: batch._queue.qsize() > 1)  # the others and the error
    ids += [token.id for _, token in batch.take()]
    assert ids == expected
    with pytest.raises(PaliGemmaError, match="memory of cpu is too small"):
        batch.take()


FROM_NUMPY = torch.ops.aten.lift_fresh.default  # shares the memory


class LargeOperations(TorchDispatchMode):
    """Records what the calling thread computes that is large enough for torch to use several threads."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.numel() >= 2**15 and function is not FROM_NUMPY:
            self.seen.append(str(function))
        return result


def test_only_the_engine_s_thread_computes_so_that_it_alone_has_threads_of_openmp():
    with LargeOperations() as operations:
        vlm = paligemma.load(device="cpu")
        assert "<seg" in vlm.generate(EXAMPLES / "traffic.png", "segment car", max_new_tokens=64)
        assert vlm.decode_mask([1] * 16) is not None
    assert operations.seen == []
    with operations:
        torch.zeros(2**15) + 1
    assert operations.seen == ["aten.zeros.default", "aten.add.Tensor"]
