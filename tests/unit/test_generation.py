"""Answers stream as tokens whose texts join to the whole, and bad settings are refused at the call."""

from __future__ import annotations

import shutil
import time

import pytest
import torch
from conftest import EXAMPLES, wait_until
from PIL import Image, ImageOps
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma import PaliGemmaError, prefill

IMAGE = EXAMPLES / "cats.png"


def test_joined_tokens_are_the_answer(tiny):
    tokens = list(tiny.stream(IMAGE, "caption en"))
    assert "".join(token.text for token in tokens) == tiny.generate(IMAGE, "caption en")
    assert all(0 < token.probability <= 1 for token in tokens)
    assert not set(tiny.config.eos_token_ids) & {token.id for token in tokens}


def test_probability_is_the_models_own_whatever_the_sampler(tiny):
    greedy = next(tiny.stream(IMAGE, "caption en"))
    cold = next(tiny.stream(IMAGE, "caption en", temperature=0.01, top_k=1, seed=0))
    assert cold.id == greedy.id
    assert cold.probability == pytest.approx(greedy.probability)


def test_the_same_seed_gives_the_same_text(long_winded):
    def sample(seed):
        return long_winded.generate(IMAGE, "caption en", max_new_tokens=8, temperature=1.5, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1
    assert sample(None) != sample(None)


def test_max_new_tokens_bounds_the_answer(long_winded):
    assert len(list(long_winded.stream(IMAGE, "caption en", max_new_tokens=5))) == 5


@pytest.mark.parametrize(
    "max_new_tokens", [0, -1, 1.5, 100_000, None, "5", float("nan"), 10**400, pytest.param(10**5000, id="5001 digits")]
)
def test_max_new_tokens_out_of_range_is_refused(tiny, max_new_tokens):
    context, prompt = tiny.config.text.max_position_embeddings, len(tiny.processor.input_ids("caption en"))
    with pytest.raises(
        PaliGemmaError, match=f"^max_new_tokens is .*please give a whole number from 1 to {context - prompt}\\.$"
    ):
        tiny.stream(IMAGE, "caption en", max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"seed": -1},
        {"seed": 2**70},
        {"seed": 10**5000},
        {"seed": float("inf")},
        {"seed": "x"},
    ],
)
def test_settings_out_of_range_are_refused(tiny, setting):
    with pytest.raises(PaliGemmaError, match=f"^{next(iter(setting))} is .{{1,50}}; please give"):
        tiny.stream(IMAGE, "caption en", **setting)


def test_errors_come_at_the_call_and_not_at_the_first_token(tiny, tmp_path):
    with pytest.raises(PaliGemmaError, match="no file"):
        tiny.stream(tmp_path / "nowhere.png", "caption en")
    with pytest.raises(PaliGemmaError, match="prompt is empty"):
        tiny.stream(IMAGE, "")


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "^There is no picture; please give one or more.$"),
        ([IMAGE, 5], "^The picture is of type int; please give a Pillow picture or a path.$"),
        ([IMAGE] * 1000, "^There are 1000 pictures, but {} fit; please give fewer.$"),
    ],
    ids=["none", "a number", "a thousand"],
)
def test_images_that_cannot_be_taken_are_refused(tiny, images, sentence):
    fitting = (tiny.config.text.max_position_embeddings - 4) // tiny.config.vision.num_patches
    with pytest.raises(PaliGemmaError, match=sentence.format(fitting)):
        tiny.stream(images, "caption en")
    assert len(tiny.processor.input_ids("a", fitting)) < tiny.config.text.max_position_embeddings


def test_each_prompt_of_a_batch_has_an_image_or_several(long_winded):
    images = [[IMAGE, EXAMPLES / "music.png"], IMAGE, [EXAMPLES / "music.png", IMAGE]]
    alone = [long_winded.generate(image, "caption en", max_new_tokens=8) for image in images]
    assert long_winded.generate_batch(images, ["caption en"] * 3, max_new_tokens=8) == alone
    assert len(set(alone)) == 3


def test_what_is_no_image_is_refused(tiny, tmp_path):
    with pytest.raises(PaliGemmaError, match="please give a Pillow picture or a path"):
        tiny.stream(None, "caption en")
    cut = tmp_path / "cut.png"
    cut.write_bytes(IMAGE.read_bytes()[:2000])
    with pytest.raises(PaliGemmaError, match="please save it anew"):
        tiny.stream(Image.open(cut), "caption en")


def test_too_little_memory_is_explained(tiny, nothing_kept, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny.model, "prefill", run_out)
    with pytest.raises(PaliGemmaError, match="memory of cpu is too small; please choose"):
        tiny.generate(IMAGE, "caption en")


def test_a_pillow_image_answers_like_its_file(tiny):
    assert tiny.generate(Image.open(IMAGE), "caption en") == tiny.generate(str(IMAGE), "caption en")


def test_streaming_leaves_the_callers_gradients_alone(tiny):
    for _ in tiny.stream(IMAGE, "caption en", max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 0}], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_are_explained(tiny, nothing_kept, monkeypatch, value, settings):
    """As of a checkpoint whose activations overflow in float16."""

    def overflow(*_):
        logits = torch.zeros(1, tiny.config.text.vocab_size)
        logits[0, tiny.config.eos_token_ids[0]] = value
        return logits

    monkeypatch.setattr(tiny.model, "prefill", overflow)
    with pytest.raises(PaliGemmaError, match=r"^The logits are not finite in float32; please choose .*bfloat16"):
        tiny.generate(IMAGE, "caption en", **settings)


