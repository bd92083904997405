"""Where to look: attention that is shown to the model, for what it would find by itself only after many more scenes.

The sides of a box lie where an object ends, in up to four patches far from each other, and each code of a mask tells of
one place of the box. To go there is little to learn where it is shown, and what is to be told then lies before one's eyes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..config import CODES_PER_MASK
from ..gemma import GemmaLayer, rotate
from ..mask_decoder import GRID_SIDE
from ..siglip import VisionLayer
from .losses import attention_loss
from .patches import PatchLabels
from .scenes import Box, Scene
from .tasks import loc_tokens
from .tokenizer import SEG_TOKENS

SIDES = 4  # of a box; each has a head of the eye


@dataclass(frozen=True)
class Looks:
    """Where the voice looks in a chunk of rows as it tells a coordinate or a code: N times in all.

    rows, positions: int64 [N], the state that the token is told from.
    patches: float32 [N, patches], how the attention should spread, with a sum of one.
    """

    rows: Tensor
    positions: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Told:
    """Where an object's box is told in a batch of rows: from which state of which row its first coordinate, and of what."""

    row: int
    position: int
    picture: int
    place: int
    has_codes: bool


def find_boxes(tokenizer: Tokenizer, scenes: list[Scene], pictures: Tensor, labels: Tensor) -> list[Told]:
    """In rows of labels, int64 [R, T], about `pictures`, int64 [R], row by row."""
    first_seg = tokenizer.token_to_id(SEG_TOKENS[0])
    found = []
    boxes = {  # by picture, what is written of each object's box, and its number; a picture has several rows
        picture: {
            tuple(tokenizer.encode(loc_tokens(thing)).ids): place for place, thing in enumerate(scenes[picture].objects)
        }
        for picture in set(pictures.tolist())
    }
    for row, (picture, tokens) in enumerate(zip(pictures.tolist(), labels.tolist())):
        for position in range(len(tokens) - SIDES):
            place = boxes[picture].get(tuple(tokens[position : position + SIDES]))
            if place is not None:
                has_codes = first_seg <= tokens[position + SIDES] < first_seg + len(SEG_TOKENS)
                found.append(Told(row, position, picture, place, has_codes))
    return found


def find_looks(boxes: list[Told], heard: list[Scene], ends: Tensor) -> Looks:
    """For the coordinates of boxes, and for the codes that follow them.

    Args:
        heard: scenes with boxes as they are read before the codes.
        ends: bool [P, objects, 4, patches], of `PatchLabels`.
    """
    patches = ends.shape[-1]
    found: list[tuple[int, int]] = []
    spreads: list[Tensor] = [torch.zeros(0, patches)]
    for told in boxes:
        found += [(told.row, told.position + side) for side in range(SIDES)]
        spreads.append(spread_evenly(ends[told.picture, told.place]))
        if told.has_codes:
            found += [(told.row, told.position + SIDES + code) for code in range(CODES_PER_MASK)]
            spreads.append(spread_over_cells(heard[told.picture].objects[told.place].box, round(patches**0.5)))
    rows, positions = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T
    return Looks(rows, positions, torch.cat(spreads))


def spread_evenly(ends: Tensor) -> Tensor:
    """Bool [..., patches] to attention, float32, that is the same wherever it should look."""
    wanted = ends.float()
    return wanted / wanted.sum(-1, keepdim=True).clamp(min=1)


def spread_over_cells(box: Box, side: int) -> Tensor:
    """Float32 [16, side * side]: for each code of a mask the patches around the middle of its cell, the nearer the more."""
    middles = (np.arange(GRID_SIDE) + 0.5) / GRID_SIDE
    y, x = (
        torch.tensor(np.clip((low + middles * (high - low)) * side - 0.5, 0, side - 1), dtype=torch.float32)
        for low, high in ((box[0], box[2]), (box[1], box[3]))
    )
    patches = torch.arange(side)
    down, across = ((1 - (places[:, None] - patches).abs()).clamp(min=0) for places in (y, x))  # [4, side]
    return torch.einsum("iy,jx->ijyx", down, across).reshape(CODES_PER_MASK, side * side)


def eye_loss(layer: VisionLayer, hidden_states: Tensor, labels: PatchLabels) -> Tensor:
    """How far each of a layer's four heads is from looking, at an object's patches, where it ends on one of its sides.

    `hidden_states`, float [P, patches, width], are what the layer reads.
    """
    attention, states = layer.self_attn, layer.layer_norm1(hidden_states)
    queries, keys = (
        project(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    logits = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5  # [P, heads, patches, patches]
    pictures, patches = (labels.owners >= 0).nonzero(as_tuple=True)
    wanted = labels.ends[pictures, labels.owners[pictures, patches]]
    return attention_loss(logits[pictures, :, patches], spread_evenly(wanted))


def voice_loss(layer: GemmaLayer, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], looks: Looks) -> Tensor:
    """How far a layer is from looking where it should, with one head of each group that shares its keys and values.

    `hidden_states`, float [R, T, width], are what it reads.
    """
    attention, states = layer.self_attn, layer.input_layernorm(hidden_states)
    queries, keys = (
        rotate(project(states).unflatten(-1, (-1, attention.head_dim)), *rotary).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    # Of all positions, and then of some: keys gathered for each of these would be hundreds of megabytes.
    logits = (queries[:, :: attention.group] @ keys.transpose(-1, -2)).float() * attention.head_dim**-0.5
    logits = logits[looks.rows, :, looks.positions]  # [N, kv_heads, T]
    is_later = torch.arange(keys.shape[2], device=states.device) > looks.positions[:, None, None]
    return attention_loss(logits.masked_fill(is_later, float("-inf")), looks.patches[:, None])
