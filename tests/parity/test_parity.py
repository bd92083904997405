"""The model equals the reference, transformers, on random checkpoints that transformers itself has written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoints import VOCABULARY, reference_inputs
from transformers import PaliGemmaForConditionalGeneration

import paligemma
from paligemma.gemma import rotate
from paligemma.kv_cache import KVCache

LOGITS_BOUND = 1e-4
FAMILIES = ["gemma", "gemma2"]


def random_rows(config, lengths, seed=0):
    """Pixel values and right-padded rows of placeholders and random text, with their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    patches, rows = config.vision.num_patches, len(lengths)
    pixel_values = torch.randn(rows, 3, config.vision.image_size, config.vision.image_size, generator=generator)
    input_ids = torch.randint(4, 1000, (rows, patches + max(lengths)), generator=generator)
    input_ids[:, :patches] = config.image_token_id
    attention_mask = torch.arange(patches + max(lengths)) < patches + torch.tensor(lengths)[:, None]
    input_ids[~attention_mask] = config.pad_token_id
    return pixel_values, input_ids, attention_mask


def random_image(seed, width=90, height=60):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("image_size", [28, 56, 112])
@torch.no_grad()
def test_logits_equal_the_reference(load_both, family, kv_heads, image_size):
    shape = {"kv_heads": kv_heads, "image_size": image_size, "epsilon": 1e-2}  # so large that it shows
    reference, vlm = load_both(family=family, std=0.1, **shape)
    for lengths in ([39], [39, 35, 2]):  # one row; three padded rows
        pixel_values, input_ids, attention_mask = random_rows(vlm.config, lengths)
        prefix_lengths = vlm.config.vision.num_patches + torch.tensor([length // 4 for length in lengths])
        for given in (prefix_lengths, None):
            rows = pixel_values, input_ids, given, attention_mask
            logits, expected = vlm.model(*rows), reference(**reference_inputs(*rows)).logits
            assert logits.dtype == torch.float32
            assert expected[attention_mask].std() > 0.05
            assert (logits - expected)[attention_mask].abs().max() <= LOGITS_BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image_size", [224, 448, 896])
@torch.no_grad()
def test_prefill_and_decode_equal_the_reference_at_the_official_resolutions(load_both, family, image_size):
    sizes = {"layers": 2, "kv_heads": 2, "sliding_window": 4096}  # as in official files: less than 896 pixels have
    reference, vlm = load_both(family=family, image_size=image_size, std=0.1, **sizes)
    pixel_values, input_ids, _ = random_rows(vlm.config, [8])
    prompt_length = input_ids.shape[1] - 4
    inputs = reference_inputs(pixel_values, input_ids, torch.tensor([prompt_length]))
    expected = reference(**inputs, logits_to_keep=5).logits[0]
    cache = KVCache(vlm.config.text, 1, input_ids.shape[1], torch.float32, "cpu")
    logits = [vlm.model.prefill(vlm.model.image_features(pixel_values), input_ids[:, :prompt_length], cache)]
    for end in range(prompt_length + 1, input_ids.shape[1] + 1):
        logits.append(vlm.model.decode(input_ids[:, end - 1 : end], cache, end))
    assert (torch.cat(logits) - expected).abs().max() <= LOGITS_BOUND
    assert expected.std() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_causal_and_prompts_are_not(load_both, family):
    _, vlm = load_both(family=family, image_size=112, std=0.2)
    pixel_values, input_ids, _ = random_rows(vlm.config, [40])
    prefix_length = vlm.config.vision.num_patches + 6
    logits = vlm.model(pixel_values, input_ids, torch.tensor([prefix_length]))
    for changed in (prefix_length - 1, prefix_length + 10):
        other = input_ids.clone()
        other[0, changed] += 1
        differs = (vlm.model(pixel_values, other, torch.tensor([prefix_length])) - logits)[0].abs().amax(-1) > 1e-6
        first = 0 if changed < prefix_length else changed
        assert not differs[:first].any()
        assert differs[first : changed + 1].all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_decode_with_cache_equals_full_forward(load_both, family, kv_heads):
    _, vlm = load_both(family=family, kv_heads=kv_heads, image_size=112, std=0.2)
    model, prompt_length, steps = vlm.model, 5, 32
    pixel_values, input_ids, _ = random_rows(vlm.config, [prompt_length + steps])
    length = input_ids.shape[1] - steps
    expected = model(pixel_values, input_ids, torch.tensor([length]))[0, length - 1 :]
    cache = KVCache(vlm.config.text, 1, input_ids.shape[1], torch.float32, "cpu")
    rows = [model.prefill(model.image_features(pixel_values), input_ids[:, :length], cache)]
    for end in range(length + 1, input_ids.shape[1] + 1):
        rows.append(model.decode(input_ids[:, end - 1 : end], cache, end))
    logits = torch.cat(rows)
    assert (logits - expected).abs().max() <= LOGITS_BOUND
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_greedy_tokens_equal_generate(load_both, family, seed):
    shape = {"kv_heads": (1, 2, 4)[seed % 3], "image_size": (28, 56)[seed % 2], "sliding_window": 8}
    reference, vlm = load_both(family=family, std=0.2, seed=seed, **shape)
    image, prompt = random_image(seed), f"answer en how many cats are there? {seed}"
    input_ids = torch.tensor([vlm.processor.input_ids(prompt)])
    inputs = reference_inputs(vlm.processor.pixel_values(image), input_ids)
    expected = reference.generate(**inputs, max_new_tokens=24, do_sample=False)[0, input_ids.shape[1] :].tolist()
    ours = [token.id for token in vlm.stream(image, prompt, max_new_tokens=24)]
    assert ours == [token_id for token_id in expected if token_id not in vlm.config.eos_token_ids]
    assert len(set(ours)) > len(ours) // 3, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_several_images_before_a_prompt_equal_the_reference(load_both, family, count):
    reference, vlm = load_both(family=family, kv_heads=2, image_size=28, std=0.2)
    images, prompt = [random_image(seed) for seed in range(count)], "answer en which is larger?"
    input_ids = torch.tensor([vlm.processor.input_ids(prompt, count)])
    pixel_values = torch.cat([vlm.processor.pixel_values(image) for image in images])
    inputs = reference_inputs(pixel_values, input_ids)
    logits = vlm.model(pixel_values[None], input_ids)
    assert (logits - reference(**inputs).logits).abs().max() <= LOGITS_BOUND
    expected = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0, input_ids.shape[1] :].tolist()
    ours = [token.id for token in vlm.stream(images, "<image>" * count + prompt, max_new_tokens=12)]
    assert ours == [token_id for token_id in expected if token_id not in vlm.config.eos_token_ids]
    assert len(set(ours)) > 3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_is_rounded_where_the_reference_rounds(load_both, family, tmp_path):
    # The root of 72, which scales the embeddings, is no bfloat16.
    exact = load_both(family=family, kv_heads=2, hidden_size=72, std=0.2)[1].model
    rounded = paligemma.load(tmp_path / "checkpoint", dtype="bfloat16").model
    reference = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.bfloat16, attn_implementation="eager"
    )
    pixel_values, input_ids, _ = random_rows(exact.config, [40])
    prefix_lengths = torch.tensor([exact.config.vision.num_patches + 6])
    expected = exact(pixel_values, input_ids, prefix_lengths)
    logits = rounded(pixel_values.bfloat16(), input_ids, prefix_lengths)

    decoder, theirs = rounded.language_model, reference.model.language_model
    assert torch.equal(decoder.embed(input_ids), theirs.embed_tokens(input_ids))
    states = torch.randn(1000, 72).bfloat16()
    assert (decoder.norm(states) != theirs.norm(states)).float().mean() < 0.001  # float32 differs in its last bit
    positions = torch.arange(60)[None]
    heads = torch.randn(1, 60, 4, 32).bfloat16()
    cos, sin = theirs.rotary_emb(heads, positions)
    rotated = heads * cos[:, :, None] + torch.cat((-heads[..., 16:], heads[..., :16]), -1) * sin[:, :, None]
    assert torch.equal(rotate(heads, *decoder.rotary(positions, torch.bfloat16)), rotated)
    their_logits = reference(**reference_inputs(pixel_values.bfloat16(), input_ids, prefix_lengths)).logits
    error, theirs_error = ((one.float() - expected).norm() for one in (logits, their_logits))
    assert error <= 1.1 * theirs_error


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_pixel_values_equal_the_reference(tiny, mode):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    side = tiny.config.vision.image_size
    reference = SiglipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    sizes = [
        (1, 1),
        (7, 300),
        (300, 7),
        (56, 56),
        (64, 48),
        (side - 1, side + 1),
        (side, side),
        (224, 224),
        (640, 427),
        (1500, 900),
    ]
    for seed, (width, height) in enumerate(sizes):
        image = random_image(seed, max(width, 6), max(height, 6)).resize((width, height)).convert(mode)
        expected = reference(image, return_tensors="pt")["pixel_values"]
        ours = tiny.processor.pixel_values(image)
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-6


