"""Scenes say truly what is on them, answers are true, losses are those of the papers, and a run learns and resumes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from paligemma import gemma, siglip
from paligemma.annotations import find_detections
from paligemma.mask_decoder import MaskDecoder
from paligemma.model import PaliGemma
from paligemma.training import (
    artwork,
    augmentation,
    batches,
    contrastive,
    evaluate,
    looking,
    loop,
    mask_codec,
    naming,
    train,
)
from paligemma.training.artwork import KINDS, STYLES, Sprites, load_folder, load_sheet, load_sprites, pack_sheet
from paligemma.training.augmentation import restyle
from paligemma.training.batches import SceneBatches, collate, encode_masks, mishear, nearest_codes, told_masks
from paligemma.training.colours import COLOURS, random_colour, ruling_colour
from paligemma.training.looking import Told, find_boxes, find_looks
from paligemma.training.losses import (
    CODE_COST,
    COORDINATE_COST,
    NO_LABEL,
    TokenRisk,
    answer_loss,
    attention_loss,
    clip_loss,
    siglip_loss,
)
from paligemma.training.mask_codec import MaskCodec, decoded_loss, fit_mask
from paligemma.training.patches import FIRST_COLOUR, FIRST_LETTER, PatchHeads, RelationHeads, label_patches
from paligemma.training.plot import plot
from paligemma.training.scenes import MAX_OBJECTS, MAX_OVERLAP, Painter, Scene, SceneObject
from paligemma.training.start import (
    EYE_LAYERS,
    IMAGE_SIZE,
    TEXT_LAYERS,
    deepen,
    initialise,
    resize_positions,
    tiny_config,
)
from paligemma.training.tasks import (
    caption,
    caption_with_slip,
    description,
    detect_prompt,
    detections,
    every_text,
    largest,
    loc_tokens,
    neighbour,
    prompts_and_answers,
)
from paligemma.training.tokenizer import IMAGE_TOKEN, build_tokenizer


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
    return Sprites(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """The font that Pillow carries, as a file."""
    path = tmp_path_factory.mktemp("fonts") / "font.ttf"
    path.write_bytes(ImageFont.load_default(size=12).font_bytes)
    return [path]


@pytest.fixture(scope="module")
def painter(sprites, fonts):
    return Painter(sprites, fonts)


def index(name):
    return next(number for number, kind in enumerate(KINDS) if kind.name == name)


def scene_of(*things, **facts):
    objects = tuple(SceneObject(index(name), box) for name, box in things)
    return Scene(Image.new("RGB", (112, 112)), objects, **facts)


LEFT, MIDDLE, RIGHT = (0.3, 0.0, 0.5, 0.2), (0.3, 0.4, 0.5, 0.6), (0.3, 0.8, 0.5, 1.0)


def test_boxes_and_owners_enclose_what_was_drawn(painter):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drawn = painter.scene(rng, 200, painter.choose_kinds(rng, 1))
        (thing,) = drawn.objects
        rows, columns = np.nonzero(drawn.owners == thing.owner)
        edges = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
        assert edges == pytest.approx([side * 200 for side in thing.box], abs=3)
        assert drawn.mask(thing).mean() > 0.5, "an ellipse fills more than half of its box"


def test_the_same_seed_draws_the_same_scene(painter):
    one, same, other = (
        np.asarray(painter.random_scene(np.random.default_rng(seed), 112, 3).image) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_objects_hardly_overlap_and_never_cover_the_word(painter):
    rng = np.random.default_rng(0)
    words = 0
    for _ in range(60):
        drawn = painter.random_scene(rng, 112, 6)
        for number, one in enumerate(drawn.objects):
            for other in drawn.objects[:number]:
                height = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
                width = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
                smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (one.box, other.box))
                assert max(height, 0) * max(width, 0) <= MAX_OVERLAP * smaller + 1e-9
        if drawn.word:
            words += 1
            areas = [(drawn.owners == place + 1).sum() for place in range(len(drawn.word))]
            assert min(areas) >= 0.7 * max(areas), "each letter has its whole place"
    assert words > 5


def ellipse(height, width):
    """Bool [height, width], from edge to edge."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return x**2 + y**2 <= 1


def test_a_restyled_drawing_fills_its_frame_which_may_be_lower_or_narrower():
    rng = np.random.default_rng(0)
    drawing = np.repeat(ellipse(41, 61)[..., None].astype(np.float32), 4, axis=-1)
    silhouettes = [restyle(rng, drawing)[..., 3] > 0.5 for _ in range(60)]
    for silhouette in silhouettes:
        for edge in (silhouette[:2], silhouette[-2:], silhouette[:, :2], silhouette[:, -2:]):
            assert edge.any(), "the box stays true"
    heights, widths = np.array([silhouette.shape for silhouette in silhouettes]).T
    assert ((heights == 41) | (widths == 61)).all(), "one side is as long as it was"
    assert (heights.max(), widths.max()) == (41, 61)
    for lengths in (heights / 41, widths / 61):
        assert augmentation.LEAST_LENGTH - 0.02 < lengths.min() < 0.75
    plain = [ellipse(*silhouette.shape) for silhouette in silhouettes]
    overlaps = [(one & other).sum() / (one | other).sum() for one, other in zip(plain, silhouettes)]
    assert 0.6 < min(overlaps) < 0.97, "some have other proportions, and are still the same thing"
    assert max(overlaps) == 1


def test_lines_lie_where_a_drawing_changes_and_are_as_thick_as_they_should_be():
    square = np.zeros((40, 40, 4), np.float32)
    square[10:30, 10:30] = 1
    thin, thick = (
        augmentation._lines(square[..., :3], square[..., 3:], thickness)[..., 0] > 0.5 for thickness in (0, 2)
    )
    assert np.flatnonzero(thin[20]).tolist() == [9, 10, 29, 30]
    assert np.flatnonzero(thick[20]).tolist() == [*range(7, 13), *range(27, 33)]
    full = np.ones((9, 9, 4), np.float32)
    framed = augmentation._lines(full[..., :3], full[..., 3:], 0)[..., 0] > 0.5
    assert np.flatnonzero(framed[4]).tolist() == [0, 8], "a drawing that fills its frame ends there as well"


def test_a_flattened_drawing_has_a_few_colours_and_no_fine_details():
    rng = np.random.default_rng(0)
    drawing = np.ones((40, 40, 4), np.float32)
    drawing[..., :3] = np.linspace(0, 1, 40)[:, None, None]
    drawing[20, 20, :3] = 1, 0, 0  # a speck
    drawing[:, 30:] = 0, 1, 0, 0  # what is not drawn
    means = []
    for _ in range(20):
        flat = augmentation._flatten(rng, drawing[..., :3], drawing[..., 3:])
        assert flat.shape == (40, 40, 3)
        assert 2 <= len(np.unique(flat[:, :30].reshape(-1, 3), axis=0)) <= 7
        assert np.array_equal(flat[20, 20], flat[20, 19])
        means.append(flat[:, :27].mean(1))
    faithful = [np.abs(mean - drawing[:, 0, :3]).max() < 0.25 for mean in means]
    assert 0 < sum(faithful) < 20, "some have other colours in places, some have not"


def test_half_of_the_flattened_drawings_have_other_colours_and_black_or_white_among_them():
    drawing = np.ones((40, 40, 4), np.float32)
    drawing[..., :3] = 0.2, 0.7, 0.3
    drawing[:20, :, :3] = 0.8, 0.3, 0.2
    rng = np.random.default_rng(0)
    shades, kept = [], 0
    for _ in range(60):
        areas = augmentation._flatten(rng, drawing[..., :3], drawing[..., 3:])[[5, 35], 20]
        kept += np.abs(areas - drawing[[5, 35], 20, :3]).max() < 0.1
        shades += [colour.mean() for colour in areas if np.ptp(colour) == 0]
    assert {round(float(shade), 2) for shade in shades} == {0.05, 0.95}
    assert 30 < kept < 50, "two thirds: where colours may change, both areas stay in a third"


