"""int8: how exact its layers are, and how its weights are made once and kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma import PaliGemmaError
from paligemma.checkpoints.quantized import store
from paligemma.quantization import InputMemo, Int8Linear, pack, packing, quantize
from paligemma.quantization.packing import PACKED, OneDnnWeight, bytes_of, onednn_prepack
from paligemma.quantization.rounding import rotate, rotation, unrotate

# [in, out]: of vision encoder and decoders in the official shapes, and of the embedded checkpoint.
SHAPES = [(1152, 1152), (1152, 4304), (4304, 1152), (2048, 4096), (16384, 2048), (2304, 2048), (9216, 2304), (192, 512)]


def relative_error(output, exact):
    return ((output - exact).norm() / exact.norm()).item()


def rows_of(kind, channels, count=64):
    rows = torch.randn(count, channels)
    if kind == "outliers":  # at least one
        rows[:, torch.randperm(channels)[: max(1, round(channels / 1000))]] *= 100
    if kind == "one giant":
        rows[:, 5] = 2000.0
    return rows


def random_layer(outputs, channels, **settings):
    return Int8Linear(pack(*quantize(torch.randn(outputs, channels))), **settings)


@pytest.fixture(autouse=True)
def within_packing():
    with packing():
        yield


@pytest.fixture
def folder(tmp_path):
    return save_reference(make_reference(std=0.2), tmp_path / "checkpoint")


# --- the layers


@cache
def layer_of(outputs, channels):
    torch.manual_seed(0)
    weight = torch.randn(outputs, channels) * 0.02
    return weight, Int8Linear(pack(*quantize(weight)))


@pytest.mark.parametrize(("channels", "outputs"), SHAPES)
@pytest.mark.parametrize(("kind", "bound"), [("gaussian", 0.015), ("outliers", 0.03), ("one giant", 0.03)])
def test_a_layer_is_nearly_exact(channels, outputs, kind, bound):
    weight, layer = layer_of(outputs, channels)
    torch.manual_seed(0)
    rows = rows_of(kind, channels)
    assert relative_error(layer(rows), rows @ weight.T) <= bound


@pytest.mark.parametrize("single_residual", [False, True])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_sequence_gives_what_it_gives_among_others(positions, single_residual):
    torch.manual_seed(0)
    layer = random_layer(512, 256, single_residual=single_residual)
    sequences = [rows_of(kind, 256, positions) for kind in ("gaussian", "one giant", "gaussian", "outliers")]
    together = torch.stack([*sequences, torch.zeros(positions, 256)])
    for sequence, output in zip(together, layer(together)):
        torch.testing.assert_close(layer(sequence[None])[0], output, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "count", "single_residual", "expected"),
    [
        ("one giant", 4, False, [3]),
        ("gaussian", 4, False, [3]),
        ("gaussian", 1, False, []),
        ("gaussian", 1, True, [0]),
    ],
)
def test_rows_with_a_residual_lose_little_by_rounding(kind, count, single_residual, expected):
    torch.manual_seed(0)
    rounded, scale = quantize(torch.randn(512, 16384))
    rows = rows_of(kind, 16384, count)
    exact = rotate(rows) @ (rounded * scale[:, None]).T
    layer = Int8Linear(pack(rounded, scale), single_residual=single_residual)
    prepared = layer.prepare(rows[None])
    chosen = [] if prepared.residual_rows is None else torch.arange(count)[prepared.residual_rows].tolist()
    assert chosen == expected
    without = layer.weight.multiply(prepared.rounded[:count]) * prepared.step
    for row, output in enumerate(layer(rows[None])[0]):
        error = relative_error(output, exact[row])
        if row in expected:
            assert error <= 0.01
            assert error < 0.7 * relative_error(without[row], exact[row])
        else:
            assert error == relative_error(without[row], exact[row])


def test_zeros_and_bias_come_through():
    bias = torch.randn(64)
    assert torch.equal(random_layer(64, 128, bias=bias)(torch.zeros(2, 3, 128)), bias.expand(2, 3, 64))


def test_a_weight_of_zeros_gives_zeros():
    assert torch.equal(Int8Linear(pack(*quantize(torch.zeros(64, 128))))(torch.randn(2, 128)), torch.zeros(2, 64))


def test_the_other_kernel_computes_the_same():
    """Which pack takes is a matter of the CPU; without VNNI instructions oneDNN's overflows now and then."""
    torch.manual_seed(0)
    weight, rows = torch.randn(512, 2048) * 0.02, torch.randn(16, 2048)
    layer = Int8Linear(OneDnnWeight(*quantize(weight)))
    assert relative_error(layer(rows), rows @ weight.T) <= 0.03


