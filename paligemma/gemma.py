"""The decoder: Gemma (arXiv 2403.08295) and Gemma 2 (2408.00118). Module names are those of official checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .config import TextConfig
from .kv_cache import Write
from .projections import Projections


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32: Gemma stores the gain's distance from one."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        states, weight = hidden_states.float(), self.weight.float()
        inverse = torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.eps)
        return (torch.addcmul(states, states, weight) * inverse).to(hidden_states.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (arXiv 2104.09864), computed once for every position there can be."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        # On the CPU even where the weights are built on `meta`: the table is computed, not loaded.
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        # One more than a sequence can have, for the spare position of a cache.
        positions = torch.arange(config.max_position_embeddings + 1, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, 1.0 / config.rope_theta**exponents)  # [positions, head_dim / 2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine at a slice of T positions, or at int64 [B, T], each [..., T, 1, head_dim / 2]."""
        return self.cos[positions, None].to(dtype), self.sin[positions, None].to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads` [B, T, heads, head_dim] by their positions; dimension i is paired with i + head_dim / 2."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GemmaAttention(Projections):
    """Attention in which groups of query heads share one key/value head."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__("q_proj", "k_proj", "v_proj")
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        query_size, kv_size = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, write: Write | None, first: int
    ) -> Tensor:
        if first:  # all positions are attended to, but only those from here on attend
            keys, values = self.k_proj(hidden_states), self.v_proj(hidden_states)
            queries = self.q_proj(hidden_states[:, first:])
            mask = None if mask is None else mask[..., first:, :]
        else:
            queries, keys, values = self.project(hidden_states)
        queries, keys, values = (one.unflatten(-1, (-1, self.head_dim)) for one in (queries, keys, values))
        cos, sin = rotary
        queries = rotate(queries, cos[first:], sin[first:])
        keys, values = rotate(keys, cos, sin).transpose(1, 2), values.transpose(1, 2)
        if write is not None:
            keys, values = write(self.layer, keys, values)
        return self.o_proj(attend(queries, keys, values, mask, self.scale, self.softcap))


class GemmaMLP(Projections):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig):
        super().__init__("gate_proj", "up_proj")
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.project(hidden_states)
        gate = F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * up)


class GemmaLayer(nn.Module):
    """One transformer layer, which normalizes what attention and MLP read."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        write: Write | None,
        first: int = 0,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, mask, write, first)
        hidden_states = hidden_states[:, first:] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Gemma2Layer(nn.Module):
    """One transformer layer, which normalizes what attention and MLP read and what they return."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        write: Write | None,
        first: int = 0,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, mask, write, first)
        hidden_states = hidden_states[:, first:] + self.post_attention_layernorm(attended)
        fed_forward = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.post_feedforward_layernorm(fed_forward)


class TokenEmbedding(nn.Embedding):
    """The token embedding, which is the output layer as well."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Float [..., hidden_size] to float [..., vocab_size]."""
        return F.linear(hidden_states, self.weight)


class GemmaModel(nn.Module):
    """Token embedding, layers, last norm; the output layer is the embedding again."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config)
        layer_class = {"gemma": GemmaLayer, "gemma2": Gemma2Layer}[config.model_type]
        self.layers = nn.ModuleList(layer_class(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Int64 [B, T] to float [B, T, hidden_size], multiplied by sqrt(hidden_size) as their dtype rounds it."""
        embeddings = self.embed_tokens(input_ids)
        return embeddings * embeddings.new_full((), self.config.hidden_size**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        positions: slice | Tensor,
        mask: Tensor | None,
        window_mask: Tensor | None,
        write: Write | None = None,
        first: int = 0,
        after_layer: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run the layers over T positions.

        Args:
            hidden_states: float [B, T, hidden_size], scaled token embeddings or image features.
            positions: where they stand in their sequences, a slice of T positions or int64 [B, T].
            mask: bool [B, 1, T, S], or what broadcasts to it, True where a position attends to another; None: everywhere.
            window_mask: the same of the layers with a sliding window, see `TextConfig.has_window`.
            write: see `Write`, with S positions to attend to; None: the T positions attend to each other.
            first: the first of the T positions that are asked for: the last layer computes none before it.
            after_layer: called after each layer but the last.

        Returns:
            float [B, T - first, hidden_size], after the last norm.
        """
        rotary = self.rotary(positions, hidden_states.dtype)
        masks = [window_mask if self.config.has_window(layer) else mask for layer in range(len(self.layers))]
        for layer, its_mask in zip(self.layers[:-1], masks[:-1], strict=True):
            hidden_states = layer(hidden_states, rotary, its_mask, write)
            if after_layer is not None:
                after_layer()
        return self.norm(self.layers[-1](hidden_states, rotary, masks[-1], write, first))


def operations(text: TextConfig, positions: int, attended: int) -> int:
    """Multiply-adds of the decoder to read some positions, each of which attends to `attended`, and choose a token.

    Counted are the matrix products. In the last layer only the last position is computed beyond its keys and values.
    """
    queries, keys = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    cached = 2 * text.hidden_size * keys
    others = 2 * text.hidden_size * queries + 3 * text.hidden_size * text.intermediate_size + 2 * queries * attended
    full, layers = positions * (cached + others), text.num_hidden_layers
    return (layers - 1) * full + positions * cached + others + text.hidden_size * text.vocab_size
