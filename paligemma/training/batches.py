"""Endless batches of scenes with the truth about them, drawn afresh in a process of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..mask_decoder import MASK_SIDE
from ..processor import Processor
from .looking import Looks, find_boxes, find_looks
from .losses import NO_LABEL
from .mask_codec import MaskCodec, fit_mask
from .patches import PatchLabels, label_patches
from .scenes import Painter, Scene
from .tasks import (
    CAPTION_PROMPT,
    LAST_STEP,
    LOC_STEP,
    Slip,
    caption,
    caption_with_slip,
    detections,
    loc_steps,
    loc_tokens,
    prompts_and_answers,
    segment_prompt,
)
from .tokenizer import SEG_TOKENS

SHORT = 6  # tokens, as one box has
SPOILT_CODES = 0.5  # of a mask's codes that are read, not of those to be written
ALIKE = 16  # codes that a spoilt one may have become
MISHEARD = 0.5  # of the boxes that are read before codes
OFF = 2.0  # steps of a coordinate by which the sides of these are wrong: the standard deviation
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
    masks: float32 [M, 64, 64], what each sixteen codes among the labels stand for, in their order.
    """

    pictures: Tensor
    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    prefix_lengths: Tensor
    attention_mask: Tensor
    first: int
    looks: Looks | None = None
    masks: Tensor | None = None