@pytest.mark.parametrize(("outputs", "channels"), [(128, 64), (70, 100), (1, 1), (257, 4304)])
def test_the_second_weight_of_a_shape_is_packed_as_the_first(outputs, channels):
    capabilities = torch.cpu.get_capabilities()
    weights = [torch.randint(-127, 128, (outputs, channels), dtype=torch.int8) for _ in range(3)]
    first, *others = (onednn_prepack(weight) for weight in weights)
    for packed, weight in zip(others, weights[1:], strict=True):
        assert torch.equal(bytes_of(packed), bytes_of(torch.ops.onednn.qlinear_prepack(weight, None)))
    if capabilities.get("avx512_vnni"):
        assert PACKED[weights[0].shape] is first, "the fast way was not taken"


@pytest.mark.parametrize("channels", [1, 48, 127, 192, 1152, 4304, 16384])
def test_rotating_keeps_lengths_and_can_be_undone(channels):
    across, within = rotation(channels)
    assert channels % (len(across) * len(within)) == 0
    for matrix in (across, within):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)
    rows = torch.randn(3, channels)
    torch.testing.assert_close(unrotate(rotate(rows)), rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("even", [torch.ones(2048), torch.eye(2048)[7] * 100])
def test_rotating_spreads_what_is_even_or_in_one_channel(even):
    assert rotate(even).abs().amax() <= even.norm() * 0.15


@pytest.mark.parametrize("channels", [48, 1152, 4304, 16384])
def test_rotating_in_bfloat16_is_nearly_exact(channels):
    torch.manual_seed(0)
    rows = rows_of("outliers", channels)
    assert relative_error(rotate(rows, torch.bfloat16).float(), rotate(rows)) <= 0.004


def test_weights_are_the_same_however_many_threads_round_them():
    torch.manual_seed(0)
    weight, threads = torch.randn(300, 4304), torch.get_num_threads()
    rounded, scale = quantize(weight)
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, quantize(weight), (rounded, scale)))
    finally:
        torch.set_num_threads(threads)


# --- one preparation for all layers that share an input


@pytest.fixture
def prepared(monkeypatch):
    """Every input that is prepared, by the address of its numbers."""
    seen, prepare = [], Int8Linear.prepare
    monkeypatch.setattr(Int8Linear, "prepare", lambda layer, rows: seen.append(rows.data_ptr()) or prepare(layer, rows))
    return seen


def test_layers_with_one_input_prepare_it_once(prepared):
    memo = InputMemo()
    layers = [random_layer(outputs, 128, memo=memo) for outputs in (64, 32, 32)]
    states = torch.randn(2, 5, 128)
    for layer in layers:
        alone = Int8Linear(layer.weight)
        assert torch.equal(layer(states), alone(states))
    assert len(prepared) == 1 + len(layers)


def test_an_input_that_was_written_to_is_prepared_anew():
    memo = InputMemo()
    layer, states = random_layer(64, 128, memo=memo), torch.randn(3, 128)
    before = layer(states)
    states *= 2
    torch.testing.assert_close(layer(states), before * 2)


def test_what_was_prepared_is_freed_with_its_input():
    layer = random_layer(64, 128)
    with torch.inference_mode():
        states = torch.randn(3, 128)
        layer(states)
        assert layer.memo._last is not None
        del states
        assert layer.memo._last is None


def test_threads_that_share_a_memo_do_not_mix_their_inputs():
    memo = InputMemo()
    layers = [random_layer(64, 128, memo=memo) for _ in range(3)]
    inputs = torch.randn(8, 4, 128)
    expected = [[layer(states) for layer in layers] for states in inputs]

    def outputs(number):
        states = inputs[number % 8]
        return [layer(states) for layer in layers]

    with ThreadPoolExecutor(4) as threads:
        for number, actual in enumerate(threads.map(outputs, range(400))):
            assert all(map(torch.equal, actual, expected[number % 8]))


def test_the_model_prepares_each_input_once(tiny_int8, prepared):
    vision, text = tiny_int8.config.vision, tiny_int8.config.text
    for _ in tiny_int8.stream(EXAMPLES / "cats.png", "caption en", max_new_tokens=1):
        pass
    # Four a layer: to q, k and v; to the output; two in the MLP. The last layer computes queries of one position only.
    assert len(prepared) == 4 * vision.num_hidden_layers + 1 + 4 * text.num_hidden_layers + 1 + 1


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


