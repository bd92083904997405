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

from ..gemma import GemmaLayer, rotate
from ..mask_decoder import GRID_SIDE, NUM_CODES
from ..siglip import VisionLayer
from .losses import attention_loss
from .patches import PatchLabels
from .scenes import Box, Scene
from .tasks import loc_tokens
from .tokenizer import LOC_TOKENS, SEG_TOKENS

# Of the heads of the voice's layer that is shown where to look, one for coordinates and one for codes.
END_HEAD, CELL_HEAD = 0, 2
SIDES = 4  # of a box, and heads of the eye


@dataclass(frozen=True)
class Looks:
    """Where the voice looks in a chunk of rows as it tells a coordinate or a code: N times in all.

    rows, positions: int64 [N], the state that the token is told from. heads: int64 [N].
    patches: float32 [N, patches], how the attention should spread, with a sum of one.
    """

    rows: Tensor
    positions: Tensor
    heads: Tensor
    patches: Tensor


def find_looks(tokenizer: Tokenizer, scenes: list[Scene], ends: Tensor, pictures: Tensor, labels: Tensor) -> Looks:
    """For rows of labels, int64 [R, T], about `pictures`, int64 [R].

    Args:
        scenes: all of them, and `ends`, bool [P, objects, 4, patches], of `PatchLabels`.
    """
    first_loc, first_seg = (tokenizer.token_to_id(tokens[0]) for tokens in (LOC_TOKENS, SEG_TOKENS))
    patches = ends.shape[-1]
    found: list[tuple[int, int, int]] = []
    spreads: list[Tensor] = [torch.zeros(0, patches)]
    boxes = {  # by picture, what is written of each object's box, and its number; a picture has several rows
        picture: {
            tuple(tokenizer.encode(loc_tokens(thing)).ids): place for place, thing in enumerate(scenes[picture].objects)
        }
        for picture in set(pictures.tolist())
    }
    for row, (picture, tokens) in enumerate(zip(pictures.tolist(), labels.tolist())):
        for position in range(len(tokens) - SIDES):
            place = boxes[picture].get(tuple(tokens[position : position + SIDES]))
            if place is None:
                continue
            found += [(row, position + side, END_HEAD) for side in range(SIDES)]
            spreads.append(spread_evenly(ends[picture, place]))
            after = position + SIDES
            if first_seg <= tokens[after] < first_seg + len(SEG_TOKENS):
                found += [(row, after + code, CELL_HEAD) for code in range(NUM_CODES)]
                spreads.append(spread_over_cells(scenes[picture].objects[place].box, round(patches**0.5)))
    rows, positions, heads = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).T
    return Looks(rows, positions, heads, torch.cat(spreads))


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
    return torch.einsum("iy,jx->ijyx", down, across).reshape(NUM_CODES, side * side)


def eye_loss(layer: VisionLayer, hidden_states: Tensor, labels: PatchLabels) -> Tensor:
    """How far each of a layer's heads is from looking, at an object's patches, where it ends on one of its sides.

    `hidden_states`, float [P, patches, width], are what the layer reads.
    """
    attention, states = layer.self_attn, layer.layer_norm1(hidden_states)
    queries, keys = (
        project(states).unflatten(-1, (SIDES, -1)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj)
    )
    logits = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5  # [P, sides, patches, patches]
    pictures, patches = (labels.owners >= 0).nonzero(as_tuple=True)
    wanted = labels.ends[pictures, labels.owners[pictures, patches]]
    return attention_loss(logits[pictures, :, patches], spread_evenly(wanted))


def voice_loss(layer: GemmaLayer, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], looks: Looks) -> Tensor:
    """How far a layer's heads are from looking where they should; `hidden_states`, float [R, T, width], are what it reads."""
    attention, states = layer.self_attn, layer.input_layernorm(hidden_states)
    keys = rotate(attention.k_proj(states).unflatten(-1, (-1, attention.head_dim)), *rotary)  # [R, T, kv_heads, dim]
    queries = attention.q_proj(states[looks.rows, looks.positions]).unflatten(-1, (-1, attention.head_dim))
    queries = rotate(queries, *(part[looks.positions] for part in rotary))
    numbers = torch.arange(len(looks.rows), device=states.device)
    queries = queries[numbers, looks.heads].float()  # [N, dim]
    keys = keys[looks.rows, :, looks.heads // attention.group].float()  # [N, T, dim]
    logits = torch.einsum("nd,ntd->nt", queries, keys) * attention.head_dim**-0.5
    is_later = torch.arange(keys.shape[1], device=states.device) > looks.positions[:, None]
    return attention_loss(logits.masked_fill(is_later, float("-inf")), looks.patches)
