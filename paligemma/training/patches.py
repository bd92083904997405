"""Stage 2: the eye learns to say, of each patch of a scene, what it shows, and of what it shows, everything that is asked.

One picture teaches as much here as sixty-four captions would, so that the voice later finds in the features what it has
to say: the heads are thrown away.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VisionConfig
from ..siglip import SiglipVisionModel
from .artwork import KINDS
from .colours import COLOURS
from .losses import NO_LABEL
from .scenes import MAX_OBJECTS, Box, Scene
from .tasks import kinds_by_first_appearance

LETTERS = string.ascii_uppercase
# What a patch can show: a kind, a letter, or the background in one of the colours.
FIRST_LETTER, FIRST_COLOUR = len(KINDS), len(KINDS) + len(LETTERS)
NUM_SHOWN = FIRST_COLOUR + len(COLOURS)
NO_COLOUR = len(COLOURS)  # of an object that no colour rules
LEAST_SHARE = 0.15  # of a patch that an object or letter must cover for the patch to show it
KIND_WEIGHT = 2.0  # the hardest of the questions, and the one that the others rest on
LETTER_WEIGHT = 3.0
BOX_WEIGHT = 16.0  # an error of a sixteenth of the picture weighs as much as a nat
CHOSEN_WEIGHT = 4.0  # most patches are so clearly not chosen that the mean over all is small
SHAPE_WEIGHT = 4.0
RELATION_WEIGHT = 0.5
SHAPE_SIDE = 8  # a window's part of an object is asked for in so many squares, either way
END_PIXELS = 2  # that lie so near to the furthest are at an object's end as well


@dataclass(frozen=True)
class PatchLabels:
    """The truth about the patches of P pictures; `NO_LABEL` where a question makes no sense.

    shown: int64 [P, patches], up to `NUM_SHOWN`.
    boxes: float32 [P, patches, 4], the object's box, in parts of the picture; 0 where there is no object.
    colours: int64 [P, patches], the object's.
    across: int64 [P, patches], how many objects begin further left, or how many letters of the word are before.
    down: int64 [P, patches], how many objects come before in reading order.
    counts: int64 [P, patches], how many more objects there are of this one's kind.
    order: int64 [P, patches], how many kinds the caption names before the object's.
    following: int64 [P, patches], how many it names after it.
    chosen: float32 [P, patches], 1 for one patch of each object, that objects may be counted by: the nearest to the
        middle of its box.
    shapes: float32 [P, patches, 64], how much of each square of a window about the patch, cut into 8 × 8, the object fills;
        the window is half as high and half as wide as the object's box.
    owners: int64 [P, patches], the number of the object, in reading order.
    ends: bool [P, objects, 4, patches], which patches hold an object's first and last pixels, in the order of its sides.
    parts: float32 [P, patches, 4], the box of what is seen in this patch of an object, in parts of the picture: of the
        one that is seen most, even if the patch hardly shows it; 0 where none is.
    """

    shown: Tensor
    boxes: Tensor
    colours: Tensor
    across: Tensor
    down: Tensor
    counts: Tensor
    order: Tensor
    following: Tensor
    chosen: Tensor
    shapes: Tensor
    owners: Tensor
    ends: Tensor
    parts: Tensor


def label_patches(scenes: list[Scene], side: int) -> PatchLabels:
    """Labels for scenes cut into `side` × `side` patches."""
    labels = [_label_scene(scene, side) for scene in scenes]
    return PatchLabels(
        *(torch.stack([getattr(label, field.name) for label in labels]) for field in fields(PatchLabels))
    )


def _label_scene(scene: Scene, side: int) -> PatchLabels:
    owners = _patch_owners(scene, side)
    numbers = np.full(side**2, NO_LABEL)
    shown = np.full(side**2, FIRST_COLOUR + COLOURS.index(scene.background))
    boxes = np.zeros((side**2, 4), np.float32)
    colours, across, down, counts, order, following = (np.full(side**2, NO_LABEL) for _ in range(6))
    chosen = np.zeros(side**2, np.float32)
    shapes = np.zeros((side**2, SHAPE_SIDE**2), np.float32)
    ends, parts = np.zeros((MAX_OBJECTS, 4, side**2), bool), _parts(scene, side)
    for place, letter in enumerate(scene.word):
        here = owners == place + 1
        shown[here], across[here] = FIRST_LETTER + LETTERS.index(letter), place
    left_edges = sorted(thing.box[1] for thing in scene.objects)
    named = kinds_by_first_appearance(scene)
    for place, thing in enumerate(scene.objects):
        here = owners == thing.owner
        shown[here], boxes[here], down[here], numbers[here] = thing.kind, thing.box, place, place
        across[here] = left_edges.index(thing.box[1])
        counts[here] = scene.count(thing.kind) - 1
        order[here] = named.index(thing.kind)
        following[here] = len(named) - 1 - named.index(thing.kind)
        chosen[_nearest_to_middle(here, thing.box, side)] = 1
        colours[here] = NO_COLOUR if thing.colour is None else COLOURS.index(thing.colour)
        seen = scene.owners == thing.owner
        shapes[here] = _windows(seen, thing.box, side)[here]
        ends[place] = _ends(seen, side)
    labels = (shown, boxes, colours, across, down, counts, order, following, chosen, shapes, numbers, ends, parts)
    return PatchLabels(*map(torch.from_numpy, labels))


def _nearest_to_middle(here: np.ndarray, box: Box, side: int) -> np.ndarray:
    """Int64 [at most 1]: of the patches marked in bool [patches], the one nearest to the middle of the box."""
    patches = np.flatnonzero(here)
    y, x = (patches // side + 0.5) / side, (patches % side + 0.5) / side
    distances = (y - (box[0] + box[2]) / 2) ** 2 + (x - (box[1] + box[3]) / 2) ** 2
    return patches[np.argsort(distances)[:1]]


def _windows(seen: np.ndarray, box: Box, side: int) -> np.ndarray:
    """Float32 [patches, 64]: what an object fills of windows of half its size, about the middle of each patch.

    Args:
        seen: bool [size, size], what is seen of the object.
    """
    size = len(seen)
    sums = np.pad(seen, ((1, 0), (1, 0))).cumsum(0, dtype=np.float32).cumsum(1)  # of all pixels above and left
    middles = (np.arange(side)[:, None] + 0.5) * (size / side)
    steps = np.linspace(-0.25, 0.25, SHAPE_SIDE + 1)
    height, width = size * (box[2] - box[0]), size * (box[3] - box[1])
    for axis, extent in enumerate((height, width)):
        places = np.clip(middles + steps * extent, 0, size).ravel()  # [side * 9]
        before = np.minimum(places.astype(int), size - 1)
        share = np.expand_dims(places - before, 1 - axis)
        sums = sums.take(before, axis) * (1 - share) + sums.take(before + 1, axis) * share
    sums = sums.reshape(side, SHAPE_SIDE + 1, side, SHAPE_SIDE + 1)
    filled = np.diff(np.diff(sums, axis=1), axis=3).transpose(0, 2, 1, 3)
    return filled.reshape(side**2, -1) * (2 * SHAPE_SIDE) ** 2 / (height * width)


def _ends(seen: np.ndarray, side: int) -> np.ndarray:
    """Bool [4, patches]: which patches hold the first and last of an object's pixels, in the order of a box's sides."""
    ends = np.zeros((4, side, side), bool)
    places = np.argwhere(seen)
    for number, (axis, way) in enumerate(((0, 1), (1, 1), (0, -1), (1, -1))):
        along = way * places[:, axis]
        last = along < along.min() + END_PIXELS if len(along) else slice(0)
        y, x = np.minimum(places[last] * side // len(seen), side - 1).T
        ends[number, y, x] = True
    return ends.reshape(4, -1)


def _parts(scene: Scene, side: int) -> np.ndarray:
    """Float32 [patches, 4], as `PatchLabels` has it."""
    cut = _cut(scene.owners, side)
    first, last = len(scene.word) + 1, len(scene.word) + len(scene.objects)
    areas = np.stack([(cut == owner).sum((2, 3)) for owner in range(first, last + 1)])  # [objects, side, side]
    is_part = cut == (areas.argmax(0) + first)[..., None, None]  # [side, side, pixels, pixels]
    pixels = cut.shape[-1]
    sides = []
    for axis in (3, 2):  # seen along the other one
        seen = is_part.any(axis)
        sides.append((seen.argmax(-1), pixels - seen[..., ::-1].argmax(-1)))
    (top, bottom), (left, right) = sides
    y, x = pixels * np.arange(side)[:, None], pixels * np.arange(side)
    parts = np.stack((top + y, left + x, bottom + y, right + x), axis=-1) / len(scene.owners)
    return np.where((areas.max(0) > 0)[..., None], parts, 0).reshape(side**2, 4).astype(np.float32)


def _patch_owners(scene: Scene, side: int) -> np.ndarray:
    """Int64 [patches]: whose most of each patch is, leaving the background what others hardly touch."""
    cut = _cut(scene.owners, side)
    last = len(scene.word) + len(scene.objects)
    shares = np.stack([(cut == owner).mean((2, 3)) for owner in range(1, last + 1)])  # [owners, side, side]
    return np.where(shares.max(0) >= LEAST_SHARE, shares.argmax(0) + 1, 0).ravel()


def _cut(owners: np.ndarray, side: int) -> np.ndarray:
    """[size, size] to patches, [side, side, pixels, pixels]; what is left over at the end is left out."""
    pixels = len(owners) // side
    cut = owners[: side * pixels, : side * pixels].reshape(side, pixels, side, pixels)
    return np.ascontiguousarray(cut.swapaxes(1, 2))


class PatchHeads(nn.ModuleDict):
    """A linear head for each question."""

    def __init__(self, width: int):
        sizes = {
            "shown": NUM_SHOWN,
            "boxes": 4,
            "colours": len(COLOURS) + 1,
            "across": MAX_OBJECTS,
            "down": MAX_OBJECTS,
            "chosen": 1,
            "shapes": SHAPE_SIDE**2,
            "parts": 4,
        }
        super().__init__({name: nn.Linear(width, size) for name, size in sizes.items()})

    def seen(self) -> dict[str, Tensor]:
        """By the words for it, the direction of features, float [width], that tells that a patch shows something."""
        directions = self["shown"].weight.detach()
        names = {name: index for index, kind in enumerate(KINDS) for name in (kind.name, kind.plural)}
        names |= {letter: FIRST_LETTER + index for index, letter in enumerate(LETTERS)}
        names |= {colour: FIRST_COLOUR + index for index, colour in enumerate(COLOURS)}
        return {name: directions[index] for name, index in names.items()}

    def told(self) -> Tensor:
        """Orthonormal directions of features, float [n, width], that tell the rest: where, of which colour."""
        names = ("boxes", "colours", "across", "down")
        return torch.linalg.qr(torch.cat([self[name].weight.detach() for name in names]).T).Q.T

    def losses(self, features: Tensor, labels: PatchLabels) -> dict[str, Tensor]:
        """From the eye's features, float [P, patches, width]."""
        # In float32, also where all else is mixed: what is asked of a box's side is finer than the steps of bfloat16.
        with torch.autocast(features.device.type, enabled=False):
            return self._losses(features.float(), labels)

    def _losses(self, features: Tensor, labels: PatchLabels) -> dict[str, Tensor]:
        is_object, is_ground = labels.shown < FIRST_LETTER, labels.shown >= FIRST_COLOUR
        is_letter = ~is_object & ~is_ground
        is_placed, is_part = labels.across != NO_LABEL, labels.parts[..., 2] > 0
        things, placed = features[is_object], features[is_placed]  # [objects' patches, width]
        shown = self["shown"](features)
        return {
            "kinds": KIND_WEIGHT * F.cross_entropy(shown[is_object], labels.shown[is_object]),
            "letters": LETTER_WEIGHT * _mean_loss(shown[is_letter], labels.shown[is_letter]),
            "ground": F.cross_entropy(shown[is_ground], labels.shown[is_ground]),
            "boxes": BOX_WEIGHT * F.l1_loss(self["boxes"](things), labels.boxes[is_object]),
            "colours": 0.3 * F.cross_entropy(self["colours"](things), labels.colours[is_object]),
            "across": 0.5 * F.cross_entropy(self["across"](placed), labels.across[is_placed]),
            "down": 0.3 * F.cross_entropy(self["down"](things), labels.down[is_object]),
            "chosen": CHOSEN_WEIGHT
            * F.binary_cross_entropy_with_logits(self["chosen"](features).squeeze(-1), labels.chosen),
            "shapes": SHAPE_WEIGHT
            * F.binary_cross_entropy_with_logits(self["shapes"](things), labels.shapes[is_object]),
            "parts": BOX_WEIGHT * F.l1_loss(self["parts"](features[is_part]), labels.parts[is_part]),
        }


