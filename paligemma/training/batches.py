"""Endless batches of scenes with their questions and answers, drawn afresh in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..processor import Processor
from .artwork import KINDS
from .losses import NO_LABEL
from .scenes import MAX_OBJECTS, Scene, choose_kinds, draw_crop, draw_scene
from .tasks import prompts_and_answers


@dataclass(frozen=True)
class Rows:
    """Pictures, and several rows of prompt and answer for each.

    pixel_values: float32 [P, 3, H, W]; the others have R rows, R / P consecutive ones on the same picture.
    input_ids: int64 [R, T], right-padded. labels: int64 [R, T], the next token or `NO_LABEL`.
    prefix_lengths: int64 [R]. attention_mask: bool [R, T].
    """

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    prefix_lengths: Tensor
    attention_mask: Tensor


def collate(processor: Processor, pixel_values: Tensor, pairs: list[tuple[str, str]]) -> Rows:
    """Rows of prompt, answer and `<eos>` for teacher forcing; the prompt and the padding carry no label."""
    config = processor.config
    prefixes = [processor.input_ids(prompt) for prompt, _ in pairs]
    answers = [processor.tokenizer.encode(answer, add_special_tokens=False).ids for _, answer in pairs]
    lengths = [len(prefix) + len(answer) for prefix, answer in zip(prefixes, answers)]
    input_ids = torch.full((len(pairs), max(lengths)), config.pad_token_id)
    labels = torch.full_like(input_ids, NO_LABEL)
    for row, (prefix, answer, length) in enumerate(zip(prefixes, answers, lengths)):
        input_ids[row, :length] = torch.tensor(prefix + answer)
        labels[row, len(prefix) - 1 : length] = torch.tensor([*answer, config.eos_token_ids[0]])
    return Rows(
        pixel_values=pixel_values,
        input_ids=input_ids,
        labels=labels,
        prefix_lengths=torch.tensor([len(prefix) for prefix in prefixes]),
        attention_mask=torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None],
    )


class SceneBatches(IterableDataset):
    """Endless `Rows`; `max_objects`, a shared int64 scalar, may be raised while they are drawn."""

    def __init__(self, processor: Processor, sprites: np.ndarray, pictures: int, max_objects: Tensor, seed: int):
        self.processor, self.sprites, self.pictures = processor, sprites, pictures
        self.max_objects, self.seed = max_objects, seed

    def __iter__(self) -> Iterator[Rows]:
        rng = np.random.default_rng(self.seed)
        size = self.processor.config.vision.image_size
        while True:
            counts = rng.integers(1, self.max_objects.item() + 1, self.pictures)
            scenes = [draw_scene(rng, self.sprites, size, choose_kinds(rng, count)) for count in counts]
            pixel_values = torch.cat([self.processor.pixel_values(scene.image) for scene in scenes])
            pairs = [pair for scene in scenes for pair in prompts_and_answers(rng, scene)]
            yield collate(self.processor, pixel_values, pairs)


class CropBatches(IterableDataset):
    """Endless pairs of pixel values, float32 [P, 3, size, size], and kinds, int64 [P], of single objects."""

    def __init__(self, processor: Processor, sprites: np.ndarray, pictures: int, size: int, seed: int):
        self.processor, self.sprites, self.pictures = processor, sprites, pictures
        self.size, self.seed = size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(self.seed)
        while True:
            crops = [draw_crop(rng, self.sprites, self.size) for _ in range(self.pictures)]
            pixel_values = torch.cat([self.processor.normalise(image) for image, _ in crops])
            yield pixel_values, torch.tensor([kind for _, kind in crops])


class PatchBatches(IterableDataset):
    """Endless pairs of pixel values, float32 [P, 3, H, W], of scenes, and what each patch shows, int64 [P, patches].

    What it shows is the kind of the object whose box holds its centre, or `len(KINDS)` where there is none.
    """

    def __init__(self, processor: Processor, sprites: np.ndarray, pictures: int, seed: int):
        self.processor, self.sprites, self.pictures, self.seed = processor, sprites, pictures, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(self.seed)
        size = self.processor.config.vision.image_size
        while True:
            counts = rng.integers(1, MAX_OBJECTS + 1, self.pictures)
            scenes = [draw_scene(rng, self.sprites, size, choose_kinds(rng, count)) for count in counts]
            pixel_values = torch.cat([self.processor.normalise(scene.image) for scene in scenes])
            yield pixel_values, torch.stack([self.kinds_of_patches(scene) for scene in scenes])

    def kinds_of_patches(self, scene: Scene) -> Tensor:
        vision = self.processor.config.vision
        side = vision.image_size // vision.patch_size
        centres = (torch.arange(side) + 0.5) / side
        kinds = torch.full((side, side), len(KINDS))
        for thing in scene.objects:
            y_min, x_min, y_max, x_max = thing.box
            rows, columns = (centres > y_min) & (centres < y_max), (centres > x_min) & (centres < x_max)
            kinds[rows[:, None] & columns] = thing.kind
        return kinds.flatten()


def in_background(batches: IterableDataset) -> Iterator:
    """Draw in one other process, so that drawing and computing overlap."""
    return iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))
