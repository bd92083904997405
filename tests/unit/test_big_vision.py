"""Files of big_vision, written here by their documented layout, load as the checkpoint that they are made from."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from random_checkpoints import TOKENIZER, make_reference, save_reference

import paligemma
from paligemma.checkpoints import save_checkpoint
from paligemma.checkpoints.big_vision import BigVisionFile

VISION, TEXT = "params/img/Transformer/encoderblock/", "params/llm/layers/"
ATTENTION = VISION + "MultiHeadDotProductAttention_0/"


def big_vision_arrays(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The arrays that big_vision saves of a model: layers stacked, heads apart, matrices [in, out]."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    text, vision_heads = model.config.text, (model.config.vision.num_attention_heads, -1)

    def stack(prefix, names, arrange):
        layers = [name.removesuffix(names) for name in weights if name.startswith(prefix) and name.endswith(names)]
        return torch.stack([arrange(weights[layer + names]) for layer in layers])

    def vision(name, arrange=lambda weight: weight):
        return stack("vision_tower.", name, arrange)

    def language(name, arrange=lambda weight: weight):
        return stack("language_model.", name, arrange)

    def by_head(heads):  # [heads * head_dim, in] to [heads, in, head_dim]
        return lambda weight: weight.unflatten(0, (heads, -1)).transpose(1, 2)

    arrays = {
        "params/img/embedding/kernel": weights["vision_tower.embeddings.patch_embedding.weight"].permute(2, 3, 1, 0),
        "params/img/embedding/bias": weights["vision_tower.embeddings.patch_embedding.bias"],
        "params/img/pos_embedding": weights["vision_tower.embeddings.position_embedding.weight"][None],
        "params/img/Transformer/encoder_norm/scale": weights["vision_tower.post_layernorm.weight"],
        "params/img/Transformer/encoder_norm/bias": weights["vision_tower.post_layernorm.bias"],
        "params/img/head/kernel": weights["multi_modal_projector.linear.weight"].T,
        "params/img/head/bias": weights["multi_modal_projector.linear.bias"],
        VISION + "LayerNorm_0/scale": vision("layer_norm1.weight"),
        VISION + "LayerNorm_0/bias": vision("layer_norm1.bias"),
        VISION + "LayerNorm_1/scale": vision("layer_norm2.weight"),
        VISION + "LayerNorm_1/bias": vision("layer_norm2.bias"),
        VISION + "MlpBlock_0/Dense_0/kernel": vision("mlp.fc1.weight", torch.t),
        VISION + "MlpBlock_0/Dense_0/bias": vision("mlp.fc1.bias"),
        VISION + "MlpBlock_0/Dense_1/kernel": vision("mlp.fc2.weight", torch.t),
        VISION + "MlpBlock_0/Dense_1/bias": vision("mlp.fc2.bias"),
        ATTENTION + "out/kernel": vision("out_proj.weight", lambda weight: weight.T.unflatten(0, vision_heads)),
        ATTENTION + "out/bias": vision("out_proj.bias"),
        "params/llm/embedder/input_embedding": weights["language_model.embed_tokens.weight"],
        "params/llm/final_norm/scale": weights["language_model.norm.weight"],
        TEXT + "attn/q_einsum/w": language("q_proj.weight", by_head(text.num_attention_heads)),
        TEXT + "attn/kv_einsum/w": torch.stack(
            [language(f"{one}_proj.weight", by_head(text.num_key_value_heads)) for one in "kv"], dim=1
        ),
        TEXT + "attn/attn_vec_einsum/w": language(
            "o_proj.weight", lambda weight: weight.T.unflatten(0, (text.num_attention_heads, -1))
        ),
        TEXT + "mlp/gating_einsum": torch.stack(
            [language("gate_proj.weight", torch.t), language("up_proj.weight", torch.t)], dim=1
        ),
        TEXT + "mlp/linear": language("down_proj.weight", torch.t),
        TEXT + "pre_attention_norm/scale": language("input_layernorm.weight"),
        TEXT + "pre_ffw_norm/scale": language("post_attention_layernorm.weight"),
    }
    for array, layer in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        arrays[f"{ATTENTION}{array}/kernel"] = vision(
            f"{layer}.weight", lambda weight: weight.T.unflatten(1, vision_heads)
        )
        arrays[f"{ATTENTION}{array}/bias"] = vision(f"{layer}.bias", lambda bias: bias.unflatten(0, vision_heads))
    if "language_model.layers.0.post_feedforward_layernorm.weight" in weights:
        arrays[TEXT + "post_attention_norm/scale"] = language("post_attention_layernorm.weight")
        arrays[TEXT + "pre_ffw_norm/scale"] = language("pre_feedforward_layernorm.weight")
        arrays[TEXT + "post_ffw_norm/scale"] = language("post_feedforward_layernorm.weight")
    return arrays


def save_npz(path: Path, arrays: dict[str, torch.Tensor], save=np.savez) -> Path:
    """Write the arrays as numpy does; bfloat16, which it does not know, as two bytes of anything."""
    path.parent.mkdir(exist_ok=True)
    save(
        path,
        **{
            name: array.contiguous().view(torch.int16).numpy().view("V2")
            if array.dtype == torch.bfloat16
            else array.contiguous().numpy()
            for name, array in arrays.items()
        },
    )
    return path


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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_npz_file_gives_the_logits_of_the_official_layout(kv_heads, tmp_path):
    reference = make_reference(kv_heads=kv_heads, image_size=28 * kv_heads, std=0.1)
    official = load(save_reference(reference, tmp_path / "official"))
    file = save_npz(tmp_path / "model.npz", big_vision_arrays(official.model))
    vlm = load(file, tokenizer=TOKENIZER)
    assert torch.equal(logits(vlm), logits(official))
    for part in ("vision", "text"):
        sizes, expected = vars(getattr(vlm.config, part)), vars(getattr(official.config, part))
        assert {**sizes, "max_position_embeddings": 0} == {**expected, "max_position_embeddings": 0}


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


def test_int8_weights_equal_those_of_the_official_layout(official, file, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
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
        (lambda file, arrays: (file.parent / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (
            lambda file, arrays: (file.parent / "tokenizer.json").rename(file.parent / "tokenizer.model"),
            "SentencePiece model and no tokenizer.json",
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