class RelationHeads(nn.ModuleDict):
    """A linear head for each question about an object among the others.

    The eye hardly learns to answer these, probably since it needs all of its layers to know kinds, and could only then
    compare them: they are asked of the decoder's states at the patches.
    """

    def __init__(self, width: int):
        super().__init__({name: nn.Linear(width, MAX_OBJECTS) for name in ("counts", "order", "following")})

    def losses(self, states: Tensor, pictures: Tensor, labels: PatchLabels) -> dict[str, Tensor]:
        """From states, float [R, patches, width], of rows about `pictures`, int64 [R], which `labels` are of."""
        is_object = labels.shown[pictures] < FIRST_LETTER
        things = states[is_object]  # [objects' patches, width]
        return {
            name: RELATION_WEIGHT * F.cross_entropy(head(things), getattr(labels, name)[pictures][is_object])
            for name, head in self.items()
        }


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, zero where there is nothing to average over: not every batch has a word."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


class PatchModel(nn.Module):
    """The eye and the heads."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_tower = SiglipVisionModel(config)
        self.heads = PatchHeads(config.hidden_size)

    def losses(self, pixel_values: Tensor, labels: PatchLabels) -> dict[str, Tensor]:
        return self.heads.losses(self.vision_tower(pixel_values), labels)
