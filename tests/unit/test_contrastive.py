"""Contrastive losses are those of the papers, and pairs that belong together find each other in the end."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from paligemma import PaliGemmaError
from paligemma.training import contrastive, loop
from paligemma.training.losses import clip_loss, siglip_loss

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def contrastive_inputs(batch):
    torch.manual_seed(0)
    images, texts = (torch.randn(batch, 16, requires_grad=True) for _ in range(2))
    return images, texts, torch.tensor(1.5, requires_grad=True), torch.tensor(-2.0, requires_grad=True)


def plain_siglip_loss(images, texts, log_scale, bias):
    """As the paper writes it (algorithm 1), over the whole square of pairs."""
    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp() + bias
    labels = 2 * torch.eye(len(images)) - 1
    return -torch.log(1 / (1 + torch.exp(-labels * logits))).sum() / len(images)


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_siglip_loss_and_its_gradients_are_the_papers_in_chunks_of_any_size(chunk_size):
    inputs = contrastive_inputs(6)
    expected = plain_siglip_loss(*inputs)
    loss = siglip_loss(*inputs, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected)
    for gradient, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(gradient, other)


def bytes_saved_for_backward(compute):
    """Of all tensors that a loss keeps until its backward pass, each storage counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    assert loss.requires_grad
    return sum(storages.values())


def test_memory_of_siglip_loss_grows_with_the_batch_and_not_with_its_square():
    small, large = contrastive_inputs(256), contrastive_inputs(1024)
    plain = [bytes_saved_for_backward(lambda some=some: plain_siglip_loss(*some)) for some in (small, large)]
    chunked = [bytes_saved_for_backward(lambda some=some: siglip_loss(*some, chunk_size=64)) for some in (small, large)]
    assert plain[1] > 12 * plain[0]
    assert chunked[1] < 5 * chunked[0]
    assert chunked[1] < plain[1] / 20


def test_clip_loss_is_low_only_where_pairs_belong_together():
    images = torch.eye(4)
    assert clip_loss(images, images, torch.tensor(3.0)) < 0.01
    assert clip_loss(images, images.flip(0), torch.tensor(3.0)) > 10
    assert clip_loss(torch.ones(4, 8), torch.randn(4, 8), torch.tensor(0.0)) > 1, "all images alike"


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_equal_captions_are_no_negatives_of_each_other(chunk_size):
    images, texts, log_scale, bias = contrastive_inputs(5)
    captions = torch.tensor([0, 1, 0, 2, 1])
    is_alike = (captions[:, None] == captions) & ~torch.eye(5, dtype=torch.bool)
    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp()
    labels = 2 * torch.eye(5) - 1
    pairs = -F.logsigmoid(labels * (logits + bias))
    loss = siglip_loss(images, texts, log_scale, bias, captions, chunk_size)
    torch.testing.assert_close(loss, pairs[~is_alike].sum() / 5)
    (image_gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    assert image_gradient.isfinite().all()

    left = [torch.log(row.exp()[~alike].sum()) - row[one] for one, (row, alike) in enumerate(zip(logits, is_alike))]
    right = [torch.log(row.exp()[~alike].sum()) - row[one] for one, (row, alike) in enumerate(zip(logits.T, is_alike))]
    torch.testing.assert_close(clip_loss(images, texts, log_scale, captions), torch.stack(left + right).mean())
    torch.testing.assert_close(
        clip_loss(images, texts, log_scale, torch.arange(5)), clip_loss(images, texts, log_scale)
    )


def figures(printed):
    return {name: float(value) for name, value in re.findall(r"^(.*): (\d\.\d+)$", printed, re.MULTILINE)}


def test_training_on_scenes_learns_and_prints_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contrastive, "PAIRS_A_BATCH", 16)
    monkeypatch.setattr(contrastive, "EVALUATION_CROPS", 20)
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr(loop, "LOSS_SMOOTHING", 0.8)
    contrastive.main(["--output", str(tmp_path), "--steps", "10"])
    losses = [float(row["siglip"]) for row in csv.DictReader((tmp_path / "contrastive.csv").open())]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert figures(capsys.readouterr().out).keys() == {
        "the nearest text of an image is its own",
        "it is among the nearest five",
        "the nearest image of a text is its own",
        "the nearest kind is the right one",
        "the nearest background is the right one",
    }
    assert contrastive.load_towers(tmp_path).processor.config.vision == contrastive.VISION


def write_pairs(folder, count):
    """Images of plain colors, with texts of which many are equal."""
    rng, names = np.random.default_rng(0), list(COLORS)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(count):
            name = names[number % len(names)]
            color = np.clip(np.array(COLORS[name]) + rng.integers(-20, 20, 3), 0, 255)
            Image.new("RGB", (40, 30), tuple(color.tolist())).save(folder / f"{number}.png")
            file.write(json.dumps({"image": f"{number}.png", "text": f"something {name}"}) + "\n")
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("loss", ["siglip", "clip"])
def test_own_pairs_find_each_other_and_the_towers_are_read_again(tmp_path, monkeypatch, capsys, loss):
    monkeypatch.setattr(contrastive, "PAIRS_A_BATCH", 16)
    data = write_pairs(tmp_path, 40)
    options = ["--loss", loss, "--steps", "40", "--image-size", "28"]
    contrastive.main(["--data", str(data), "--output", str(tmp_path / "run"), *options])
    printed = figures(capsys.readouterr().out)
    assert printed.pop("it is among the nearest five") == 1
    assert set(printed.values()) == {1.0}

    towers = contrastive.load_towers(tmp_path / "run")
    images = [Image.new("RGB", (20, 20), color) for color in COLORS.values()]
    cosines = towers.similarity(images, [f"something {name}" for name in COLORS])
    assert cosines.shape == (4, 4)
    assert cosines.abs().max() <= 1 + 1e-5
    assert cosines.argmax(1).tolist() == cosines.argmax(0).tolist() == [0, 1, 2, 3]
    with Image.open(tmp_path / "run" / "similarity.png") as picture:
        colors = {color for _, color in picture.getcolors(100_000)}
    assert (24, 63, 160) in colors


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"image": "0.png"}', "There is no “text”"),
        ('{"image": "0.png", "text": " "}', "“text” is empty"),
        ('{"image": "none.png", "text": "a cat"}', "There is no file none.png"),
        ("nonsense", "not JSON"),
    ],
)
def test_bad_pairs_are_named_by_their_line(tmp_path, line, sentence):
    data = write_pairs(tmp_path, 4)
    with data.open("a") as file:
        file.write(line)
    with pytest.raises(SystemExit) as caught:
        contrastive.main(["--data", str(data), "--output", str(tmp_path / "run")])
    assert f"{data}, line 5: " in str(caught.value)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run" / "contrastive.csv").exists()


def test_a_folder_without_towers_is_refused(tmp_path):
    with pytest.raises(PaliGemmaError, match="holds no two towers"):
        contrastive.load_towers(tmp_path)


def test_a_device_that_is_not_there_ends_with_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="device nonsense"):
        contrastive.main(["--output", str(tmp_path), "--device", "nonsense"])


def test_padding_changes_no_text_embedding():
    torch.manual_seed(0)
    tower = contrastive.TextTower(vocab_size=20, width=16, heads=2, pad_token_id=0, max_tokens=12).eval()
    ids = torch.zeros(1, 12, dtype=torch.int64)
    ids[0, :3] = torch.tensor([5, 6, 7])
    before = tower(ids)
    with torch.no_grad():
        tower.embedding.weight[0] = 9.0
    torch.testing.assert_close(tower(ids), before)
