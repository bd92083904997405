"""Checkpoints as they lie about on disks: written by transformers, in every layout of keys, whole and damaged."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoints import VOCABULARY, make_reference, reference_inputs, save_reference
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER, INDEX_FILE, canonical_name, save_checkpoint

VOCAB_SIZE = VOCABULARY.get_vocab_size()
NORM = "language_model.model.norm.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
HIDDEN_SIZE, VISION_HIDDEN_SIZE = 64, 48


both_families = pytest.mark.parametrize("reference", ["gemma", "gemma2"], indirect=True)


@pytest.fixture(scope="module")
def reference(request):
    """A small PaliGemma of transformers, with no parameter left at zero or one, where a mix-up would not show."""
    model = make_reference(family=getattr(request, "param", "gemma"), image_size=28, layers=2, kv_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def written(reference, tmp_path_factory):
    """The folder as transformers writes it; tests that change files work on a copy."""
    return save_reference(reference, tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def written_in_shards(reference, tmp_path_factory):
    return save_reference(reference, tmp_path_factory.mktemp("shards"), max_shard_size="100KB")


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


@pytest.fixture
def shards(written_in_shards, tmp_path):
    return Path(shutil.copytree(written_in_shards, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def parameters(written):
    return named(paligemma.load(written, device="cpu"))


def named(vlm):
    return dict(vlm.model.named_parameters())


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert torch.equal(actual[name], value), name


def assert_same_logits(vlm, reference):
    """Both models on two random images, each with a prompt that is prefix as a whole."""
    generator = torch.Generator().manual_seed(1)
    size, patches = vlm.config.vision.image_size, vlm.config.vision.num_patches
    pixel_values = torch.randn(2, 3, size, size, generator=generator)
    text = torch.randint(3, 900, (2, 7), generator=generator)
    input_ids = torch.cat((torch.full((2, patches), vlm.config.image_token_id), text), dim=1)
    with torch.no_grad():
        actual = vlm.model(pixel_values, input_ids)
        expected = reference(**reference_inputs(pixel_values, input_ids)).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def refusal(source, **options):
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(paligemma.PaliGemmaError) as caught:
        paligemma.load(source, device=options.pop("device", "cpu"), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_weights(folder, change):
    """Rewrite the tensors of a folder: `change` makes the new dictionary from that of the file."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def without(tensors, key):
    assert key in tensors
    return {name: tensor for name, tensor in tensors.items() if name != key}


# Folders that transformers writes


@both_families
def test_folder_written_by_transformers_gives_its_logits(written, reference):
    assert_same_logits(paligemma.load(written, device="cpu"), reference)


@both_families
def test_shards_written_by_transformers_give_its_logits(written_in_shards, reference):
    assert len(list(written_in_shards.glob("model-*-of-*.safetensors"))) > 2
    assert_same_logits(paligemma.load(written_in_shards, device="cpu"), reference)


@pytest.mark.parametrize("source", ["{}", "~/checkpoint", " {}  "], ids=["text", "in the home folder", "white space"])
def test_folder_may_be_given_as_text(folder, parameters, monkeypatch, source):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert_same(named(paligemma.load(source.format(folder), device="cpu")), parameters)


# Layouts of keys

LAYOUTS = {
    "official": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "nested in model": ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
    "nested, flat vision": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "flat vision": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    "all flat": ("language_model.", "vision_tower.", "multi_modal_projector."),
}
OUTPUT_KEYS = ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"]


@both_families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_keys_gives_the_same_parameters(folder, reference, parameters, layout):
    language, vision, projector = LAYOUTS[layout]
    parts = {
        language: reference.model.language_model,
        vision: reference.model.vision_tower,
        projector: reference.model.multi_modal_projector,
    }
    change_weights(
        folder,
        lambda _: {prefix + key: value for prefix, part in parts.items() for key, value in part.state_dict().items()},
    )
    assert_same(named(paligemma.load(folder, device="cpu")), parameters)


@pytest.mark.parametrize("key", OUTPUT_KEYS)
def test_output_layer_beside_the_embedding_changes_nothing(folder, parameters, key):
    change_weights(folder, lambda tensors: {**tensors, key: tensors[EMBEDDING].clone()})
    assert_same(named(paligemma.load(folder, device="cpu")), parameters)