def prompts():
    """Two hundred prompts: tasks, several scripts, odd spaces, location and segmentation tokens."""
    words = (
        "caption en|detect cat ; dog|segment a big cat|ocr|answer de wie viele Bücher?|describe fr l'été à Noël|"
        "caption ru кошка на столе|答えて 日本語 で|描述 这张 图片|يصف الصورة|תאר את התמונה|रंग क्या है|"
        "ภาพนี้คืออะไร|무엇이 보이나요|<loc0000><loc0512><loc1023><loc0001> cat|<seg000><seg127> mask|🐱 and 👩‍👩‍👧 family|"
        "two  spaces|three   spaces |\ttab and\nline|naïve café Å|1,234.5 + π ≈ ∞|<loc12> <seg> <unk"
    ).split("|")
    made = [f"{first} {second}" for first in words for second in words]
    return words + made[:: len(made) // 180][: 200 - len(words)]


@pytest.mark.parametrize("vocabulary", ["embedded", "gemma"])
def test_token_ids_equal_the_reference(tiny, vocabulary):
    from transformers import GemmaTokenizer, PaliGemmaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from paligemma.processor import Processor

    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if vocabulary == "embedded":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=VOCABULARY, **names)
    else:
        # The official class, taught on these very prompts.
        tokenizer = GemmaTokenizer().train_new_from_iterator(prompts(), 1500)
    image_processor = SiglipImageProcessorPil()
    image_processor.image_seq_length = tiny.config.vision.num_patches
    reference = PaliGemmaProcessor(image_processor, tokenizer)
    if vocabulary == "embedded":
        ours = tiny.processor
    else:
        import dataclasses

        config = dataclasses.replace(
            tiny.config,
            image_token_id=reference.image_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_ids=(tokenizer.eos_token_id,),
        )
        ours = Processor(config, reference.tokenizer.backend_tokenizer)
    image = random_image(0)
    assert len(set(prompts())) == 200
    for prompt in prompts():
        expected = reference(images=image, text="<image>" + prompt)["input_ids"][0]
        assert ours.input_ids(prompt) == list(expected), prompt
