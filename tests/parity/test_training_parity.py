"""Losses and gradients equal those of transformers, and of peft where an adapter is trained."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from random_checkpoints import make_reference, save_reference
from test_parity import random_image

import paligemma
from paligemma.checkpoints import canonical_name
from paligemma.checkpoints.adapters import LoraConfig
from paligemma.training import finetune
from paligemma.training.data import collate
from paligemma.training.loop import checkpoint_gradients
from paligemma.training.lora import PARTS, add_lora, lora_matrices, target_modules
from paligemma.training.losses import answer_loss

EXAMPLES = [
    ([random_image(0)], "caption en", "2 cats and an apple"),
    ([random_image(1)], "detect cat", "<loc0008><loc0016><loc0512><loc1000> cat"),
    ([random_image(2)], "answer en how many bees are there?", "0"),
]
PAIRS = [
    ([random_image(3), random_image(4)], "answer en are these the same?", "no"),
    ([random_image(5), random_image(5)], "caption en", "2 red cats"),
]


def reference_loss(reference, config, rows):
    """The loss of transformers, which wants <eos> among the inputs, and shifts the labels by itself."""
    count, lengths = len(rows.input_ids), rows.attention_mask.sum(1)
    positions = torch.arange(rows.input_ids.shape[1] + 1)
    input_ids = torch.nn.functional.pad(rows.input_ids, (0, 1), value=config.pad_token_id)
    input_ids[torch.arange(count), lengths] = config.eos_token_ids[0]
    in_answer = (positions >= rows.prefix_lengths[:, None]) & (positions <= lengths[:, None])
    return reference.train()(
        pixel_values=rows.pixel_values.flatten(0, 1).to(next(reference.parameters()).dtype),
        input_ids=input_ids,
        attention_mask=(positions <= lengths[:, None]).long(),
        token_type_ids=(positions >= rows.prefix_lengths[:, None]).long(),
        labels=input_ids.masked_fill(~in_answer, -100),
    ).loss


def assert_same_gradient(gradient, expected, name):
    if expected.norm() < 1e-7:  # keys' biases have none: softmax ignores what is added to a whole row
        assert gradient.norm() < 1e-6, name
        return 0
    assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name
    return 1


@pytest.mark.parametrize(("family", "examples"), [("gemma", EXAMPLES), ("gemma2", EXAMPLES), ("gemma", PAIRS)])
def test_loss_and_gradients_equal_the_reference(tmp_path, family, examples):
    reference = make_reference(family=family, kv_heads=2, std=0.1, sliding_window=4)
    vlm = paligemma.load(save_reference(reference, tmp_path))
    finetune.train_parameters(vlm.model, list(PARTS))
    rows = collate(vlm.processor, examples)
    assert not rows.attention_mask.all(), "there must be padding"
    loss, expected_loss = answer_loss(vlm.model, rows), reference_loss(reference, vlm.config, rows)
    loss.backward()
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    ours = dict(vlm.model.named_parameters())
    compared = sum(
        assert_same_gradient(ours[canonical_name(name)].grad, parameter.grad, name)
        for name, parameter in reference.named_parameters()
    )
    assert compared > 60


@pytest.mark.parametrize(("family", "interval"), [("gemma", None), ("gemma", 2), ("gemma2", 1)])
def test_loss_and_gradients_of_an_adapter_equal_those_of_peft(tmp_path, family, interval):
    base = make_reference(family=family, kv_heads=2, std=0.1, sliding_window=4)
    vlm = paligemma.load(save_reference(base, tmp_path))
    modules = target_modules(list(PARTS))
    add_lora(vlm.model, LoraConfig(None, 4, 6, modules))
    peft_model = get_peft_model(base, PeftConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False))
    matrices = {
        f"{name}.lora_{side}": one for name, pair in lora_matrices(vlm.model).items() for side, one in zip("AB", pair)
    }
    theirs = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    theirs = {
        canonical_name(name.removeprefix("base_model.model.")).removesuffix(".default.weight"): parameter
        for name, parameter in theirs.items()
    }
    assert theirs.keys() == matrices.keys()
    with torch.no_grad():
        for name, matrix in matrices.items():
            matrix.copy_(theirs[name])
    if interval:
        for layers in (vlm.model.vision_tower.encoder["layers"].children(), vlm.model.language_model.layers):
            checkpoint_gradients(layers, interval)
    rows = collate(vlm.processor, EXAMPLES)
    loss, expected_loss = answer_loss(vlm.model, rows), reference_loss(peft_model, vlm.config, rows)
    loss.backward()
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    compared = sum(assert_same_gradient(matrix.grad, theirs[name].grad, name) for name, matrix in matrices.items())
    assert compared > 70
    assert {name for name, one in vlm.model.named_parameters() if one.grad is not None} == {
        name for name, one in vlm.model.named_parameters() if "lora_" in name
    }


def test_an_adapter_begins_as_that_of_peft_does(tmp_path):
    base = make_reference(hidden_size=256, heads=4)
    vlm = paligemma.load(save_reference(base, tmp_path))
    add_lora(vlm.model, LoraConfig(None, 16, 16, target_modules(["decoder"])))
    down, up = lora_matrices(vlm.model)["language_model.layers.0.mlp.gate_proj"]
    peft_model = get_peft_model(base, PeftConfig(r=16, target_modules=r".*layers\.0\.mlp\.gate_proj"))
    theirs = dict(peft_model.named_parameters())[
        "base_model.model.model.language_model.layers.0.mlp.gate_proj.lora_A.default.weight"
    ]
    assert down.shape == theirs.shape
    assert not up.any()
    assert down.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)
    assert down.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def test_what_is_trained_is_float32_behind_bfloat16_weights(tmp_path):
    save_reference(make_reference(std=0.1), tmp_path)
    rounded, exact = (paligemma.load(tmp_path, dtype=dtype) for dtype in ("bfloat16", "float32"))
    for vlm in (rounded, exact):
        finetune.train_parameters(vlm.model.requires_grad_(False), ["projector", "decoder"])
    parameters = {name: one for name, one in rounded.model.named_parameters() if one.requires_grad}
    assert {one.dtype for one in parameters.values()} == {torch.float32}
    assert all(one.dtype == torch.bfloat16 for one in rounded.model.vision_tower.parameters())
    assert rounded.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    rows = collate(rounded.processor, EXAMPLES)
    losses = [answer_loss(vlm.model, rows) for vlm in (rounded, exact)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    expected = {name: one.grad for name, one in exact.model.named_parameters() if one.requires_grad}
    ours = {
        name.replace(".parametrizations", "").removesuffix(".original"): one.grad for name, one in parameters.items()
    }
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= 0.1 * expected[name].norm(), name
