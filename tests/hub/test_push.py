"""What a run has made goes to the Hub, with a card, and is opened from there."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

import paligemma
from paligemma import PaliGemmaError
from paligemma.checkpoints import EMBEDDED_FOLDER
from paligemma.training import finetune
from paligemma.training.publish import push

WRITER = "hf_writer"


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    row = json.dumps({"image": "0.png", "prefix": "answer en which paint is it?", "suffix": "red"})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 8)
    return tmp_path / "train.jsonl"


def run(model, rows, output, *options):
    options = ["--epochs=1", "--batch-size=4", *options]
    finetune.main(["--model", str(model), "--data", str(rows), "--output", str(output), *options])


@pytest.mark.parametrize("full", [False, True])
def test_what_was_trained_is_pushed_with_a_card_and_opens_from_the_hub(
    hub, small, rows, tmp_path, monkeypatch, capsys, full
):
    base = shutil.copytree(small, tmp_path / "base")
    shutil.copy(EMBEDDED_FOLDER / "mask_decoder.safetensors", base)
    hub.add("google/paligemma-test", base)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub.uploads, hub.writers = tmp_path / "hub", {WRITER}
    folder = tmp_path / "tuned"
    run("google/paligemma-test", rows, folder, "--push", "ada/tuned", *(["--full"] if full else []))
    assert f"Pushed to {hub.url}/ada/tuned" in capsys.readouterr().out
    pushed = {file.name for file in (hub.uploads / "ada" / "tuned").iterdir()}
    assert {"README.md", "finetune.csv", "finetune.svg", "held_back.csv", "figures.json"} <= pushed
    weights = {"config.json", "tokenizer.json", "model.safetensors", "mask_decoder.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert pushed & (weights | adapter) == (weights if full else adapter)
    assert not any(name.endswith(".pt") or name == "options.json" for name in pushed)
    card = (hub.uploads / "ada" / "tuned" / "README.md").read_text()
    figures = json.loads((folder / "figures.json").read_text())
    assert "library_name: " + ("transformers" if full else "peft") in card
    assert ("A whole checkpoint" if full else "A LoRA adapter of rank 8") in card
    assert "on 7 rows of `train.jsonl`" in card
    assert f"| loss | {figures['before']['loss']:.3f} | {figures['after']['loss']:.3f} |" in card
    header = card.split("---")[1]
    assert "\nbase_model: google/paligemma-test\n" in header
    image, prompt = rows.parent / "0.png", "answer en which paint is it?"
    expected = paligemma.load(folder).generate(image, prompt, max_new_tokens=8)
    assert paligemma.load("ada/tuned").generate(image, prompt, max_new_tokens=8) == expected
    run(
        "google/paligemma-test", rows, folder, "--push", "ada/tuned", *(["--full"] if full else [])
    )  # once more, into what is there


def test_the_card_and_the_config_of_an_adapter_name_the_revision_of_its_base(hub, small, rows, tmp_path):
    hub.add("google/paligemma-test", small, "float")
    run("google/paligemma-test@float", rows, tmp_path / "tuned")
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "from [google/paligemma-test](https://huggingface.co/google/paligemma-test) (revision float) on" in card
    config = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("google/paligemma-test", "float")
    assert paligemma.load(tmp_path / "tuned").config.text.hidden_size == 32


@pytest.mark.parametrize(
    ("token", "advice"), [(None, "set HF_TOKEN to a token that may write"), ("x", "check the name")]
)
def test_a_push_that_is_refused_ends_with_a_sentence(hub, tmp_path, monkeypatch, token, advice):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for repository in ("ada/tuned", "no id at all"):
        with pytest.raises(PaliGemmaError) as caught:
            push(repository, tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{repository} could not be pushed (")
        assert advice in message
        assert "\n" not in message
    hub.close()
    with pytest.raises(PaliGemmaError, match="could not be pushed"):
        push("ada/tuned", tmp_path)
