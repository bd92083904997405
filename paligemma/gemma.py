"""The voice: the Gemma decoder (arXiv 2403.08295). Module names are those of the official checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextConfig
from .kv_cache import KVCache


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
    """The table of angles of rotary positions (arXiv 2104.09864), computed once for every position there can be."""

    def __init__(self, config: TextConfig):
        super().__init__()
        # On the CPU even where the weights are built on `meta`: the table is computed, not loaded.
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, config.rope_theta**-exponents)  # [positions, head_dim / 2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine at T positions, a slice or int64 [T], each [T, 1, head_dim / 2]."""
        return self.cos[positions, None].to(dtype), self.sin[positions, None].to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `heads` [B, T, heads, head_dim] by their positions; dimension i is paired with i + head_dim / 2."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GemmaAttention(nn.Module):
    """Attention in which groups of query heads share one key/value head (one group: multi-query attention).

    The heads of a group are laid out as further query rows of their shared head, so that keys and values are read
    where they lie and never repeated.
    """

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_attention_heads * config.head_dim, self.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        first: int,
    ) -> Tensor:
        batch, length, _ = hidden_states.shape
        keys = rotate(self.k_proj(hidden_states).view(batch, length, -1, self.head_dim), *rotary).transpose(1, 2)
        values = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)  # [B, kv_heads, S, head_dim]

        if first:  # every position is looked at, but only those from here on look
            length, hidden_states = length - first, hidden_states[:, first:]
            rotary = rotary[0][first:], rotary[1][first:]
            mask = None if mask is None else mask[..., first:, :]
        queries = rotate(self.q_proj(hidden_states).view(batch, length, -1, self.head_dim), *rotary)
        queries = queries.view(batch, length, self.kv_heads, self.group, self.head_dim).transpose(1, 2)
        queries = queries.reshape(batch, self.kv_heads, length * self.group, self.head_dim)
        if mask is not None:
            mask = mask.repeat_interleave(self.group, dim=-2)  # [B, 1, T * group, S]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        attended = attended.view(batch, self.kv_heads, length, self.group, self.head_dim).transpose(1, 2)
        return self.o_proj(attended.reshape(batch, length, -1))


class GemmaMLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(hidden_states), approximate="tanh")
        return self.down_proj(gate * self.up_proj(hidden_states))


class GemmaLayer(nn.Module):
    """One pre-norm transformer layer."""

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
        cache: KVCache | None,
        first: int = 0,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, mask, cache, first)
        hidden_states = hidden_states[:, first:] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class TokenEmbedding(nn.Embedding):
    """The token embedding, which is the output layer as well."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Float [..., hidden_size] to float [..., vocab_size]."""
        return F.linear(hidden_states, self.weight)


class GemmaModel(nn.Module):
    """Token embedding, layers, last norm; the output layer is the embedding again."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embedding_scale = config.hidden_size**0.5
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config)
        self.layers = nn.ModuleList(GemmaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Int64 [B, T] to float [B, T, hidden_size], multiplied by sqrt(hidden_size)."""
        return self.embed_tokens(input_ids) * self.embedding_scale

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        first: int = 0,
    ) -> Tensor:
        """Run the layers over T positions that follow those in `cache`.

        Args:
            hidden_states: float [B, T, hidden_size], scaled token embeddings or image features.
            mask: bool [B, 1, T, T], True where a position may look, or None where every one sees all; without a cache.
            cache: keys and values of the positions before, extended by these T, which see all of them; None when there
                are none.
            first: the first of the T positions that anybody asks for: the last layer computes none before it.

        Returns:
            float [B, T - first, hidden_size], after the last norm.
        """
        length = hidden_states.shape[1]
        if cache is None:
            positions = slice(0, length)
        else:
            positions, mask = cache.positions(length), cache.mask(length)
        rotary = self.rotary(positions, hidden_states.dtype)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, rotary, mask, cache)
        hidden_states = self.layers[-1](hidden_states, rotary, mask, cache, first)
        if cache is not None:
            cache.advance(length)
        return self.norm(hidden_states)
