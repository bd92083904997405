"""LoRA adapters equal those of peft: read from its files, in every layout of names, and written for it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from random_checkpoints import make_reference, reference_inputs, save_reference
from safetensors.torch import load_file, save_file
from test_parity import LOGITS_BOUND, random_rows
from transformers import PaliGemmaForConditionalGeneration

import paligemma
from paligemma import PaliGemmaError
from paligemma.checkpoints import EMBEDDED_FOLDER, save_checkpoint
from paligemma.checkpoints.adapters import LoraConfig, save_adapter
from paligemma.checkpoints.quantized.checkpoint import write_int8_checkpoint
from paligemma.training.lora import PARTS, add_lora, lora_matrices, target_modules

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Settings of peft for which the sum of the weights and scaling * B @ A is all there is to an adapter.
SETTINGS = {
    "as the Hub's notebooks have it": {"target_modules": ALL, "task_type": "CAUSAL_LM"},
    "all linear layers": {"target_modules": "all-linear", "lora_alpha": 32, "lora_dropout": 0.1},
    "a regular expression": {"target_modules": r".*language_model.*\.(q|v)_proj"},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 3},
        "alpha_pattern": {r"^model\.language_model.*\.v_proj": 32, "k_proj": 5},
    },
    "projector and norms trained whole": {
        "target_modules": ["q_proj", "fc1"],
        "modules_to_save": ["multi_modal_projector", "norm"],
    },
    "projector and encoder adapted": {"target_modules": ["linear", "fc1", "out_proj", "patch_embedding"]},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "biases": {"target_modules": ["fc1", "q_proj"], "bias": "all"},
    "token embedding adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "token embedding trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "output layer adapted": {"target_modules": ["lm_head"]},
    "output layer trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
# Names of the same modules in files of other releases of transformers.
LAYOUTS = {
    "5": {},
    "4.52": {r"\.vision_tower\.": ".vision_tower.vision_model."},
    "4.41": {
        r"\.model\.vision_tower\.": ".vision_tower.vision_model.",
        r"\.model\.multi_modal_projector\.": ".multi_modal_projector.",
        r"\.model\.language_model\.": ".language_model.model.",
        r"\.lm_head\.": ".language_model.lm_head.",
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_reference(make_reference(std=0.1, kv_heads=2), tmp_path_factory.mktemp("base"))


@torch.no_grad()
def train_at_random(peft_model):
    """Move all that an adapter trains away from where it began."""
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad or ".modules_to_save." in name:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return peft_model.eval()


def make_adapter(base, folder, **settings):
    """An adapter that peft has written, and its model."""
    reference = PaliGemmaForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    model = train_at_random(get_peft_model(reference, PeftConfig(init_lora_weights=False, **settings)))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def distance(vlm, reference):
    """The largest difference of logits, of a padded row and one that is not."""
    pixel_values, input_ids, attention_mask = random_rows(vlm.config, [20, 12])
    prefix_lengths = vlm.config.vision.num_patches + torch.tensor([5, 4])
    rows = pixel_values, input_ids, prefix_lengths, attention_mask
    return (vlm.model(*rows) - reference(**reference_inputs(*rows)).logits)[attention_mask].abs().max()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_adapter_of_peft_gives_its_logits_under_the_names_of_every_release(base, tmp_path, settings):
    reference = make_adapter(base, tmp_path, **settings)
    plain = paligemma.load(base)
    assert distance(plain, reference) > 0.05, "an adapter that changes nothing proves nothing"
    assert distance(paligemma.load(base, adapter=tmp_path), reference) <= LOGITS_BOUND
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for replacements in list(LAYOUTS.values())[1:]:
        renamed = dict(stored)
        for pattern, name in replacements.items():
            renamed = {re.sub(pattern, name, key): tensor for key, tensor in renamed.items()}
        save_file(renamed, tmp_path / "adapter_model.safetensors")
        if "alpha_pattern" not in settings:  # whose names are those of a release
            assert distance(paligemma.load(base, adapter=tmp_path), reference) <= LOGITS_BOUND


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_an_adapter_that_is_given_as_the_model_names_its_base(tmp_path, family):
    base = save_reference(make_reference(family=family, std=0.1), tmp_path / "base")
    reference = make_adapter(base, tmp_path / "adapter", target_modules=ALL)
    for vlm in (paligemma.load(tmp_path / "adapter"), paligemma.load(adapter=tmp_path / "adapter")):
        assert distance(vlm, reference) <= LOGITS_BOUND


@torch.no_grad()
@pytest.mark.parametrize("settings", ["all linear layers", "output layer adapted", "token embedding adapted"])
def test_an_adapter_is_merged_before_weights_are_rounded_to_int8(base, tmp_path, settings):
    make_adapter(base, tmp_path / "adapter", **SETTINGS[settings])
    merged = paligemma.load(base, adapter=tmp_path / "adapter")
    save_checkpoint(merged.model, merged.processor.tokenizer, tmp_path / "merged", torch.float32)
    pixel_values, input_ids, _ = random_rows(merged.config, [20])
    made, kept, expected = (
        paligemma.load(source, dtype="int8", adapter=adapter).model(pixel_values, input_ids)
        for source, adapter in ((base, tmp_path / "adapter"), (base, tmp_path / "adapter"), (tmp_path / "merged", None))
    )
    assert torch.equal(made, expected)
    assert torch.equal(kept, expected)
    plain = paligemma.load(base, dtype="int8").model(pixel_values, input_ids)
    assert (plain - expected).abs().max() > 0.05


@torch.no_grad()
def test_an_adapter_is_merged_before_weights_are_rounded_to_int4(base, tmp_path):
    make_adapter(base, tmp_path / "adapter", **SETTINGS["all linear layers"])
    merged = paligemma.load(base, adapter=tmp_path / "adapter")
    save_checkpoint(merged.model, merged.processor.tokenizer, tmp_path / "merged", torch.float32)

    def states(source, adapter=None):
        """Of as few positions as are computed in int4."""
        decoder = paligemma.load(source, dtype="int4", adapter=adapter).model.language_model
        return decoder(decoder.embed(torch.tensor([[100, 101, 102]])), slice(0, 3), None, None)

    made, kept, expected = (*(states(base, tmp_path / "adapter") for _ in range(2)), states(tmp_path / "merged"))
    assert torch.equal(made, expected)
    assert torch.equal(kept, expected)
    assert (states(base) - expected).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("settings", ["all linear layers", "output layer adapted", "token embedding adapted"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_adapter_is_added_to_what_int8_weights_stand_for(base, tmp_path, settings, dtype):
    make_adapter(base, tmp_path / "adapter", **SETTINGS[settings])
    write_int8_checkpoint(base, tmp_path / "int8")
    rounded = paligemma.load(tmp_path / "int8", dtype="float32")
    save_checkpoint(rounded.model, rounded.processor.tokenizer, tmp_path / "rounded", torch.float32)
    expected = paligemma.load(tmp_path / "rounded", adapter=tmp_path / "adapter")
    vlm = paligemma.load(tmp_path / "int8", adapter=tmp_path / "adapter", dtype=dtype)
    pixel_values, input_ids, _ = random_rows(vlm.config, [20])
    logits = [one.model(pixel_values, input_ids) for one in (vlm, expected, rounded)]
    error, change = ((one - logits[1]).square().mean().sqrt() for one in (logits[0], logits[2]))
    assert error < {"float32": 1e-5, "int8": 0.3}[dtype] * change


@pytest.mark.parametrize("parts", [["decoder"], ["decoder", "projector"], list(PARTS)])
def test_peft_reads_an_adapter_that_is_written_here(base, tmp_path, parts):
    vlm = paligemma.load(base)
    config = LoraConfig(
        str(base), 4, 6, target_modules(parts), use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"fc1": 9}
    )
    add_lora(vlm.model, config)
    matrices = lora_matrices(vlm.model)
    assert len(matrices) == {1: 21, 2: 22, 3: 40}[len(parts)]
    with torch.no_grad():
        for _, up in matrices.values():
            up.normal_(std=0.1)
    save_adapter(config, matrices, tmp_path)
    reference = PaliGemmaForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    assert distance(vlm, reference) > 0.05
    peft_model = PeftModel.from_pretrained(reference, tmp_path).eval()
    assert distance(vlm, peft_model) <= LOGITS_BOUND
    assert distance(paligemma.load(tmp_path), peft_model) <= LOGITS_BOUND
    written = load_file(tmp_path / "adapter_model.safetensors")
    peft_model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert written.keys() == again.keys()
    assert all(torch.equal(written[key], again[key]) for key in written)


def refusal(*arguments, **settings):
    with pytest.raises(PaliGemmaError) as caught:
        paligemma.load(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "; please " in message
    return message


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "the kind IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeated layers"),
        ({"alora_invocation_tokens": [4]}, "activated LoRA"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(base, tmp_path, settings, name):
    make_adapter(base, tmp_path, target_modules=["fc1"])
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | settings))
    message = refusal(base, adapter=tmp_path)
    assert f"{tmp_path / 'adapter_config.json'} describes" in message
    assert name in message


def test_dora_is_known_by_its_tensors_too(base, tmp_path):
    make_adapter(base, tmp_path, target_modules=["q_proj"], use_dora=True)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    del values["use_dora"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert "adapter_model.safetensors holds DoRA" in refusal(base, adapter=tmp_path)


def test_an_adapter_that_does_not_belong_to_the_model_is_refused(base, tmp_path):
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    wider = save_reference(make_reference(hidden_size=72), tmp_path / "wider")
    assert "q_proj.weight in the shape [128, 64], but the model has [128, 72]" in refusal(
        wider, adapter=tmp_path / "adapter"
    )
    shallow = save_reference(make_reference(layers=2), tmp_path / "shallow")
    message = refusal(shallow, adapter=tmp_path / "adapter")
    assert "changes language_model.layers.2.self_attn.q_proj.weight, which the model does not have" in message
    assert str(base) in message


def test_what_is_no_whole_adapter_is_refused_with_a_sentence(base, tmp_path):
    assert f"{base} has no adapter_config.json" in refusal(base, adapter=base)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config, weights = (tmp_path / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert "is an adapter itself" in refusal(tmp_path / "adapter", adapter=tmp_path / "adapter")
    stored, values = load_file(weights), json.loads(config.read_text())

    save_file({key: tensor for key, tensor in stored.items() if "0.self_attn.q_proj.lora_B" not in key}, weights)
    assert "one of the two matrices of" in refusal(base, adapter=tmp_path / "adapter")
    for damage in (torch.Tensor.flatten, lambda matrix: matrix[:0], lambda matrix: matrix[1:].contiguous()):
        save_file(
            {key: damage(one) if "0.self_attn.q_proj.lora_A" in key else one for key, one in stored.items()}, weights
        )
        assert "which are none of LoRA" in refusal(base, adapter=tmp_path / "adapter")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "truncated or damaged" in refusal(base, adapter=tmp_path / "adapter")
    weights.unlink()
    shutil.copy(base / "config.json", tmp_path / "adapter" / "adapter_model.bin")
    assert "holds an adapter only in pickled form (adapter_model.bin)" in refusal(tmp_path / "adapter")

    save_file(stored, weights)
    config.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    assert "names no model; please give the model" in refusal(tmp_path / "adapter")
    assert paligemma.load(base, adapter=tmp_path / "adapter").generate(
        EMBEDDED_FOLDER.parent / "demo/examples/cats.png", "caption en", max_new_tokens=1
    )
    config.write_text(json.dumps(values | {"alpha_pattern": {"q_proj": "much"}}))
    assert "q_proj is 'much', expected a number" in refusal(base, adapter=tmp_path / "adapter")
    config.write_text("[]")
    assert "is no dictionary" in refusal(base, adapter=tmp_path / "adapter")
