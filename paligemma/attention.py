"""Attention, in the one function that the vision encoder and the decoder call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

# Scores that soft-capped attention computes at once: 16 MB in float32, of gigabytes for an image of 896 pixels.
MAX_SCORES = 2**22


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute softmax(scale * queries @ keys.T) @ values for every head.

    Groups of query heads share a key/value head (arXiv 2305.13245); one group alone is multi-query attention.

    Args:
        queries: float [B, T, heads, head_dim].
        keys, values: float [B, kv_heads, S, head_dim], as a cache holds them; kv_heads divides heads.
        mask: bool [B, 1, T, S], or what broadcasts to it, True where a position attends to another; None: everywhere.
        scale: None stands for head_dim ** -0.5.
        softcap: where given, softcap * tanh(score / softcap) takes each score's place (Gemma 2, arXiv 2408.00118).

    Returns:
        float [B, T, heads * head_dim].
    """
    batch, length, _, head_dim = queries.shape
    kv_heads = keys.shape[1]
    if softcap is None and mask is not None and length > 1:
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return attended.transpose(1, 2).reshape(batch, length, -1)
    # The heads of a group become further query rows of their shared head, so that keys and values are read where they
    # lie and never repeated.
    rows = queries.view(batch, length, kv_heads, -1, head_dim).transpose(1, 2).reshape(batch, kv_heads, -1, head_dim)
    if softcap is not None and mask is None and length > 1 and torch.compiler.is_compiling():
        return _attend_fused(queries, keys, values, scale or head_dim**-0.5, softcap)
    if softcap is None:
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    else:
        attended = _attend_soft_capped(rows, keys, values, mask, scale or head_dim**-0.5, softcap, length)
    attended = attended.view(batch, kv_heads, length, -1, head_dim).transpose(1, 2)
    return attended.reshape(batch, length, -1)


def attention_weights(
    queries: Tensor, keys: Tensor, mask: Tensor | None = None, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """How much each position attends to each other, as `attend` weighs them; arguments as there.

    Returns:
        float32 [B, heads, T, S], which sums to 1 over S.
    """
    queries = queries.transpose(1, 2).unflatten(1, (keys.shape[1], -1))  # [B, kv_heads, group, T, head_dim]
    scores = (queries @ keys[:, :, None].transpose(-1, -2)).flatten(1, 2).float() * (scale or queries.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def _attend_fused(queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
    """As `attend` with a soft-cap and without a mask, as one kernel that holds no scores; only compiled it is one."""

    def cap(score: Tensor, *place: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    attended = flex_attention(queries.transpose(1, 2), keys, values, score_mod=cap, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2)


def _attend_soft_capped(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float, length: int
) -> Tensor:
    """As `attend`, for rows of `length` positions, [B, kv_heads, T * group, head_dim], in pieces of `MAX_SCORES`.

    Of a piece among several only the inputs are kept for the gradient, which computes it again.
    """
    batch, kv_heads, count, _ = rows.shape
    group = count // length
    positions = max(1, MAX_SCORES // (batch * kv_heads * group * keys.shape[2]))
    if positions >= length:
        return _attend_piece(rows, keys, values, mask, scale, softcap, group)
    # Allocated before the scores: between those of one piece and the next, what each has attended to would leave gaps in
    # the heap that are too small for the scores of others, until it is as large as all scores.
    attended, pieces = torch.empty_like(rows), []
    for start in range(0, length, positions):
        place = slice(start * group, (start + positions) * group)
        piece_mask = mask[:, :, start : start + positions] if mask is not None and mask.shape[2] > 1 else mask
        arguments = rows[:, :, place], keys, values, piece_mask, scale, softcap, group
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_attend_piece, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            attended[:, :, place] = _attend_piece(*arguments)
    return torch.cat(pieces, dim=2) if pieces else attended


def _attend_piece(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float, group: int
) -> Tensor:
    # As in the reference, products have the dtype of the model, cap and softmax are computed in float32.
    scores = (rows @ keys.transpose(-1, -2)).float().mul_(scale / softcap).tanh_() * softcap
    if mask is not None:
        # A finite score: the softmax of a row that attends to nothing, as padding may, would be NaN.
        left_out = torch.finfo(scores.dtype).min
        scores = scores.unflatten(2, (-1, group)).masked_fill(~mask[:, :, :, None], left_out).flatten(2, 3)
    return scores.softmax(dim=-1).to(values.dtype) @ values