def assert_nearly_the_logits_of_float32(exact, ours, cosine=0.99):
    """Layers of few channels, as random checkpoints have, are less exact than real ones."""
    torch.manual_seed(0)
    size = exact.config.vision.image_size
    pixel_values = torch.rand(2, 3, size, size) * 2 - 1
    input_ids = torch.tensor([exact.processor.input_ids("caption en")] * 2)
    with torch.inference_mode():
        logits = [vlm.model(pixel_values, input_ids).flatten() for vlm in (exact, ours)]
    assert F.cosine_similarity(*logits, dim=0) >= cosine


def test_logits_are_nearly_those_of_float32(tiny, tiny_int8):
    assert_nearly_the_logits_of_float32(tiny, tiny_int8, cosine=0.999)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_logits_of_random_checkpoints_are_nearly_those_of_float32(tmp_path, int8_cache, family, kv_heads):
    folder = save_reference(make_reference(family=family, kv_heads=kv_heads, std=0.2), tmp_path / "random")
    ours = paligemma.load(folder, dtype="int8")
    assert torch.nn.Linear not in map(type, ours.model.modules())
    assert_nearly_the_logits_of_float32(paligemma.load(folder, dtype="float32"), ours)


def test_logits_of_an_output_layer_of_its_own_are_nearly_those_of_float32(untied_folder, int8_cache):
    ours = paligemma.load(untied_folder, dtype="int8")
    assert isinstance(ours.model.lm_head, Int8Linear)
    assert ours.model.lm_head.single_residual
    assert ours.model.language_model.embed_tokens.output is None
    assert_nearly_the_logits_of_float32(paligemma.load(untied_folder, dtype="float32"), ours)


@pytest.fixture(params=["gemma", "gemma2"])
def untied_folder(request, tmp_path):
    reference = make_reference(family=request.param, std=0.2)
    reference.config.tie_word_embeddings = False
    reference.lm_head.weight = torch.nn.Parameter(torch.randn_like(reference.lm_head.weight) * 0.05)
    return save_reference(reference, tmp_path / "untied")


def test_the_embedding_reads_the_rows_of_the_output(tiny, tiny_int8):
    ids = torch.arange(tiny.config.text.vocab_size)
    exact = tiny.model.language_model.embed_tokens(ids)
    embedding = tiny_int8.model.language_model.embed_tokens
    assert relative_error(embedding(ids[None])[0], exact) <= 0.01
    states = torch.randn(5, tiny.config.text.hidden_size)
    assert relative_error(embedding.logits(states), states @ exact.T) <= 0.015


# --- the weights on the disk


def logits_of(vlm):
    input_ids = torch.tensor([vlm.processor.input_ids("caption en")])
    size = vlm.config.vision.image_size
    with torch.inference_mode():
        return vlm.model(torch.zeros(1, 3, size, size), input_ids)


@pytest.fixture
def written(monkeypatch):
    """How often int8 weights were written."""
    calls, write = [], store.write_files
    monkeypatch.setattr(store, "write_files", lambda *arguments: calls.append(1) or write(*arguments))
    return calls


def test_int8_weights_are_made_once(folder, int8_cache, written):
    first = paligemma.load(folder, dtype="int8")
    (kept,) = int8_cache.iterdir()
    second = paligemma.load(folder, dtype="int8")
    assert list(int8_cache.iterdir()) == [kept]
    assert len(written) == 1
    assert torch.equal(logits_of(first), logits_of(second))


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
    assert len(list(int8_cache.iterdir())) == 1, "those of the old version are removed"
    assert_nearly_the_logits_of_float32(paligemma.load(folder, dtype="float32"), changed)


def cut(files):
    files[0].write_bytes(files[0].read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda files: files[0].unlink(),
        lambda files: [file.unlink() for file in files],
        lambda files: shutil.copy(files[0], files[1]),
    ],
    ids=["a file cut short", "a file missing", "empty", "a file in another's place"],
)
def test_int8_weights_that_are_not_whole_are_made_anew(folder, int8_cache, monkeypatch, written, damage):
    monkeypatch.setattr(store, "SHARD_BYTES", 10_000)
    expected = logits_of(paligemma.load(folder, dtype="int8"))
    files = sorted(int8_cache.glob("*/*.safetensors"))
    assert len(files) > 5
    damage(files)
    assert torch.equal(logits_of(paligemma.load(folder, dtype="int8")), expected)
    assert len(written) == 2
    assert sorted(int8_cache.glob("*/*.safetensors")) == files


