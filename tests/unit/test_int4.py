"""int4: how exact its layers are, when they are used, and how their weights are made once and int8_cache."""

from __future__ import annotations

import shutil
from functools import cache

import pytest
import torch
from conftest import EXAMPLES
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma.checkpoints.quantized import store
from paligemma.checkpoints.quantized.checkpoint import write_int8_checkpoint
from paligemma.checkpoints.weights import int4_weights
from paligemma.demo.serving import EMBEDDED, Models
from paligemma.quantization import INT4, Int4Linear, Int8Linear, pack, packing, quantize, quantize_int4
from paligemma.quantization.int4 import MOST_ROWS
from paligemma.quantization.rounding import rotate, unrotate

pytestmark = pytest.mark.skipif(not paligemma.quantization.int4.is_available(), reason="needs AVX2")

# [in, out]: of decoders in the official shapes, fewer outputs of the widest, and of the embedded checkpoint.
SHAPES = [(2048, 256), (2304, 1024), (3584, 128), (9216, 128), (14336, 64), (16384, 128), (192, 512), (512, 192)]


@pytest.fixture(autouse=True)
def within_packing():
    with packing():
        yield


@pytest.fixture
def folder(tmp_path):
    return save_reference(make_reference(std=0.2), tmp_path / "checkpoint")


def relative_error(output, exact):
    return ((output - exact).norm() / exact.norm()).item()


def stands_for(rounded, scale, layer):
    """The weight, float32 [out, in], of the codes nearest to an int8 one."""
    groups = rotate(unrotate(rounded * scale[:, None]) / layer.factors).unflatten(1, (-1, layer.group))
    step, offset = (layer.steps[:, :, kind].float().T[..., None] for kind in (0, 1))
    codes = ((groups - offset) / step).round().clamp(-8, 7)
    return unrotate((codes * step + offset).flatten(1)) * layer.factors


def layer_from(weight, group=32, inputs=None, bias=None):
    rounded, scale = quantize(weight)
    inputs = torch.ones(weight.shape[1]) if inputs is None else inputs
    return Int4Linear(Int8Linear(pack(rounded, scale), bias), *quantize_int4(rounded, scale, inputs, group))


@cache
def layer_of(outputs, channels, group=32, seed=0):
    """A Gaussian weight, the layer of it, and the weight that its int4 codes stand for."""
    torch.manual_seed(seed)
    weight = torch.randn(outputs, channels) * 0.02
    layer = layer_from(weight, group)
    return weight, layer, stands_for(*quantize(weight), layer)


