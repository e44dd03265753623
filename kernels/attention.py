"""Attention of one new token per sequence over a paged key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of `q` [batch, heads, dim] over each sequence's cached tokens, the new one included.

    `k_cache`, `v_cache` [blocks, block_size, kv_heads, dim]; `block_tables` int32 [batch, max_blocks];
    `lengths` int32 [batch], tokens to attend to (0 gives a zero row); `window`: only the last so many of them (sliding
    window). Heads share key-value heads in groups (GQA). Returns [batch, heads, dim] in q's dtype.
    Paging after vLLM (Kwon et al., 2023).
    """
    return _torch_decode(q, k_cache, v_cache, block_tables, lengths, scale, window)


def _torch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    batch, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    used = -(-int(lengths.max()) // block_size) if batch else 0
    if used == 0:
        return torch.zeros_like(q)
    tables = block_tables[:, :used].long()
    tokens = used * block_size
    k = k_cache[tables].view(batch, tokens, kv_heads, dim).permute(0, 2, 3, 1)
    v = v_cache[tables].view(batch, tokens, kv_heads, dim).transpose(1, 2)
    scores = torch.matmul(q.view(batch, kv_heads, heads // kv_heads, dim), k).float() * scale
    position = torch.arange(tokens, device=q.device)
    hidden = position >= lengths[:, None]
    if window is not None:
        hidden |= position < lengths[:, None] - window
    hidden = hidden[:, None, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    # Blocks beyond a sequence's length may hold anything, NaN included: keep it out of the sum.
    v = v.masked_fill(hidden.transpose(2, 3)[:, 0], 0.0)
    return torch.matmul(weights.to(q.dtype), v).reshape(batch, heads, dim)
