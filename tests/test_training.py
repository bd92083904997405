"""Scenes say truly what is on them, rows carry labels only where they should, and a run learns and resumes."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma.annotations import find_detections
from paligemma.training import scenes, train
from paligemma.training.artwork import KINDS
from paligemma.training.batches import PatchBatches, collate
from paligemma.training.evaluate import count_matches, kinds_of
from paligemma.training.losses import NO_LABEL
from paligemma.training.scenes import Scene, SceneObject, choose_kinds, draw_crop, draw_scene
from paligemma.training.tasks import caption, count_prompt, detections, every_text, prompts_and_answers
from paligemma.training.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def sprites():
    """Stand-ins for the artwork, which would have to be fetched: an opaque disc in a colour of its own for each kind."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    disc = (x**2 + y**2 <= 1)[..., None]
    colours = np.random.default_rng(0).integers(80, 256, (len(KINDS), 1, 1, 1, 3))
    pixels = np.concatenate(
        [
            np.broadcast_to(colours, (len(KINDS), 1, 32, 32, 3)) * disc,
            255 * np.broadcast_to(disc, (len(KINDS), 1, 32, 32, 1)),
        ],
        -1,
    )
    return pixels.astype(np.uint8)


def index(name):
    return next(number for number, kind in enumerate(KINDS) if kind.name == name)


def scene_of(*things):
    return Scene(Image.new("RGB", (112, 112)), tuple(SceneObject(index(name), box) for name, box in things))


def test_boxes_enclose_what_was_drawn(sprites, monkeypatch):
    monkeypatch.setattr(scenes, "_background", lambda rng, size: Image.new("RGB", (size, size)))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drawn = draw_scene(rng, sprites, 200, choose_kinds(rng, 1))
        (thing,) = drawn.objects
        visible = np.asarray(drawn.image).sum(-1) > 60
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        edges = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
        assert edges == pytest.approx([side * 200 for side in thing.box], abs=2)


def test_the_same_seed_draws_the_same_scene(sprites):
    one, same, other = (
        np.asarray(draw_scene(np.random.default_rng(seed), sprites, 112, [1, 2]).image) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_objects_hardly_overlap(sprites):
    rng = np.random.default_rng(0)
    for _ in range(30):
        things = draw_scene(rng, sprites, 112, choose_kinds(rng, 4)).objects
        for number, one in enumerate(things):
            for other in things[:number]:
                height = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
                width = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
                smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (one.box, other.box))
                assert max(height, 0) * max(width, 0) <= 0.1 * smaller + 1e-9


def test_a_crop_is_a_picture_and_its_kind(sprites):
    image, kind = draw_crop(np.random.default_rng(0), sprites, 56)
    assert image.size == (56, 56)
    assert 0 <= kind < len(KINDS)


def test_captions_count_from_left_to_right():
    left, middle, right = (0.1, 0.1, 0.3, 0.3), (0.1, 0.4, 0.3, 0.6), (0.1, 0.7, 0.3, 0.9)
    assert caption(scene_of(("cat", left))) == "a cat"
    assert caption(scene_of(("apple", right), ("cat", left))) == "a cat and an apple"
    assert caption(scene_of(("cat", left), ("apple", middle), ("cat", right))) == "2 cats and an apple"
    assert caption(scene_of(("mouse", right), ("fish", left), ("owl", middle))) == "a fish, an owl and a mouse"


def test_detections_read_back_as_the_boxes():
    things = [("cat", (0.1, 0.2, 0.5, 0.6)), ("dog", (0.5, 0.5, 0.9, 1.0)), ("cat", (0.6, 0.0, 0.99, 0.4))]
    answer = detections(scene_of(*things), index("cat"))
    found = find_detections(answer)
    assert [detection.label for detection in found] == ["cat", "cat"]
    for detection, (_, box) in zip(found, [things[0], things[2]]):
        assert detection.box == pytest.approx(box, abs=8 / 1024)
    assert detections(scene_of(*things), index("owl")) == ""


def test_every_answer_is_true(sprites):
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = draw_scene(rng, sprites, 112, choose_kinds(rng, 3))
        (_, said), (count_question, count), (detect_question, boxes) = prompts_and_answers(rng, drawn)
        assert kinds_of(said) == {KINDS[thing.kind].name for thing in drawn.objects}
        (counted,) = [kind for kind in range(len(KINDS)) if count_prompt(kind) == count_question]
        assert int(count) == drawn.count(counted)
        detected = index(detect_question.removeprefix("detect "))
        true_boxes = [thing.box for thing in drawn.objects if thing.kind == detected]
        assert count_matches(find_detections(boxes), true_boxes) == len(true_boxes) == boxes.count(" ; ") + bool(boxes)


def test_every_word_of_the_tasks_is_one_token():
    tokenizer = build_tokenizer()
    for kind in KINDS:
        for text in (kind.with_article, f"2 {kind.plural}", f"detect {kind.name}"):
            assert len(tokenizer.encode(text).ids) == len(text.split())
    assert all("<unk>" not in tokenizer.encode(text).tokens for text in every_text())


