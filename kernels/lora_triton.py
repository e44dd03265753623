# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""LoRA in Triton: shrink (x A^T, split over the input width) and expand (times B^T, added to the output).

A row's bits depend on its own data and its site alone: the input width is cut into chunks of a length fixed per site,
each chunk is summed in order within one program, the chunks' float32 sums are added in order, without atomics. The
fused kernel follows the same order, so choosing between the two never changes an answer. Between shrink and expand the
sum is rounded to the weights' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from riverdelta.kernels.plans import Plan, plan_for
from riverdelta.kernels.pool import LoraPool
from riverdelta.kernels.segments import TILE_ROWS, Segments


@triton.jit
def _chunk_sum(
    x_rows,
    a_rows,
    row_mask,
    rank_mask,
    begin,
    in_features,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """float32 [TILE_M, BLOCK_R]: the rows' product with A over input columns begin .. begin + CHUNK."""
    total = tl.zeros((TILE_M, BLOCK_R), dtype=tl.float32)
    for k in range(begin, begin + CHUNK, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        if EVEN:
            a = tl.load(a_rows[None, :] + columns[:, None], mask=rank_mask[None, :], other=0.0)
            x = tl.load(x_rows[:, None] + columns[None, :], mask=row_mask[:, None], other=0.0)
        else:
            inside = columns < in_features
            a = tl.load(a_rows[None, :] + columns[:, None], mask=rank_mask[None, :] & inside[:, None], other=0.0)
            x = tl.load(x_rows[:, None] + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, a, total, input_precision="ieee")
    return total


@triton.jit
def _part_of_tile(tile, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which part an output tile lies in, the part's first column, the tile's, and the part's end."""
    part = 0
    start = 0
    first = 0
    end = 0
    for p in tl.static_range(len(COLUMNS) - 1):
        n_tiles = (COLUMNS[p + 1] - COLUMNS[p] + BLOCK_N - 1) // BLOCK_N
        here = (tile >= 0) & (tile < n_tiles)
        part = tl.where(here, p, part)
        start = tl.where(here, COLUMNS[p], start)
        first = tl.where(here, COLUMNS[p] + tile * BLOCK_N, first)
        end = tl.where(here, COLUMNS[p + 1], end)
        tile -= n_tiles
    return part, start, first, end


@triton.jit
def _shrink(
    x_ptr,
    a_ptr,
    offsets_ptr,
    tiles_ptr,
    sums_ptr,
    x_stride,
    a_slot_stride,
    in_features,
    width,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_M: tl.constexpr,
    PDL: tl.constexpr,
):
    chunk, rank_tile, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_rows = tl.load(tiles_ptr + 3 * tile + 2)
    slot = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    rank = tl.load(offsets_ptr + slot * (PARTS + 1) + PARTS)
    if PDL:
        # Started while the kernel ahead was ending; from here on it has ended, and expand may start in the same way.
        gdc_wait()
        gdc_launch_dependents()
    if (n_rows > 0) & (rank_tile * BLOCK_R < rank):
        local = tl.arange(0, TILE_M)
        rows = (tl.load(tiles_ptr + 3 * tile + 1) + local).to(tl.int64)
        ranks = rank_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        total = _chunk_sum(
            x_ptr + rows * x_stride,
            a_ptr + slot * a_slot_stride + ranks * in_features,
            local < n_rows,
            ranks < rank,
            chunk * CHUNK,
            in_features,
            CHUNK,
            BLOCK_K,
            EVEN,
            TILE_M,
            BLOCK_R,
        )
        at = sums_ptr + (rows * CHUNKS + chunk)[:, None] * width + ranks[None, :]
        tl.store(at, total, mask=(local < n_rows)[:, None] & (ranks < rank)[None, :])


@triton.jit
def _expand(
    sums_ptr,
    b_ptr,
    offsets_ptr,
    scales_ptr,
    tiles_ptr,
    out_ptr,
    out_stride,
    b_slot_stride,
    max_rank,
    width,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(1)
    part, start, first, end = _part_of_tile(tl.program_id(0), COLUMNS, BLOCK_N)
    n_rows = tl.load(tiles_ptr + 3 * tile + 2)
    slot = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    offset = tl.load(offsets_ptr + slot * (PARTS + 1) + part)
    rank = tl.load(offsets_ptr + slot * (PARTS + 1) + part + 1) - offset
    if (n_rows > 0) & (rank > 0):
        scale = tl.load(scales_ptr + slot * PARTS + part)
        local = tl.arange(0, TILE_M)
        rows = (tl.load(tiles_ptr + 3 * tile + 1) + local).to(tl.int64)
        row_mask = local < n_rows
        columns = first + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        b_part = b_ptr + slot * b_slot_stride + start * max_rank
        b_at = b_part + ranks[:, None] * (end - start) + (columns - start)[None, :]
        out_at = out_ptr + rows[:, None] * out_stride + columns[None, :]
        out_mask = row_mask[:, None] & (columns < end)[None, :]
        # What shrink does not make is on its way before shrink ends. What is in `out` was there before shrink let this
        # kernel start, but an L1 cache may hold what was there earlier: read it from the L2.
        base = tl.load(out_at, mask=out_mask, other=0.0, cache_modifier=".cg")
        b = tl.load(b_at, mask=(ranks < rank)[:, None] & (columns < end)[None, :], other=0.0)
        if PDL:
            gdc_wait()
        delta = tl.zeros((TILE_M, BLOCK_N), dtype=tl.float32)
        for r in tl.static_range(RANK_TILES):
            live = ranks + r * BLOCK_R < rank
            sums_at = sums_ptr + (rows * CHUNKS * width + offset + r * BLOCK_R)[:, None] + ranks[None, :]
            h = tl.zeros((TILE_M, BLOCK_R), dtype=tl.float32)
            for chunk in tl.static_range(CHUNKS):
                h += tl.load(sums_at + chunk * width, mask=row_mask[:, None] & live[None, :], other=0.0)
            # A reduction over one element, so that the compiler converts the sum's layout, not each chunk's.
            h = tl.sum(h[None, :, :], axis=0)
            if r > 0:
                b = tl.load(
                    b_at + r * BLOCK_R * (end - start), mask=live[:, None] & (columns < end)[None, :], other=0.0
                )
            delta = tl.dot(h.to(b.dtype), b, delta, input_precision="ieee")
        tl.store(out_at, (base.to(tl.float32) + scale * delta).to(base.dtype), mask=out_mask)


@triton.jit
def _fused(
    x_ptr,
    a_ptr,
    b_ptr,
    offsets_ptr,
    scales_ptr,
    tiles_ptr,
    out_ptr,
    x_stride,
    out_stride,
    a_slot_stride,
    b_slot_stride,
    in_features,
    max_rank,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_TILES: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_M: tl.constexpr,
):
    tile = tl.program_id(1)
    part, start, first, end = _part_of_tile(tl.program_id(0), COLUMNS, BLOCK_N)
    n_rows = tl.load(tiles_ptr + 3 * tile + 2)
    slot = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    offset = tl.load(offsets_ptr + slot * (PARTS + 1) + part)
    rank = tl.load(offsets_ptr + slot * (PARTS + 1) + part + 1) - offset
    if (n_rows > 0) & (rank > 0):
        scale = tl.load(scales_ptr + slot * PARTS + part)
        local = tl.arange(0, TILE_M)
        rows = (tl.load(tiles_ptr + 3 * tile + 1) + local).to(tl.int64)
        row_mask = local < n_rows
        columns = first + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        b_part = b_ptr + slot * b_slot_stride + start * max_rank
        b_at = b_part + ranks[:, None] * (end - start) + (columns - start)[None, :]
        out_at = out_ptr + rows[:, None] * out_stride + columns[None, :]
        out_mask = row_mask[:, None] & (columns < end)[None, :]
        base = tl.load(out_at, mask=out_mask, other=0.0)
        b = tl.load(b_at, mask=(ranks < rank)[:, None] & (columns < end)[None, :], other=0.0)
        delta = tl.zeros((TILE_M, BLOCK_N), dtype=tl.float32)
        for r in tl.static_range(RANK_TILES):
            live = ranks + r * BLOCK_R < rank
            a_rows = a_ptr + slot * a_slot_stride + (offset + r * BLOCK_R + ranks) * in_features
            h = tl.zeros((TILE_M, BLOCK_R), dtype=tl.float32)
            for chunk in range(CHUNKS):
                h += _chunk_sum(
                    x_ptr + rows * x_stride,
                    a_rows,
                    row_mask,
                    live,
                    chunk * CHUNK,
                    in_features,
                    CHUNK,
                    BLOCK_K,
                    EVEN,
                    TILE_M,
                    BLOCK_R,
                )
            if r > 0:
                b = tl.load(
                    b_at + r * BLOCK_R * (end - start), mask=live[:, None] & (columns < end)[None, :], other=0.0
                )
            delta = tl.dot(h.to(b.dtype), b, delta, input_precision="ieee")
        tl.store(out_at, (base.to(tl.float32) + scale * delta).to(base.dtype), mask=out_mask)


def delta(x: Tensor, pool: LoraPool, segments: Segments, out: Tensor, plan: Plan | None = None) -> None:
    """Launch what the plan says: shrink and expand, or both in one."""
    plan = plan or plan_for(pool)
    chunks = triton.cdiv(pool.in_features, plan.chunk)
    even = pool.in_features % plan.chunk == 0
    parts = len(pool.parts)
    rank_tiles = triton.cdiv(pool.max_rank, plan.expand_rank)
    column_tiles = sum(triton.cdiv(width, plan.block_n) for width in pool.parts)
    if plan.fused:
        _fused[(column_tiles, segments.capacity)](
            x,
            pool.a,
            pool.b,
            pool.offsets,
            pool.scales,
            segments.tiles,
            out,
            x.stride(0),
            out.stride(0),
            pool.a.stride(0),
            pool.b.stride(0),
            pool.in_features,
            pool.max_rank,
            CHUNKS=chunks,
            COLUMNS=pool.columns,
            PARTS=parts,
            CHUNK=plan.chunk,
            BLOCK_K=plan.block_k,
            BLOCK_N=plan.block_n,
            BLOCK_R=plan.expand_rank,
            RANK_TILES=rank_tiles,
            EVEN=even,
            TILE_M=TILE_ROWS,
            num_warps=plan.expand_warps,
            num_stages=plan.stages,
        )
        return
    width = pool.a.shape[1]
    sums = torch.empty(segments.rows, chunks, width, dtype=torch.float32, device=x.device)
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    early = {"launch_pdl": True} if pdl else {}
    _shrink[(chunks, triton.cdiv(width, plan.shrink_rank), segments.capacity)](
        x,
        pool.a,
        pool.offsets,
        segments.tiles,
        sums,
        x.stride(0),
        pool.a.stride(0),
        pool.in_features,
        width,
        CHUNKS=chunks,
        PARTS=parts,
        CHUNK=plan.chunk,
        BLOCK_K=plan.block_k,
        BLOCK_R=plan.shrink_rank,
        EVEN=even,
        TILE_M=TILE_ROWS,
        PDL=pdl,
        num_warps=plan.shrink_warps,
        num_stages=plan.stages,
        **early,
    )
    _expand[(column_tiles, segments.capacity)](
        sums,
        pool.b,
        pool.offsets,
        pool.scales,
        segments.tiles,
        out,
        out.stride(0),
        pool.b.stride(0),
        pool.max_rank,
        width,
        CHUNKS=chunks,
        COLUMNS=pool.columns,
        PARTS=parts,
        BLOCK_N=plan.block_n,
        BLOCK_R=plan.expand_rank,
        RANK_TILES=rank_tiles,
        TILE_M=TILE_ROWS,
        PDL=pdl,
        num_warps=plan.expand_warps,
        num_stages=1,
        **early,
    )
