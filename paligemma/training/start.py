"""What training starts from: the sizes of the embedded checkpoint, and its first weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import PaliGemmaConfig, TextConfig, VisionConfig
from ..model import PaliGemma
from .tokenizer import LOC_TOKENS


def tiny_config(vocab_size: int, image_token_id: int) -> PaliGemmaConfig:
    """Sizes of the embedded checkpoint: 4.8 million parameters."""
    return PaliGemmaConfig(
        vision=VisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=48,
            max_position_embeddings=1024,
        ),
        image_token_id=image_token_id,
    )


def initialise(model: PaliGemma, tokenizer: Tokenizer, seen: dict[str, Tensor]) -> None:
    """Draw the weights that the voice begins with: what the eye sees is nearly a word already.

    Args:
        seen: the direction in which the eye's features, float [width], tell that something is there: a kind by its name
            and by its plural, a letter, a colour. The words for it begin near it, and the projector as identity.
    """
    embedding = model.language_model.embed_tokens.weight
    width = embedding.shape[1]
    # Unit variance once it is scaled, and logits near zero.
    nn.init.normal_(embedding, std=width**-0.5)
    loc_ids = [tokenizer.token_to_id(token) for token in LOC_TOKENS]
    # Coordinates begin as smooth functions of where they are, so that what is learnt of one holds for its neighbours.
    coordinates = torch.linspace(0, 1, len(loc_ids))[:, None]
    frequencies, phases = torch.randn(width) * 2 * math.pi * 4, torch.rand(width) * 2 * math.pi
    mean = torch.stack(list(seen.values())).mean(0)
    with torch.no_grad():
        embedding[loc_ids] = torch.cos(coordinates * frequencies + phases) * (2 / width) ** 0.5
        for name, direction in seen.items():
            for token in (name, f"▁{name}"):
                if (token_id := tokenizer.token_to_id(token)) is not None:
                    near = F.normalize(direction - mean, dim=0)
                    embedding[token_id] = (near + embedding[token_id]) / 2**0.5
    # One head of each layer begins by looking at what is like itself: a kind's name in the prompt at its patches.
    for layer in model.language_model.layers:
        attention = layer.self_attn
        with torch.no_grad():
            nn.init.normal_(attention.k_proj.weight, std=width**-0.5)
            attention.q_proj.weight[: attention.head_dim] = attention.k_proj.weight[: attention.head_dim]
    nn.init.eye_(model.multi_modal_projector["linear"].weight)
    nn.init.zeros_(model.multi_modal_projector["linear"].bias)


def resize_positions(positions: Tensor, patches: int) -> Tensor:
    """Interpolate learned positions, float [old, width], of one square grid of patches to another, [patches, width]."""
    old_side, side = math.isqrt(positions.shape[0]), math.isqrt(patches)
    grid = positions.T.reshape(1, -1, old_side, old_side)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.contiguous()
