# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Paged attention decode in Triton: each sequence's tokens in splits of fixed length, then their sum in order.

Flash-decoding (Dao et al., 2023). The split length is a constant and empty splits are skipped, so a sequence's bits
depend neither on its batch mates nor on the width of the block table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT_TOKENS = 512
_BLOCK_TOKENS = 64


@triton.jit
def _split_range(length, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """First position to attend to, first live split and the one after the last."""
    start = 0
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0)
    return start, start // SPLIT, (length + SPLIT - 1) // SPLIT


@triton.jit
def _decode_split(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    lengths_ptr,
    sums_ptr,
    norms_ptr,
    scale,
    q_row,
    k_block,
    k_token,
    k_head,
    v_block,
    v_token,
    v_head,
    table_row,
    n_splits,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    start, first, last = _split_range(length, WINDOW, SPLIT)
    if (split >= first) & (split < last):
        group = tl.arange(0, BLOCK_G)
        dims = tl.arange(0, BLOCK_D)
        q_at = q_ptr + row.to(tl.int64) * q_row + (head * GROUP + group)[:, None] * DIM + dims[None, :]
        q = tl.load(q_at, mask=(group < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)
        best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        norm = tl.zeros((BLOCK_G,), tl.float32)
        total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        begin = tl.maximum(split * SPLIT, start // BLOCK_T * BLOCK_T)
        for at in range(begin, tl.minimum((split + 1) * SPLIT, length), BLOCK_T):
            tokens = at + tl.arange(0, BLOCK_T)
            live = (tokens >= start) & (tokens < length)
            blocks = tl.load(tables_ptr + row * table_row + tokens // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
            inside = tokens % BLOCK_SIZE
            mask = live[:, None] & (dims < DIM)[None, :]
            k_at = k_ptr + (blocks * k_block + inside * k_token + head * k_head)[:, None] + dims[None, :]
            v_at = v_ptr + (blocks * v_block + inside * v_token + head * v_head)[:, None] + dims[None, :]
            k = tl.load(k_at, mask=mask, other=0.0)
            v = tl.load(v_at, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(live[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(best - higher)
            norm = norm * shrink + tl.sum(weights, axis=1)
            total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
            best = higher
        base = ((row * tl.num_programs(1) + head).to(tl.int64) * n_splits + split) * BLOCK_G
        tl.store(sums_ptr + (base + group)[:, None] * BLOCK_D + dims[None, :], total)
        tl.store(norms_ptr + (base + group) * 2, best)
        tl.store(norms_ptr + (base + group) * 2 + 1, norm)


@triton.jit
def _decode_join(
    sums_ptr,
    norms_ptr,
    lengths_ptr,
    out_ptr,
    n_splits,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1)
    _, first, last = _split_range(tl.load(lengths_ptr + row), WINDOW, SPLIT)
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    place = (row * tl.num_programs(0) + head).to(tl.int64)
    best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_G,), tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for split in range(first, last):
        base = (place * n_splits + split) * BLOCK_G
        other_best = tl.load(norms_ptr + (base + group) * 2)
        other_norm = tl.load(norms_ptr + (base + group) * 2 + 1)
        other = tl.load(sums_ptr + (base + group)[:, None] * BLOCK_D + dims[None, :])
        higher = tl.maximum(best, other_best)
        keep, add = tl.exp(best - higher), tl.exp(other_best - higher)
        norm = norm * keep + other_norm * add
        total = total * keep[:, None] + other * add[:, None]
        best = higher
    result = total / tl.where(norm > 0, norm, 1.0)[:, None]
    out_at = out_ptr + (place * GROUP + group)[:, None] * DIM + dims[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=(group < GROUP)[:, None] & (dims < DIM)[None, :])


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `attention.paged_attention_decode`; the launch depends on shapes alone, so a CUDA graph can hold it."""
    batch, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    q = q.contiguous()
    out = torch.empty_like(q)
    if batch == 0:
        return out
    group = heads // kv_heads
    n_splits = max(1, triton.cdiv(block_tables.shape[1] * block_size, SPLIT_TOKENS))
    block_g, block_d = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim))
    sums = torch.empty(batch, kv_heads, n_splits, block_g, block_d, dtype=torch.float32, device=q.device)
    norms = torch.empty(batch, kv_heads, n_splits, block_g, 2, dtype=torch.float32, device=q.device)
    shape = {
        "DIM": dim,
        "GROUP": group,
        "WINDOW": window or 0,
        "SPLIT": SPLIT_TOKENS,
        "BLOCK_G": block_g,
        "BLOCK_D": block_d,
    }
    _decode_split[(n_splits, kv_heads, batch)](
        q,
        k_cache,
        v_cache,
        block_tables,
        lengths,
        sums,
        norms,
        scale,
        q.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables.stride(0),
        n_splits,
        BLOCK_SIZE=block_size,
        BLOCK_T=_BLOCK_TOKENS,
        num_warps=4,
        num_stages=3,
        **shape,
    )
    _decode_join[(kv_heads, batch)](sums, norms, lengths, out, n_splits, num_warps=4, **shape)
    return out
