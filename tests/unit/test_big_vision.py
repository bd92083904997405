"""Files of big_vision, written here by their documented layout, load as the checkpoint that they are made from."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from big_vision_files import TEXT, VISION, big_vision_arrays, save_npz
from conftest import ROOT
from random_checkpoints import TOKENIZER, make_reference, save_reference

import paligemma
from paligemma.checkpoints import save_checkpoint
from paligemma.checkpoints.big_vision import BigVisionFile, config_from_shapes
from paligemma.checkpoints.load import empty_model
from paligemma.checkpoints.official import DECODERS, official_config


def load(source, **options):
    return paligemma.load(source, **{"device": "cpu", "dtype": "float32", **options})


def logits(vlm):
    generator = torch.Generator().manual_seed(1)
    size, patches = vlm.config.vision.image_size, vlm.config.vision.num_patches
    pixel_values = torch.randn(2, 3, size, size, generator=generator).to(vlm.dtype)
    input_ids = torch.randint(4, 900, (2, patches + 7), generator=generator)
    with torch.no_grad():
        return vlm.model(pixel_values, input_ids)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A random checkpoint in the official layout."""
    reference = make_reference(kv_heads=2, layers=4, image_size=28, std=0.1)
    return load(save_reference(reference, tmp_path_factory.mktemp("official")))


@pytest.fixture(scope="module")
def arrays(official):
    return big_vision_arrays(official.model)


@pytest.fixture
def file(arrays, tmp_path):
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.json")
    return save_npz(tmp_path / "model.npz", arrays)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_npz_file_gives_the_logits_of_the_official_layout(family, kv_heads, tmp_path):
    reference = make_reference(family=family, kv_heads=kv_heads, image_size=28 * kv_heads, std=0.1)
    folder = save_reference(reference, tmp_path / "official")
    values = json.loads((folder / "config.json").read_text())
    text = values["text_config"]
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "max_position_embeddings"):
        text.pop(name, None)  # as in official checkpoints, and so for what the file does not tell
    text["query_pre_attn_scalar"] = text["head_dim"]
    (folder / "config.json").write_text(json.dumps(values))
    official = load(folder)
    vlm = load(save_npz(tmp_path / "model.npz", big_vision_arrays(official.model)), tokenizer=TOKENIZER)
    assert torch.equal(logits(vlm), logits(official))
    assert vlm.config.text.model_type == family
    assert vlm.config == official.config


@pytest.mark.parametrize(("family", "size"), DECODERS)
@pytest.mark.parametrize("resolution", [224, 896])
def test_sizes_of_official_checkpoints_follow_from_the_shapes_of_their_arrays(family, size, resolution):
    config = official_config(family, size, resolution)
    arrays = big_vision_arrays(empty_model(config))
    assert config_from_shapes({name.removeprefix("params/"): tuple(arrays[name].shape) for name in arrays}) == config


def test_folder_with_an_npz_file_answers_like_the_official_layout(official, file):
    image, settings = ROOT / "paligemma/demo/examples/sign.png", {"prompt": "caption en", "max_new_tokens": 8}
    assert list(load(file.parent).stream(image, **settings)) == list(official.stream(image, **settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_of_any_dtype_are_cast_to_the_one_asked_for(official, arrays, file, dtype):
    stored = getattr(torch, dtype)
    save_npz(file, {name: array.to(stored) for name, array in arrays.items()})
    for asked in (torch.float32, torch.bfloat16):
        parameters = dict(load(file, dtype=asked).model.named_parameters())
        for name, value in official.model.named_parameters():
            assert torch.equal(parameters[name], value.to(stored).to(asked)), name


def test_arrays_may_be_saved_by_column_without_the_name_of_their_tree_or_beside_a_training_state(
    official, arrays, file
):
    save_npz(file, {name.removeprefix("params/"): array for name, array in arrays.items()})
    assert torch.equal(logits(load(file)), logits(official))
    np.savez(file, **{name: np.asfortranarray(array) for name, array in arrays.items()})
    assert torch.equal(logits(load(file)), logits(official))
    save_npz(file, {**arrays, "opt/0/count": torch.zeros(())})
    assert torch.equal(logits(load(file)), logits(official))


def test_int8_weights_equal_those_of_the_official_layout(official, file, tmp_path):
    save_checkpoint(official.model, official.processor.tokenizer, tmp_path / "official", torch.float32)
    assert torch.equal(logits(load(file, dtype="int8")), logits(load(tmp_path / "official", dtype="int8")))


def test_reading_a_tensor_takes_the_memory_of_its_layer_only(file, arrays):
    opened = BigVisionFile(file)
    stack = arrays[TEXT + "mlp/gating_einsum"]
    tracemalloc.start()
    opened.get_tensor("language_model.layers.3.mlp.up_proj.weight")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * stack[3, 1].nbytes < stack.nbytes / 2


def test_tokenizer_may_be_elsewhere(file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (file.parent / "tokenizer.json").rename(elsewhere / "tokenizer.json")
    for place in (elsewhere, elsewhere / "tokenizer.json"):
        assert load(file, tokenizer=place).processor.tokenizer.get_vocab_size() > 256


def damaged(change):
    """A way to spoil a file, by changing the arrays in it."""
    return lambda file, arrays: save_npz(file, change(dict(arrays)))


def without(name):
    return damaged(lambda arrays: {key: array for key, array in arrays.items() if key != name})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file, arrays: file.write_bytes(file.read_bytes()[:5000]), "model.npz is truncated or damaged"),
        (lambda file, arrays: file.write_bytes(b"version https://git-lfs"), "model.npz is truncated or damaged"),
        (lambda file, arrays: save_npz(file, arrays, np.savez_compressed), "compressed; please save it anew"),
        (lambda file, arrays: save_npz(file, {"x": torch.zeros(2)}), "does not hold the arrays of a PaliGemma"),
        (lambda file, arrays: file.unlink(), "There is no file .*model.npz"),
        (
            lambda file, arrays: (file.parent / "tokenizer.json").unlink(),
            "no tokenizer.json, and a SentencePiece model",
        ),
        (
            lambda file, arrays: (file.parent / "tokenizer.json").rename(file.parent / "tokenizer.model"),
            "please copy the file from google/paligemma-3b-pt-224 there, or give its path as the tokenizer",
        ),
        (without(f"{TEXT}attn/kv_einsum/w"), "does not hold the arrays .*llm/layers/attn/kv_einsum/w"),
        (without(f"{VISION}LayerNorm_1/bias"), "lacks 3 tensors"),
        (damaged(lambda arrays: {**arrays, "params/img/x": torch.zeros(2)}), "unexpected tensor, img/x"),
        (
            damaged(lambda arrays: {**arrays, f"{TEXT}attn/attn_vec_einsum/w": torch.zeros(4, 2)}),
            r"attn_vec_einsum/w has the shape \[4, 2\]",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(file, arrays, spoil, sentence):
    spoil(file, arrays)
    with pytest.raises(paligemma.PaliGemmaError, match=sentence):
        load(file)


def test_folder_with_two_npz_files_asks_for_one_of_them(file):
    shutil.copy(file, file.parent / "other.npz")
    with pytest.raises(paligemma.PaliGemmaError, match=r"several checkpoints \(model.npz, other.npz\)"):
        load(file.parent)
