"""Attention equals its formula, and never holds all scores of a long sequence at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma import attention
from paligemma.attention import attend

HEADS, HEAD_DIM = 8, 16


def formula(queries, keys, values, mask, scale, softcap):
    """In float64, with each key and value head repeated for its group."""
    group = HEADS // keys.shape[1]
    queries, keys, values = queries.double(), keys.double(), values.double()
    keys, values = (heads.repeat_interleave(group, dim=1) for heads in (keys, values))
    scores = torch.einsum("bthd,bhsd->bhts", queries, keys) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhts,bhsd->bthd", scores.softmax(-1), values).flatten(2)


def random_inputs(length, kv_heads, width, kind):
    queries = torch.randn(2, length, HEADS, HEAD_DIM)
    keys, values = (torch.randn(2, kv_heads, width, HEAD_DIM) for _ in range(2))
    masks = {
        "no mask": None,
        "a mask for all rows": torch.rand(1, 1, length, width) > 0.5,
        "a mask for each row": torch.rand(2, 1, length, width) > 0.5,
        "a mask for all positions": torch.rand(2, 1, 1, width) > 0.5,
    }
    mask = masks[kind]
    if mask is not None:
        mask[..., 0] = True
    return queries, keys, values, mask


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("kind", ["no mask", "a mask for all rows", "a mask for each row", "a mask for all positions"])
@pytest.mark.parametrize(
    ("softcap", "max_scores"), [(None, None), (0.7, 2**22), (0.7, 2 * HEADS * 11 * 3)], ids=["SDPA", "whole", "pieces"]
)
def test_attention_equals_its_formula(monkeypatch, kv_heads, kind, softcap, max_scores):
    monkeypatch.setattr(attention, "MAX_SCORES", max_scores)
    torch.manual_seed(0)
    for length in (1, 7):
        *inputs, mask = random_inputs(length, kv_heads, 11, kind)
        for tensor in inputs:
            tensor.requires_grad_()
        attended, expected = attend(*inputs, mask, 0.5, softcap), formula(*inputs, mask, 0.5, softcap)
        torch.testing.assert_close(attended, expected.float(), rtol=0, atol=1e-5)
        weights = torch.randn_like(attended)
        gradients, wanted = (torch.autograd.grad((output * weights).sum(), inputs) for output in (attended, expected))
        torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_position_that_attends_to_nothing_is_finite(softcap):
    queries, keys, values, _ = random_inputs(5, 2, 5, "no mask")
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(-1)  # the first position attends to none
    assert attend(queries, keys, values, mask, softcap=softcap).isfinite().all()


class TensorSizes(TorchDispatchMode):
    """Records how many numbers each tensor has that is computed."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = output if isinstance(output, tuple) else (output,)
        self.sizes.extend(tensor.numel() for tensor in tensors if torch.is_tensor(tensor))
        return output


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_the_peak_of_memory_at_896_pixels_is_a_fraction_of_all_scores():
    script = """
import torch
from pathlib import Path
from paligemma.attention import attend

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0])

queries, keys, values = torch.randn(1, 4100, 8, 16), torch.randn(1, 4, 4100, 16), torch.randn(1, 4, 4100, 16)
with torch.inference_mode():
    attend(queries[:, :99], keys, values, softcap=50.0)
    before = kilobytes("VmHWM:")
    attend(queries, keys, values, softcap=50.0)
print(kilobytes("VmHWM:") - before)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1024 * int(run.stdout) < 4 * 8 * 4100**2 / 4


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("has_mask", [False, True])
def test_neither_attention_nor_its_gradient_holds_the_scores_of_all_positions_and_heads(monkeypatch, softcap, has_mask):
    length = 160
    bound = 2 * length**2  # all scores of both rows are eight times as many
    monkeypatch.setattr(attention, "MAX_SCORES", bound)
    queries, keys, values, _ = random_inputs(length, 4, length, "no mask")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if has_mask else None
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), TensorSizes() as computed:
        attended = attend(queries.requires_grad_(), keys, values, mask, softcap=softcap)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert sum(sizes.values()) <= 4 * (bound + 8 * queries.numel())
    with computed:
        attended.sum().backward()
    assert max(computed.sizes) <= bound


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@torch.inference_mode()
def test_compiled_soft_capped_attention_is_one_graph_for_all_lengths(kv_heads):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for length in (7, 40, 300):
        queries, keys, values, _ = random_inputs(length, kv_heads, length, "no mask")
        for tensor, dimension in ((queries, 1), (keys, 2), (values, 2)):
            torch._dynamo.mark_dynamic(tensor, dimension)
        attended = compiled(queries, keys, values, None, 0.5, 0.7)
        expected = formula(queries, keys, values, None, 0.5, 0.7)
        torch.testing.assert_close(attended, expected.float(), rtol=0, atol=1e-5)
    assert len(graphs) == 1
    assert "flex_attention" in graphs[0].code
