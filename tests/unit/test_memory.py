"""Memory that a checkpoint takes, computed from its sizes before there is a weight."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER, load
from paligemma.checkpoints.load import empty_model
from paligemma.checkpoints.memory import WIDE_TENSORS, check_fits, running_bytes, weight_bytes
from paligemma.config import PaliGemmaConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def empty():
    return empty_model(PaliGemmaConfig.from_file(EMBEDDED_FOLDER / "config.json"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_weights_are_those_of_the_loaded_model(empty, dtype):
    loaded = paligemma.load(device="cpu", dtype=dtype).model
    assert weight_bytes(empty, dtype) == sum(parameter.nbytes for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_bytes_of_quantized_weights_are_those_of_the_stored_ones(empty, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    load(device="cpu", dtype=dtype)
    others, stored = dict(empty.named_parameters()), 0  # the stores have what is int8 and int4, and its scales
    for file in tmp_path.glob("paligemma-int8/*/*.safetensors"):
        with safe_open(file, framework="pt") as mapped:
            for key in mapped.keys():
                stored += mapped.get_tensor(key).nbytes
                others.pop(key, None)
    assert stored > 0
    assert weight_bytes(empty, getattr(torch, dtype)) == stored + sum(
        4 * parameter.numel() for parameter in others.values()
    )


def test_running_takes_a_longer_cache_for_larger_images(empty):
    config = empty.config
    vision = dataclasses.replace(config.vision, image_size=2 * config.vision.image_size)
    larger = empty_model(dataclasses.replace(config, vision=vision))
    text, positions = config.text, vision.num_patches - config.vision.num_patches
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    extra = positions * (cached + WIDE_TENSORS * text.intermediate_size + config.vision.hidden_size)
    assert running_bytes(larger, torch.bfloat16) - running_bytes(empty, torch.bfloat16) == 2 * extra


def test_checkpoint_that_cannot_fit_is_refused_with_the_sizes_and_what_would(empty):
    weights = weight_bytes(empty, torch.float32)
    check_fits("any/name", empty, torch.float32, CPU, weights)
    with pytest.raises(paligemma.PaliGemmaError, match="please choose the dtype bfloat16 .*, the dtype int8 .*larger"):
        check_fits("any/name", empty, torch.float32, CPU, weights - 1)
    with pytest.raises(
        paligemma.PaliGemmaError, match=r"billion parameters, .* float32 take .* GB, but cpu has 0.0 GB"
    ):
        check_fits("any/name", empty, torch.float32, CPU, 100)


def test_loading_refuses_what_cannot_fit_before_weights_are_read(tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(EMBEDDED_FOLDER / name)
    module = sys.modules["paligemma.checkpoints.load"]  # its name is also that of the function
    monkeypatch.setattr(module, "total_memory", lambda device: 1000)
    with pytest.raises(paligemma.PaliGemmaError, match=f"{tmp_path} has .* please choose a smaller checkpoint or"):
        load(tmp_path, device="cpu", dtype="float32")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_memory_that_ends_while_loading_is_a_sentence(dtype):
    script = f"""
import paligemma, re, resource

def end_memory(needed):
    taken = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
    resource.setrlimit(resource.RLIMIT_AS, (taken, taken))

try:
    paligemma.load(dtype={dtype!r}, make_room=end_memory)
except paligemma.PaliGemmaError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ran.stdout.startswith("The memory of cpu is too small; please choose the dtype bfloat16, "), ran.stderr


def test_answering_imports_no_compiler():
    """It takes a second and 70 MB, and some operators of torch on `meta` bring it along."""
    script = """
import sys, paligemma
from PIL import Image
paligemma.load().generate(Image.new("RGB", (9, 9)), "caption en", max_new_tokens=2)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)
