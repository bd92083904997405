"""The vision encoder: a SigLIP transformer (arXiv 2303.15343), from pixels to one feature per patch.

Pre-norm, LayerNorm, learned positions, GELU, a last LayerNorm; no class token and no pooling head.
Module names are those of the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .config import GELU, VisionConfig
from .projections import Projections


class VisionEmbeddings(nn.Module):
    """Cut the image into patches, project each to a vector and add its learned position."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values)  # [B, width, H/patch, W/patch]
        return patches.flatten(2).transpose(1, 2).contiguous() + self.position_embedding.weight  # [B, patches, width]


class VisionAttention(Projections):
    """Multi-head attention in which every patch attends to every patch."""

    def __init__(self, config: VisionConfig):
        super().__init__("q_proj", "k_proj", "v_proj")
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        queries, keys, values = (one.unflatten(-1, (self.num_heads, -1)) for one in self.project(hidden_states))
        return self.out_proj(attend(queries, keys.transpose(1, 2), values.transpose(1, 2)))


class VisionMLP(nn.Module):
    """Two layers with GELU between: its tanh approximation, or exact where the config says so."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = "none" if config.hidden_act == GELU else "tanh"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate=self.approximate))


class VisionLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SiglipVisionModel(nn.Module):
    """Pixels to patch features."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, after_layer: Callable[[], None] | None = None) -> Tensor:
        """Encode images.

        Args:
            pixel_values: float [B, 3, image_size, image_size], in -1 to 1.
            after_layer: called after each layer.

        Returns:
            float [B, patches, hidden_size].
        """
        hidden_states = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            hidden_states = layer(hidden_states)
            if after_layer is not None:
                after_layer()
        return self.post_layernorm(hidden_states)