# --- the layer


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("group", "bound"), [(32, 0.095), (64, 0.105)])
@pytest.mark.parametrize(("channels", "outputs"), SHAPES)
def test_few_rows_are_multiplied_by_what_the_codes_stand_for(channels, outputs, group, bound, count):
    weight, layer, in_int4 = layer_of(outputs, channels, group)
    torch.manual_seed(1)
    rows = torch.randn(count, channels)
    rows[0, channels // 2] = 1000.0
    output = layer(rows[:, None])[:, 0]
    assert relative_error(output, rows @ in_int4.T) <= 0.005
    assert relative_error(output, rows @ weight.T) <= bound


@pytest.mark.parametrize(("group", "bound"), [(32, 0.0725), (64, 0.085)])
@pytest.mark.parametrize(("channels", "outputs"), SHAPES)
def test_the_search_loses_less_than_the_whole_range_of_each_group(channels, outputs, group, bound):
    weight, _, in_int4 = layer_of(outputs, channels, group)
    groups = rotate(weight).unflatten(1, (-1, group))
    least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (largest - least) / 15
    whole_range = ((groups - least) / step).round() * step + least
    assert relative_error(in_int4, weight) <= bound
    assert relative_error(in_int4, weight) < 0.95 * relative_error(whole_range, groups)


def test_channels_that_carry_much_lose_less():
    torch.manual_seed(0)
    weight, inputs = torch.randn(256, 512) * 0.02, torch.ones(512)
    inputs[::8], inputs[1::8] = 30.0, 0.0
    rows = torch.randn(3, 512) * inputs
    even, aware = (layer_from(weight, inputs=sizes)(rows) for sizes in (torch.ones(512), inputs))
    exact = rows @ weight.T
    assert relative_error(aware, exact) < 0.6 * relative_error(even, exact)


@pytest.mark.parametrize(
    ("shape", "is_int4"),
    [((1, 1), True), ((3, 1), True), ((1, 3), True), ((4, 1), False), ((2, 2), False), ((2,), True), ((5,), False)],
)
def test_the_number_of_rows_decides_between_int4_and_int8(shape, is_int4):
    _, layer, _ = layer_of(128, 192)
    rows = torch.randn(*shape, 192)
    expected = layer.multiply_in_int4(rows) if is_int4 else layer.int8(rows)
    other = layer.int8(rows) if is_int4 else layer.multiply_in_int4(rows)
    assert torch.equal(layer(rows), expected)
    assert 0.01 < relative_error(other, expected) < 0.1, "the two differ, by the rounding to four bits"


def test_bias_comes_through_and_zeros_give_zeros():
    bias = torch.randn(64)
    assert torch.equal(layer_from(torch.randn(64, 128), bias=bias)(torch.zeros(1, 2, 128)), bias.expand(1, 2, 64))
    zeros = layer_from(torch.zeros(64, 128), inputs=torch.zeros(128))
    torch.testing.assert_close(zeros(torch.randn(1, 128)), torch.zeros(1, 64), rtol=0, atol=1e-20)


def test_a_group_of_one_value_or_with_an_outlier_is_kept():
    rotated = torch.full((64, 64), 0.5)
    rotated[:, 40] = 8.0
    output = layer_from(unrotate(rotated))(unrotate(torch.eye(64)[[3, 40, 50]]))
    torch.testing.assert_close(output, torch.tensor([[0.5], [8.0], [0.5]]).expand(3, 64), rtol=0.02, atol=0)


def test_weights_packed_apart_may_be_appended():
    """So layers that share an input can be one."""
    a, b = layer_of(256, 192, seed=2)[1], layer_of(64, 192, seed=3)[1]
    packed, steps = torch.cat((a.packed, b.packed)), torch.cat((a.steps, b.steps), dim=1)
    both = Int4Linear(a.int8, packed, steps, a.factors)
    rows = torch.randn(2, 192)
    assert torch.equal(both(rows), torch.cat((a(rows), b(rows)), dim=-1))


# --- the model


def int4_layers(vlm):
    return {name for name, module in vlm.model.named_modules() if isinstance(module, Int4Linear)}


def decoded(vlm, count=MOST_ROWS):
    """The decoder's last hidden states of a few tokens, without an image."""
    decoder = vlm.model.language_model
    with torch.inference_mode():
        return decoder(decoder.embed(torch.arange(100, 100 + count)[None]), slice(0, count), None, None)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_few_positions_give_what_float32_gives_with_the_same_weights(tmp_path, int8_cache, family):
    folder = save_reference(make_reference(family=family, std=0.2), tmp_path / "random")
    ours, exact = paligemma.load(folder, dtype="int4"), paligemma.load(folder, dtype="float32")
    assert ours.weight_dtype == INT4
    assert ours.dtype == torch.float32
    names = int4_layers(ours)
    assert names == {name.removesuffix(".weight") for name in int4_weights(exact.model)}
    assert len(names) == 9, "those of the MLPs; the output layer has 2401 rows, which the kernel does not take"
    before = decoded(exact)
    for name, module in exact.model.named_modules():
        if name in names:
            in_int4 = stands_for(*quantize(module.weight.detach()), ours.model.get_submodule(name))
            module.weight = torch.nn.Parameter(in_int4)
    assert relative_error(decoded(ours), decoded(exact)) < 0.2 * relative_error(before, decoded(exact))


def test_the_output_layer_is_in_int4_where_its_kernel_takes_it(tmp_path, int8_cache):
    reference = make_reference(std=0.2)
    reference.resize_token_embeddings(2432)
    vlm = paligemma.load(save_reference(reference, tmp_path / "random"), dtype="int4")
    output = vlm.model.language_model.embed_tokens.output
    assert isinstance(output, Int4Linear)
    states = torch.randn(3, 64)
    assert torch.equal(vlm.model.language_model.embed_tokens.logits(states), output.multiply_in_int4(states))
    assert vlm.model.language_model.embed_tokens.weight.dtype == torch.int8


def test_answers_of_the_embedded_checkpoint_are_right_and_the_page_says_what_int4_is(int8_cache):
    vlm = paligemma.load(dtype="int4")
    assert vlm.generate(EXAMPLES / "cats.png", "caption en") == "2 cats on an orange background"
    models = Models([None], lambda source, **_: vlm)
    models.get(EMBEDDED)
    assert "int4 on cpu, where answers come faster than in int8 and are less exact." in models.status(EMBEDDED)


def test_many_positions_give_what_int8_gives(folder, int8_cache):
    in_int8, in_int4 = (paligemma.load(folder, dtype=dtype) for dtype in ("int8", "int4"))
    assert torch.equal(decoded(in_int8, 4), decoded(in_int4, 4))
    assert relative_error(decoded(in_int8, 3), decoded(in_int4, 3)) > 0.01


# --- the weights on the disk


@pytest.fixture
def written(monkeypatch):
    """In which forms weights were written."""
    forms, write = [], store.write_files
    monkeypatch.setattr(store, "write_files", lambda form, *rest: forms.append(form) or write(form, *rest))
    return forms


def test_int4_weights_are_made_once_of_the_int8_ones(folder, int8_cache, written):
    first = decoded(paligemma.load(folder, dtype="int4"))
    assert written == ["int8", "int4"]
    assert torch.equal(decoded(paligemma.load(folder, dtype="int4")), first)
    paligemma.load(folder, dtype="int8")
    assert written == ["int8", "int4"]
    assert len(list(int8_cache.iterdir())) == 2


def test_int4_weights_packed_for_another_cpu_are_made_anew(folder, int8_cache, written, monkeypatch):
    paligemma.load(folder, dtype="int4")
    monkeypatch.setattr(store, "layout", lambda: "another")
    paligemma.load(folder, dtype="int4")
    assert written == ["int8", "int4", "int4"]
    assert len(list(int8_cache.iterdir())) == 2, "those for the other are removed"


def test_flipped_bytes_are_noticed_and_made_good(folder, int8_cache, written, caplog):
    expected = decoded(paligemma.load(folder, dtype="int4"))
    (file,) = (file for file in int8_cache.glob("*/*.safetensors") if b'"BF16"' in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert torch.equal(decoded(paligemma.load(folder, dtype="int4")), expected)
    assert f"{file} holds damaged int4 weights; the next start makes them anew" in caplog.text
    assert torch.equal(decoded(paligemma.load(folder, dtype="int4")), expected)
    assert written == ["int8", "int4", "int4"]


def test_int4_weights_that_cannot_be_kept_are_made_in_memory_with_a_warning(folder, int8_cache, caplog, monkeypatch):
    expected = decoded(paligemma.load(folder, dtype="int4"))
    shutil.rmtree(int8_cache)
    paligemma.load(folder, dtype="int8")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert torch.equal(decoded(paligemma.load(folder, dtype="int4")), expected)
    assert f"int4 weights cannot be kept in {int8_cache}" in caplog.text


def test_a_checkpoint_with_int8_weights_gives_the_same(folder, int8_cache, tmp_path, written):
    expected = decoded(paligemma.load(folder, dtype="int4"))
    shared = write_int8_checkpoint(folder, tmp_path / "shared")
    shutil.rmtree(int8_cache)
    written.clear()
    assert torch.equal(decoded(paligemma.load(shared, dtype="int4")), expected)
    assert torch.equal(decoded(paligemma.load(shared, dtype="int4")), expected)
    assert written == ["int4"]
