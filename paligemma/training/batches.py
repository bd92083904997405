"""Endless batches of scenes with the truth about them, drawn afresh in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..processor import Processor
from .looking import Looks, find_looks
from .losses import NO_LABEL
from .mask_codec import MaskCodec, fit_mask
from .patches import PatchLabels, label_patches
from .scenes import Painter, Scene
from .tasks import CAPTION_PROMPT, Slip, caption, caption_with_slip, prompts_and_answers
from .tokenizer import SEG_TOKENS

SHORT = 6  # tokens, as one box has
SPOILT_CODES = 0.5  # of a mask's codes that are read, not of those to be written
SLIPS = 0.4  # of the captions of further pictures
ROWS_A_CHUNK = 12


@dataclass(frozen=True)
class Rows:
    """Rows of prompt and answer about some pictures.

    pictures: int64 [R], which picture each row is about.
    input_ids: int64 [R, T], right-padded. labels: int64 [R, T], the next token or `NO_LABEL`.
    weights: float32 [R, T], how much each label counts. prefix_lengths: int64 [R]. attention_mask: bool [R, T].
    first: no label is before this position.
    looks: where to look for coordinates and codes, if that is shown.
    """

    pictures: Tensor
    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    prefix_lengths: Tensor
    attention_mask: Tensor
    first: int
    looks: Looks | None = None


def collate(
    processor: Processor,
    pictures: list[int],
    pairs: list[tuple[str, str]],
    slips: list[Slip | None] | None = None,
    rng: np.random.Generator | None = None,
) -> Rows:
    """Rows of prompt, answer and `<eos>` for teacher forcing; the prompt and the padding carry no label.

    A label counts by one over the square root of how many its row has: otherwise long answers would be all that
    matters, and with one over their number a coordinate would count for nothing beside a `yes`. Of short answers all count
    alike, since else the `<eos>` of an empty one would outweigh the first coordinate of a box, and be said too often.

    What overlaps a slip of an answer carries no label: it is there to be gone on from (DAgger, arXiv 1011.0686).

    With `rng`, half of the mask codes that are read are others at random (word dropout, arXiv 1511.06349), so that each
    is learnt from the picture, and not from the ones before it, which will be less right than here.
    """
    config = processor.config
    prefixes = [processor.input_ids(prompt) for prompt, _ in pairs]
    encodings = [processor.tokenizer.encode(answer, add_special_tokens=False) for _, answer in pairs]
    answers = [encoding.ids for encoding in encodings]
    lengths = [len(prefix) + len(answer) for prefix, answer in zip(prefixes, answers)]
    input_ids = torch.full((len(pairs), max(lengths)), config.pad_token_id)
    labels, weights = torch.full_like(input_ids, NO_LABEL), torch.zeros(input_ids.shape)
    first_code = processor.tokenizer.token_to_id(SEG_TOKENS[0])
    for row, (prefix, answer, length) in enumerate(zip(prefixes, answers, lengths)):
        input_ids[row, :length] = torch.tensor(prefix + answer)
        labels[row, len(prefix) - 1 : length] = torch.tensor([*answer, config.eos_token_ids[0]])
        weights[row, len(prefix) - 1 : length] = max(len(answer) + 1, SHORT) ** -0.5
        if slips is not None and (slip := slips[row]) is not None:
            spans = enumerate(encodings[row].offsets, len(prefix) - 1)
            wrong = [place for place, (start, end) in spans if start < slip[1] and end > slip[0]]
            labels[row, wrong], weights[row, wrong] = NO_LABEL, 0.0
    if rng is not None:
        is_code = (input_ids >= first_code) & (input_ids < first_code + len(SEG_TOKENS))
        is_spoilt = is_code & torch.from_numpy(rng.random(input_ids.shape) < SPOILT_CODES)
        others = torch.from_numpy(rng.integers(first_code, first_code + len(SEG_TOKENS), input_ids.shape))
        input_ids = torch.where(is_spoilt, others, input_ids)
    return Rows(
        pictures=torch.tensor(pictures),
        input_ids=input_ids,
        labels=labels,
        weights=weights,
        prefix_lengths=torch.tensor([len(prefix) for prefix in prefixes]),
        attention_mask=torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None],
        first=min(map(len, prefixes)) - 1,
    )


class CropBatches(IterableDataset):
    """Endless pairs of pixel values, float32 [crops, 3, size, size], of single objects, and what `label` makes of them."""

    def __init__(
        self,
        processor: Processor,
        painter: Painter,
        crops: int,
        size: int,
        label: Callable[[list[Scene]], Tensor],
        seed: int,
    ):
        self.processor, self.painter, self.crops, self.size = processor, painter, crops, size
        self.label, self.seed = label, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(self.seed)
        while True:
            crops = [self.painter.crop(rng, self.size) for _ in range(self.crops)]
            yield torch.cat([self.processor.normalise(crop.image) for crop in crops]), self.label(crops)


class PatchBatches(IterableDataset):
    """Endless pairs of pixel values, float32 [P, 3, H, W], and `PatchLabels`.

    Scenes have up to `max_objects`, a shared int64 scalar that may be raised while they are drawn.
    """

    def __init__(self, processor: Processor, painter: Painter, pictures: int, max_objects: Tensor, seed: int):
        self.processor, self.painter, self.pictures = processor, painter, pictures
        self.max_objects, self.seed = max_objects, seed

    def __iter__(self) -> Iterator[tuple[Tensor, PatchLabels]]:
        rng = np.random.default_rng(self.seed)
        while True:
            yield self._pixels_and_labels(self._draw(rng))

    def _draw(self, rng: np.random.Generator) -> list[Scene]:
        size = self.processor.config.vision.image_size
        counts = rng.integers(1, self.max_objects.item() + 1, self.pictures)
        return [self.painter.random_scene(rng, size, count) for count in counts]

    def _pixels_and_labels(self, scenes: list[Scene]) -> tuple[Tensor, PatchLabels]:
        vision = self.processor.config.vision
        pixel_values = torch.cat([self.processor.normalise(scene.image) for scene in scenes])
        return pixel_values, label_patches(scenes, vision.image_size // vision.patch_size)


class SceneBatches(PatchBatches):
    """As `PatchBatches`, with a third element: rows, in chunks, of all tasks about the first `asked_about` pictures.

    The next `captioned` pictures have one row each, since naming all that is there takes the most practice.
    """

    def __init__(
        self,
        processor: Processor,
        painter: Painter,
        pictures: int,
        max_objects: Tensor,
        seed: int,
        codec: MaskCodec,
        asked_about: int,
        captioned: int = 0,
    ):
        super().__init__(processor, painter, pictures, max_objects, seed)
        self.codec, self.asked_about, self.captioned = codec, asked_about, captioned

    def __iter__(self) -> Iterator[tuple[Tensor, PatchLabels, list[Rows]]]:
        rng = np.random.default_rng(self.seed)
        while True:
            scenes = self._draw(rng)
            codes = encode_masks(self.codec, scenes[: self.asked_about])
            asked: list[tuple[int, tuple[str, str], Slip | None]] = [
                (picture, pair, None)
                for picture, scene in enumerate(scenes[: self.asked_about])
                for pair in prompts_and_answers(rng, scene, codes[picture], self.painter.kinds)
            ]
            further = range(self.asked_about, self.asked_about + self.captioned)
            for picture in further:
                slips = rng.random() < SLIPS
                text, slip = caption_with_slip(rng, scenes[picture]) if slips else (caption(scenes[picture]), None)
                asked.append((picture, (CAPTION_PROMPT, text), slip))
            # Rows of like length together, because each is padded to the longest of its chunk.
            asked.sort(key=lambda item: len(self.processor.tokenizer.encode(" ".join(item[1])).ids))
            chunks = [
                collate(self.processor, *map(list, zip(*asked[start : start + ROWS_A_CHUNK])), rng)
                for start in range(0, len(asked), ROWS_A_CHUNK)
            ]
            pixel_values, labels = self._pixels_and_labels(scenes)
            yield pixel_values, labels, [self._show(rows, scenes, labels) for rows in chunks]

    def _show(self, rows: Rows, scenes: list[Scene], labels: PatchLabels) -> Rows:
        looks = find_looks(self.processor.tokenizer, scenes, labels.ends, rows.pictures, rows.labels)
        return replace(rows, looks=looks)


@torch.inference_mode()
def encode_masks(codec: MaskCodec, scenes: list[Scene]) -> list[dict[int, list[int]]]:
    """For each scene, the mask codes of each object by its owner."""
    masks = [fit_mask(scene.mask(thing)) for scene in scenes for thing in scene.objects]
    codes = iter(codec.encode(torch.stack(masks)).tolist())
    return [{thing.owner: next(codes) for thing in scene.objects} for scene in scenes]


def in_background(batches: IterableDataset) -> Iterator:
    """Draw in one other process, so that drawing and computing overlap."""
    return iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))


def move(batch: PatchLabels | Rows | Looks, device: torch.device) -> PatchLabels | Rows | Looks:
    """All tensors of a batch to a device."""
    tensors = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else move(value, device)
        for name, value in vars(batch).items()
        if isinstance(value, (Tensor, Looks))
    }
    return replace(batch, **tensors)
