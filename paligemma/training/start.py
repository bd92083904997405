"""What training starts from: the sizes of the embedded checkpoint, and its first weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import PaliGemmaConfig, TextConfig, VisionConfig
from ..gemma import GemmaAttention
from ..model import PaliGemma
from .tokenizer import LOC_TOKENS

IMAGE_SIZE = 224  # pixels of a picture's side, as the checkpoint ships
EYE_LAYERS = 9
TEXT_LAYERS = 6  # of its voice
# What of a layer is added to the residual stream, in the eye and in the voice.
ADDING = ("self_attn.out_proj", "mlp.fc2", "self_attn.o_proj", "mlp.down_proj")
SHARPNESS = 1.4  # of the heads that begin by looking for the same: most of their attention finds it


def tiny_config(
    vocab_size: int,
    image_token_id: int,
    image_size: int = IMAGE_SIZE,
    eye_layers: int = EYE_LAYERS,
    text_layers: int = TEXT_LAYERS,
) -> PaliGemmaConfig:
    """Sizes of the embedded checkpoint: 7.1 million parameters. It begins to learn from less, with less."""
    return PaliGemmaConfig(
        vision=VisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=eye_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=14,
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            max_position_embeddings=1024,
        ),
        image_token_id=image_token_id,
    )


def initialise(model: PaliGemma, tokenizer: Tokenizer, seen: dict[str, Tensor], told: Tensor) -> None:
    """Draw the weights that the voice begins with: what the eye sees is nearly a word already.

    The projector begins as identity, the words for things near the features that show them, and one head of each layer
    by looking from a word at the patches that show it, and fetching what they tell.

    Args:
        seen: by its word, the direction, float [width], of features that show a thing: a kind by its name and by its
            plural, a letter, a colour.
        told: float [n, width], orthonormal, n at most `head_dim`: the directions in which features tell all else.
    """
    embedding = model.language_model.embed_tokens.weight
    width = embedding.shape[1]
    # Unit variance once it is scaled, and logits near zero.
    nn.init.normal_(embedding, std=width**-0.5)
    loc_ids = [tokenizer.token_to_id(token) for token in LOC_TOKENS]
    # Coordinates begin as smooth functions of where they are, so that what is learnt of one holds for its neighbours.
    coordinates = torch.linspace(0, 1, len(loc_ids))[:, None]
    frequencies, phases = torch.randn(width) * 2 * math.pi * 4, torch.rand(width) * 2 * math.pi
    directions = torch.stack(list(seen.values()))
    directions = F.normalize(directions - directions.mean(0), dim=1)
    with torch.no_grad():
        embedding[loc_ids] = torch.cos(coordinates * frequencies + phases) * (2 / width) ** 0.5
        for name, direction in zip(seen, directions):
            for token in (name, f"▁{name}"):
                if (token_id := tokenizer.token_to_id(token)) is not None:
                    embedding[token_id] = (direction + embedding[token_id]) / 2**0.5
        for layer in model.language_model.layers:
            _look_for_the_same(layer.self_attn, directions, told)
    nn.init.eye_(model.multi_modal_projector["linear"].weight)
    nn.init.zeros_(model.multi_modal_projector["linear"].bias)


def _look_for_the_same(attention: GemmaAttention, directions: Tensor, told: Tensor) -> None:
    """Let the first head look from `directions` at keys that lie in the same one, and add up what they have along `told`."""
    dim = attention.head_dim
    # Only in the slower half of the rotary dimensions: the others turn so fast that a patch is the same only where it is near.
    slow = [*range(dim // 4, dim // 2), *range(dim // 4 + dim // 2, dim)]
    _, _, components = torch.linalg.svd(directions, full_matrices=False)
    nn.init.normal_(attention.k_proj.weight, std=attention.k_proj.in_features**-0.5)
    nn.init.zeros_(attention.q_proj.weight[:dim])
    attention.k_proj.weight[slow] = attention.q_proj.weight[slow] = SHARPNESS * components[: len(slow)]
    attention.v_proj.weight[: len(told)] = told
    attention.o_proj.weight[:, : len(told)] = told.T


def resize_positions(positions: Tensor, patches: int) -> Tensor:
    """Interpolate learned positions, float [old, width], of one square grid of patches to another, [patches, width]."""
    old_side, side = math.isqrt(positions.shape[0]), math.isqrt(patches)
    grid = positions.T.reshape(1, -1, old_side, old_side)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.contiguous()


def deepen(state: dict[str, Tensor], layers: int, at_end: bool = False) -> dict[str, Tensor]:
    """A transformer's state with layers added that change nothing until they learn.

    Each new one begins as the layer beside it, with all that it would add to the residual stream at zero.

    Args:
        state: by name, that of each layer as `layers.{index}.…`, and whatever else.
        layers: how many there shall be, from as many as there are to twice that.
        at_end: whether the new ones come last, and not in the middle.
    """
    old_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    new_layers = layers - old_layers
    place = old_layers if at_end else old_layers // 2
    # Of the layers that are repeated, which lie around the place.
    first = min(place - (new_layers + 1) // 2, old_layers - new_layers)
    sources = [*range(place), *range(first, first + new_layers), *range(place, old_layers)]
    deeper = {name: value for name, value in state.items() if not name.startswith("layers.")}
    for number, source in enumerate(sources):
        prefix = f"layers.{source}."
        layer = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if place <= number < place + new_layers:
            layer |= {name: torch.zeros_like(value) for name, value in layer.items() if name.startswith(ADDING)}
        deeper |= {f"layers.{number}.{name}": value for name, value in layer.items()}
    return deeper