def test_what_is_smaller_than_a_grain_is_left_out_of_a_flattened_drawing(monkeypatch):
    drawing = np.zeros((160, 160, 4), np.float32)
    drawing[..., 2:] = 1
    drawing[:, 80:, :3] = 1, 0, 0
    drawing[40:45, 40:45, :3] = 0, 1, 0  # wider than what a median of three pixels takes away
    for grains, is_kept in (((16, 17), False), ((160, 161), True)):
        monkeypatch.setattr(augmentation, "GRAINS", grains)
        flat = augmentation._flatten(np.random.default_rng(0), drawing[..., :3], drawing[..., 3:])
        assert np.array_equal(flat[42, 42], flat[100, 42]) != is_kept
        assert not np.array_equal(flat[100, 40], flat[100, 120]), "what is large stays"


def test_proportions_change_otherwise_on_the_left_than_on_the_right():
    rows = np.repeat(np.linspace(0, 1, 41, dtype=np.float32)[:, None], 30, axis=1)[..., None]
    drawn = augmentation._proportion(np.random.default_rng(0), rows, 41)[..., 0]
    assert np.array_equal(drawn[[0, -1]], rows[[0, -1], :, 0])
    assert (np.diff(drawn, axis=0) > 0).all(), "nothing is upside down"
    assert np.abs(drawn[:, 0] - drawn[:, -1]).max() > 0.02


def test_a_painted_word_is_there_to_be_read(painter, fonts):
    rng = np.random.default_rng(0)
    drawn = painter.scene(rng, 112, [], word="IIII")
    assert drawn.word == "IIII"
    assert set(np.unique(drawn.owners)) == {0, 1, 2, 3, 4}
    word = np.asarray(drawn.image.convert("L"), float)[drawn.owners > 0]
    assert word.max() - word.min() > 60, "ink and ground differ"


def test_words_to_be_judged_by_are_words(sprites, fonts):
    from paligemma.training.words import WORDS

    plain, rng = Painter(sprites, fonts, restyled=0.0), np.random.default_rng(0)
    words = {plain.random_scene(rng, 112, 2).word for _ in range(60)} - {""}
    assert words
    assert words <= set(WORDS)


@pytest.mark.parametrize("name", COLOURS)
def test_what_is_painted_in_a_colour_is_called_by_its_name(name):
    rng = np.random.default_rng(0)
    for _ in range(50):
        pixel = np.append(random_colour(rng, name) / 255, 1).astype(np.float32)
        assert ruling_colour(np.broadcast_to(pixel, (4, 4, 4))) == name


def test_no_colour_rules_a_motley_thing():
    motley = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 0]], np.float32)
    assert ruling_colour(motley) is None
    assert ruling_colour(motley[[0, 0, 1, 3]]) == "red", "the transparent pixel does not count"


def test_captions_count_from_left_to_right():
    assert caption(scene_of(("cat", LEFT))) == "a cat on a white background"
    assert caption(scene_of(("apple", RIGHT), ("cat", LEFT), background="orange")) == (
        "a cat and an apple on an orange background"
    )
    things = scene_of(("cat", LEFT), ("apple", MIDDLE), ("cat", RIGHT))
    assert caption(things) == "2 cats and an apple on a white background"
    things = scene_of(("mouse", RIGHT), ("fish", LEFT), ("owl", MIDDLE))
    assert caption(things) == "a fish, an owl and a mouse on a white background"


def test_descriptions_tell_size_colour_and_place():
    cat = SceneObject(index("cat"), (0.1, 0.0, 0.9, 0.6), colour=None)
    apple = SceneObject(index("apple"), (0.0, 0.8, 0.2, 1.0), colour="red")
    scene = replace(scene_of(), objects=(apple, cat), background="blue")
    assert description(scene) == (
        "a large cat on the left and a small red apple in the top right corner on a blue background"
    )


def test_neighbours_are_asked_about_only_where_the_answer_is_clear():
    row = scene_of(("cat", LEFT), ("guitar", MIDDLE), ("dog", RIGHT))
    assert neighbour(row, "left of", index("guitar")) == "cat"
    assert neighbour(row, "right of", index("guitar")) == "dog"
    assert neighbour(row, "above", index("guitar")) == "nothing"
    assert neighbour(row, "right of", index("cat")) is None, "a guitar and a dog are"
    diagonal = scene_of(("cat", (0.0, 0.0, 0.2, 0.2)), ("dog", (0.4, 0.4, 0.6, 0.6)))
    assert neighbour(diagonal, "left of", index("dog")) is None, "as much above"
    twice = scene_of(("cat", LEFT), ("cat", RIGHT), ("dog", MIDDLE))
    assert neighbour(twice, "left of", index("cat")) is None, "which one?"


def test_the_largest_object_is_asked_for_only_where_it_is_clear():
    assert largest(scene_of(("cat", LEFT), ("dog", (0.0, 0.3, 0.5, 0.8)))) == "dog"
    assert largest(scene_of(("cat", LEFT), ("dog", MIDDLE))) is None


def test_detections_read_back_as_the_boxes():
    things = [("cat", (0.1, 0.2, 0.5, 0.6)), ("dog", (0.5, 0.5, 0.9, 1.0)), ("cat", (0.6, 0.0, 0.99, 0.4))]
    found = find_detections(detections(scene_of(*things), index("cat")))
    assert [detection.label for detection in found] == ["cat", "cat"]
    for detection, (_, box) in zip(found, [things[0], things[2]]):
        assert detection.box == pytest.approx(box, abs=8 / 1024)
    assert detections(scene_of(*things), index("owl")) == ""
    both = find_detections(detections(scene_of(*things), index("cat"), index("dog")))
    assert [detection.label for detection in both] == ["cat", "dog", "cat"]
    assert detect_prompt(index("cat"), index("dog")) == "detect cat ; dog"


def test_every_answer_is_true(painter):
    rng, codec = np.random.default_rng(0), MaskCodec().eval()
    seen = set()
    for _ in range(80):
        drawn = painter.random_scene(rng, 112, 3)
        (codes,) = encode_masks(codec, [drawn], told_masks([drawn]))
        for prompt, answer in prompts_and_answers(rng, drawn, codes, painter.kinds):
            task = " ".join(prompt.split()[:4]) if prompt.startswith("answer") else prompt.split()[0]
            seen.add(task)
            if task == "caption":
                assert evaluate.kinds_of(answer) == {KINDS[thing.kind].name for thing in drawn.objects}
            elif task in ("detect", "segment"):
                names = prompt.partition(" ")[2].split(" ; ")
                true = [thing.box for thing in drawn.objects if KINDS[thing.kind].name in names]
                found = find_detections(answer)
                assert len(evaluate.match(found, true)) == len(true) == answer.count(" ; ") + bool(answer)
                assert all(len(one.codes) == (16 if task == "segment" else 0) for one in found)
            elif task == "ocr":
                assert answer == drawn.word
            elif task == "answer en how many":
                (counted,) = [kind for kind in KINDS if prompt.endswith(f" many {kind.plural} are there?")]
                assert int(answer) == sum(KINDS[thing.kind] == counted for thing in drawn.objects)
    assert seen == {
        "caption", "describe", "detect", "segment", "ocr", "answer en how many", "answer en is there",
        "answer en what is", "answer en what color",
    }  # fmt: skip


def test_what_follows_a_slip_of_a_caption_is_right(painter):
    rng = np.random.default_rng(0)
    sorts = set()
    for _ in range(300):
        scene = painter.random_scene(rng, 112, int(rng.integers(1, 7)))
        text, (start, end) = caption_with_slip(rng, scene)
        said, told = (phrases(text) for text in (text, caption(scene)))
        place = next(place for place, (one, other) in enumerate(zip(said, told)) if one != other)
        assert text[start:end] == said[place]
        assert text[:start] == caption(scene)[:start]
        if sorted(said) == sorted(told):  # one before its turn; the next is the one that was passed over
            sorts.add("order")
            assert said[place : place + 2] == told[place : place + 2][::-1]
            assert said[place + 2 :] == told[place + 2 :]
        else:
            sorts.add("number")
            assert said[:place] + said[place + 1 :] == told[:place] + told[place + 1 :]
            assert text[start:end].split()[0] in ("a", "an", *map(str, range(2, MAX_OBJECTS + 1)))
    assert sorts == {"order", "number"}


