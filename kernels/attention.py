"""Attention of one new token per sequence over a paged key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from riverdelta.kernels.device import use_triton


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
    `lengths` int32 [batch], tokens to attend to (0 gives a zero row); `window`: only the last so many of them
    (sliding window). Heads share key-value heads in groups (GQA). Returns [batch, heads, dim] in q's dtype.
    On a GPU the work grows with `max_blocks`: pass the table's columns that the longest sequence needs, or a bucket.
    Paging after vLLM (Kwon et al., 2023).
    """
    kv_heads, dim = k_cache.shape[2], q.shape[2]
    if q.shape[1] % kv_heads or k_cache.shape[3] != dim or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"q {list(q.shape)} needs caches [blocks, size, kv_heads, {dim}] whose kv_heads divide its heads, "
            f"got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if use_triton(q) and k_cache.stride(3) == v_cache.stride(3) == 1:
        from riverdelta.kernels import attention_triton

        return attention_triton.decode(q, k_cache, v_cache, block_tables, lengths, scale, window)
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
    v = v.masked_fill(hidden.transpose(2, 3), 0.0)
    return torch.matmul(weights.to(q.dtype), v).reshape(batch, heads, dim)
