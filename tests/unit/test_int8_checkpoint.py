"""A checkpoint with int8 weights: written whole or not at all, and read as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, ROOT
from random_checkpoints import make_reference, save_reference
from safetensors.torch import load_file, save_file

import paligemma
from paligemma import PaliGemmaError
from paligemma.checkpoints.quantized.__main__ import main
from paligemma.checkpoints.quantized.checkpoint import write_int8_checkpoint

COMMAND = [sys.executable, "-m", "paligemma.checkpoints.quantized"]


@pytest.fixture(autouse=True)
def int8_cache(tmp_path, monkeypatch):
    """Where loading keeps int8 weights, for this test alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    return tmp_path / "cache" / "paligemma-int8"


@pytest.fixture
def source(tmp_path):
    return save_reference(make_reference(std=0.2), tmp_path / "source")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "made" / "int8"


@pytest.fixture
def written(source, target):
    return write_int8_checkpoint(source, target)


def logits_of(vlm):
    input_ids = torch.tensor([vlm.processor.input_ids("caption en")])
    size = vlm.config.vision.image_size
    with torch.inference_mode():
        return vlm.model(torch.zeros(1, 3, size, size), input_ids)


@pytest.mark.parametrize("is_tied", [True, False])
def test_it_gives_what_its_source_gives_in_int8(tmp_path, target, int8_cache, is_tied):
    reference = make_reference(family="gemma2", std=0.2)
    if not is_tied:
        reference.config.tie_word_embeddings = False
        reference.lm_head.weight = torch.nn.Parameter(torch.randn_like(reference.lm_head.weight) * 0.05)
    source = save_reference(reference, tmp_path / "source")
    expected = logits_of(paligemma.load(source, dtype="int8"))
    write_int8_checkpoint(source, target)
    shutil.rmtree(source)
    shutil.rmtree(int8_cache)
    loaded = paligemma.load(target)
    assert loaded.weight_dtype == torch.int8
    assert torch.equal(logits_of(loaded), expected)
    assert not int8_cache.exists(), "what is read as it is needs no second copy"


def test_it_can_be_read_in_other_dtypes(source, written):
    exact, ours = (logits_of(paligemma.load(folder, dtype="float32")) for folder in (source, written))
    assert F.cosine_similarity(exact.flatten(), ours.flatten(), dim=0) >= 0.99
    assert paligemma.load(written, dtype="bfloat16").weight_dtype == torch.bfloat16


def test_it_has_the_mask_decoder_and_a_card(target):
    write_int8_checkpoint(None, target)
    vlm = paligemma.load(target)
    assert vlm.generate(EXAMPLES / "cats.png", "caption en") == "2 cats on an orange background"
    assert vlm.mask_decoder is not None
    assert 'paligemma.load("int8")' in (target / "README.md").read_text()


def test_a_folder_that_is_there_is_left_as_it_is(source, target):
    target.mkdir(parents=True)
    with pytest.raises(PaliGemmaError, match="is there already; please give another folder, or remove it"):
        write_int8_checkpoint(source, target)
    assert not list(target.iterdir())


def test_int8_weights_are_not_rounded_again(written, tmp_path):
    with pytest.raises(PaliGemmaError, match="holds int8 weights already"):
        write_int8_checkpoint(written, tmp_path / "again")


def test_an_interrupted_making_leaves_nothing(source, target):
    def interrupt(doing, fraction):
        if fraction and fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_int8_checkpoint(source, target, progress=interrupt)
    assert not list(target.parent.iterdir())


def test_what_a_process_that_died_left_unfinished_is_removed(source, target):
    unfinished = target.parent / "unfinished-int8"
    unfinished.mkdir(parents=True)
    (unfinished / "00001.safetensors").write_bytes(bytes(1000))
    write_int8_checkpoint(source, target)
    assert list(target.parent.iterdir()) == [target]


def test_of_two_processes_at_once_one_writes(source, target, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*COMMAND, source, target], stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    ends = sorted((process.communicate()[1].splitlines()[-1], process.returncode) for process in processes)
    (refused, failed), (done, succeeded) = sorted(ends, key=lambda end: -end[1])
    assert (failed, succeeded) == (1, 0)
    assert "is there already" in refused
    assert "is written" in done
    assert list(target.parent.iterdir()) == [target]
    assert paligemma.load(target).weight_dtype == torch.int8


@pytest.mark.parametrize("reason", ["No space left on device", "Not a directory"])
def test_what_cannot_be_written_is_said_in_a_sentence(source, target, monkeypatch, reason):
    if reason == "Not a directory":
        target.parent.write_text("a file")
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(PaliGemmaError, match=rf"cannot be written \({reason}\); please choose a place with 0.000"):
        write_int8_checkpoint(source, target)
    assert not target.parent.is_dir() or not list(target.parent.iterdir())


def test_damaged_weights_are_refused(written):
    for file in written.glob("0*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    with pytest.raises(PaliGemmaError, match=r"safetensors holds damaged int8 weights; please fetch it again\."):
        paligemma.load(written)


def test_weights_without_their_scales_are_refused(written):
    (file,) = written.glob("0*.safetensors")
    tensors = load_file(file)
    del tensors["multi_modal_projector.linear.scale"]
    save_file(tensors, file)
    with pytest.raises(PaliGemmaError, match=r"lacks 1 tensors, the first is multi_modal_projector\.linear\.scale"):
        paligemma.load(written)


def test_another_format_is_refused(written):
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"]["format"] += 1
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(PaliGemmaError, match="please choose the checkpoint that they were made from"):
        paligemma.load(written)


def test_one_command_lists_what_is_kept_and_removes_what_nothing_reads(source, int8_cache, capsys):
    paligemma.load(source, dtype="int8")
    (kept,) = int8_cache.iterdir()
    for name in ("of-another-version", "unfinished-abc"):
        (int8_cache / name).mkdir()
    main(["--clean"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:] for line in lines] == [
        ["removed", str(int8_cache / "of-another-version")],
        ["kept", str(kept)],
        ["removed", str(int8_cache / "unfinished-abc")],
    ]
    assert list(int8_cache.iterdir()) == [kept]


@pytest.mark.parametrize("arguments", [[], ["SOURCE"], ["SOURCE", "FOLDER", "--clean"]])
def test_the_command_says_what_it_needs(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "please give SOURCE and FOLDER, or --clean alone" in capsys.readouterr().err


def test_the_command_ends_with_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="There is no folder /nowhere"):
        main(["/nowhere", str(tmp_path / "int8")])
    assert Path(tmp_path).is_dir()