def test_a_slip_is_found_where_the_name_before_it_begins_alike():
    scene = scene_of(("carrot", LEFT), ("car", RIGHT))
    slips = {caption_with_slip(np.random.default_rng(seed), scene) for seed in range(20)}
    assert ("a carrot and 2 cars on a white background", (13, 19)) in slips
    assert ("a car and a carrot on a white background", (0, 5)) in slips
    scene = scene_of(("carrot", LEFT), ("car", RIGHT), ("car", RIGHT))
    slips = {caption_with_slip(np.random.default_rng(seed), scene) for seed in range(20)}
    assert ("a carrot and a car on a white background", (13, 18)) in slips


def phrases(caption: str) -> list[str]:
    """What a caption names, with articles and numbers."""
    return caption.rpartition(" on ")[0].replace(" and ", ", ").split(", ")


def test_every_word_of_the_tasks_is_one_token_and_painted_words_are_letters():
    tokenizer = build_tokenizer()
    for kind in KINDS:
        for text in (kind.name, f"2 {kind.plural}", f"detect {kind.name}"):
            assert len(tokenizer.encode(text).ids) == len(text.split())
    assert tokenizer.encode("STOP").tokens == list("STOP")
    assert all("<unk>" not in tokenizer.encode(text).tokens for text in every_text())


def test_the_embedded_checkpoint_has_the_tokenizer_that_training_builds(tiny):
    assert tiny.processor.tokenizer.to_str() == build_tokenizer().to_str()


def test_labels_are_the_next_tokens_of_the_answer_only(tiny):
    rows = collate(tiny.processor, [0, 0], [("caption en", "a cat"), ("detect owl", "")])
    tokenizer, eos = tiny.processor.tokenizer, tiny.config.eos_token_ids[0]
    answer = tokenizer.encode("a cat").ids
    for row, expected in enumerate([[*answer, eos], [eos]]):
        prefix = rows.prefix_lengths[row].item()
        labels, weights = rows.labels[row], rows.weights[row]
        assert labels[prefix - 1 : prefix - 1 + len(expected)].tolist() == expected
        assert (labels != NO_LABEL).sum() == len(expected)
        assert torch.equal(weights > 0, labels != NO_LABEL)
        assert weights.max().item() == pytest.approx(batches.SHORT**-0.5), "of short answers all count alike"
        assert rows.attention_mask[row].sum() == prefix + len(expected) - 1
    assert rows.input_ids[0, rows.prefix_lengths[0] :].tolist()[: len(answer)] == answer


def test_a_slip_is_gone_on_from_and_not_learnt(tiny):
    text = "2 cats, a hot dog and an owl on a red background"
    slip = (text.index("a hot"), text.index(" and"))
    rows = collate(tiny.processor, [0, 0], [("caption en", text)] * 2, [slip, None])
    assert torch.equal(rows.input_ids[0], rows.input_ids[1])
    differs = rows.labels[0] != rows.labels[1]
    tokens = [tiny.processor.tokenizer.id_to_token(token) for token in rows.labels[1, differs].tolist()]
    assert tokens == ["▁a", "▁hot", "▁dog"]
    for row in range(2):
        assert torch.equal(rows.weights[row] > 0, rows.labels[row] != NO_LABEL)


def segmenting_batch(tiny, painter, scenes, monkeypatch):
    """A batch in which all pictures are asked for masks; its scenes are appended to `scenes`."""
    draw = painter.random_scene
    monkeypatch.setattr(painter, "random_scene", lambda *arguments: scenes.append(draw(*arguments)) or scenes[-1])
    torch.manual_seed(0)
    codec = MaskCodec().eval()
    drawn = SceneBatches(tiny.processor, painter, 16, torch.tensor(2), 0, codec, 0, segmented=16)
    return codec, next(iter(drawn))[2]


def test_the_masks_of_any_number_of_kinds_are_asked_for_in_one_row(tiny, painter, monkeypatch):
    scenes, numbers, decode = [], set(), tiny.processor.tokenizer.decode
    _, chunks = segmenting_batch(tiny, painter, scenes, monkeypatch)
    for rows in chunks:
        for picture, ids, labels, prefix in zip(
            rows.pictures.tolist(), rows.input_ids, rows.labels, rows.prefix_lengths
        ):
            asked = decode(ids[:prefix].tolist()).strip().removeprefix("segment ").split(" ; ")
            there = [KINDS[thing.kind].name for thing in scenes[picture].objects]
            said = find_detections(decode(labels[labels != NO_LABEL].tolist(), skip_special_tokens=False))
            assert [found.label for found in said] == [name for name in there if name in asked]
            assert all(len(found.codes) == 16 for found in said)
            numbers.add((len(asked), len(set(there))))
    assert numbers == {(1, 1), (1, 2), (2, 2)}


def test_half_of_the_codes_that_are_read_are_others_like_them_and_none_that_is_written(tiny, painter, monkeypatch):
    monkeypatch.setattr(batches, "MISHEARD", 0.0)
    codec, chunks = segmenting_batch(tiny, painter, [], monkeypatch)
    first, alike = tiny.processor.tokenizer.token_to_id("<seg000>"), nearest_codes(codec)
    assert alike[:, 0].tolist() == list(range(128)), "each is nearest to itself"
    differs = []
    for rows in chunks:
        written, read = rows.labels[:, :-1] - first, rows.input_ids[:, 1:] - first
        is_code = (written >= 0) & (written < 128)
        assert (alike[written[is_code]] == read[is_code][:, None]).any(1).all()
        differs.append((written != read)[is_code])
        is_answer = (rows.labels[:, :-1] != NO_LABEL) & rows.attention_mask[:, 1:]
        assert not (written != read)[is_answer & ~is_code].any(), "all else is read as it is written"
    assert 0.4 < torch.cat(differs).float().mean() < 0.6


def test_masks_are_told_within_the_boxes_that_are_heard(tiny, painter, monkeypatch):
    scenes = []
    codec, chunks = segmenting_batch(tiny, painter, scenes, monkeypatch)
    tokenizer, first_seg = tiny.processor.tokenizer, tiny.processor.tokenizer.token_to_id("<seg000>")
    misheard, told = [], 0
    for rows in chunks:
        labels = rows.labels[rows.labels >= first_seg]
        codes = (labels[labels < first_seg + 128] - first_seg).view(-1, 16)
        assert len(codes) == len(rows.masks) > 0
        assert torch.equal(codec.encode(rows.masks), codes)
        for box, mask in zip(find_boxes(tokenizer, scenes, rows.pictures, rows.labels), rows.masks, strict=True):
            thing = scenes[box.picture].objects[box.place]
            written = rows.labels[box.row, box.position : box.position + 4].tolist()
            heard = rows.input_ids[box.row, box.position + 1 : box.position + 5].tolist()
            assert written == tokenizer.encode(loc_tokens(thing)).ids
            misheard.append(heard != written)
            sides = [int(tokenizer.id_to_token(token)[4:8]) / 1024 for token in heard]
            assert np.abs(np.subtract(sides, thing.box)).max() < 0.08
            assert torch.equal(mask, fit_mask(scenes[box.picture].owners == thing.owner, tuple(sides)))
            told += 1
    assert told > 16
    assert 0.2 < np.mean(misheard) < 0.8


def test_a_box_is_never_heard_inside_out(painter, monkeypatch):
    monkeypatch.setattr(batches, "OFF", 60.0)
    monkeypatch.setattr(batches, "MISHEARD", 1.0)
    rng = np.random.default_rng(0)
    scene = painter.random_scene(rng, 112, 2)
    boxes = [thing.box for _ in range(40) for thing in mishear(rng, scene).objects]
    assert len(set(boxes)) > 20
    for y_min, x_min, y_max, x_max in boxes:
        assert 0 <= y_min < y_max < 1
        assert 0 <= x_min < x_max < 1


