"""Paged attention's PyTorch path."""

from __future__ import annotations

import pytest
import torch

from riverdelta.kernels import paged_attention_decode


@pytest.mark.parametrize("window", [None, 3])
def test_matches_float64_whatever_unused_cache_holds(window):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 4, 0], dtype=torch.int32)
    k = torch.full((7, 4, 2, 8), float("nan"))
    v = torch.full((7, 4, 2, 8), float("nan"))
    tables = torch.tensor([[2, 6, 6], [0, 1, 3], [5, 6, 6], [6, 6, 6]], dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        for at in range(length):
            k[tables[row, at // 4], at % 4], v[tables[row, at // 4], at % 4] = torch.randn(2, 2, 8)
    q = torch.randn(4, 4, 8)
    got = paged_attention_decode(q, k, v, tables, lengths, 0.5, window)
    for row, length in enumerate(lengths.tolist()):
        for head in range(4):
            first = max(0, length - window) if window else 0
            seen = [(tables[row, t // 4], t % 4) for t in range(first, length)]
            if not seen:
                assert not got[row, head].any()
                continue
            keys = torch.stack([k[b, t, head // 2] for b, t in seen]).double()
            values = torch.stack([v[b, t, head // 2] for b, t in seen]).double()
            weights = (keys @ q[row, head].double() * 0.5).softmax(0)
            torch.testing.assert_close(got[row, head].double(), weights @ values, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    q, tables, lengths = torch.randn(1, 3, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    cache = torch.randn(2, 4, 2, 8)
    with pytest.raises(ValueError, match="divide its heads"):
        paged_attention_decode(q, cache, cache, tables, lengths, 1.0)