def test_a_float16_checkpoint_that_overflows_is_explained(tmp_path):
    reference = make_reference(std=0.2)
    with torch.no_grad():
        reference.model.multi_modal_projector.linear.weight *= 1e5
    vlm = paligemma.load(save_reference(reference, tmp_path / "large"), dtype="float16")
    with pytest.raises(PaliGemmaError, match=r"^The logits are not finite in float16; please choose .*bfloat16"):
        vlm.generate(IMAGE, "caption en")


@pytest.mark.parametrize("prompt_words", [1, 30])
def test_a_step_attends_without_a_mask_and_without_copies_of_the_cache(long_winded, prompt_words, monkeypatch):
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(queries, keys, values, attn_mask=None, **rest):
        calls.append((queries.shape, keys.shape, attn_mask, keys.data_ptr()))
        return attention(queries, keys, values, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    list(long_winded.stream(IMAGE, "caption en" + " cat" * prompt_words, max_new_tokens=4))
    layers = long_winded.config.text.num_hidden_layers
    decoder = calls[-4 * layers :]
    assert all(mask is None for _, _, mask, _ in calls)
    assert all(keys[1] == 1 for _, keys, _, _ in decoder), "the shared head is not repeated"
    for layer in range(layers):
        pointers = {pointer for _, _, _, pointer in decoder[layer::layers]}
        assert len(pointers) == 1, "the cache stays where it is"


# --- the cache of image features


@pytest.fixture
def encoder_runs(tiny, nothing_kept, monkeypatch):
    """A list that grows with every run of the vision encoder."""
    runs, image_features = [], tiny.model.image_features

    def record(pixel_values, after_layer):
        runs.append(pixel_values)
        return image_features(pixel_values, after_layer)

    monkeypatch.setattr(tiny.model, "image_features", record)
    tiny.engine.prefill._features.clear()
    return runs


def test_a_second_prompt_about_an_image_runs_no_encoder(tiny, encoder_runs, tmp_path):
    first = tiny.generate(IMAGE, "caption en")
    tiny.generate(IMAGE, "detect cat")
    shutil.copy(IMAGE, tmp_path / "the same.png")
    assert tiny.generate(tmp_path / "the same.png", "caption en") == first
    assert len(encoder_runs) == 1
    tiny.generate(ImageOps.mirror(Image.open(IMAGE).convert("RGB")), "caption en")
    assert len(encoder_runs) == 2


def test_of_several_images_only_the_unseen_are_encoded(tiny, encoder_runs):
    other = EXAMPLES / "music.png"
    tiny.generate([IMAGE, other, IMAGE], "caption en", max_new_tokens=1)
    tiny.generate([other], "caption en", max_new_tokens=1)
    assert len(encoder_runs) == 2


def test_an_encoder_whose_weights_changed_runs_again(encoder_runs, tiny):
    bias = tiny.model.vision_tower.post_layernorm.bias
    tiny.generate(IMAGE, "caption en")
    bias += 1
    tiny.generate(IMAGE, "caption en")
    bias -= 1
    assert len(encoder_runs) == 2


def test_the_features_of_the_latest_images_are_kept_within_their_bytes(tiny, encoder_runs, monkeypatch):
    features = tiny.config.vision.num_patches * tiny.config.text.hidden_size * 4
    image = Image.open(IMAGE).convert("RGB")
    images = {1: image, 2: ImageOps.mirror(image), 3: ImageOps.flip(image)}
    for images_kept, asked, runs in ((2, (1, 2, 1, 3, 1, 2), 4), (0.5, (1, 1), 2)):  # 3 pushes out 2, asked before 1
        tiny.engine.prefill._features.clear()
        encoder_runs.clear()
        monkeypatch.setattr(prefill, "MAX_FEATURE_BYTES", images_kept * features)
        for number in asked:
            tiny.generate(images[number], "caption en", max_new_tokens=1)
        assert len(encoder_runs) == runs


def test_all_tokens_that_are_there_are_taken_at_once(tiny):
    prompts = ["segment car", "caption en"]
    expected = [tiny.stream(EXAMPLES / "traffic.png", prompt) for prompt in prompts]
    texts, batch = ["", ""], tiny.stream_batch([EXAMPLES / "traffic.png"] * 2, prompts)
    sizes, ends = [], []
    while taken := batch.take():
        sizes.append(len(taken))
        for number, token in taken:
            texts[number] += token.text if token else ""
            ends += [number] * (token is None)
        time.sleep(0.05)  # in which the engine makes more than one
    assert texts == ["".join(token.text for token in answer) for answer in expected]
    assert sorted(ends) == [0, 1]
    assert max(sizes) > 2
    closed = tiny.stream_batch([IMAGE] * 3, ["caption en"] * 3)
    assert closed.take()
    closed.close()
    wait_until(lambda: not closed.take())


def test_compiling_is_refused_off_cuda():
    with pytest.raises(PaliGemmaError, match="Compiling is for CUDA; please leave it out"):
        paligemma.load(device="cpu", compile=True)
