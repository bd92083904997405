"""Fine-tuning: rows are checked before any step, runs go on after a kill, and what comes out is opened everywhere."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from random_checkpoints import make_reference, reference_inputs, save_reference
from transformers import PaliGemmaForConditionalGeneration

import paligemma
from paligemma import PaliGemmaError
from paligemma.training import data, finetune, loop
from paligemma.training.evaluate import answer_figures

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}
BOXES = "<loc0008><loc0016><loc0512><loc1000> cat ; <loc0100><loc0100><loc0200><loc0200> dog"


def write_rows(folder, count=24, several=False):
    """Images of plain colors, or pairs of them, with a question about the color."""
    rng, names, rows = np.random.default_rng(0), list(COLORS), []
    for number in range(count):
        name = names[number % 3]
        color = np.clip(np.array(COLORS[name]) + rng.integers(-20, 20, 3), 0, 255)
        Image.new("RGB", (40, 30), tuple(color.tolist())).save(folder / f"{number}.png")
        images = [f"{number}.png"] * 2 if several and number % 2 else f"{number}.png"
        rows.append({"image": images, "prefix": "answer en which paint is it?", "suffix": f"paint {name}"})
    return write_lines(folder, map(json.dumps, rows))


def write_lines(folder, lines):
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_reference(make_reference(std=0.1, image_size=28), tmp_path_factory.mktemp("base"))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def run(base, rows, output, *options):
    finetune.main(["--model", str(base), "--data", str(rows), "--output", str(output), *options])


def bad_rows():
    good = {"image": "0.png", "prefix": "ocr", "suffix": "SUN"}
    yield "{", "This is not JSON"
    yield "[]", "This is no JSON object"
    yield json.dumps({**good, "image": 5}), "“image” is no path, nor a list of them"
    yield json.dumps({**good, "image": []}), "“image” is no path, nor a list of them"
    yield json.dumps({**good, "image": ["0.png", ""]}), "“image” is no path, nor a list of them"
    yield json.dumps({**good, "image": "nowhere.png"}), "There is no file nowhere.png"
    yield json.dumps({**good, "image": "train.jsonl"}), "train.jsonl is not a picture"
    yield json.dumps({**good, "image": "cut.png"}), "cut.png"
    yield json.dumps({"image": "0.png", "suffix": "SUN"}), "There is no “prefix”"
    yield json.dumps({**good, "suffix": 3}), "“suffix” is 3; please give text"
    yield json.dumps({**good, "prefix": " "}), "The prompt is empty"
    yield json.dumps({**good, "suffix": "a<eos>"}), "contains <eos>"
    yield json.dumps({**good, "suffix": "cat " * 2000}), "is too long"


def test_each_bad_row_is_named_by_its_line_before_any_step(base, tmp_path, monkeypatch):
    write_rows(tmp_path, 1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-30])
    bad = list(bad_rows())
    good = json.dumps({"image": "0.png", "prefix": "ocr", "suffix": "SUN"})
    rows = write_lines(tmp_path, [good, *(line for line, _ in bad), "", good])
    with pytest.raises(SystemExit) as caught:
        run(base, rows, tmp_path / "run")
    sentences = str(caught.value).splitlines()
    assert len(sentences) == len(bad)
    for number, (sentence, (_, expected)) in enumerate(zip(sentences, bad), start=2):
        assert sentence.startswith(f"{rows}, line {number}: ")
        assert expected in sentence
        assert "please" in sentence
    assert not (tmp_path / "run" / "finetune.csv").exists()
    rows = write_lines(tmp_path, ["{"] * 50)
    with pytest.raises(SystemExit, match="and 30 more rows"):
        run(base, rows, tmp_path / "other run")


def test_a_file_that_cannot_be_read_or_has_no_rows_is_refused(base, tmp_path):
    with pytest.raises(SystemExit, match="cannot be read"):
        run(base, tmp_path / "nowhere.jsonl", tmp_path / "run")
    with pytest.raises(SystemExit, match="has no rows"):
        run(base, write_lines(tmp_path, []), tmp_path / "other run")


@pytest.mark.parametrize("share", ["0", "1", "0.001", "-1", "nan"])
def test_a_share_that_leaves_nothing_on_one_side_is_refused(base, tmp_path, share):
    with pytest.raises(SystemExit, match="cannot be held back"):
        run(base, write_rows(tmp_path), tmp_path / "run", f"--held-back={share}")


def test_every_row_is_seen_once_before_any_is_seen_again(tiny, tmp_path):
    examples = data.read_examples(write_rows(tmp_path, 10, several=True), tiny.processor)
    steps = data.ExampleSteps(tiny.processor, examples, 4, 3, seed=0)
    seen = [batch.pixel_values.flatten(2).mean(-1)[:, 0] for step in range(5) for batch, _ in steps[step]]
    means = torch.cat(seen).tolist()
    assert len(set(means)) == 10
    assert sorted(means[:10]) == sorted(means[10:]), "an epoch ends in the middle of a step"
    for step in range(5):
        parts = steps[step]
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert all(len(batch.input_ids) <= 3 for batch, _ in parts)
        assert {batch.pixel_values.shape[1] for batch, _ in parts} <= {1, 2}
        again = steps[step]
        assert all(torch.equal(one.input_ids, other.input_ids) for (one, _), (other, _) in zip(parts, again))


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
def test_accumulated_gradients_equal_those_of_the_whole_step(base, tmp_path, rows_at_once):
    rows = write_rows(tmp_path, 6, several=True)
    gradients = []
    for at_once in (6, rows_at_once):
        vlm = paligemma.load(base)
        finetune.train_parameters(vlm.model, ["decoder"])
        examples = data.read_examples(rows, vlm.processor)
        for part in data.ExampleSteps(vlm.processor, examples, 6, at_once, seed=0)[0]:
            finetune.losses(vlm.model, part)["loss"].backward()
        gradients.append({name: one.grad for name, one in vlm.model.language_model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-6)


@pytest.fixture
def logged(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr(loop, "LOSS_SMOOTHING", 0.0)


def test_an_adapter_that_was_trained_opens_here_and_in_peft(base, tmp_path, logged, capsys):
    rows = write_rows(tmp_path, several=True)
    run(base, rows, tmp_path / "run", "--lora=4", "--epochs=6", "--learning-rate=0.03", "--freeze", "--rows-at-once=3")
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert figures["after"]["loss"] < 0.9 * figures["before"]["loss"]
    assert (
        f"loss: {figures['before']['loss']:.3f} before, {figures['after']['loss']:.3f} after" in capsys.readouterr().out
    )
    log = loop.Log(tmp_path / "run" / "held_back.csv").rows()
    assert log[0] == {"step": 0, "loss": pytest.approx(figures["before"]["loss"], abs=1e-3)}
    assert log[-1] == {"step": 16, "loss": pytest.approx(figures["after"]["loss"], abs=1e-3)}
    assert len(loop.Log(tmp_path / "run" / "finetune.csv").rows()) == 16
    assert "<polyline" in (tmp_path / "run" / "finetune.svg").read_text()

    reference = PaliGemmaForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(reference, tmp_path / "run").eval()
    ours = paligemma.load(tmp_path / "run")
    assert_same_logits(ours, tuned)
    examples = data.read_examples(rows, ours.processor)
    assert finetune.mean_loss(ours, examples, 4) < 0.9 * figures["before"]["loss"]


@torch.no_grad()
def assert_same_logits(vlm, reference):
    input_ids = torch.tensor([vlm.processor.input_ids("answer en which paint is it?")])
    pixel_values = vlm.processor.pixel_values(Image.new("RGB", (40, 30), "red"))
    expected = reference(**reference_inputs(pixel_values, input_ids)).logits
    assert (vlm.model(pixel_values.to(vlm.dtype), input_ids) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_checkpoint_that_was_trained_opens_here_and_in_transformers(base, tmp_path, logged, dtype):
    options = ["--full", "--epochs=4", "--learning-rate=0.002", "--freeze", "encoder", "projector", f"--dtype={dtype}"]
    rows = write_rows(tmp_path)
    run(base, rows, tmp_path / "run", *options, "--checkpoint-every=2", f"--held-back={rows}")
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert figures["after"]["loss"] < 0.9 * figures["before"]["loss"]
    assert (tmp_path / "run" / "preprocessor_config.json").exists()
    tuned = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "run", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours, before = (paligemma.load(folder, dtype="float32") for folder in (tmp_path / "run", base))
    assert_same_logits(ours, tuned)
    kept = {name for name, one in before.model.named_parameters() if torch.equal(one, ours.model.get_parameter(name))}
    in_encoder = {name for name, _ in before.model.named_parameters() if name.startswith(("vision", "multi"))}
    assert kept >= in_encoder if dtype == "float32" else not kept & {"language_model.norm.weight"}
    assert not {name for name in kept if "self_attn" in name and "language_model" in name}


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_same_losses(base, tmp_path):
    rows = write_rows(tmp_path)
    script = (
        "from paligemma.training import finetune, loop; loop.LOG_EVERY = 1; loop.LOSS_SMOOTHING = 0.0; "
        "import torch, sys; torch.set_num_threads(1); finetune.main(sys.argv[1:])"
    )
    options = ["--model", base, "--data", rows, "--epochs=12", "--batch-size=4", "--learning-rate=0.003"]

    def start(folder):
        command = [sys.executable, "-c", script, *options, "--output", folder]
        return subprocess.Popen(
            list(map(str, command)), cwd=Path(paligemma.__file__).parent.parent, start_new_session=True
        )

    assert start(tmp_path / "whole").wait(timeout=300) == 0
    process, log = start(tmp_path / "killed"), tmp_path / "killed" / "finetune.csv"
    while not log.exists() or log.read_text().count("\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start(tmp_path / "killed").wait(timeout=300) == 0
    for name, columns in (("finetune.csv", ("step", "learning_rate", "loss")), ("held_back.csv", ("step", "loss"))):
        whole, killed = (
            [[row[column] for column in columns] for row in csv.DictReader((tmp_path / folder / name).open())]
            for folder in ("whole", "killed")
        )
        assert killed == whole
    assert len(whole) > 4
    weights = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_a_folder_with_a_run_of_other_settings_is_refused(base, tmp_path):
    rows = write_rows(tmp_path)
    run(base, rows, tmp_path / "run", "--epochs=1")
    with pytest.raises(SystemExit, match="has a run with --epochs 1, and this one has 2; please choose another folder"):
        run(base, rows, tmp_path / "run", "--epochs=2")


def test_an_adapter_cannot_be_made_for_an_adapter(base, tmp_path):
    rows = write_rows(tmp_path)
    run(base, rows, tmp_path / "run", "--epochs=1")
    with pytest.raises(SystemExit, match="is an adapter; please give the model that it was made for, or --full"):
        run(tmp_path / "run", rows, tmp_path / "again", "--epochs=1")


@pytest.mark.parametrize(
    "options",
    [["--lora=0"], ["--lora=4", "--full"], ["--freeze", "encoder", "projector", "decoder"], ["--freeze", "nothing"]],
)
def test_options_that_make_no_sense_are_refused(base, tmp_path, options):
    with pytest.raises(SystemExit) as caught:
        run(base, tmp_path / "train.jsonl", tmp_path / "run", *options)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("answers", "truths", "expected"),
    [
        (["a cat ", "dog"], ["a cat", "a dog"], {"exact match": 0.5}),
        ([BOXES, ""], [BOXES, "dog"], {"exact match": 0.5, "box F1": 1.0}),
        ([BOXES.replace("dog", "owl")], [BOXES], {"exact match": 0.0, "box F1": 0.5}),
        ([f"{BOXES} ; {BOXES}"], [BOXES], {"exact match": 0.0, "box F1": pytest.approx(2 / 3)}),
        (["nothing"], [BOXES], {"exact match": 0.0, "box F1": 0.0}),
        (
            [BOXES.replace("0512", "0300")],
            [BOXES],
            {"exact match": 0.0, "box F1": 1.0},
        ),
    ],
)
def test_answers_are_counted_by_their_words_and_boxes(answers, truths, expected):
    assert answer_figures(answers, truths) == expected


def test_a_missing_model_ends_with_a_sentence(tmp_path):
    with pytest.raises(PaliGemmaError, match="There is no folder"):
        finetune.finetune(finetune.parse(["--model=/nowhere", f"--data={tmp_path}", f"--output={tmp_path / 'run'}"]))
