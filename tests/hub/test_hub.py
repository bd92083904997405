"""Checkpoints from the Hub, which a server on this machine stands in for."""

import json
import shutil
import sys

import huggingface_hub
import pytest
import torch
from big_vision_files import big_vision_arrays, save_npz
from hub_server import BAD_TOKEN, commit_of
from PIL import Image

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER, INDEX_FILE
from paligemma.checkpoints.adapters import LoraConfig, save_adapter
from paligemma.checkpoints.quantized.checkpoint import write_int8_checkpoint
from paligemma.training.lora import add_lora, lora_matrices, target_modules

NAME = "google/paligemma-test"
MEMBER, STRANGER = "hf_member", "hf_stranger"


def load(name=NAME, **options):
    return paligemma.load(name, device="cpu", dtype="float32", **options)


def is_small(vlm):
    return vlm.config.text.hidden_size == 32


def refusal(name=NAME, **options):
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(paligemma.PaliGemmaError) as caught:
        load(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_checkpoint_of_the_hub_answers_as_from_its_folder(hub):
    hub.add(NAME, EMBEDDED_FOLDER)
    image = Image.linear_gradient("L")
    settings = {"prompt": "caption en", "max_new_tokens": 6}
    expected = list(paligemma.load(EMBEDDED_FOLDER, device="cpu", dtype="float32").stream(image, **settings))
    assert expected
    assert list(load().stream(image, **settings)) == expected


def test_int8_weights_are_fetched_and_read_as_they_are(hub, tmp_path):
    folder = write_int8_checkpoint(None, tmp_path / "int8")
    hub.add(NAME, folder)
    vlm = paligemma.load(NAME, device="cpu")
    assert vlm.weight_dtype == torch.int8
    assert {"config.json", "others.safetensors", INDEX_FILE} <= hub.fetched()
    assert not (tmp_path / "paligemma-int8").is_dir() or not list((tmp_path / "paligemma-int8").iterdir())
    expected, image = paligemma.load(folder, device="cpu"), Image.linear_gradient("L")
    assert vlm.generate(image, "caption en") == expected.generate(image, "caption en")


def test_only_the_files_that_loading_needs_are_fetched(hub, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "repository")
    (folder / "generation_config.json").write_text("{}")
    for name in (
        "README.md",
        "flax_model.msgpack",
        "pytorch_model.bin",
        "paligemma-3b-pt-224.npz",
        "tokenizer.model",
        "special_tokens_map.json",
        "original/model.safetensors",
        INDEX_FILE,
        "model-00001-of-00001.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(1000))
    hub.add(NAME, folder)
    assert is_small(load())
    described = {"config.json", "generation_config.json", INDEX_FILE}
    assert hub.fetched() == {*described, "tokenizer.json", "model.safetensors"}
    assert not any("original" in path for _, path, _ in hub.requests)


def test_a_checkpoint_that_cannot_fit_is_refused_before_its_weights_are_fetched(hub, small, monkeypatch):
    hub.add(NAME, small)
    monkeypatch.setattr(sys.modules["paligemma.checkpoints.load"], "total_memory", lambda device: 1000)
    assert f"{NAME} has 0.0 billion parameters, which in float32 take" in refusal()
    assert hub.fetched() <= {"config.json"}


def test_a_checkpoint_of_big_vision_is_fetched_and_read(hub, small, tmp_path):
    folder = tmp_path / "repository"
    save_npz(folder / "paligemma-3b-pt-224.bf16.npz", big_vision_arrays(load(small).model))
    hub.add(NAME, folder)
    assert "please copy the file from google/paligemma-3b-pt-224 there, or give its path" in refusal()
    assert is_small(load(tokenizer=small))
    assert hub.fetched() == {"paligemma-3b-pt-224.bf16.npz"}


@pytest.mark.parametrize(
    "shard",
    [
        "model-00001-of-00001.safetensors",
        "consolidated-1.safetensors",
        "pytorch_model-00001-of-00001.safetensors",
        "weights/[1].safetensors",
    ],
)
def test_index_and_the_shards_that_it_lists_are_fetched(hub, small, tmp_path, shard):
    folder = in_shards(shutil.copytree(small, tmp_path / "repository"), shard)
    (folder / "model-00009-of-00009.safetensors").write_bytes(bytes(10))
    hub.add(NAME, folder)
    assert is_small(load())
    assert hub.fetched() == {"config.json", "tokenizer.json", INDEX_FILE, shard.rpartition("/")[2]}


def in_shards(folder, shard):
    """The same checkpoint with an index that lists one shard."""
    (folder / shard).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / shard)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"any": shard}}))
    return folder


