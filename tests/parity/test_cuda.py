"""What runs on a CUDA GPU equals transformers there, and the engine keeps its promises: `pytest -m cuda`.

The tests leave themselves out where there is no GPU. `PALIGEMMA_DEVICE=cpu pytest -m cuda` runs those that can on a CPU,
where graphs are captured but not compiled further.
"""

from __future__ import annotations

import os
import threading
import warnings

import pytest
import torch
from conftest import EXAMPLES, wait_until
from random_checkpoints import make_reference, save_reference
from test_parity import random_image
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import paligemma
from paligemma import PaliGemmaError
from paligemma.kv_cache import KVCache

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else os.environ.get("PALIGEMMA_DEVICE")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE is None, reason="there is no CUDA GPU")]
on_gpu_only = pytest.mark.skipif(not HAS_GPU, reason="there is no CUDA GPU")

FAMILIES = ["gemma", "gemma2"]
IMAGES = [EXAMPLES / name for name in ("cats.png", "sign.png", "music.png", "picnic.png", "traffic.png")]
PROMPTS = ["caption en", "detect cat ; dog", "ocr", "answer en how many are there on the left?", "describe en"]
FLOAT32_BOUND = 2e-4  # of logits of a spread of one
BFLOAT16_BOUND = 0.04  # of the norm of all logits, as at full size
TOKENS = 40


@pytest.fixture(scope="module", autouse=True)
def whole_float32():
    """Convolutions round to TF32 by default, each library in an order of its own."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each generation whose answers do not end by themselves."""
    sizes = {"kv_heads": 2, "std": 0.2, "layers": 2}
    return {
        family: save_reference(make_reference(family=family, **sizes), tmp_path_factory.mktemp(family) / "checkpoint")
        for family in FAMILIES
    }


@pytest.fixture(params=FAMILIES)
def vlm(folders, request):
    return paligemma.load(folders[request.param], device=DEVICE, dtype="float32")


@pytest.fixture
def compile_model(monkeypatch):
    """A function that lets a model answer by compiled graphs."""
    torch._dynamo.reset()
    counters.clear()
    if not HAS_GPU:
        compile_graph = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda function, mode, **others: compile_graph(function, backend=aot_eager, **others)
        )
    return lambda vlm: vlm.engine.compile()


def load_both(tmp_path, dtype, **sizes):
    reference = make_reference(kv_heads=2, **sizes)
    vlm = paligemma.load(save_reference(reference, tmp_path / "checkpoint"), device=DEVICE, dtype=dtype)
    return reference.to(DEVICE, vlm.dtype), vlm


def ids(answer):
    return [token.id for token in answer]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("image_size", [56, 224, 896])
@torch.inference_mode()
def test_logits_of_prefill_and_steps_equal_the_reference(tmp_path, family, dtype, image_size):
    sizes = {"image_size": image_size, "layers": 2, "std": 0.1, "sliding_window": 4096}
    reference, vlm = load_both(tmp_path, dtype, family=family, **sizes)
    input_ids = torch.tensor([vlm.processor.input_ids(PROMPTS[3])], device=DEVICE)
    pixel_values = vlm.processor.pixel_values(random_image(0)).to(DEVICE, vlm.dtype)
    prompt_length = input_ids.shape[1] - 4
    expected = reference(
        input_ids=input_ids,
        pixel_values=pixel_values,
        attention_mask=torch.ones_like(input_ids),
        token_type_ids=(torch.arange(input_ids.shape[1], device=DEVICE) >= prompt_length).long()[None],
        logits_to_keep=5,
    ).logits[0]
    cache = KVCache(vlm.config.text, 1, input_ids.shape[1], vlm.dtype, DEVICE)
    logits = [vlm.model.prefill(vlm.model.image_features(pixel_values), input_ids[:, :prompt_length], cache)]
    for end in range(prompt_length + 1, input_ids.shape[1] + 1):
        logits.append(vlm.model.decode(input_ids[:, end - 1 : end], cache, end))
    difference = torch.cat(logits) - expected.float()
    assert expected.float().std() > 0.05
    if dtype == "float32":
        assert difference.abs().max() <= FLOAT32_BOUND
    else:
        assert difference.norm() <= BFLOAT16_BOUND * expected.float().norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_greedy_ids_equal_those_of_generate(tmp_path, family):
    reference, vlm = load_both(tmp_path, "float32", family=family, std=0.2)
    for image, prompt in zip(IMAGES, PROMPTS):
        input_ids = torch.tensor([vlm.processor.input_ids(prompt)], device=DEVICE)
        expected = reference.generate(
            input_ids=input_ids,
            pixel_values=vlm._pixel_values(image).to(DEVICE),
            attention_mask=torch.ones_like(input_ids),
            token_type_ids=torch.zeros_like(input_ids),
            max_new_tokens=24,
            do_sample=False,
        )[0, input_ids.shape[1] :].tolist()
        ours = ids(vlm.stream(image, prompt, max_new_tokens=24))
        assert ours == [token_id for token_id in expected if token_id not in vlm.config.eos_token_ids]