def test_the_embedded_tokenizer_is_the_one_that_is_built(tiny):
    assert tiny.processor.tokenizer.to_str() == build_tokenizer().to_str()


def test_labels_are_the_next_tokens_of_the_answer_only(tiny):
    rows = collate(tiny.processor, torch.zeros(1, 3, 112, 112), [("caption en", "a cat"), ("detect owl", "")])
    tokenizer, eos = tiny.processor.tokenizer, tiny.config.eos_token_ids[0]
    answer = tokenizer.encode("a cat").ids
    for row, expected in enumerate([[*answer, eos], [eos]]):
        prefix = rows.prefix_lengths[row].item()
        labels = rows.labels[row]
        assert labels[prefix - 1 : prefix - 1 + len(expected)].tolist() == expected
        assert (labels != NO_LABEL).sum() == len(expected)
        assert rows.attention_mask[row].sum() == prefix + len(expected) - 1
    assert rows.input_ids[0, rows.prefix_lengths[0] :].tolist()[: len(answer)] == answer


def test_patches_are_named_after_what_lies_on_their_centres(tiny):
    scene = scene_of(("cat", (0.0, 0.0, 0.25, 0.25)), ("dog", (0.5, 0.75, 1.0, 1.0)))
    kinds = PatchBatches(tiny.processor, None, 1, seed=0).kinds_of_patches(scene).view(8, 8)
    assert (kinds[:2, :2] == index("cat")).all()
    assert (kinds[4:, 6:] == index("dog")).all()
    assert (kinds == len(KINDS)).sum() == 64 - 4 - 8


def test_the_eye_learns_slowly_where_it_is_told_to(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WARM_UP_STEPS", 1)
    module = torch.nn.ModuleDict({"eye": torch.nn.Linear(4, 4), "voice": torch.nn.Linear(4, 4)})
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    run = train.Run("slow", module, tmp_path, steps=100, eye=module["eye"])
    run.update(module["voice"](module["eye"](torch.ones(1, 4))).square().sum())
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in module.state_dict().items()}
    assert 0 < moved["eye.bias"] == pytest.approx(train.EYE_SLOWNESS * moved["voice.bias"], rel=1e-2)


def test_positions_interpolate_from_grid_to_grid():
    grid = torch.linspace(0, 1, 4)
    positions = torch.stack([grid.repeat_interleave(4), grid.repeat(4)], dim=1)  # row and column of 16 patches
    larger = train.resize_positions(positions, 64).view(8, 8, 2)
    assert (larger[1:, :, 0] > larger[:-1, :, 0]).all()
    assert (larger[:, 1:, 1] > larger[:, :-1, 1]).all()
    assert torch.allclose(train.resize_positions(positions, 16), positions, atol=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train.learning_rate(step, 1000, 1e-3) for step in range(1001)]
    assert rates[0] <= 1e-3 / 50
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (train.WARM_UP_STEPS - 1, train.WARM_UP_STEPS)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_training_learns_logs_and_resumes(tiny, sprites, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_sprites", lambda size: sprites)
    monkeypatch.setattr(train, "CROPS_A_BATCH", 16)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 5)
    monkeypatch.setattr(train, "LOG_EVERY", 20)
    monkeypatch.setattr(train, "SAVE_EVERY", 20)
    monkeypatch.setattr(train, "LOSS_SMOOTHING", 0.8)
    torch.manual_seed(0)
    train.train_eye(tiny.processor, tmp_path, steps=100)
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "eye.csv").open())]
    assert len(losses) == 5
    assert losses[-1] < min(losses[0], math.log(len(KINDS))) - 0.1, "no better than guessing"

    with (tmp_path / "eye.csv").open("a") as log:
        log.write("119,9.9,0,0\n")  # an interruption came after this step was logged, and before it was saved
    eye = train.train_eye(tiny.processor, tmp_path, steps=140)  # goes on where it stopped
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "eye.csv").open())]
    assert steps == [20, 40, 60, 80, 100, 120, 140]

    monkeypatch.setattr(train, "SMALL_PICTURES_A_BATCH", 2)
    small = train.train_voice(tiny.processor, eye.vision_tower, tmp_path, steps=5)
    kept, seen = eye.vision_tower.state_dict(), small.vision_tower.state_dict()
    assert all(torch.equal(weight, seen[name]) for name, weight in kept.items()), "the eye stays as it is"

    monkeypatch.setattr(train, "SCENES_A_BATCH", 2)
    full_eye = train.train_patches(tiny.processor, eye, tmp_path, steps=5)
    monkeypatch.setattr(train, "PICTURES_A_BATCH", 2)
    model = train.train_together(tiny.processor, full_eye, small, tmp_path, steps=5)
    assert model.config == tiny.config
    assert (tmp_path / "together.pt").exists()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