def test_shard_that_the_repository_lacks_is_named(hub, small, tmp_path):
    folder = in_shards(shutil.copytree(small, tmp_path / "repository"), "model-1.safetensors")
    (folder / "model-1.safetensors").unlink()
    hub.add(NAME, folder)
    assert refusal() == f"{NAME} lacks model-1.safetensors, which its index lists; please choose another revision."


def test_index_that_leaves_its_folder_is_refused(hub, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "repository")
    (folder / "model.safetensors").unlink()
    (folder / INDEX_FILE).write_text('{"weight_map": {"any": "../secret.safetensors"}}')
    hub.add(NAME, folder)
    assert "lists files outside its folder" in refusal()


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (["model-q4_k.gguf"], None, "holds a GGUF file for llama.cpp"),
        (
            ["adapter_model.bin", "adapter_config.json"],
            None,
            "holds an adapter only in pickled form (adapter_model.bin)",
        ),
        (["pytorch_model.bin"], {}, "holds its weights only in pickled form (pytorch_model.bin)"),
        (["model.safetensors"], {"quantization_config": {"quant_method": "gptq"}}, "holds weights quantized for gptq"),
    ],
)
def test_formats_of_other_programs_are_named_before_anything_large_is_fetched(hub, tmp_path, names, config, expected):
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("tokenizer.json", *names):
        (folder / name).write_bytes(bytes(10))
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "paligemma", **config}))
    if "adapter_config.json" in names:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/base"}')
    hub.add(NAME, folder)
    message = refusal()
    assert message.startswith(f"{NAME} {expected}")
    assert "; please " in message
    assert hub.fetched() <= {"config.json", "adapter_config.json", INDEX_FILE}


def test_adapter_beside_whole_weights_is_left_out_with_a_warning(hub, small, tmp_path, caplog):
    folder = shutil.copytree(small, tmp_path / "repository")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/base"}')
    hub.add(NAME, folder)
    assert is_small(load())
    assert f"{NAME}: the LoRA adapter beside the whole weights (for google/base) is not applied" in caplog.text


def test_an_adapter_is_fetched_with_its_base_and_only_what_it_takes(hub, small, tmp_path):
    config = LoraConfig(NAME, 2, 4, target_modules(["decoder"]), revision="float")
    vlm = paligemma.load(small)
    add_lora(vlm.model, config)
    matrices = lora_matrices(vlm.model)
    for _, up in matrices.values():
        torch.nn.init.normal_(up)
    save_adapter(config, matrices, tmp_path / "adapter")
    for name in ("README.md", "tokenizer.json", "optimizer.pt", "checkpoint-10/adapter_model.safetensors"):
        (tmp_path / "adapter" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).write_bytes(bytes(1000))
    hub.add("ada/adapter", tmp_path / "adapter")
    hub.add(NAME, small, "float")
    pixel_values, input_ids = torch.ones(1, 3, 28, 28), torch.tensor([vlm.processor.input_ids("caption en")])
    expected = vlm.model(pixel_values, input_ids)
    for adapted in (load("ada/adapter"), load(f"{NAME}@float", adapter="ada/adapter")):
        torch.testing.assert_close(adapted.model(pixel_values, input_ids), expected, rtol=0, atol=1e-4)
    paths = {path for method, path, _ in hub.requests if method == "GET" and "/ada/adapter/resolve/" in path}
    assert {path.rpartition("/")[2] for path in paths} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(paths) == 2
    hub.revisions.pop(NAME)
    shutil.rmtree(tmp_path / "cache")
    assert f"The Hub knows no repository {NAME}" in refusal("ada/adapter")