def test_what_lies_in_a_box_fills_the_mask():
    picture = np.zeros((40, 80), bool)
    picture[10:20, 20:60] = True
    assert fit_mask(picture, (0.25, 0.25, 0.5, 0.75)).mean() > 0.99, (
        "all but the corners, which share with what is outside"
    )
    half = fit_mask(picture, (0.0, 0.25, 0.5, 0.75))
    assert not half[:31].any()
    assert half[33:].all()


def test_rows_ask_about_the_first_pictures_only(tiny, painter):
    scenes = SceneBatches(tiny.processor, painter, 5, torch.tensor(2), 0, MaskCodec().eval(), asked_about=2)
    pixel_values, labels, chunks = next(iter(scenes))
    assert len(pixel_values) == len(labels.shown) == 5
    assert {picture for rows in chunks for picture in rows.pictures.tolist()} == {0, 1}


def test_some_captions_of_the_next_pictures_slip(tiny, painter, monkeypatch):
    monkeypatch.setattr(batches, "SLIPS", 1.0)
    drawn = SceneBatches(tiny.processor, painter, 4, torch.tensor(2), 0, MaskCodec().eval(), 2, captioned=2)
    for rows in next(iter(drawn))[2]:
        for picture, labels, length, prefix in zip(
            rows.pictures.tolist(), rows.labels, rows.attention_mask.sum(1), rows.prefix_lengths
        ):
            assert (labels[prefix - 1 : length] == NO_LABEL).any() == (picture >= 2)


def test_the_next_pictures_are_captioned_only(tiny, painter, monkeypatch):
    scenes, draw = [], painter.random_scene
    monkeypatch.setattr(painter, "random_scene", lambda *arguments: scenes.append(draw(*arguments)) or scenes[-1])
    monkeypatch.setattr(batches, "SLIPS", 0.0)
    drawn = SceneBatches(tiny.processor, painter, 5, torch.tensor(2), 0, MaskCodec().eval(), 2, captioned=2)
    tokenizer = tiny.processor.tokenizer
    texts = {}
    for rows in next(iter(drawn))[2]:
        for picture, ids in zip(rows.pictures.tolist(), rows.input_ids.tolist()):
            texts.setdefault(picture, []).append(" ".join(tokenizer.decode(ids).split()))
    assert texts.keys() == {0, 1, 2, 3}
    for picture in (2, 3):
        assert texts[picture] == [f"caption en {caption(scenes[picture])}"]