def test_answers_that_stream_together_are_those_of_each_alone(vlm):
    alone = [ids(vlm.stream(image, prompt, max_new_tokens=TOKENS)) for image, prompt in zip(IMAGES, PROMPTS)]
    together = [[] for _ in IMAGES]
    for number, token in vlm.stream_batch(IMAGES, PROMPTS, max_new_tokens=TOKENS):
        together[number] += [token.id] if token else []
    assert together == alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image_size", [56, 896])
def test_compiled_buckets_answer_the_same_and_are_never_compiled_again(tmp_path, compile_model, family, image_size):
    _, vlm = load_both(
        tmp_path, "float32", family=family, image_size=image_size, layers=2, std=0.2, sliding_window=4096
    )
    count = 2 if image_size == 896 else len(IMAGES)
    arguments = {"images": IMAGES[:count], "prompts": PROMPTS[:count], "max_new_tokens": 12}
    expected = vlm.generate_batch(**arguments)
    compiled = paligemma.VisionLanguageModel(vlm.model, vlm.processor)
    compile_model(compiled)
    assert compiled.generate_batch(**arguments) == expected
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2 + 4, "encoder, prefill, and steps of 1, 2, 4 and 8 rows"
    assert compiled.generate_batch(**arguments) == expected
    # A prompt of another length, in another slot.
    assert compiled.generate(IMAGES[0], PROMPTS[3], max_new_tokens=5) == vlm.generate(
        IMAGES[0], PROMPTS[3], max_new_tokens=5
    )
    assert counters["stats"]["unique_graphs"] == graphs


def test_several_models_answer_at_the_same_time(folders, compile_model):
    models = [paligemma.load(folder, device=DEVICE, dtype="float32") for folder in folders.values()]
    expected = [vlm.generate_batch(IMAGES[:2], PROMPTS[:2], max_new_tokens=TOKENS) for vlm in models]
    for is_compiled in (False, True):
        if is_compiled:
            models = [paligemma.VisionLanguageModel(vlm.model, vlm.processor) for vlm in models]
            for vlm in models:
                compile_model(vlm)
        answers = [vlm.stream_batch(IMAGES[:2], PROMPTS[:2], max_new_tokens=TOKENS) for vlm in models]
        texts = [["", ""] for _ in models]
        for step in zip(*answers):
            for text, (number, token) in zip(texts, step):
                text[number] += token.text if token else ""
        assert texts == expected


def test_the_same_seed_gives_the_same_text_whoever_else_is_served(vlm):
    sampled = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_new_tokens": TOKENS}
    alone = [ids(vlm.stream(IMAGES[0], "ocr", seed=seed, **sampled)) for seed in (1, 2)]
    assert alone[0] != alone[1]
    others = vlm.stream_batch(IMAGES[1:4], PROMPTS[1:4], temperature=1.0, max_new_tokens=TOKENS)
    next(others)
    assert [ids(vlm.stream(IMAGES[0], "ocr", seed=seed, **sampled)) for seed in (1, 2)] == alone
    others.close()


def test_a_stopped_answer_frees_its_slot_while_another_goes_on(vlm):
    expected = ids(vlm.stream(IMAGES[1], "ocr", max_new_tokens=500))
    stopped, other = (vlm.stream(image, "ocr", max_new_tokens=500) for image in IMAGES[:2])
    next(stopped)
    received = [next(other).id]
    reading = threading.Thread(target=list, args=(stopped,))
    reading.start()
    stopped.close()
    reading.join(timeout=20)
    assert not reading.is_alive()
    wait_until(lambda: vlm.figures()["active_rows"] == 1)
    received += ids(other)
    assert received == expected
    wait_until(lambda: vlm.figures()["active_rows"] == 0)


@on_gpu_only
def test_running_out_of_memory_is_said_and_survived(folders):
    vlm = paligemma.load(folders["gemma2"], device=DEVICE, dtype="float32")
    expected = vlm.generate(IMAGES[0], "ocr", max_new_tokens=5)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    vlm.engine._cache = vlm.engine._no_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(PaliGemmaError, match="The memory of cuda.* is too small"):
            vlm.generate_batch(IMAGES * 3, PROMPTS * 3, max_new_tokens=500)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert vlm.generate(IMAGES[0], "ocr", max_new_tokens=5) == expected


@on_gpu_only
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}])
def test_a_step_waits_for_the_device_at_one_place_only(vlm, compile_model, is_compiled, settings):
    if is_compiled:
        compile_model(vlm)
    for _ in range(3):  # memory, graphs and their recordings
        vlm.generate_batch(IMAGES[:3], PROMPTS[:3], max_new_tokens=TOKENS, **settings)
    chosen, choose = [], vlm.engine._choose
    vlm.engine._choose = lambda sequences, logits: chosen.append(len(sequences)) or choose(sequences, logits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            vlm.generate_batch(IMAGES[2:], PROMPTS[2:], max_new_tokens=TOKENS, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == len(chosen), {f"{warning.filename}:{warning.lineno}" for warning in waits}