def test_all_files_are_those_of_one_commit_though_a_branch_may_move(hub, small):
    hub.add(NAME, small)
    paligemma.load(NAME, device="cpu")
    paths = [path for _, path, _ in hub.requests]
    described = max(place for place, path in enumerate(paths) if path.endswith("/config.json"))
    assert any(path.endswith("/model.safetensors") for path in paths[described:])
    assert not [path for path in paths[described + 1 :] if "/main" in path]


def test_progress_of_fetching_goes_up_to_the_whole(hub, small):
    hub.add(NAME, small)
    reports = []
    load(progress=lambda *report: reports.append(report))
    fractions = [fraction for doing, fraction in reports if doing == f"Downloading {NAME}"]
    assert fractions[0] is None
    assert fractions[-1] == 1
    assert all(0 <= fraction <= 1 for fraction in fractions[1:])


def test_second_load_fetches_nothing_again(hub, small):
    hub.add(NAME, small)
    load()
    hub.requests.clear()
    assert is_small(load())
    assert hub.fetched() == set()


def test_second_load_needs_no_network(hub, small):
    hub.add(NAME, small)
    load()
    hub.close()
    assert is_small(load())


def test_second_load_needs_no_hub_in_good_health(hub, small):
    hub.add(NAME, small)
    load()
    hub.failing = ("/",)
    assert is_small(load())


@pytest.mark.parametrize("revision", ["v2", commit_of(NAME, "v2"), "refs/pr/1"])
def test_revision_after_the_name_is_honored(hub, small, revision):
    hub.add(NAME, EMBEDDED_FOLDER)
    hub.add(NAME, small, revision="v2")
    hub.add(NAME, small, revision="refs/pr/1")
    assert is_small(load(f"{NAME}@{revision}"))
    assert not is_small(load())


def test_white_space_around_a_name_is_trimmed(hub, small):
    hub.add(NAME, small)
    assert is_small(load(f" {NAME}  "))


