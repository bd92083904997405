"""Answers stream as tokens whose texts join to the whole, and bad settings are refused at the call."""

from __future__ import annotations

import pytest
import torch
from conftest import EXAMPLES
from PIL import Image

from paligemma import PaliGemmaError

PICTURE = EXAMPLES / "cats.png"


def test_joined_tokens_are_the_answer(tiny):
    tokens = list(tiny.stream(PICTURE, "caption en"))
    assert "".join(token.text for token in tokens) == tiny.generate(PICTURE, "caption en")
    assert all(0 < token.probability <= 1 for token in tokens)
    assert not set(tiny.config.eos_token_ids) & {token.id for token in tokens}


def test_probability_is_the_models_own_whatever_the_sampler(tiny):
    greedy = next(tiny.stream(PICTURE, "caption en"))
    cold = next(tiny.stream(PICTURE, "caption en", temperature=0.01, top_k=1, seed=0))
    assert cold.id == greedy.id
    assert cold.probability == pytest.approx(greedy.probability)


def test_the_same_seed_gives_the_same_text(long_winded):
    def sample(seed):
        return long_winded.generate(PICTURE, "caption en", max_new_tokens=8, temperature=1.5, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1
    assert sample(None) != sample(None)


def test_max_new_tokens_bounds_the_answer(long_winded):
    assert len(list(long_winded.stream(PICTURE, "caption en", max_new_tokens=5))) == 5


@pytest.mark.parametrize("max_new_tokens", [0, -1, 1.5, 100_000, None, "5", float("nan")])
def test_max_new_tokens_out_of_range_is_refused(tiny, max_new_tokens):
    with pytest.raises(PaliGemmaError, match="^max_new_tokens is .*please give a whole number from 1 to 9"):
        tiny.stream(PICTURE, "caption en", max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(
    "setting", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"seed": -1}, {"seed": 2**70}, {"seed": "x"}]
)
def test_settings_out_of_range_are_refused(tiny, setting):
    with pytest.raises(PaliGemmaError, match=next(iter(setting))):
        tiny.stream(PICTURE, "caption en", **setting)


def test_errors_come_at_the_call_and_not_at_the_first_token(tiny, tmp_path):
    with pytest.raises(PaliGemmaError, match="no file"):
        tiny.stream(tmp_path / "nowhere.png", "caption en")
    with pytest.raises(PaliGemmaError, match="prompt is empty"):
        tiny.stream(PICTURE, "")


def test_what_is_no_picture_is_refused(tiny, tmp_path):
    with pytest.raises(PaliGemmaError, match="please give a Pillow picture or a path"):
        tiny.stream(None, "caption en")
    cut = tmp_path / "cut.png"
    cut.write_bytes(PICTURE.read_bytes()[:2000])
    with pytest.raises(PaliGemmaError, match="please save it anew"):
        tiny.stream(Image.open(cut), "caption en")


def test_too_little_memory_is_explained(tiny, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny.model, "prefill", run_out)
    with pytest.raises(PaliGemmaError, match="memory of cpu is too small; please choose"):
        tiny.generate(PICTURE, "caption en")


def test_a_pillow_picture_answers_like_its_file(tiny):
    assert tiny.generate(Image.open(PICTURE), "caption en") == tiny.generate(str(PICTURE), "caption en")


def test_streaming_leaves_the_callers_gradients_alone(tiny):
    for _ in tiny.stream(PICTURE, "caption en", max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("prompt_words", [1, 30])
def test_a_step_attends_without_a_mask_and_without_copies_of_the_cache(long_winded, prompt_words, monkeypatch):
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(queries, keys, values, attn_mask=None, **rest):
        calls.append((queries.shape, keys.shape, attn_mask, keys.data_ptr()))
        return attention(queries, keys, values, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    list(long_winded.stream(PICTURE, "caption en" + " cat" * prompt_words, max_new_tokens=4))
    layers = long_winded.config.text.num_hidden_layers
    decoder = calls[long_winded.config.vision.num_hidden_layers :]
    assert len(decoder) == 4 * layers
    assert all(mask is None for _, _, mask, _ in calls)
    assert all(keys[1] == 1 for _, keys, _, _ in decoder), "the shared head is not repeated"
    for layer in range(layers):
        pointers = {pointer for _, _, _, pointer in decoder[layer::layers]}
        assert len(pointers) == 1, "the cache stays where it is"
