"""Rows carry the right labels, runs learn and resume, and evaluation counts what is right."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks.scene_figures import FIGURES, SEED, draw_scenes, evaluate
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from paligemma import PaliGemmaError
from paligemma.model import PaliGemma
from paligemma.scenes.artwork import load_sheet
from paligemma.scenes.painter import Painter
from paligemma.scenes.questions import detections, questions
from paligemma.training import loop
from paligemma.training.data import collate
from paligemma.training.loop import Run
from paligemma.training.losses import NO_LABEL, answer_loss

IMAGE = Image.new("RGB", (50, 40), "red")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors gain nothing from several threads, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def painter():
    return Painter(load_sheet())


def test_labels_are_the_next_tokens_of_the_answer_only(tiny):
    batch = collate(tiny.processor, [([IMAGE], "caption en", "a cat"), ([IMAGE], "detect owl", "")])
    tokenizer, eos = tiny.processor.tokenizer, tiny.config.eos_token_ids[0]
    answer = tokenizer.encode("a cat").ids
    for row, expected in enumerate([answer, []]):
        prefix = tiny.processor.input_ids(["caption en", "detect owl"][row])
        assert batch.prefix_lengths[row] == len(prefix)
        length = len(prefix) + len(expected)
        assert batch.input_ids[row, :length].tolist() == prefix + expected
        assert (batch.input_ids[row, length:] == tiny.config.pad_token_id).all()
        assert batch.attention_mask[row].tolist() == [place < length for place in range(batch.input_ids.shape[1])]
        assert batch.labels[row, len(prefix) - 1 : length].tolist() == [*expected, eos]
        assert (batch.labels[row] != NO_LABEL).sum() == len(expected) + 1
    assert torch.equal(batch.pixel_values, tiny.processor.pixel_values(IMAGE).expand(2, 1, -1, -1, -1))


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("a<eos>", "contains <eos>"),
        ("<image>", "contains <image>"),
        ("cat " * 800, "too long"),
        (None, "not valid text"),
    ],
)
def test_an_answer_that_cannot_be_learned_is_refused(tiny, answer, sentence):
    with pytest.raises(PaliGemmaError, match=sentence):
        collate(tiny.processor, [([IMAGE], "caption en", "a cat"), ([IMAGE], "ocr", answer)])


def test_gradient_checkpointing_changes_no_gradient(tiny):
    batch = collate(tiny.processor, [([IMAGE], "caption en", "a cat"), ([IMAGE], "ocr", "SUN")])
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = PaliGemma(tiny.config)
        if is_checkpointed:
            loop.checkpoint_gradients(model.vision_tower.encoder["layers"])
            loop.checkpoint_gradients(model.language_model.layers)
        answer_loss(model, batch).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(("steps", "warm_up"), [(1000, 100), (50, 5)])
def test_the_learning_rate_warms_up_and_falls_to_zero(steps, warm_up):
    rates = [loop.learning_rate(step, steps, 1e-3) for step in range(steps + 1)]
    assert rates[0] == pytest.approx(1e-3 / warm_up)
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (warm_up - 1, warm_up)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


class Numbers(Dataset):
    """Random numbers for each step, in one batch or in several."""

    def __init__(self, batches=1):
        self.batches = batches

    def __getitem__(self, step):
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).chunk(self.batches)


class Adder(nn.Module):
    """Two layers that learn to add up their inputs; the first may be frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def losses(self, inputs):
        return {"error": F.mse_loss(self.second(self.first(inputs))[:, 0], inputs.sum(1))}


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 5)
    monkeypatch.setattr(loop, "LOSS_SMOOTHING", 0.5)
    whole, killed, resumed = Adder(), Adder(), Adder()
    Run("adder", whole, tmp_path / "whole", 40, 0.1, save_every=10).train(Numbers(), whole.losses)

    calls = []

    def losses(inputs):
        calls.append(inputs)
        if len(calls) > 27:
            raise KeyboardInterrupt
        return killed.losses(inputs)

    with pytest.raises(KeyboardInterrupt):
        Run("adder", killed, tmp_path / "killed", 40, 0.1, save_every=10).train(Numbers(), losses, workers=0)
    run = Run("adder", resumed, tmp_path / "killed", 40, 0.1, save_every=10)
    assert run.step == 20, "the last save"
    run.train(Numbers(), resumed.losses)

    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    logs = [[*csv.DictReader((tmp_path / name / "adder.csv").open())] for name in ("whole", "killed")]
    for log in logs:
        assert [int(row["step"]) for row in log] == [*range(5, 41, 5)]
        assert all(float(row["steps_per_second"]) > 0 for row in log)
    assert [row["error"] for row in logs[0]] == [row["error"] for row in logs[1]]
    assert float(logs[0][-1]["error"]) < 0.3 * float(logs[0][0]["error"])


def test_gradients_of_the_batches_of_a_step_add_up_to_that_of_one(tmp_path):
    adders = {batches: Adder() for batches in (1, 4)}
    for batches, adder in adders.items():
        run = Run("adder", adder, tmp_path / str(batches), 3, 0.1)
        run.train(
            Numbers(batches),
            lambda rows, adder=adder: {"error": adder.losses(rows)["error"] * len(rows) / 8},
            workers=0,
        )
    for name, weight in adders[1].state_dict().items():
        torch.testing.assert_close(adders[4].state_dict()[name], weight)