def test_folder_of_the_same_name_goes_before_the_hub(hub, small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert is_small(load())
    assert hub.requests == []


def test_token_of_the_environment_opens_a_gated_repository(hub, small, monkeypatch):
    hub.add(NAME, small)
    hub.gated, hub.members = {NAME}, {MEMBER}
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert is_small(load())
    assert {authorization for _, path, authorization in hub.requests if NAME in path} == {f"Bearer {MEMBER}"}


def test_no_token_is_sent_where_there_is_none(hub, small):
    hub.add(NAME, small)
    load()
    assert {authorization for _, path, authorization in hub.requests if NAME in path} == {None}


def test_gated_without_a_token_says_where_to_accept_and_to_set_one(hub, small):
    hub.add(NAME, small)
    hub.gated = {NAME}
    message = refusal()
    assert f"{NAME} is a gated repository" in message
    assert f"accept its license at https://huggingface.co/{NAME} and set HF_TOKEN" in message


def test_gated_with_a_token_of_no_access_says_whose_account_must_accept(hub, small, monkeypatch):
    hub.add(NAME, small)
    hub.gated, hub.members = {NAME}, {MEMBER}
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    message = refusal()
    assert f"{NAME} is a gated repository" in message
    assert f"https://huggingface.co/{NAME} with the account that your HF_TOKEN belongs to" in message


def test_token_without_the_permission_for_gated_repositories_is_refused_with_a_way_out(hub, small, monkeypatch):
    hub.add(NAME, small)
    hub.forbidden = {NAME}
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    message = refusal()
    assert f"The Hub forbids reading {NAME}" in message
    assert "set HF_TOKEN to a token that may read gated repositories" in message


@pytest.mark.parametrize("answer", ["Invalid username or password.", "Invalid credentials in Authorization header"])
def test_missing_repository_without_a_token_says_to_check_the_name_or_set_one(hub, answer):
    hub.answer_about_unknown = answer
    message = refusal()
    assert f"The Hub knows no repository {NAME}" in message
    assert "check the name, and if it is a private one, set HF_TOKEN" in message


def test_missing_repository_with_a_token_says_to_check_the_name_and_its_rights(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    message = refusal()
    assert f"The Hub knows no repository {NAME}" in message
    assert "check the name, and that your HF_TOKEN may read it" in message


def test_missing_revision_is_named_with_where_to_look(hub, small):
    hub.add(NAME, small)
    message = refusal(f"{NAME}@v9")
    assert f"{NAME} has no revision v9" in message
    assert f"https://huggingface.co/{NAME}" in message


def test_token_that_the_hub_does_not_accept_is_to_be_made_anew(hub, small, monkeypatch):
    hub.add(NAME, small)
    monkeypatch.setenv("HF_TOKEN", BAD_TOKEN)
    message = refusal()
    assert "The Hub does not accept your HF_TOKEN; please make a new one" in message
    assert BAD_TOKEN not in message


def test_no_network_and_nothing_in_the_cache_says_to_check_the_network(hub):
    hub.close()
    message = refusal()
    assert f"{NAME} is not in the local cache and the Hub cannot be reached" in message
    assert "check the network" in message


def test_offline_mode_and_nothing_in_the_cache_says_so(hub, small, monkeypatch):
    hub.add(NAME, small)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal() == (
        f"{NAME} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; please unset that."
    )
    assert hub.requests == []


def test_offline_mode_takes_what_is_in_the_cache(hub, small, monkeypatch):
    hub.add(NAME, small)
    load()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert is_small(load())


def test_cache_that_knows_no_list_of_files_is_enough(hub, small, tmp_path):
    hub.add(NAME, small)
    load()
    hub.close()
    for trees in (tmp_path / "cache").glob("*/trees"):
        shutil.rmtree(trees)
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    assert is_small(load())


def test_download_that_ended_early_is_not_taken_for_whole_without_network(hub, small):
    hub.add(NAME, small)
    hub.failing = ("/model.safetensors",)
    refusal()
    hub.close()
    assert f"{NAME} is not in the local cache and the Hub cannot be reached" in refusal()


def test_cache_that_cannot_be_written_to_is_named(hub, small, tmp_path):
    hub.add(NAME, small)
    (tmp_path / "cache").write_text("a file")
    message = refusal()
    assert message.startswith(f"{NAME} cannot be stored (")
    assert message.endswith("please set HF_HOME to a place with space for it.")


@pytest.mark.parametrize("part", ["/revision/", "/tree/", "/config.json", "/model.safetensors"])
def test_server_error_says_to_try_later(hub, small, part):
    hub.add(NAME, small)
    hub.failing = (part,)
    message = refusal()
    assert f"The Hub answered 500 for {NAME}" in message
    assert "try again later" in message


def test_connection_that_breaks_off_again_and_again_says_to_try_again(hub, small):
    hub.add(NAME, small)
    hub.cut = {"/model.safetensors": 1000}
    message = refusal()
    assert f"{NAME} could not be downloaded" in message
    assert "please try again" in message
    hub.cut = {}
    assert is_small(load())


def test_connection_that_breaks_off_twice_is_taken_up_where_it_broke(hub, small):
    hub.add(NAME, small)
    hub.cut = {"/model.safetensors": 2}
    fetched, expected = load().model, load(small).model
    for one, other in zip(fetched.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["google/", "/paligemma", "google/pali gemma", "google/pali..gemma", "google/@main"])
def test_name_that_the_hub_cannot_have_is_refused_without_asking(hub, name):
    assert "owner/name" in refusal(name)
    assert hub.requests == []


def test_repository_that_holds_another_model_is_refused_with_its_file_named(hub, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    hub.add(NAME, folder)
    message = refusal()
    assert "config.json: model_type is 'llama'" in message


def test_repository_without_a_checkpoint_is_refused_with_what_it_lacks(hub, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("Nothing here.")
    hub.add(NAME, folder)
    assert "a checkpoint needs its config.json" in refusal()
