"""int8: how exact its layers are, and how its weights are made once and kept."""

from __future__ import annotations

import json
import shutil
import warnings

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma import PaliGemmaError
from paligemma.checkpoints import quantized
from paligemma.quantization import Int8Linear, OneDnnWeight, pack, packing, quantize, rotation, turn, turn_back

# [in, out]: of the eye and of the voice in the official shapes, and of the embedded checkpoint.
SHAPES = [(1152, 1152), (1152, 4304), (4304, 1152), (2048, 4096), (16384, 2048), (192, 512)]


def relative_error(output, exact):
    return ((output - exact).norm() / exact.norm()).item()


def rows_of(kind, channels, count=130):
    rows = torch.randn(count, channels)
    if kind == "outliers":  # at least one
        rows[:, torch.randperm(channels)[: max(1, round(channels / 1000))]] *= 100
    if kind == "one giant":
        rows[:, 5] = 2000.0
    return rows


@pytest.fixture(autouse=True)
def within_packing():
    with packing():
        yield


@pytest.fixture
def int8_cache(tmp_path, monkeypatch):
    """Where int8 weights are kept, for this test alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "paligemma-int8"


@pytest.fixture
def folder(tmp_path):
    return save_reference(make_reference(std=0.2), tmp_path / "checkpoint")


# --- the layers


@pytest.mark.parametrize(("channels", "outputs"), SHAPES)
@pytest.mark.parametrize(("kind", "bound"), [("gaussian", 0.015), ("outliers", 0.03), ("one giant", 0.03)])
def test_a_layer_is_nearly_exact(channels, outputs, kind, bound):
    torch.manual_seed(0)
    weight = torch.randn(outputs, channels) * 0.02
    rows = rows_of(kind, channels)
    layer = Int8Linear(pack(*quantize(weight)))
    assert relative_error(layer(rows), rows @ weight.T) <= bound


def test_a_row_gives_what_it_gives_among_others():
    torch.manual_seed(0)
    layer = Int8Linear(pack(*quantize(torch.randn(512, 256))))
    rows = torch.cat([rows_of("gaussian", 256, 3), rows_of("one giant", 256, 1), torch.zeros(1, 256)])
    for row, output in zip(rows[:-1], layer(rows), strict=False):
        torch.testing.assert_close(layer(row[None])[0], output, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "count", "single_twice", "twice"),
    [
        ("one giant", 4, False, [0, 1, 2, 3]),
        ("one giant", 1, False, [0]),
        ("gaussian", 4, False, [3]),
        ("gaussian", 1, False, []),
        ("gaussian", 1, True, [0]),
    ],
)
def test_rows_that_go_in_twice_lose_little_by_rounding(kind, count, single_twice, twice):
    torch.manual_seed(0)
    rounded, scale = quantize(torch.randn(512, 16384))
    rows = rows_of(kind, 16384, count)
    exact = turn(rows) @ (rounded * scale[:, None]).T
    layer = Int8Linear(pack(rounded, scale), single_twice=single_twice)
    prepared = layer.prepare(rows)
    chosen = torch.arange(count)[prepared.twice] if prepared.twice is not None else torch.arange(0)
    assert chosen.tolist() == twice
    once = layer(prepared._replace(steps=prepared.steps[:count], twice=None))
    for row, output in enumerate(layer(rows)):
        error = relative_error(output, exact[row])
        if row in twice:
            assert error <= 0.01
            assert error < 0.7 * relative_error(once[row], exact[row])
        else:
            assert error == relative_error(once[row], exact[row])


def test_zeros_and_bias_come_through():
    bias = torch.randn(64)
    layer = Int8Linear(pack(*quantize(torch.randn(64, 128))), bias)
    assert torch.equal(layer(torch.zeros(2, 3, 128)), bias.expand(2, 3, 64))


def test_a_weight_of_zeros_gives_zeros():
    assert torch.equal(Int8Linear(pack(*quantize(torch.zeros(64, 128))))(torch.randn(2, 128)), torch.zeros(2, 64))


def test_layers_with_one_input_can_share_its_preparation():
    layer = Int8Linear(pack(*quantize(torch.randn(64, 128))))
    states = torch.randn(2, 5, 128)
    assert torch.equal(layer(layer.prepare(states)), layer(states))


def test_the_other_kernel_computes_the_same():
    """Which pack takes is a matter of the CPU; without VNNI instructions oneDNN's overflows now and then."""
    torch.manual_seed(0)
    weight, rows = torch.randn(512, 2048) * 0.02, torch.randn(16, 2048)
    layer = Int8Linear(OneDnnWeight(*quantize(weight)))
    assert relative_error(layer(rows), rows @ weight.T) <= 0.03