def test_where_to_look_is_shown_for_each_coordinate_and_code(tiny):
    owners = np.zeros((112, 112), np.uint8)
    owners[:28, :28], owners[56:, 56:] = 1, 2
    boxes = [(0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 1.0, 1.0)]
    cats = tuple(SceneObject(index("cat"), box, None, owner) for owner, box in enumerate(boxes, 1))
    scene = replace(scene_of(), objects=cats, owners=owners)
    codes = {owner: list(range(16)) for owner in (1, 2)}
    segmented, ends = detections(scene, index("cat"), codes=codes), label_patches([scene], 8).ends
    rows = collate(tiny.processor, [0, 0], [("caption en", caption(scene)), ("segment cat", segmented)])
    boxes = find_boxes(tiny.processor.tokenizer, [scene], rows.pictures, rows.labels)
    assert boxes == [Told(1, rows.prefix_lengths[1].item() - 1 + 24 * place, 0, place, True) for place in (0, 1)]
    looks = find_looks(boxes, [scene], ends)
    tokens = map(tiny.processor.tokenizer.id_to_token, rows.labels[looks.rows, looks.positions].tolist())
    assert "".join(tokens) == segmented.replace(" cat", "").replace(" ; ", "")
    assert looks.rows.unique().tolist() == [1]
    assert looks.patches.sum(1).tolist() == pytest.approx(40 * [1])
    top_of_the_second = looks.patches[20].nonzero().flatten().tolist()
    assert top_of_the_second == [8 * 4 + 4, 8 * 4 + 5, 8 * 4 + 6, 8 * 4 + 7]
    assert looks.patches[24:].argmax(1).tolist() == [8 * (4 + code // 4) + 4 + code % 4 for code in range(16)]


def test_between_patches_attention_is_shared():
    assert torch.equal(looking.spread_over_cells((0, 0, 1, 1), 4), torch.eye(16))
    between = looking.spread_over_cells((0.125, 0.0, 1.0, 1.0), 4)[0]  # its middle is a quarter further down
    assert between.nonzero().flatten().tolist() == [0, 4]
    assert between[[0, 4]].tolist() == pytest.approx([1 - 0.4375, 0.4375])


def test_attention_is_off_by_a_divergence():
    wanted = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    there = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log().clamp(min=-100)
    assert attention_loss(there, wanted).item() == pytest.approx(0, abs=1e-6)
    elsewhere = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert attention_loss(elsewhere, wanted[:1]).item() == pytest.approx(math.log(2))


def test_what_is_shown_is_where_eye_and_voice_look(tiny, painter, monkeypatch):
    """The losses are of the very attention that the layers compute."""
    torch.manual_seed(0)
    scenes = SceneBatches(tiny.processor, painter, 2, torch.tensor(2), 0, MaskCodec().eval(), asked_about=2)
    pixel_values, labels, chunks = next(iter(scenes))
    together, attention = train.Together(tiny.config), []

    def attend(queries, keys, values, attn_mask=None):
        logits = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        attention.append(logits.softmax(-1))
        return attention[-1] @ values

    for room in (siglip, gemma):
        monkeypatch.setattr(room.F, "scaled_dot_product_attention", attend)
    eye = together.model.vision_tower.encoder["layers"]
    with train.recorded(eye[-2]) as outputs:
        features = together.model.image_features(pixel_values)
    chances = attention[-1]  # [P, heads, patches, patches]
    pictures, patches = (labels.owners >= 0).nonzero(as_tuple=True)
    wanted = looking.spread_evenly(labels.ends[pictures, labels.owners[pictures, patches]])
    expected = attention_loss(chances[pictures, :, patches].log(), wanted)
    torch.testing.assert_close(looking.eye_loss(eye[-1], outputs[0], labels), expected)

    attention.clear()
    losses = together.answer_losses(features, labels, chunks, [], shows_looks=True)
    layers = len(together.model.language_model.layers)
    total, looks = 0.0, 0
    for number, rows in enumerate(chunks):
        for layer in range(layers)[train.LOOKING_LAYERS.start : train.LOOKING_LAYERS.stop]:
            chances = attention[number * layers + layer]  # [R, kv_heads, T * group, T]
            chances = chances.unflatten(2, (-1, tiny.config.text.num_attention_heads // chances.shape[1]))
            chances = chances[rows.looks.rows, :, rows.looks.positions, 0]  # of the first head of each group
            total = total + len(chances) * attention_loss(chances.log(), rows.looks.patches[:, None])
            looks += len(chances)
    assert looks > 40
    torch.testing.assert_close(losses["voice_looks"], train.VOICE_LOOK_WEIGHT * total / looks)


def test_a_code_costs_as_much_as_its_vector_lies_away(tiny):
    codebook = torch.tensor([[0.0], [1.0], [5.0]])
    risk = TokenRisk.of_codes(10, codebook)
    logits = torch.full((4, 20), 50.0)  # what other tokens get is of no account
    logits[:, 10:13] = torch.tensor([[0, 30, 0], [0, 30, 0], [0, 30, 0], [30, 0, 30]]).float()
    risks = risk(logits, torch.tensor([11, 12, 7, 10]))
    mean = (2 * 1 + 2 * 25 + 2 * 16) / 9
    assert risks == pytest.approx([0, CODE_COST * 16 / mean, 0, CODE_COST * 12.5 / mean], abs=1e-4)


def test_a_coordinate_costs_as_much_as_it_is_off():
    risk = TokenRisk.of_coordinates(2, 5)
    logits = torch.full((3, 9), -50.0)
    logits[0, 4] = logits[1, 2] = logits[2, 6] = 50.0
    assert risk(logits, torch.tensor([5, 6, 1])) == pytest.approx([COORDINATE_COST / 4, COORDINATE_COST, 0])


@pytest.mark.parametrize(
    ("risks", "chosen"), [([], [2]), ([TokenRisk.of_codes(0, torch.tensor([[0.0], [0.2], [5.0]]))], [0, 1])]
)
def test_of_two_likely_codes_that_are_alike_one_is_preferred_to_a_lone_likelier_one(risks, chosen):
    wanted, weights = torch.tensor([[0] * 30 + [1] * 30 + [2] * 40]), torch.full((1, 100), 0.01)
    output_layer = torch.nn.Linear(1, 3)  # of hidden states of nothing: its bias are the logits
    optimiser = torch.optim.Adam(output_layer.parameters(), lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        answer_loss(torch.zeros(1, 100, 1), wanted, weights, output_layer, risks).backward()
        optimiser.step()
    assert output_layer.bias.argmax() in chosen


def test_patches_are_labelled_with_what_lies_on_them():
    owners = np.zeros((112, 112), np.uint8)
    owners[:28, :28], owners[28:42, 70:84], owners[56:, 84:] = 3, 1, 2
    owners[:14, :14] = 0  # a quarter of the cat is not there
    cat = SceneObject(index("cat"), (0.0, 0.0, 0.25, 0.25), "gray", owner=3)
    dog = SceneObject(index("dog"), (0.5, 0.75, 1.0, 1.0), None, owner=2)
    scene = replace(scene_of(background="pink"), objects=(cat, dog), word="Q", owners=owners)
    labels = label_patches([scene], 8)
    shown = labels.shown.view(8, 8)
    assert shown[:2, :2].flatten()[1:].tolist() == 3 * [index("cat")]
    assert (shown[4:, 6:] == index("dog")).all()
    assert shown[2, 5] == FIRST_LETTER + ord("Q") - ord("A")
    assert (shown == FIRST_COLOUR + COLOURS.index("pink")).sum() == 64 - 3 - 8 - 1
    first, last = 1, 63
    assert labels.boxes[0, last].tolist() == [0.5, 0.75, 1.0, 1.0]
    assert labels.colours[0, first] == COLOURS.index("gray")
    of_the_cat, of_the_dog = labels.shapes[0, 8].view(8, 8), labels.shapes[0, 8 * 4 + 6].view(8, 8)
    assert of_the_cat.min() > 0.99, "a window as large as a patch"
    assert of_the_dog[:2].max() < 0.01, "a window of twice the height: above the dog is nothing"
    assert of_the_dog[2:].min() > 0.99
    assert labels.owners[0, [0, 1, last]].tolist() == [NO_LABEL, 0, 1]
    ends = labels.ends[0, 0].view(4, 8, 8)
    assert [side.nonzero().tolist() for side in ends] == [[[0, 1]], [[1, 0]], [[1, 0], [1, 1]], [[0, 1], [1, 1]]]
    assert not labels.ends[0, 2:].any(), "there is no third object"
    assert labels.parts[0, first].tolist() == [0, 0.125, 0.125, 0.25]
    assert not labels.parts[0, 8 * 2 + 5].any(), "a letter"
    assert [labels.across[0, place].item() for place in (first, last, 8 * 2 + 5)] == [0, 1, 0]
    assert labels.counts[0, last] == 0, "no other dog"
    assert labels.down[0, 30] == NO_LABEL, "the background has no place"
    assert [labels.order[0, place].item() for place in (first, last, 30)] == [0, 1, NO_LABEL]
    assert [labels.following[0, place].item() for place in (first, last, 30)] == [1, 0, NO_LABEL]


def test_patches_tell_a_kinds_place_in_the_caption_and_one_patch_of_each_object_is_chosen():
    owners = np.zeros((112, 112), np.uint8)
    owners[:28, :28], owners[42:70, 42:70], owners[84:, 84:] = 1, 2, 3
    owners[56:70, 56:70] = 0  # the chosen patch is one that shows the object
    places = [(0.0, 0.0, 0.25, 0.25), (0.375, 0.375, 0.625, 0.625), (0.75, 0.75, 1.0, 1.0)]
    kinds = [index("cat"), index("dog"), index("cat")]
    things = tuple(SceneObject(kind, box, None, owner) for owner, (kind, box) in enumerate(zip(kinds, places), 1))
    scene = replace(scene_of(), objects=things, owners=owners)
    labels = label_patches([scene], 8)
    patches = [0, 8 * 3 + 3, 63]
    assert labels.order[0, patches].tolist() == [0, 1, 0], "2 cats and a dog"
    assert labels.following[0, patches].tolist() == [1, 0, 1]
    assert labels.counts[0, patches].tolist() == [1, 0, 1]
    chosen = labels.chosen[0].nonzero().flatten().tolist()
    assert len(chosen) == 3
    assert {labels.down[0, place].item() for place in chosen} == {0, 1, 2}
    assert 8 * 4 + 4 not in chosen, "the middle of the dog does not show it"
    assert set(chosen) & {8 * 3 + 3, 8 * 3 + 4, 8 * 4 + 3}


def test_an_object_that_hardly_touches_a_patch_is_not_shown_by_it():
    owners = np.zeros((112, 112), np.uint8)
    owners[:14, :15] = 1
    scene = replace(scene_of(), objects=(SceneObject(0, (0, 0, 0.125, 15 / 112), None, 1),), owners=owners)
    labels = label_patches([scene], 8)
    assert labels.shown[0, 0] == 0
    assert labels.shown[0, 1] >= FIRST_COLOUR
    assert labels.parts[0, 1].tolist() == pytest.approx([0, 14 / 112, 14 / 112, 15 / 112]), "but where it ends is told"


def test_siglip_loss_is_the_papers_in_chunks_of_any_size():
    torch.manual_seed(0)
    pictures, texts = torch.randn(6, 8), torch.randn(6, 8)
    temperature, bias = torch.tensor(1.5), torch.tensor(-2.0)
    logits = F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T * math.exp(1.5) - 2
    labels = 2 * torch.eye(6) - 1
    expected = -torch.log(1 / (1 + torch.exp(-labels * logits))).sum() / 6
    for chunk_size in (1, 4, 6, 100):
        assert siglip_loss(pictures, texts, temperature, bias, chunk_size) == pytest.approx(expected.item(), rel=1e-5)


def test_clip_loss_is_low_only_where_pairs_belong_together():
    pictures = torch.eye(4)
    together = clip_loss(pictures, pictures, torch.tensor(3.0))
    assert together < 0.01
    assert clip_loss(pictures, pictures.flip(0), torch.tensor(3.0)) > 10
    assert clip_loss(torch.ones(4, 8), torch.randn(4, 8), torch.tensor(0.0)) > 1, "all pictures alike"


def test_gradient_checkpointing_changes_no_gradient(tiny, painter):
    scenes = SceneBatches(tiny.processor, painter, 2, torch.tensor(2), 0, MaskCodec().eval(), asked_about=2)
    pixel_values, _, chunks = next(iter(scenes))
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = PaliGemma(tiny.config)
        if is_checkpointed:
            loop.checkpoint_gradients(model.vision_tower.encoder["layers"])
            loop.checkpoint_gradients(model.language_model.layers)
        train.rows_loss(model, model.image_features(pixel_values), chunks).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_how_objects_relate_is_asked_of_the_first_layers_of_the_voice(tiny, painter):
    torch.manual_seed(0)
    scenes = SceneBatches(
        tiny.processor, painter, 3, torch.tensor(2), 0, MaskCodec().eval(), asked_about=2, captioned=1
    )
    pixel_values, labels, chunks = next(iter(scenes))
    together = train.Together(tiny.config)
    losses = together.answer_losses(together.model.image_features(pixel_values), labels, chunks, [])
    assert losses.keys() == {"answers", "counts", "order", "following"}
    losses["counts"].backward()
    layers = together.model.language_model.layers
    has_gradient = [layer.self_attn.q_proj.weight.grad is not None for layer in layers]
    relating = len(layers) - train.SPEAKING_LAYERS
    assert has_gradient == [place < relating for place in range(len(layers))]
    assert not layers[relating - 1]._forward_hooks, "nothing is recorded any longer"


def test_each_row_is_asked_how_the_objects_of_its_own_picture_relate(painter):
    rng = np.random.default_rng(0)
    labels = label_patches([painter.random_scene(rng, 112, count) for count in (1, 4, 4)], 8)
    heads = RelationHeads(6)
    for head in heads.values():
        torch.nn.init.eye_(head.weight)
        torch.nn.init.zeros_(head.bias)
    pictures = torch.tensor([2, 1, 2])
    states = 20 * F.one_hot(labels.counts[pictures].clamp(min=0), 6).float()
    assert heads.losses(states, pictures, labels)["counts"] < 1e-3
    assert heads.losses(states, torch.tensor([0, 0, 0]), labels)["counts"] > 0.1


def test_a_codec_learns_to_give_masks_back(painter, tmp_path):
    torch.manual_seed(0)
    rng, codec = np.random.default_rng(0), MaskCodec()
    scenes = [painter.crop(rng, 64) for _ in range(16)]
    masks = torch.stack([fit_mask(scene.mask(scene.objects[0])) for scene in scenes])
    optimiser = torch.optim.Adam(codec.parameters(), lr=2e-3)
    before = codec.losses(masks)["mask"].item()
    for _ in range(100):
        optimiser.zero_grad()
        sum(codec.losses(masks).values()).backward()
        optimiser.step()
    assert codec.eval().losses(masks)["mask"].item() < 0.5 * before
    codes = codec.encode(masks)
    assert codes.shape == (16, 16)
    assert 0 <= codes.min() <= codes.max() < 128
    decoded = codec.mask_decoder(codes) > 0
    assert (decoded == masks.bool()).float().mean() > 0.9


def test_the_decoder_and_the_codes_learn_from_masks_what_a_code_should_be():
    torch.manual_seed(0)
    decoder = MaskDecoder(8, 4, 8)
    masks = torch.zeros(3, 64, 64)
    masks[:, :32] = 1
    logits = torch.randn(48, 8, requires_grad=True)
    decoded = mask_codec.SHARPNESS * decoder(logits.argmax(-1).view(3, 16))
    loss = decoded_loss(decoder, logits, masks)
    filled = decoded.sigmoid()
    both, either = filled * masks, torch.maximum(filled, masks)  # a mask is nothing but 0 and 1
    overlaps = both.sum((1, 2)) / either.sum((1, 2))
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(decoded, masks) + 1 - overlaps.mean())
    loss.backward()
    assert logits.grad.abs().min() > 0
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        decoded_loss(decoder, logits, masks).backward()
        optimiser.step()
    assert decoded_loss(decoder, logits, masks) < loss, "other codes were chosen"
    assert decoded_loss(decoder, logits[:0], masks[:0]) == 0


def test_what_is_decoded_of_the_codes_teaches_all_that_says_them(tiny, painter):
    torch.manual_seed(0)
    scenes = SceneBatches(tiny.processor, painter, 4, torch.tensor(2), 0, MaskCodec().eval(), 2, segmented=2)
    pixel_values, labels, chunks = next(iter(scenes))
    together = train.Together(tiny.config)
    first_code = tiny.processor.tokenizer.token_to_id("<seg000>")
    features = together.model.image_features(pixel_values)
    losses = together.answer_losses(features, labels, chunks, [], first_code=first_code)
    losses["masks"].backward()
    for part in (together.mask_decoder, together.model.language_model, together.model.vision_tower):
        assert sum(float(weight.grad.abs().sum()) for weight in part.parameters() if weight.grad is not None) > 0


def test_codes_are_read_as_the_voice_says_them(tiny, painter, monkeypatch):
    torch.manual_seed(0)
    scenes = SceneBatches(tiny.processor, painter, 4, torch.tensor(2), 0, MaskCodec().eval(), 1, 1, 2)
    pixel_values, _, chunks = next(iter(scenes))
    together = train.Together(tiny.config)
    first_code = tiny.processor.tokenizer.token_to_id("<seg000>")
    with torch.no_grad():
        features = together.model.image_features(pixel_values)
    some = [together.with_said_codes(features, rows, first_code) for rows in chunks]
    monkeypatch.setattr(train, "READINGS", 2 * 16 + 1)  # after so many, all codes come after such as it says itself
    told = 0
    for rows, first, last in zip(
        chunks, some, (together.with_said_codes(features, rows, first_code) for rows in chunks)
    ):
        is_code = (rows.input_ids >= first_code) & (rows.input_ids < first_code + 128)
        assert torch.equal(last.input_ids[~is_code], rows.input_ids[~is_code])
        with torch.no_grad():
            states = together.model.hidden_states(
                features[rows.pictures], last.input_ids, rows.prefix_lengths, rows.attention_mask
            )
            said = together.model.logits(states)[..., first_code : first_code + 128].argmax(-1)
        assert torch.equal(said[:, :-1][is_code[:, 1:]], last.input_ids[is_code] - first_code)
        for row, codes in enumerate(is_code):
            place = codes.nonzero()[:2, 0]  # of the first two codes
            assert torch.equal(first.input_ids[row, place], last.input_ids[row, place])
            told += len(place)
    assert told >= 4
    assert any(not torch.equal(rows.input_ids, first.input_ids) for rows, first in zip(chunks, some))


def test_a_code_tells_of_its_own_cell_only():
    torch.manual_seed(0)
    codec, masks = MaskCodec().eval(), (torch.rand(1, 64, 64) > 0.5).float()
    changed = masks.clone()
    changed[:, 16:32, 48:] = 1 - changed[:, 16:32, 48:]
    vectors, others = codec.encoder(masks[:, None]), codec.encoder(changed[:, None])
    assert (vectors != others).any(1)[0].nonzero().tolist() == [[1, 3]]


def test_parts_learn_at_the_rates_they_are_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WARM_UP_STEPS", 1)
    eye = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module = torch.nn.ModuleDict({"eye": eye, "voice": torch.nn.Linear(4, 4)})
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    run = loop.Run("slow", module, tmp_path, steps=1, peak=1e-3, factors={eye: 0.1, eye[1]: 2.0})
    run.train(repeat(torch.ones(1, 4)), lambda inputs: {"loss": module["voice"](eye(inputs)).square().sum()})
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in module.state_dict().items()}
    assert 0 < moved["eye.0.bias"] == pytest.approx(0.1 * moved["voice.bias"], rel=1e-2)
    assert moved["eye.1.bias"] == pytest.approx(2 * moved["voice.bias"], rel=1e-2)


def test_what_is_asked_of_patches_is_finer_than_mixed_precision(painter):
    torch.manual_seed(0)
    heads = PatchHeads(16)
    labels = label_patches([painter.random_scene(np.random.default_rng(0), 112, 2)], 8)
    features = torch.randn(1, 64, 16)
    expected = heads.losses(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        losses = heads.losses(features, labels)
    assert all(torch.equal(loss, expected[name]) for name, loss in losses.items())


def test_muon_moves_the_matrices_it_is_given_as_far_in_every_direction(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WARM_UP_STEPS", 1)
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"given": torch.nn.Linear(8, 8), "other": torch.nn.Linear(8, 8)})
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    matrices = [module["given"].weight]
    run = loop.Run("muon", module, tmp_path, steps=1, peak=1e-3, matrices=matrices)
    strengths = 0.7 ** torch.arange(8)  # of directions, of which the last would wait for the first
    inputs = torch.randn(64, 8) * strengths
    run.train(repeat(inputs), lambda inputs: {"loss": sum(layer(inputs).square().mean() for layer in module.values())})
    moved = {name: weight - before[name] for name, weight in module.state_dict().items()}
    given, other = (torch.linalg.svdvals(moved[f"{name}.weight"]) for name in ("given", "other"))
    assert given[-1] > 0.3 * given[0]
    assert other[-1] < 0.3 * other[0]
    assert moved["given.bias"].abs().max() > 0, "what Muon is not given AdamW moves"


def test_the_voice_begins_by_looking_from_a_word_at_the_patches_that_show_it():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(IMAGE_TOKEN))
    model, heads = PaliGemma(config), PatchHeads(config.vision.hidden_size)
    initialise(model, tokenizer, heads.seen(), heads.told())
    names = [kind.name for kind in KINDS if tokenizer.token_to_id(f"▁{kind.name}") is not None][:20]
    words = model.language_model.embed(torch.tensor([tokenizer.token_to_id(f"▁{name}") for name in names]))
    features = model.multi_modal_projector["linear"](torch.stack([heads.seen()[name] for name in names]) * 100)
    layer = model.language_model.layers[0]
    queries, keys = (
        projection(layer.input_layernorm(states))[:, : config.text.head_dim]
        for projection, states in ((layer.self_attn.q_proj, words), (layer.self_attn.k_proj, features))
    )
    assert torch.equal((queries @ keys.T).argmax(dim=1), torch.arange(len(names)))
    # What it then adds to the word's state is what the features tell.
    told, attention = heads.told(), layer.self_attn
    added = attention.v_proj(features)[:, : len(told)] @ attention.o_proj.weight[:, : len(told)].T
    torch.testing.assert_close(added @ told.T, features @ told.T)


def test_positions_interpolate_from_grid_to_grid():
    grid = torch.linspace(0, 1, 4)
    positions = torch.stack([grid.repeat_interleave(4), grid.repeat(4)], dim=1)  # row and column of 16 patches
    larger = resize_positions(positions, 64).view(8, 8, 2)
    assert (larger[1:, :, 0] > larger[:-1, :, 0]).all()
    assert (larger[:, 1:, 1] > larger[:, :-1, 1]).all()
    assert torch.allclose(resize_positions(positions, 16), positions, atol=1e-6)


def test_layers_added_to_a_voice_change_nothing_until_they_learn(tiny):
    torch.manual_seed(0)
    model = PaliGemma(tiny.config).language_model
    layers = len(model.layers) + 3
    deeper = PaliGemma(replace(tiny.config, text=replace(tiny.config.text, num_hidden_layers=layers))).language_model
    deeper.load_state_dict(deepen(model.state_dict(), layers))
    states = torch.randn(2, 5, tiny.config.text.hidden_size)
    output = deeper(states)
    torch.testing.assert_close(output, model(states))
    output.square().sum().backward()
    for layer in deeper.layers:  # the added ones begin to learn at once, by what they add to the stream
        assert layer.self_attn.o_proj.weight.grad.abs().sum() > 0
        assert layer.mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("at_end", [False, True])
def test_layers_added_to_an_eye_change_nothing_until_they_learn(tiny, at_end):
    torch.manual_seed(0)
    layers = tiny.config.vision.num_hidden_layers
    eye = PaliGemma(tiny.config).vision_tower
    deeper = PaliGemma(
        replace(tiny.config, vision=replace(tiny.config.vision, num_hidden_layers=layers + 2))
    ).vision_tower
    others = {name: value for name, value in eye.state_dict().items() if not name.startswith("encoder.")}
    grown = deepen(eye.encoder.state_dict(), layers + 2, at_end)
    deeper.load_state_dict(others | {f"encoder.{name}": value for name, value in grown.items()})
    added = range(layers, layers + 2) if at_end else range(layers // 2, layers // 2 + 2)
    assert [place for place in range(layers + 2) if not grown[f"layers.{place}.mlp.fc2.weight"].any()] == [*added]
    pixel_values = torch.randn(1, 3, tiny.config.vision.image_size, tiny.config.vision.image_size)
    torch.testing.assert_close(deeper(pixel_values), eye(pixel_values))
    deeper(pixel_values).square().mean().backward()
    for layer in deeper.encoder["layers"]:
        assert layer.mlp.fc2.weight.grad.abs().sum() > 0


def test_each_loss_is_drawn_in_a_colour_of_its_own(tmp_path):
    names = [f"loss {number}" for number in range(16)]
    header = ["step", "learning_rate", "steps_per_second", "drawn_per_second", *names]  # the first four are no losses
    rows = [",".join(header), *(",".join(map(str, [step, 1, 1, 1, *range(1, 17)])) for step in (25, 50))]
    (tmp_path / "stage.csv").write_text("\n".join(rows))
    svg = plot(tmp_path).read_text()
    curves = re.findall(r"stroke: (#[0-9a-f]{6}); stroke-width: 1.5", svg)  # each in the panel and in its legend
    assert len(curves) == 32
    assert len(set(curves)) == 16


class Clocked(IterableDataset):
    """Numbers of the process that draws them, of which each takes two seconds on a clock that nothing else moves."""

    def __init__(self, clock):
        self.clock = clock

    def __iter__(self):
        while True:
            self.clock.now += 2
            yield os.getpid()


def test_batches_are_drawn_in_another_process_and_only_drawing_is_timed(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    drawn = batches.InBackground(Clocked(clock))
    assert os.getpid() not in {next(drawn) for _ in range(3)}
    assert drawn.rate == 0.5
    timed = iter(batches._Timed(Clocked(clock)))
    seconds = []
    for _ in range(3):
        seconds.append(next(timed)[0])
        clock.now += 10  # what is done with it takes longer
    assert seconds == [2, 2, 2]


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [loop.learning_rate(step, 1000, 1e-3) for step in range(1001)]
    assert rates[0] <= 1e-3 / 50
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (loop.WARM_UP_STEPS - 1, loop.WARM_UP_STEPS)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.fixture
def studio(sprites, fonts, tmp_path, monkeypatch):
    """A place to train in, with few and small steps."""
    monkeypatch.setattr(contrastive, "CROPS_A_BATCH", 12)
    monkeypatch.setattr(naming, "CROPS_A_BATCH", 4)
    monkeypatch.setattr(train, "SCENES_A_BATCH", 2)
    monkeypatch.setattr(train, "PICTURES_A_BATCH", 2)
    monkeypatch.setattr(train, "PICTURES_TOGETHER", 4)
    few = {
        stage: replace(lessons, asked_about=2, captioned=1, segmented=min(1, lessons.segmented))
        for stage, lessons in train.LESSONS.items()
    }
    monkeypatch.setattr(train, "LESSONS", few)
    monkeypatch.setattr(train, "JUDGED", 10)
    monkeypatch.setattr(mask_codec, "MASKS_A_BATCH", 4)
    monkeypatch.setattr(loop, "WARM_UP_STEPS", 5)
    monkeypatch.setattr(loop, "LOG_EVERY", 20)
    monkeypatch.setattr(loop, "SAVE_EVERY", 20)
    monkeypatch.setattr(loop, "LOSS_SMOOTHING", 0.8)
    torch.manual_seed(0)
    return train.Studio(
        folder=tmp_path,
        processor=train.tiny_processor(),
        painter=Painter(sprites, fonts, kinds=[0, 1, 2]),
        device=torch.device("cpu"),
        gradient_checkpointing=False,
        compile=False,
        use_clip=True,
        steps=dict.fromkeys(train.STAGES, 3) | {"contrastive": 100},
    )


def test_training_learns_logs_and_resumes_and_leaves_a_checkpoint(studio, tmp_path, monkeypatch):
    (tmp_path / "contrastive.csv").write_text("step,learning_rate,clip\n20,0,9.9\n")  # of a run that saved nothing
    train.STAGES["contrastive"](studio)
    rows = [*csv.DictReader((tmp_path / "contrastive.csv").open())]
    assert all(float(row["drawn_per_second"]) > 0 < float(row["steps_per_second"]) for row in rows)
    losses = [float(row["clip"]) for row in rows]
    assert len(losses) == 5
    assert losses[-1] < min(losses[0], math.log(12)) - 0.1, "no better than guessing"

    with (tmp_path / "contrastive.csv").open("a") as log:
        log.write("119,0,0,0,9.9\n")  # an interruption came after this step was logged, and before it was saved
    train.STAGES["contrastive"](replace(studio, steps=studio.steps | {"contrastive": 140}))  # goes on where it stopped
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "contrastive.csv").open())]
    assert steps == [20, 40, 60, 80, 100, 120, 140]

    for stage in ("naming", "masks", "patches", "voice"):
        train.STAGES[stage](studio)
    eye = studio.patch_model().vision_tower.state_dict()
    kept = studio.saved("voice")
    assert all(torch.equal(weight, kept[f"model.vision_tower.{name}"]) for name, weight in eye.items()), "the eye stays"
    for stage in ("together", "larger", "deeper", "keener"):
        train.STAGES[stage](studio)
    untouched, first = load_file(tmp_path / "mask_decoder.safetensors"), studio.codec().mask_decoder.state_dict()
    assert all(torch.equal(untouched[name], first[name].bfloat16()) for name in first), "until masks are traced"
    train.STAGES["pointed"](replace(studio, steps=studio.steps | {"pointed": 20}))
    train.STAGES["pointed"](replace(studio, steps=studio.steps | {"pointed": 21}))  # from what Muon has saved as well

    said, taught = [], []
    say, teach = train.Together.with_said_codes, train.Together.answer_losses
    monkeypatch.setattr(train.Together, "with_said_codes", lambda *given: said.append(say(*given)) or said[-1])
    monkeypatch.setattr(train.Together, "answer_losses", lambda *given: taught.extend(given[3]) or teach(*given))
    train.STAGES["traced"](studio)
    assert taught
    assert not said
    taught.clear()
    train.STAGES["finer"](studio)
    assert len(taught) == len(said) > 0
    assert all(rows is own for rows, own in zip(taught, said)), "it goes on from its own codes"
    made, draw = [], train.SceneBatches
    monkeypatch.setattr(train, "SceneBatches", lambda *given, **asked: made.append(asked) or draw(*given, **asked))
    few = replace(train.LESSONS["fuller"], asked_about=1, captioned=1, segmented=2)
    monkeypatch.setitem(train.LESSONS, "fuller", few)
    train.STAGES["fuller"](studio)
    assert made == [{"asked_about": 1, "captioned": 1, "segmented": 2}]
    train.STAGES["bolder"](studio)

    from paligemma import load

    vlm = load(tmp_path)
    decoder, first = vlm.mask_decoder.state_dict(), studio.codec().mask_decoder.state_dict()
    assert any((decoder[name] - first[name].bfloat16()).abs().max() > 0 for name in first), "the decoder learns as well"
    assert vlm.config.vision.image_size == IMAGE_SIZE > train.LARGER_IMAGE_SIZE > train.FIRST_IMAGE_SIZE
    assert vlm.config.vision.num_hidden_layers == EYE_LAYERS > train.KEENER_EYE_LAYERS > train.FIRST_EYE_LAYERS
    assert vlm.config.text.num_hidden_layers == TEXT_LAYERS > train.FIRST_TEXT_LAYERS
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    assert isinstance(vlm.mask_decoder, MaskDecoder)
    assert vlm.generate(Image.new("RGB", (50, 50)), "caption en", max_new_tokens=3) is not None


@pytest.mark.slow
def test_compiled_layers_learn_the_same(studio, tmp_path, monkeypatch):
    last = list(train.STAGES)[-1]
    for stage in list(train.STAGES)[:-1]:
        train.STAGES[stage](replace(studio, steps=dict.fromkeys(train.STAGES, 1)))
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    logs = []
    for is_compiled in (False, True):
        folder = shutil.copytree(tmp_path, tmp_path.with_name(f"compiled {is_compiled}"))
        train.STAGES[last](replace(studio, folder=folder, compile=is_compiled))
        logs.append([*csv.DictReader((folder / f"{last}.csv").open())])
    assert len(logs[0]) == len(logs[1]) == studio.steps[last]
    for plain, compiled in zip(*logs):
        for name in plain.keys() - {"step", "steps_per_second", "drawn_per_second"}:
            assert float(compiled[name]) == pytest.approx(float(plain[name]), rel=0.02, abs=0.005), name


def test_a_stage_whose_forerunner_is_missing_says_which(studio):
    with pytest.raises(SystemExit, match="train the stage naming first"):
        train.STAGES["patches"](studio)


def test_many_answers_at_a_time_are_those_given_one_by_one(tiny, painter):
    scenes = evaluate.draw_scenes(painter, 4, size=112)
    asked = [(0, "caption en"), (3, "caption en"), (1, "detect cat"), (2, "answer en what color is the background?")]
    answers = evaluate.answer_all(tiny, scenes, asked)
    assert answers == [
        tiny.generate(scenes[number].image, prompt, max_new_tokens=evaluate.MAX_NEW_TOKENS) for number, prompt in asked
    ]


def test_scores_are_full_for_true_answers_only(tiny, painter, monkeypatch):
    scenes = evaluate.draw_scenes(painter, 12, size=112)
    true = {}
    original = evaluate._ask

    def ask(rng, scene, painter):
        questions = original(rng, scene, painter)
        for prompt, _, expected in questions:
            found = detections(scene, expected) if isinstance(expected, int) else expected
            true[id(scene), prompt] = found
        return questions

    monkeypatch.setattr(evaluate, "_ask", ask)
    monkeypatch.setattr(
        evaluate, "answer_all", lambda vlm, some, asked: [true[id(some[number]), prompt] for number, prompt in asked]
    )
    figures = evaluate.evaluate(tiny, painter, scenes)[0].figures()
    no_masks = figures.pop("segment: mean IoU of masks of found objects")
    assert no_masks == 0, "boxes without codes are no masks"
    assert set(figures.values()) == {1.0}

    monkeypatch.setattr(evaluate, "answer_all", lambda vlm, some, asked: ["a mistake"] * len(asked))
    assert set(evaluate.evaluate(tiny, painter, scenes)[0].figures().values()) == {0.0}


def test_artwork_of_others_is_read_from_a_folder(tmp_path):
    Image.new("RGBA", (40, 20), (255, 0, 0, 255)).save(tmp_path / "cat.png")
    (tmp_path / "hot dog.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle cx="4" cy="4" r="3" fill="#00f"/></svg>'
    )
    sprites, kinds = load_folder(tmp_path, 64)
    assert kinds == sorted([index("cat"), index("hot dog")])
    drawn = Painter(sprites, [], kinds, restyled=0.0).choose_kinds(np.random.default_rng(0), 20)
    assert set(drawn) == set(kinds)
    assert sprites.levels[0][index("cat"), 0, 32, 32].tolist() == [255, 0, 0, 255]
    with pytest.raises(FileNotFoundError, match=r"name them after the kinds"):
        load_folder(tmp_path / "nothing", 64)


def test_a_package_that_lacks_a_kind_is_refused(monkeypatch, tmp_path):
    contents = json.dumps({"icons": {kind.icon: {} for kind in KINDS if kind.name != "cat"}}).encode()
    with tarfile.open(tmp_path / "package.tar", "w") as tar:
        entry = tarfile.TarInfo("package/icons.json")
        entry.size = len(contents)
        tar.addfile(entry, io.BytesIO(contents))
    with tarfile.open(tmp_path / "package.tar") as tar:
        monkeypatch.setattr(artwork, "_npm_package", lambda package: nullcontext(tar))
        with pytest.raises(ValueError, match="a-set has no drawings of cat-face: put those that it has into a folder"):
            load_sprites(16, ["a-set"], tmp_path)


def test_sprites_come_back_from_their_sheet(sprites, tmp_path):
    pixels = np.repeat(sprites.levels[0], len(STYLES), axis=1)
    pixels[..., 2] = np.arange(len(STYLES))[:, None, None]  # so that no two are alike
    pack_sheet(Sprites(pixels)).save(tmp_path / "sheet.png")
    assert np.array_equal(load_sheet(tmp_path / "sheet.png").levels[0], pixels)