@both_families
@pytest.mark.parametrize("key", OUTPUT_KEYS)
def test_output_layer_stands_in_for_an_absent_embedding(folder, parameters, key):
    change_weights(folder, lambda tensors: {**without(tensors, EMBEDDING), key: tensors[EMBEDDING]})
    assert_same(named(paligemma.load(folder, device="cpu")), parameters)


@pytest.fixture
def untied(reference):
    """The reference with an output layer of its own."""
    model = copy.deepcopy(reference)
    model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator) * 0.2)
    return model


@both_families
@pytest.mark.parametrize(("key", "says_tied"), [*zip(OUTPUT_KEYS, [True, False, False]), (OUTPUT_KEYS[0], False)])
def test_output_layer_of_its_own_gives_the_logits_of_transformers(folder, untied, key, says_tied):
    change_config(folder, tie_word_embeddings=says_tied)
    change_weights(folder, lambda tensors: {**tensors, key: untied.lm_head.weight.data})
    vlm = paligemma.load(folder, device="cpu")
    assert not vlm.config.tie_word_embeddings
    assert_same_logits(vlm, untied)
    if key == OUTPUT_KEYS[0]:
        opened = PaliGemmaForConditionalGeneration.from_pretrained(folder, local_files_only=True)
        assert_same_logits(vlm, opened.eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_layer_may_equal_the_embedding_in_another_dtype(folder, dtype):
    change_weights(
        folder,
        lambda tensors: {
            **tensors,
            EMBEDDING: tensors[EMBEDDING].to(dtype),
            "lm_head.weight": tensors[EMBEDDING].to(dtype).float(),
        },
    )
    assert paligemma.load(folder, device="cpu").config.tie_word_embeddings


@pytest.mark.parametrize(("absent", "left"), [("lm_head.weight", EMBEDDING), (EMBEDDING, "lm_head.weight")])
def test_one_of_two_layers_that_are_not_tied_is_missed(folder, absent, left):
    change_config(folder, tie_word_embeddings=False)
    change_weights(folder, lambda tensors: {**without(tensors, EMBEDDING), left: tensors[EMBEDDING]})
    assert f"lacks 1 tensors, the first is {absent} of shape [{VOCAB_SIZE}, {HIDDEN_SIZE}]" in refusal(folder)


@both_families
def test_tables_that_the_model_computes_and_a_pooling_head_are_left_out(folder, parameters):
    unused = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.head.probe": torch.ones(1, 1, 48),
        "model.vision_tower.head.attention.in_proj_weight": torch.ones(96, 48),
    }
    change_weights(folder, lambda tensors: {**tensors, **unused})
    assert_same(named(paligemma.load(folder, device="cpu")), parameters)


# Files