def test_flipped_bytes_are_noticed_and_made_good(folder, int8_cache, monkeypatch, written, caplog):
    monkeypatch.setattr(store, "SHARD_BYTES", 10_000)
    expected = logits_of(paligemma.load(folder, dtype="int8"))
    for file in sorted(int8_cache.glob("*/*.safetensors")):
        content = bytearray(file.read_bytes())
        content[-100] ^= 1  # in a weight or a scale
        content[-len(content) // 3] ^= 64
        file.write_bytes(content)
    damaged = paligemma.load(folder, dtype="int8")
    assert torch.equal(logits_of(damaged), expected)
    assert "holds damaged int8 weights; the next start makes them anew" in caplog.text
    assert torch.equal(logits_of(paligemma.load(folder, dtype="int8")), expected)
    assert len(written) == 2


def test_weights_of_a_checkpoint_beside_which_another_is_made_stay(folder, untied_folder, int8_cache, written):
    for _ in range(2):
        paligemma.load(folder, dtype="int8")
        paligemma.load(untied_folder, dtype="int8")
    assert len(written) == 2
    assert len(list(int8_cache.iterdir())) == 2


LOAD = """
import sys
import torch
import paligemma

torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
vlm = paligemma.load(sys.argv[1], dtype="int8")
ids = torch.tensor([vlm.processor.input_ids("caption en")])
with torch.inference_mode():
    print(vlm.model(torch.zeros(1, 3, 56, 56), ids).sum().item())
"""


def test_processes_that_find_damaged_weights_at_once_all_get_whole_ones(folder, int8_cache):
    expected = logits_of(paligemma.load(folder, dtype="int8")).sum().item()
    cut(list(int8_cache.glob("*/*.safetensors")))
    command = [sys.executable, "-c", LOAD, folder]
    package = {"PYTHONPATH": str(Path(paligemma.__file__).parents[1])}
    environment = {**os.environ, **package, "HF_HUB_CACHE": huggingface_hub.constants.HF_HUB_CACHE}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        print(file=process.stdin, flush=True)
    sums = [float(process.communicate()[0]) for process in processes]
    assert sums == pytest.approx([expected] * 2)
    assert len(list(int8_cache.iterdir())) == 1


def test_what_a_process_that_died_left_unfinished_is_removed(folder, int8_cache):
    (int8_cache / "unfinished-abc").mkdir(parents=True)
    (int8_cache / "unfinished-abc" / "00001.safetensors").write_bytes(bytes(1000))
    paligemma.load(folder, dtype="int8")
    assert not list(int8_cache.glob("unfinished-*"))


def no_space(folder):
    return SimpleNamespace(free=1000)


@pytest.mark.parametrize("reason", ["Not a directory", "No space left"])
def test_weights_that_cannot_be_kept_are_made_in_memory_with_a_warning(folder, int8_cache, monkeypatch, caplog, reason):
    expected = logits_of(paligemma.load(folder, dtype="int8"))
    shutil.rmtree(int8_cache)
    if reason == "No space left":
        monkeypatch.setattr(shutil, "disk_usage", no_space)
    else:
        int8_cache.write_text("a file")
    with caplog.at_level(logging.WARNING, logger="paligemma"):
        in_memory = paligemma.load(folder, dtype="int8")
    assert torch.equal(logits_of(in_memory), expected)
    assert f"int8 weights cannot be kept in {int8_cache}" in caplog.text
    assert "please set HF_HOME to a place with 0.00035 GB for them" in caplog.text
    assert not list(int8_cache.glob("*"))


def test_a_checkpoint_that_cannot_be_read_leaves_nothing_behind(folder, int8_cache):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(PaliGemmaError, match="truncated or damaged"):
        paligemma.load(folder, dtype="int8")
    assert not int8_cache.exists() or not list(int8_cache.iterdir())


def test_progress_is_reported_from_nothing_to_nearly_all(folder, int8_cache):
    reports = []
    paligemma.load(folder, dtype="int8", progress=lambda *report: reports.append(report))
    for doing in ("Turning the weights into int8", "Packing the int8 weights"):
        fractions = [fraction for what, fraction in reports if what == doing]
        assert fractions[0] == 0
        assert fractions == sorted(fractions)
        assert 0.9 < fractions[-1] <= 1
