"""A config.json is read as transformers reads it, or refused with a sentence that names the key."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from random_checkpoints import VOCABULARY, make_reference, save_reference

import paligemma
from paligemma import PaliGemmaError
from paligemma.config import LEFT_OUT_TEXT, PaliGemmaConfig, TextConfig, VisionConfig

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CONFIG = {
    "model_type": "paligemma",
    "vision_config": {"model_type": "siglip_vision_model", "patch_size": 14, **VISION},
    "text_config": {"model_type": "gemma", "num_hidden_layers": 2, "vocab_size": 1000, **TEXT},
    "image_token_index": 999,
}


def changed(section, **values):
    """`CONFIG` with some values of a section, or of the whole, replaced."""
    return {**CONFIG, section: {**CONFIG[section], **values}} if section else {**CONFIG, **values}


def refusal(path):
    with pytest.raises(PaliGemmaError) as caught:
        PaliGemmaConfig.from_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_config_is_named(tmp_path):
    message = refusal(tmp_path / "config.json")
    assert message.startswith(f"{tmp_path / 'config.json'} cannot be read")
    assert "a checkpoint needs its config.json" in message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000], ids=lambda content: content[:4])
def test_broken_file_is_refused_with_its_name(tmp_path, name, content):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / "config.json").startswith(f"{tmp_path / name} is not a PaliGemma {name}")


LINEAR = {"rope_type": "linear", "factor": 2.0}
SWITCHES = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        (None, "model_type", "llava", "model_type is 'llava', but this package runs only 'paligemma'"),
        (None, "model_type", ["paligemma"], "model_type is ['paligemma'], but this package runs only 'paligemma'"),
        (None, "text_config", [1], "text_config is [1], expected a dictionary"),
        (None, "vision_config", None, "vision_config is None, expected a dictionary"),
        ("vision_config", "model_type", "clip", "vision_config.model_type is 'clip', but this package runs only"),
        ("vision_config", "hidden_act", "quick_gelu", "vision_config.hidden_act is 'quick_gelu', but this package"),
        ("vision_config", "num_channels", 1, "vision_config.num_channels is 1, but this package runs only 3"),
        ("vision_config", "patch_size", -14, "patch_size is -14, expected a number above zero"),
        ("vision_config", "image_size", [28, 28], "image_size is [28, 28], expected a number above zero"),
        ("vision_config", "image_size", 30, "image_size / patch_size must be whole, but is 30 / 14"),
        ("text_config", "model_type", "gemma3_text", "text_config.model_type is 'gemma3_text', but this package runs"),
        ("text_config", "attention_bias", True, "text_config.attention_bias is True, but this package runs only False"),
        ("text_config", "hidden_act", "silu", "text_config.hidden_act is 'silu', but this package runs only"),
        ("text_config", "hidden_activation", "relu", "text_config.hidden_activation is 'relu', but this package runs"),
        (
            "text_config",
            "rope_scaling",
            LINEAR,
            "text_config.rope_scaling.rope_type is 'linear', but this package runs",
        ),
        ("text_config", "rope_scaling", {"type": "dynamic"}, "rope_scaling.rope_type is 'dynamic', but this package"),
        ("text_config", "rope_parameters", LINEAR, "text_config.rope_parameters.rope_type is 'linear', but this"),
        ("text_config", "rope_parameters", "default", "rope_parameters is 'default', expected a dictionary"),
        ("text_config", "rope_parameters", {"rope_theta": "1e4"}, "rope_theta is '1e4', expected a number above zero"),
        ("text_config", "num_attention_heads", 3, "must be whole, but is 3 / 2"),
        ("text_config", "num_key_value_heads", 0, "num_key_value_heads is 0, expected a number above zero"),
        ("text_config", "intermediate_size", "96", "intermediate_size is '96', expected a number above zero"),
        ("text_config", "hidden_size", 48.5, "hidden_size is 48.5, expected a number above zero"),
        ("text_config", "hidden_size", True, "hidden_size is True, expected a number above zero"),
        ("text_config", "hidden_size", 10**30, "expected a number above zero and below 2147483648"),
        ("text_config", "rms_norm_eps", float("nan"), "rms_norm_eps is nan, expected a number above zero"),
        ("text_config", "max_position_embeddings", 4, "is 4, but a picture alone takes 4"),
        (None, "image_token_index", 1001, "image_token_index is 1001, expected a whole number below 1001"),
        (
            None,
            "bos_token_id",
            2**40,
            "bos_token_id is 1099511627776, expected a whole number below 1000, the vocab_size",
        ),
        (None, "bos_token_id", [2], "bos_token_id is [2], expected one whole number"),
        (None, "pad_token_id", -2, "pad_token_id is -2, expected a whole number below 1000"),
        (None, "pad_token_id", "0", "pad_token_id is '0', expected a whole number below 1000"),
        (None, "eos_token_id", "<eos>", "eos_token_id is '<eos>', expected a whole number below 1000"),
        (None, "eos_token_id", [1, 1.5], "eos_token_id is 1.5, expected a whole number below 1000"),
        ("text_config", "eos_token_id", True, "eos_token_id is True, expected a whole number below 1000"),
    ],
)
def test_config_that_cannot_be_run_is_refused_with_the_key_named(tmp_path, section, key, value, expected):
    (tmp_path / "config.json").write_text(json.dumps(changed(section, **{key: value})))
    message = refusal(tmp_path / "config.json")
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (None, {}),
        (None, {"vision_config": {"hidden_size": 96}, "text_config": {"vocab_size": 1000}}),
        ("vision_config", {"patch_size": 7}),
        ("text_config", {"rope_theta": 500.0}),
        ("text_config", {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("text_config", {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}),
        ("text_config", {"rope_theta": 500.0, "rope_parameters": None}),
        ("text_config", {"rope_scaling": {"rope_type": "default", "rope_theta": 300.0}}),
        ("text_config", {"hidden_act": "gelu", "hidden_activation": None}),
        ("text_config", {"eos_token_id": [1, 7]}),
        (None, {"text_config": {"model_type": "gemma2", "vocab_size": 1000}}),
        ("text_config", {"model_type": "gemma2", "query_pre_attn_scalar": 144, "sliding_window": 8}),
        ("text_config", {"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"]}),
        ("text_config", {"model_type": "gemma2", **dict.fromkeys(SWITCHES)}),
    ],
)
def test_config_is_read_as_transformers_reads_it(section, values):
    assert_read_as_transformers_reads_it(changed(section, **values))


# What published files hold beside the sizes, or in another way than transformers writes it today.
VARIANTS = {
    "the width of the first generation above": ({"hidden_size": 2048, "projection_dim": 2048}, {}),
    "a list of end tokens": ({}, {"eos_token_id": [1, 107]}),
    "the first location as image token": ({"image_token_index": 256000}, {"vocab_size": 257216}),
    "no row for the image token": ({"image_token_index": 257152}, {"vocab_size": 257152}),
    "rows under another name": ({"_vocab_size": 257152, "vocab_size": 257152}, {}),
    "a dtype": ({"dtype": "bfloat16"}, {"dtype": "float32"}),
    "a dtype as it was named before": ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
    "an old number of image tokens": ({}, {"num_image_tokens": 1024}),
    "an activation twice": ({}, {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}),
    "an activation in the other key": ({}, {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize(("above", "inside"), VARIANTS.values(), ids=VARIANTS)
def test_variant_of_a_published_config_is_read_as_transformers_reads_it(family, above, inside):
    assert_read_as_transformers_reads_it({**changed("text_config", model_type=family, **inside), **above})


def assert_read_as_transformers_reads_it(config):
    ours, reference = PaliGemmaConfig.from_dict(config), transformers.PaliGemmaConfig.from_dict(config)
    for sizes, theirs in ((ours.vision, reference.vision_config), (ours.text, reference.text_config)):
        for name in set(sizes.__dataclass_fields__) - {"rope_theta"}:
            assert getattr(sizes, name) == getattr(theirs, name, None), name
    assert ours.text.rope_theta == reference.text_config.rope_parameters["rope_theta"]
    assert ours.image_token_id == reference.image_token_id
    eos = reference.text_config.eos_token_id
    assert ours.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))


def test_exact_gelu_of_gemma2_is_refused_which_in_gemma_is_a_name_of_the_approximation():
    PaliGemmaConfig.from_dict(changed("text_config", hidden_activation="gelu"))
    with pytest.raises(PaliGemmaError, match=r"^text_config.hidden_activation is 'gelu', but this package runs only"):
        PaliGemmaConfig.from_dict(changed("text_config", model_type="gemma2", hidden_activation="gelu"))


@pytest.mark.parametrize("layer_types", [["full_attention", "sliding_attention"], ["full_attention"] * 2, 1])
def test_sliding_windows_of_other_layers_are_refused(layer_types):
    config = changed("text_config", model_type="gemma2", layer_types=layer_types)
    with pytest.raises(
        PaliGemmaError, match=r"^text_config.layer_types has its sliding windows elsewhere than in layers 0"
    ):
        PaliGemmaConfig.from_dict(config)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_null_is_no_value(family):
    null = dict.fromkeys(("head_dim", "eos_token_id", "hidden_activation"))
    null_base = {"model_type": family, "rope_theta": 500.0, "rope_parameters": {"rope_theta": None}, **null}
    text = PaliGemmaConfig.from_dict(changed("text_config", **null_base)).text
    assert (text.rope_theta, text.head_dim) == (500.0, 256)


@pytest.mark.parametrize(
    ("above", "inside", "expected"),
    [
        ({}, {}, (2, 0, (1,))),
        ({"bos_token_id": 5, "pad_token_id": 6, "eos_token_id": 7}, {"bos_token_id": 8}, (5, 6, (7,))),
        ({}, {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 0}, (5, 0, (0,))),
        ({"bos_token_id": -1, "pad_token_id": -1, "eos_token_id": -1}, {"eos_token_id": [1, 7]}, (2, 0, (1, 7))),
        ({"eos_token_id": [7, -1]}, {}, (2, 0, (7,))),
        ({"eos_token_id": []}, {"eos_token_id": 7}, (2, 0, (7,))),
        ({"eos_token_id": 1}, {"eos_token_id": [1, 107]}, (2, 0, (1,))),
    ],
)
def test_special_ids_may_be_in_either_place_and_minus_one_is_none(above, inside, expected):
    config = PaliGemmaConfig.from_dict({**CONFIG, **above, "text_config": {**CONFIG["text_config"], **inside}})
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_ids) == expected


def test_placeholder_right_after_the_last_row_is_accepted():
    assert PaliGemmaConfig.from_dict(changed(None, image_token_index=1000)).image_token_id == 1000


@pytest.mark.parametrize("there", [{}, {"eos_token_id": 5}])
def test_end_tokens_of_the_generation_config_count(tmp_path, there):
    (tmp_path / "config.json").write_text(json.dumps(changed(None, **there)))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 107], "bos_token_id": 2}')
    assert PaliGemmaConfig.from_file(tmp_path / "config.json").eos_token_ids == (1, 107)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "1"}')
    assert refusal(tmp_path / "config.json").startswith(f"{tmp_path / 'generation_config.json'}: eos_token_id is '1'")
    (tmp_path / "generation_config.json").write_text("{}")
    assert PaliGemmaConfig.from_file(tmp_path / "config.json").eos_token_ids == (there.get("eos_token_id", 1),)


@pytest.mark.parametrize("text", [TextConfig(rope_theta=500.0), LEFT_OUT_TEXT["gemma2"]], ids=["gemma", "gemma2"])
def test_written_config_is_read_back_and_read_by_transformers(text):
    config = PaliGemmaConfig(VisionConfig(hidden_act="gelu"), text, image_token_id=999, eos_token_ids=(1, 107))
    assert PaliGemmaConfig.from_dict(config.to_dict()) == config
    theirs = transformers.PaliGemmaConfig.from_dict(config.to_dict()).text_config
    assert theirs.rope_parameters["rope_theta"] == text.rope_theta
    for name in set(text.__dataclass_fields__) - {"rope_theta"}:
        assert getattr(theirs, name, None) == getattr(text, name), name


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_image_token_of_the_tokenizer_counts_in_the_loaded_checkpoint(tmp_path, family):
    config = json.loads((save_reference(make_reference(family=family), tmp_path) / "config.json").read_text())
    config["image_token_index"] = VOCABULARY.token_to_id("<loc0000>")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert paligemma.load(tmp_path, device="cpu").config.image_token_id == VOCABULARY.token_to_id("<image>")


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "gelu_fast"])
def test_vision_activation_gives_the_logits_of_transformers(tmp_path, activation):
    reference = make_reference(std=0.2)
    reference.config.vision_config.hidden_act = activation
    save_reference(reference, tmp_path)
    reference = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, local_files_only=True)
    vlm = paligemma.load(tmp_path, device="cpu")
    pixel_values = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.model.get_image_features(pixel_values).pooler_output
        torch.testing.assert_close(vlm.model.image_features(pixel_values), expected, atol=2e-5, rtol=1e-5)