@pytest.mark.parametrize("index", [None, "not even JSON"])
def test_single_file_goes_before_other_shards_and_their_index(written, shards, parameters, index):
    for shard in shards.glob("model-*.safetensors"):
        save_file({key: value + 1 for key, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    shutil.copy(written / "model.safetensors", shards)
    if index:
        (shards / INDEX_FILE).write_text(index)
    assert_same(named(paligemma.load(shards, device="cpu")), parameters)


@pytest.mark.parametrize(
    "name", ["consolidated-{}.safetensors", "pytorch_model-{}.safetensors", "weights/[{}].safetensors"]
)
def test_shards_may_have_any_names(shards, parameters, name):
    rename_shards(shards, name)
    assert_same(named(paligemma.load(shards, device="cpu")), parameters)


def rename_shards(folder, name):
    """Call the shards of a folder after `name`, which a number is put into."""
    index = json.loads((folder / INDEX_FILE).read_text())
    for number, shard in enumerate(sorted(set(index["weight_map"].values()))):
        target = folder / name.format(number)
        target.parent.mkdir(exist_ok=True)
        (folder / shard).rename(target)
        index["weight_map"] = {
            key: name.format(number) if file == shard else file for key, file in index["weight_map"].items()
        }
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../{}.safetensors", "a/../../{}.safetensors", "/{}.safetensors", "..\\{}", "C:{}"])
def test_index_that_leaves_its_folder_is_refused(shards, name):
    index = json.loads((shards / INDEX_FILE).read_text())
    index["weight_map"][EMBEDDING] = name.format("secret")
    (shards / INDEX_FILE).write_text(json.dumps(index))
    assert (
        refusal(shards) == f"{shards / INDEX_FILE} lists files outside its folder; please do not use this checkpoint."
    )


BASE = {"base_model_name_or_path": "google/paligemma-3b-pt-224"}
PROGRAMS = {
    "bitsandbytes": {"quantization_config": {"load_in_8bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "MLX": {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}},
}


@pytest.mark.parametrize(
    ("name", "config", "content", "advice"),
    [
        ("model-q4_k.gguf", None, "a GGUF file for llama.cpp", "choose the checkpoint that it was made from"),
        ("adapter_model.bin", None, "an adapter only in pickled form (adapter_model.bin)", "write it as safetensors"),
        ("pytorch_model.bin", {}, "its weights only in pickled form (pytorch_model.bin)", "write them as safetensors"),
        ("pytorch_model-1-of-2.bin", {}, "its weights only in pickled form (pytorch_model-1-of-2.bin)", "write them"),
        ("model.fp16.safetensors", {}, "only a variant of its weights (model.fp16.safetensors)", "rename it to"),
        ("model-1-of-2.safetensors", {}, f"shards (model-1-of-2.safetensors), but no {INDEX_FILE}", "add the model"),
        *(
            ("model.safetensors", config, f"weights quantized for {program}", "choose the checkpoint that they were")
            for program, config in PROGRAMS.items()
        ),
    ],
)
def test_formats_of_other_programs_are_named_with_a_way_out(tmp_path, name, config, content, advice):
    (tmp_path / name).write_bytes(bytes(10))
    if name.startswith("adapter"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(BASE))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma", **config}))
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} holds {content}")
    assert f"; please {advice}" in message


def test_adapter_beside_whole_weights_is_left_out_with_a_warning(folder, parameters, caplog):
    (folder / "adapter_config.json").write_text(json.dumps(BASE))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert_same(named(paligemma.load(folder, device="cpu")), parameters)
    assert f"{folder}: the LoRA adapter beside the whole weights (for google/paligemma-3b-pt-224) is not" in caplog.text


# Dtypes and memory


@pytest.mark.parametrize(
    ("in_file", "asked", "expected"),
    [
        (torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, "auto", torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float16, "float16", torch.float16),
    ],
)
def test_weights_are_cast_to_the_dtype_that_is_asked_for(folder, parameters, in_file, asked, expected):
    change_weights(folder, lambda tensors: {key: value.to(in_file) for key, value in tensors.items()})
    vlm = paligemma.load(folder, device="cpu", dtype=asked)
    assert vlm.dtype == expected
    assert_same(named(vlm), {name: value.to(in_file).to(expected) for name, value in parameters.items()})


@both_families
def test_a_file_may_mix_dtypes(folder, parameters, reference):
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    mixed = {name: dtypes[number % 3] for number, name in enumerate(sorted(parameters))}
    change_weights(
        folder, lambda tensors: {key: value.to(mixed[canonical_name(key)]) for key, value in tensors.items()}
    )
    loaded = named(paligemma.load(folder, device="cpu"))
    assert_same(loaded, {name: value.to(mixed[name]).float() for name, value in parameters.items()})


def mappings(file):
    """The address ranges at which this process maps `file`."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    addresses = [line[0].split("-") for line in lines if line[-1] == str(file.resolve())]
    return [range(int(start, 16), int(end, 16)) for start, end in addresses]


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")


@needs_proc
def test_tensors_of_the_right_dtype_are_views_of_the_mapped_file(folder):
    vlm = paligemma.load(folder, device="cpu", dtype="float32")
    ranges = mappings(folder / "model.safetensors")
    copied = [name for name, value in named(vlm).items() if not any(value.data_ptr() in place for place in ranges)]
    assert copied == []


@needs_proc
def test_file_is_let_go_once_all_tensors_are_cast(folder):
    vlm = paligemma.load(folder, device="cpu", dtype="bfloat16")
    assert vlm.dtype == torch.bfloat16
    assert mappings(folder / "model.safetensors") == []


# Damage


LAYER = "language_model.model.layers.0.mlp.up_proj"
POST_NORM = "vision_tower.post_layernorm.bias"
IN_FILE = "{}/model.safetensors holds "


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: without(tensors, NORM), f"lacks 1 tensors, the first is {NORM} of shape [{HIDDEN_SIZE}]"),
        (lambda tensors: without(tensors, EMBEDDING), f"first is {EMBEDDING} of shape [{VOCAB_SIZE}, {HIDDEN_SIZE}]"),
        (
            lambda tensors: without(tensors, POST_NORM),
            f"vision_tower.vision_model.post_layernorm.bias of shape [{VISION_HIDDEN_SIZE}]",
        ),
        (lambda tensors: {**tensors, "lm_head.bias": torch.zeros(2)}, f"{IN_FILE}an unexpected tensor, lm_head.bias;"),
        (
            lambda tensors: {**tensors, NORM: torch.zeros(HIDDEN_SIZE + 1)},
            f"{{}}/model.safetensors: {NORM} has the shape [{HIDDEN_SIZE + 1}], expected [{HIDDEN_SIZE}]",
        ),
        (
            lambda tensors: {**tensors, "lm_head.weight": torch.zeros(2, HIDDEN_SIZE)},
            f"lm_head.weight has the shape [2, {HIDDEN_SIZE}], expected [{VOCAB_SIZE}, ",
        ),
        *(
            (lambda tensors, key=key: {**tensors, f"{LAYER}.{key}": torch.zeros(2)}, IN_FILE + expected)
            for key, expected in {
                "weight.absmax": "weights in the format of bitsandbytes, which cannot be read here; please choose",
                "SCB": "weights in the format of bitsandbytes",
                "qweight": "weights in the format of GPTQ or AWQ",
                "scales": "weights in the format of MLX",
                "lora_A.weight": "a LoRA adapter; please name it",
            }.items()
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, expected):
    change_weights(folder, change)
    message = refusal(folder)
    assert str(folder) in message
    assert expected.replace("{}", str(folder)) in message


def test_file_that_says_to_be_of_mlx_is_named(folder):
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "mlx"})
    assert f"{file} holds weights in the format of MLX" in refusal(folder)


@pytest.mark.parametrize("share", [0.5, 0.001, 0.0, None], ids=["half", "in the header", "empty", "another format"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_damaged_weights_are_refused_with_the_file_named(request, kind, share):
    file = sorted(request.getfixturevalue(kind).glob("*.safetensors"))[-1]
    if share is None:
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    else:
        os.truncate(file, int(file.stat().st_size * share))
    message = refusal(file.parent)
    assert message.startswith(f"{file} is truncated or damaged")
    assert "expected a whole safetensors file; please fetch it again" in message


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_missing_weights_are_refused_with_the_file_named(request, kind):
    file = sorted(request.getfixturevalue(kind).glob("*.safetensors"))[-1]
    file.unlink()
    assert refusal(file.parent) == f"{file} is missing; please fetch the checkpoint again."


@pytest.mark.parametrize(
    "content",
    [
        "",
        "weight_map",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["model.safetensors"]}}',
        '{"weight_map": {"a": "model.safetensors", "b": null}}',
    ],
)
def test_broken_index_is_refused_with_the_file_named(shards, content):
    (shards / INDEX_FILE).write_text(content)
    message = refusal(shards)
    assert message.startswith(f"{shards / INDEX_FILE} ")
    assert "shards; please fetch the checkpoint again" in message


def test_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    message = refusal(folder)
    assert message.startswith(f"{folder / 'tokenizer.json'} is missing; a checkpoint needs")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "Unknown"}}'])
def test_broken_tokenizer_is_refused_with_the_file_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert refusal(folder).startswith(f"{folder / 'tokenizer.json'} cannot be read as a tokenizer")


# What is asked for


@pytest.mark.parametrize("dtype", ["float12", "", torch.int64, 16])
def test_unknown_dtype_is_refused_with_the_choices(written, dtype):
    message = refusal(written, dtype=dtype)
    assert f"The dtype {dtype} is not known" in message
    assert "float32, bfloat16, float16" in message


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "cpu:x"])
def test_unknown_device_is_refused_with_a_way_out(written, device):
    message = refusal(written, device=device)
    assert f"The device {device} cannot be used here" in message
    assert message.endswith("please choose cpu.")


@pytest.mark.parametrize("source", ["{}/none", "./none", "none", "~/none/at/all", "~nobody-of-this-name/none", "a/b/c"])
def test_folder_that_does_not_exist_is_named(tmp_path, source):
    source = source.format(tmp_path)
    assert refusal(source).startswith(f"There is no folder {source}; please give a folder or a Hub id")


def test_file_instead_of_its_folder_is_refused(written):
    assert "please give a folder" in refusal(written / "model.safetensors")


# The embedded checkpoint


def test_embedded_checkpoint_loads_with_no_network_and_nothing_of_the_hub_imported(tmp_path):
    program = """
import sys

def offline(*arguments, **options):
    raise AssertionError("the network was asked")

import socket
socket.socket.connect = socket.create_connection = socket.getaddrinfo = offline

import paligemma
vlm = paligemma.load(device="cpu")
assert sum(value.numel() for value in vlm.model.parameters()) > 1_000_000
print(*sorted({"transformers", "gradio", "huggingface_hub", "accelerate"} & sys.modules.keys()))
print("loaded")
"""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(EMBEDDED_FOLDER.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded"]


def test_embedded_checkpoint_can_be_pushed_to_a_space():
    assert all(file.stat().st_size <= 10_000_000 for file in EMBEDDED_FOLDER.iterdir())


def test_embedded_checkpoint_opens_in_transformers_with_the_same_logits():
    reference, problems = PaliGemmaForConditionalGeneration.from_pretrained(
        EMBEDDED_FOLDER, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    assert not problems["mismatched_keys"]
    assert_same_logits(paligemma.load(device="cpu", dtype="float32"), reference.eval())


# Saving


def test_saved_checkpoint_loads_to_the_same_parameters_and_settings(written, parameters, tmp_path):
    vlm = paligemma.load(written, device="cpu")
    save_checkpoint(vlm.model, vlm.processor.tokenizer, tmp_path / "new" / "saved", torch.float32)
    saved = paligemma.load(tmp_path / "new" / "saved", device="cpu")
    assert_same(named(saved), parameters)
    assert saved.config == vlm.config
    assert saved.processor.input_ids("detect red circle") == vlm.processor.input_ids("detect red circle")


def test_saving_casts_the_file_and_leaves_the_model_alone(written, parameters, tmp_path):
    vlm = paligemma.load(written, device="cpu")
    save_checkpoint(vlm.model, vlm.processor.tokenizer, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert_same(named(vlm), parameters)
    rounded = {name: value.bfloat16().float() for name, value in parameters.items()}
    assert_same(named(paligemma.load(tmp_path, device="cpu")), rounded)


def test_checkpoint_can_be_saved_over_the_folder_that_it_was_loaded_from(folder, parameters):
    vlm = paligemma.load(folder, device="cpu")
    save_checkpoint(vlm.model, vlm.processor.tokenizer, folder, torch.float32)
    assert_same(named(vlm), parameters)
    assert_same(named(paligemma.load(folder, device="cpu")), parameters)


@both_families
def test_saved_checkpoint_opens_in_transformers_with_the_same_logits(written, tmp_path):
    vlm = paligemma.load(written, device="cpu")
    save_checkpoint(vlm.model, vlm.processor.tokenizer, tmp_path, torch.float32)
    reference, problems = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    assert_same_logits(vlm, reference.eval())


def test_saved_output_layer_of_its_own_opens_in_transformers_with_the_same_logits(untied, tmp_path):
    untied.save_pretrained(tmp_path / "written")
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.json", tmp_path / "written")
    vlm = paligemma.load(tmp_path / "written", device="cpu")
    save_checkpoint(vlm.model, vlm.processor.tokenizer, tmp_path / "saved", torch.float32)
    assert_same_logits(paligemma.load(tmp_path / "saved", device="cpu"), untied)
    opened = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert_same_logits(vlm, opened.eval())