def collate(
    processor: Processor,
    pictures: list[int],
    pairs: list[tuple[str, str]],
    slips: list[Slip | None] | None = None,
) -> Rows:
    """Rows of prompt, answer and `<eos>` for teacher forcing; the prompt and the padding carry no label.

    A label counts by one over the square root of how many its row has: otherwise long answers would be all that
    matters, and with one over their number a coordinate would count for nothing beside a `yes`. Of short answers all count
    alike, since else the `<eos>` of an empty one would outweigh the first coordinate of a box, and be said too often.

    What overlaps a slip of an answer carries no label: it is there to be gone on from (DAgger, arXiv 1011.0686).
    """
    config = processor.config
    prefixes = [processor.input_ids(prompt) for prompt, _ in pairs]
    encodings = [processor.tokenizer.encode(answer, add_special_tokens=False) for _, answer in pairs]
    answers = [encoding.ids for encoding in encodings]
    lengths = [len(prefix) + len(answer) for prefix, answer in zip(prefixes, answers)]
    input_ids = torch.full((len(pairs), max(lengths)), config.pad_token_id)
    labels, weights = torch.full_like(input_ids, NO_LABEL), torch.zeros(input_ids.shape)
    for row, (prefix, answer, length) in enumerate(zip(prefixes, answers, lengths)):
        input_ids[row, :length] = torch.tensor(prefix + answer)
        labels[row, len(prefix) - 1 : length] = torch.tensor([*answer, config.eos_token_ids[0]])
        weights[row, len(prefix) - 1 : length] = max(len(answer) + 1, SHORT) ** -0.5
        if slips is not None and (slip := slips[row]) is not None:
            spans = enumerate(encodings[row].offsets, len(prefix) - 1)
            wrong = [place for place, (start, end) in spans if start < slip[1] and end > slip[0]]
            labels[row, wrong], weights[row, wrong] = NO_LABEL, 0.0
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
            yield torch.cat([self.processor.normalize(crop.image) for crop in crops]), self.label(crops)


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
        pixel_values = torch.cat([self.processor.normalize(scene.image) for scene in scenes])
        return pixel_values, label_patches(scenes, vision.image_size // vision.patch_size)


class SceneBatches(PatchBatches):
    """As `PatchBatches`, with a third element: rows, in chunks, of all tasks about the first `asked_about` pictures.

    The next `captioned` pictures have one row each, since naming all that is there takes the most practice, and the next
    `segmented` have one as well, of the masks of any number of kinds: most of a row is the picture, whatever it asks for.
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
        segmented: int = 0,
    ):
        super().__init__(processor, painter, pictures, max_objects, seed)
        self.codec, self.asked_about, self.captioned, self.segmented = codec, asked_about, captioned, segmented
        self.alike = nearest_codes(codec)

    def __iter__(self) -> Iterator[tuple[Tensor, PatchLabels, list[Rows]]]:
        rng = np.random.default_rng(self.seed)
        while True:
            scenes = self._draw(rng)
            heard = [mishear(rng, scene) for scene in scenes]
            masks = told_masks(heard)
            codes = encode_masks(self.codec, heard, masks)
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
            for picture in range(further.stop, further.stop + self.segmented):
                kinds = list(dict.fromkeys(rng.permutation([thing.kind for thing in scenes[picture].objects]).tolist()))
                kinds = kinds[: rng.integers(len(kinds)) + 1]
                answer = detections(scenes[picture], *kinds, codes=codes[picture])
                asked.append((picture, (segment_prompt(*kinds), answer), None))
            # Rows of like length together, because each is padded to the longest of its chunk.
            asked.sort(key=lambda item: len(self.processor.tokenizer.encode(" ".join(item[1])).ids))
            chunks = [
                collate(self.processor, *map(list, zip(*asked[start : start + ROWS_A_CHUNK])))
                for start in range(0, len(asked), ROWS_A_CHUNK)
            ]
            pixel_values, labels = self._pixels_and_labels(scenes)
            chunks = [self._show(rows, scenes, heard, masks, labels) for rows in chunks]
            yield pixel_values, labels, [replace(rows, input_ids=self._spoil(rng, rows.input_ids)) for rows in chunks]

    def _show(
        self, rows: Rows, scenes: list[Scene], heard: list[Scene], masks: list[list[Tensor]], labels: PatchLabels
    ) -> Rows:
        """The rows with what they tell of boxes and masks, and with the boxes that codes follow read as they are heard."""
        tokenizer = self.processor.tokenizer
        boxes = find_boxes(tokenizer, scenes, rows.pictures, rows.labels)
        traced = [told for told in boxes if told.has_codes]
        input_ids = rows.input_ids.clone()
        for told in traced:
            ids = tokenizer.encode(loc_tokens(heard[told.picture].objects[told.place])).ids
            input_ids[told.row, told.position + 1 : told.position + 1 + len(ids)] = torch.tensor(ids)
        shapes = [masks[told.picture][told.place] for told in traced]
        return replace(
            rows,
            input_ids=input_ids,
            looks=find_looks(boxes, heard, labels.ends),
            masks=torch.stack(shapes) if shapes else torch.zeros(0, MASK_SIDE, MASK_SIDE),
        )

    def _spoil(self, rng: np.random.Generator, input_ids: Tensor) -> Tensor:
        """Input ids with half of their mask codes changed to others like them (word dropout, arXiv 1511.06349).

        So each is learnt from the picture, and not from the ones before it, which will be less right than here.
        """
        codes = input_ids - self.processor.tokenizer.token_to_id(SEG_TOKENS[0])
        is_code = (codes >= 0) & (codes < len(self.alike))
        is_spoilt = is_code & torch.from_numpy(rng.random(codes.shape) < SPOILT_CODES)
        choices = torch.from_numpy(rng.integers(ALIKE, size=codes.shape))
        others = self.alike[codes.clamp(0, len(self.alike) - 1), choices]
        return torch.where(is_spoilt, input_ids - codes + others, input_ids)


def mishear(rng: np.random.Generator, scene: Scene) -> Scene:
    """A scene with its boxes as a model may have told them: half of them a little wrong, all in whole steps.

    Masks are to be told within these, so that a code mends what a coordinate has missed.
    """
    objects = []
    for thing in scene.objects:
        steps = np.array(loc_steps(thing.box))
        if rng.random() < MISHEARD:
            wrong = np.clip(steps + rng.normal(0, OFF, 4).round().astype(int), 0, LAST_STEP)
            steps = wrong if (wrong[:2] < wrong[2:]).all() else steps
        objects.append(replace(thing, box=tuple((steps * LOC_STEP / 1024).tolist())))
    return replace(scene, objects=tuple(objects))


def told_masks(scenes: list[Scene]) -> list[list[Tensor]]:
    """For each scene, the masks of its objects within their boxes, float32 [64, 64] each."""
    return [[fit_mask(scene.owners == thing.owner, thing.box) for thing in scene.objects] for scene in scenes]


@torch.inference_mode()
def encode_masks(codec: MaskCodec, scenes: list[Scene], masks: list[list[Tensor]]) -> list[dict[int, list[int]]]:
    """For each scene, the mask codes of each object by its owner."""
    codes = iter(codec.encode(torch.stack([mask for some in masks for mask in some])).tolist())
    return [{thing.owner: next(codes) for thing in scene.objects} for scene in scenes]


@torch.inference_mode()
def nearest_codes(codec: MaskCodec) -> Tensor:
    """Int64 [codes, ALIKE]: by each code, those whose vectors are nearest, from itself on."""
    return torch.cdist(codec.codebook, codec.codebook).topk(ALIKE, largest=False).indices


class InBackground(Iterator):
    """The batches of a data set, drawn in one other process, so that drawing and computing overlap."""

    def __init__(self, batches: IterableDataset):
        self._timed = iter(DataLoader(_Timed(batches), batch_size=None, num_workers=1, prefetch_factor=4))
        self._drawn, self._seconds = 0, 0.0

    def __next__(self) -> object:
        seconds, batch = next(self._timed)
        self._drawn += 1
        self._seconds += seconds
        return batch

    @property
    def rate(self) -> float:
        """Batches that are drawn in a second of drawing; where steps a second come near it, drawing is what they wait for."""
        return self._drawn / self._seconds


class _Timed(IterableDataset):
    """Each batch with the seconds that it took to draw."""

    def __init__(self, batches: IterableDataset):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[float, object]]:
        start = time.perf_counter()
        for batch in self.batches:
            yield time.perf_counter() - start, batch
            start = time.perf_counter()


def move(batch: PatchLabels | Rows | Looks, device: torch.device) -> PatchLabels | Rows | Looks:
    """All tensors of a batch to a device."""
    tensors = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else move(value, device)
        for name, value in vars(batch).items()
        if isinstance(value, (Tensor, Looks))
    }
    return replace(batch, **tensors)