@pytest.mark.parametrize(
    "rest", ["", "st", "step,error\n", "step,error\n10,1.0\n20,2.0\n3", "step,error\n10,1.0\n30,3.0\n"]
)
def test_a_log_that_was_cut_anywhere_goes_on_after_the_last_save(tmp_path, rest):
    log = loop.Log(tmp_path / "log.csv")
    log.path.write_text(rest)
    log.forget_after(20)
    log.append({"step": 30, "error": 0.5})
    kept = [{"step": step, "error": step / 10} for step in (10, 20) if f"\n{step}," in rest]
    assert log.rows() == [*kept, {"step": 30, "error": 0.5}]


def test_matrices_decay_and_biases_do_not(tmp_path):
    adder = Adder()
    before = {name: weight.clone() for name, weight in adder.state_dict().items()}
    run = Run("adder", adder, tmp_path, 1, 0.1)
    run.train(Numbers(), lambda inputs: {"error": 0 * adder.losses(inputs)["error"]}, workers=0)
    for name, weight in adder.state_dict().items():
        torch.testing.assert_close(weight, before[name] * (1 - 0.1 * loop.WEIGHT_DECAY * name.endswith("weight")))


def test_large_gradients_are_scaled_down(tmp_path):
    adder = Adder()
    run = Run("adder", adder, tmp_path, 1, 1e-2)
    run.train(Numbers(), lambda inputs: {"error": 1000 * adder.losses(inputs)["error"]}, workers=0)
    assert nn.utils.get_total_norm([one.grad for one in adder.parameters()]) == pytest.approx(1, abs=1e-3)


def test_frozen_parameters_are_neither_trained_nor_saved(tmp_path):
    adder = Adder()
    adder.first.requires_grad_(False)
    before = {name: weight.clone() for name, weight in adder.state_dict().items()}
    Run("adder", adder, tmp_path, 2, 1e-2).train(Numbers(), adder.losses, workers=0)
    moved = {name for name, weight in adder.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"second.weight", "second.bias"}
    assert torch.load(tmp_path / "adder.pt")["parameters"].keys() == moved


def test_the_save_of_another_module_is_refused(tmp_path):
    adder = Adder()
    Run("adder", adder, tmp_path, 1, 1e-2).train(Numbers(), adder.losses, workers=0)
    with pytest.raises(PaliGemmaError, match=r"adder\.pt was saved by another run; please choose another folder"):
        Run("adder", nn.Linear(3, 3), tmp_path, 1, 1e-2)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(tmp_path):
    adder = Adder()
    run = Run("adder", adder, tmp_path, 3, 1e-2)
    with pytest.raises(PaliGemmaError, match="not finite after 0 steps; please choose a lower learning rate"):
        run.train(Numbers(), lambda inputs: {"error": adder.losses(inputs)["error"] * math.inf}, workers=0)
    assert all(weight.isfinite().all() for weight in adder.parameters())


class Answers:
    """A model that knows the true answers to the questions that `evaluate` asks, or gives one answer to all."""

    def __init__(self, scenes, answer=None):
        rng = np.random.default_rng(SEED)
        self.answers = {
            (id(scene.image), question.prompt): question.answer if answer is None else answer
            for scene in scenes
            for question in questions(rng, scene)
        }

    def generate_batch(self, images, prompts, max_new_tokens):
        return [self.answers[id(image), prompt] for image, prompt in zip(images, prompts)]


def test_scores_are_full_for_true_answers_only(painter):
    scenes = draw_scenes(painter, 12)
    by_objects = evaluate(Answers(scenes), scenes)
    assert by_objects.keys() == {0, 1, 2, 3, 4, 5, 6}
    assert by_objects[0].keys() == {*FIGURES}
    for figures in by_objects.values():
        assert figures.pop("segment: mean IoU of masks of found objects") == 0, "boxes without codes are no masks"
        assert set(figures.values()) == {1.0}
    assert set(evaluate(Answers(scenes, "a mistake"), scenes)[0].values()) == {0.0}


def test_an_object_found_twice_counts_once_and_one_of_another_name_is_an_error(painter):
    scene = painter.scene(np.random.default_rng(0), 112, [0])
    true = detections(scene, 0)
    for answer, expected in ((f"{true} ; {true}", 2 / 3), (f"{true} ; {true.replace('fox', 'owl')}", 2 / 3)):
        assert evaluate(Answers([scene], answer), [scene])[0]["detect: F1 at IoU 0.5"] == pytest.approx(expected)


def test_the_embedded_checkpoint_answers_questions_about_a_new_scene(tiny, painter):
    figures = evaluate(tiny, draw_scenes(painter, 2)[1:])[2]
    assert figures["caption"] == 1
    assert figures["how many / is there / where"] == 1
    assert figures["detect: F1 at IoU 0.5"] == 1
    assert figures["segment: mean IoU of masks of found objects"] > 0.6