@pytest.mark.parametrize("channels", [1, 48, 127, 192, 1152, 4304, 16384])
def test_turning_keeps_lengths_and_can_be_undone(channels):
    matrix = rotation(channels)
    assert channels % len(matrix) == 0
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)
    rows = torch.randn(3, channels)
    torch.testing.assert_close(turn_back(turn(rows)), rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("even", [torch.ones(2048), torch.eye(2048)[7] * 100])
def test_turning_spreads_what_is_even_or_in_one_channel(even):
    turned = turn(even)
    assert turned.abs().amax() <= even.norm() * 0.2


# --- the model


@pytest.fixture(scope="module")
def tiny_int8(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub"))
        return paligemma.load(dtype="int8")


def test_every_linear_layer_is_int8(tiny_int8):
    kinds = [type(module) for module in tiny_int8.model.modules()]
    vision, text = tiny_int8.config.vision, tiny_int8.config.text
    assert torch.nn.Linear not in kinds
    # Query, key, value, output and two of the MLP; the same with three; the projector; the output.
    assert kinds.count(Int8Linear) == 6 * vision.num_hidden_layers + 7 * text.num_hidden_layers + 2
    assert tiny_int8.weight_dtype == torch.int8
    assert tiny_int8.dtype == torch.float32


def test_logits_are_nearly_those_of_float32(tiny, tiny_int8):
    torch.manual_seed(0)
    size = tiny.config.vision.image_size
    pixel_values = torch.rand(2, 3, size, size) * 2 - 1
    input_ids = torch.tensor([tiny.processor.input_ids("caption en")] * 2)
    with torch.inference_mode():
        exact, ours = tiny.model(pixel_values, input_ids), tiny_int8.model(pixel_values, input_ids)
    assert F.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) >= 0.999


def test_the_embedding_reads_the_rows_of_the_output(tiny, tiny_int8):
    ids = torch.arange(tiny.config.text.vocab_size)
    exact = tiny.model.language_model.embed_tokens(ids)
    embedding = tiny_int8.model.language_model.embed_tokens
    assert relative_error(embedding(ids[None])[0], exact) <= 0.01
    states = torch.randn(5, tiny.config.text.hidden_size)
    assert relative_error(embedding.logits(states), states @ exact.T) <= 0.015


# --- the weights on the disk


def test_int8_weights_are_made_once(folder, int8_cache, monkeypatch):
    first = paligemma.load(folder, dtype="int8")
    (kept,) = int8_cache.iterdir()
    monkeypatch.setattr(quantized, "write_int8_weights", lambda *_: pytest.fail("made again"))
    second = paligemma.load(folder, dtype="int8")
    assert list(int8_cache.iterdir()) == [kept]
    states = torch.randn(3, 64)
    layers = (vlm.model.language_model.layers[0].mlp.up_proj for vlm in (first, second))
    assert torch.equal(*(layer(states) for layer in layers))


def test_a_config_that_no_longer_fits_is_refused_though_int8_weights_are_there(folder, int8_cache):
    paligemma.load(folder, dtype="int8")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PaliGemmaError, match="lacks .* tensors, the first is language_model.model.layers.3"):
        paligemma.load(folder, dtype="int8")


def test_torchs_engine_is_left_as_it_was(int8_cache, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "onednn")
    before = list(warnings.filters)
    vlm = paligemma.load(dtype="int8")
    assert torch.backends.quantized.engine == "onednn"
    assert warnings.filters == before
    assert vlm.generate(EXAMPLES / "cats.png", "caption en") == "2 cats on an orange background"


def test_a_changed_checkpoint_gets_new_int8_weights(folder, int8_cache):
    paligemma.load(folder, dtype="int8")
    save_reference(make_reference(std=0.2, seed=1), folder)
    changed = paligemma.load(folder, dtype="int8")
    assert len(list(int8_cache.iterdir())) == 2
    fresh = paligemma.load(folder, dtype="float32")
    weight = fresh.model.language_model.layers[0].mlp.up_proj.weight
    states = torch.randn(3, 64)
    assert relative_error(changed.model.language_model.layers[0].mlp.up_proj(states), states @ weight.T) <= 0.015


def test_damaged_int8_weights_are_made_anew(folder, int8_cache):
    paligemma.load(folder, dtype="int8")
    (file,) = int8_cache.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert paligemma.load(folder, dtype="int8").weight_dtype == torch.int8
    assert file.stat().st_size > 1000


def test_int8_weights_may_be_in_several_files(folder, int8_cache, monkeypatch):
    whole = paligemma.load(folder, dtype="int8")
    shutil.rmtree(int8_cache)
    monkeypatch.setattr(quantized, "SHARD_BYTES", 10_000)
    parts = paligemma.load(folder, dtype="int8")
    assert len(list(int8_cache.glob("*/*.safetensors"))) > 5
    ids = torch.tensor([whole.processor.input_ids("caption en")])
    pixel_values = torch.zeros(1, 3, 56, 56)
    with torch.inference_mode():
        assert torch.equal(whole.model(pixel_values, ids), parts.model(pixel_values, ids))


def test_a_place_that_cannot_be_written_to_is_named(folder, int8_cache):
    int8_cache.write_text("not a folder")
    with pytest.raises(PaliGemmaError, match="int8 weights cannot be written to .*please make room there for"):
        paligemma.load(folder, dtype="int8")


def test_a_checkpoint_that_cannot_be_read_leaves_nothing_behind(folder, int8_cache):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(PaliGemmaError, match="truncated or damaged"):
        paligemma.load(folder, dtype="int8")
    assert not int8_cache.exists() or not list(int8_cache.iterdir())


def test_progress_is_told_from_nothing_to_nearly_all(folder, int8_cache):
    told = []
    paligemma.load(folder, dtype="int8", progress=lambda *what: told.append(what))
    for doing in ("Turning the weights into int8", "Packing the int8 weights"):
        fractions = [fraction for what, fraction in told if what == doing]
        assert fractions[0] == 0
        assert fractions == sorted(fractions)
        assert 0.9 < fractions[-1] <= 1
