"""Layers that read the same input, in one product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paligemma.checkpoints import load
from paligemma.projections import Projections, merge_projections


class Three(Projections):
    def __init__(self, bias):
        super().__init__("one", "other")
        self.one, self.other = nn.Linear(8, 4, bias=bias), nn.Linear(8, 6, bias=bias)
        self.not_merged = nn.Linear(8, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_layers_give_what_they_gave_and_take_no_more_memory(bias):
    module, rows = Three(bias), torch.randn(2, 3, 8)
    expected = module.project(rows)
    weights = {name: value.clone() for name, value in module.named_parameters()}
    merge_projections(module)
    merge_projections(module)
    for part, whole in zip(module.project(rows), expected, strict=True):
        torch.testing.assert_close(part, whole)
    torch.testing.assert_close(module.one(rows), expected[0])
    assert list(module.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in module.named_parameters())
    storages = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
    assert len(storages) == (4 if bias else 3), "merged weights, merged biases, and those of the layer by itself"
    module.other.weight.data.zero_()
    assert not module.project(rows)[1].detach().sub(module.other.bias if bias else 0).any()


def test_a_whole_model_says_the_same_in_fewer_products(monkeypatch):
    vlm = load(device="cpu")
    pixel_values, ids = torch.randn(1, 3, 224, 224), torch.tensor([vlm.processor.input_ids("caption en")])
    with torch.inference_mode():
        expected = vlm.model(pixel_values, ids)
        merge_projections(vlm.model)
        calls, linear = [], nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda *given: calls.append(given) or linear(*given))
        torch.testing.assert_close(vlm.model(pixel_values, ids), expected, atol=1e-4, rtol=1e-4)
    layers = vlm.config.vision.num_hidden_layers, vlm.config.text.num_hidden_layers
    assert len(calls) == 3 * layers[0] + 2 * layers[1] + 1, "outputs of attention, the MLPs' others, and the projector"


def test_layers_in_int8_stay_as_they_are():
    model = load(device="cpu", dtype="int8").model
    merge_projections(model)
    assert all(module.merged_weight is None for module in model.modules() if isinstance(module, Projections))
