"""Paged attention's Triton kernels against float64, and the bits they promise."""

from __future__ import annotations

import pytest
import torch

from riverdelta.kernels import attention_triton, paged_attention_decode


def _inputs(lengths, *, heads=4, kv_heads=2, dim=32, block_size=16, device="cpu", dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    width = -(-max(lengths) // block_size) + 1
    blocks = sum(-(-n // block_size) for n in lengths) + 1
    free = torch.randperm(blocks, generator=random).tolist()
    cache = torch.full((2, blocks, block_size, kv_heads, dim), float("nan"))
    tables = torch.full((len(lengths), width), free.pop(), dtype=torch.int32)
    dense = []
    for row, length in enumerate(lengths):
        k, v = torch.randn(2, length, kv_heads, dim, generator=random).to(dtype).float()
        for begin in range(0, length, block_size):
            block = free.pop()
            tables[row, begin // block_size] = block
            n = min(block_size, length - begin)
            cache[0, block, :n], cache[1, block, :n] = k[begin : begin + n], v[begin : begin + n]
        dense.append((k, v))
    q = torch.randn(len(lengths), heads, dim, generator=random).to(dtype)
    paged = [t.to(device) for t in (q, cache[0].to(dtype), cache[1].to(dtype), tables)]
    return (*paged, torch.tensor(lengths, dtype=torch.int32, device=device)), dense


def _expected(q, dense, scale, window):
    rows = []
    for query, cached in zip(q.cpu().double(), dense, strict=True):
        seen = [t[-window:] if window is not None else t for t in cached]
        k, v = (t.double().repeat_interleave(query.shape[0] // t.shape[1], dim=1) for t in seen)
        weights = (torch.einsum("hd,thd->ht", query, k) * scale).softmax(-1)
        rows.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 40, 600])
def test_ragged_lengths_match_float64(device, window):
    inputs, dense = _inputs([1, 16, 17, 700, 100], device=device)
    got = paged_attention_decode(*inputs, 0.2, window)
    torch.testing.assert_close(got.cpu().double(), _expected(inputs[0], dense, 0.2, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(4, 1, 80, 8), (2, 2, 16, 32), (20, 1, 64, 16)])
def test_head_shapes(device, heads, kv_heads, dim, block_size):
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "block_size": block_size}
    inputs, dense = _inputs([33, 5], device=device, dtype=torch.float16, **shape)
    got = paged_attention_decode(*inputs, dim**-0.5)
    expected = _expected(inputs[0], dense, dim**-0.5, None)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=5e-3, atol=5e-3)


def test_a_sequences_bits_do_not_depend_on_its_mates_or_the_tables_width(device):
    (q, k, v, tables, lengths), _ = _inputs([600, 3, 48], device=device)
    together = attention_triton.decode(q, k, v, tables, lengths, 0.3, None)
    for row, length in enumerate(lengths.tolist()):
        blocks = -(-length // 16)
        one = slice(row, row + 1)
        alone = attention_triton.decode(q[one], k, v, tables[one, :blocks], lengths[one], 0.3, None)
        assert torch.equal(alone[0], together[row])


def test_no_tokens_give_a_zero_row(device):
    (q, k, v, tables, lengths), _ = _inputs([5, 5], device=device)
    lengths[1] = 0
    assert not paged_attention_decode(q, k, v, tables, lengths, 1.0)[1].any()
