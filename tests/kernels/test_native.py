"""The compiled CPU operators against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from riverdelta.kernels import Segments, lora_delta, native, paged_attention_decode

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler on this machine")


def close(got, expected, tolerance=4e-3):
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, f"relative error {error}"  # NaN never passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (3, 640), (2, 200, 1030)])
def test_norm(dtype, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    got = native.rms_norm(x, weight, 1e-6)
    close(got, functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6), 1e-6)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("width", [16, 2048])
def test_gated_activations_over_their_whole_range(rows, width):
    torch.manual_seed(0)
    x = (torch.randn(rows, 2 * width) * 20).bfloat16()
    x[0, :4] = torch.tensor([0.0, 1000.0, -1000.0, -0.5])
    gate, up = x.double().chunk(2, -1)
    close(native.gated(x, "silu"), functional.silu(gate) * up)
    close(native.gated(x, "gelu_tanh"), functional.gelu(gate, approximate="tanh") * up)


def _rotated(heads, cosine, sine):
    first, second = heads.chunk(2, -1)
    return heads * cosine[:, None] + torch.cat((-second, first), -1) * sine[:, None]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 256), (6, 3, 32)])
def test_rotation_fills_the_places_of_the_cache_and_no_other(normed, heads, kv_heads, dim):
    torch.manual_seed(0)
    rows = 5
    wide = torch.full((rows, heads + 2 * kv_heads + 1, dim), float("nan")).bfloat16()
    qkv = wide[:, :-1]
    qkv.copy_(torch.randn(qkv.shape))
    norm = torch.randn(heads + kv_heads, dim) if normed else None
    angles = torch.randn(rows, dim // 2).repeat(1, 2)
    places = torch.tensor([3, 17, 0, 8, 30])
    k, v = (torch.full((4, 8, kv_heads, dim), float("nan")).bfloat16() for _ in range(2))
    q = native.rotate(qkv, norm, 1e-6, angles.cos(), angles.sin(), places, k, v, heads)
    expected = qkv[:, : heads + kv_heads].double()
    if norm is not None:
        expected = functional.rms_norm(expected, (dim,), None, 1e-6) * norm
    expected = _rotated(expected, angles.cos(), angles.sin())
    close(q, expected[:, :heads])
    close(k.flatten(0, 1)[places], expected[:, heads:])
    assert torch.equal(v.flatten(0, 1)[places], qkv[:, heads + kv_heads :])
    others = torch.ones(32, dtype=torch.bool)
    others[places] = False
    assert k.flatten(0, 1)[others].isnan().all()
    assert v.flatten(0, 1)[others].isnan().all()


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block"), [(4, 1, 256, 16), (6, 2, 32, 8), (5, 1, 64, 128)])
def test_attention_whatever_unused_cache_holds(window, heads, kv_heads, dim, block):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 16, 17, 300, 0], dtype=torch.int32)
    width = -(-300 // block)
    tables = torch.randperm(5 * width).view(5, width).int()
    k, v = torch.randn(2, 5 * width, block, kv_heads, dim).bfloat16()
    for row, length in enumerate(lengths.tolist()):
        for at in range(length, width * block):
            k[tables[row, at // block], at % block] = float("nan")
            v[tables[row, at // block], at % block] = float("nan")
    q = torch.randn(5, heads, dim).bfloat16()
    out = torch.full_like(q, float("nan"))
    native.attend(q, k, v, tables, lengths, out, dim**-0.5, window or 0)
    wide = (q.double(), k.double(), v.double())
    close(out, paged_attention_decode(*wide, tables, lengths, dim**-0.5, window), 1e-2)
    assert not out[4].any()
    for row in range(4):
        alone = torch.empty_like(out[:1])
        native.attend(
            q[row : row + 1], k, v, tables[row : row + 1], lengths[row : row + 1], alone, dim**-0.5, window or 0
        )
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("in_features", [96, 100, 640])
def test_a_rows_lora_does_not_depend_on_its_mates_in_short_runs(make_case, in_features):
    runs = [(2, 3), (-1, 1), (0, 16), (1, 1), (2, 2), (3, 4)]
    ranks = [(16, 16), (16, 1), (9, 9), (0, 5)]
    case = make_case(ranks, runs, dtype=torch.bfloat16, in_features=in_features, parts=(590, 36), padding=16)
    together = lora_delta(case.x, case.pool, case.segments(), case.out.clone())
    case.check(together)
    row = 0
    for slot, rows in runs:
        for i in range(row, row + rows):
            alone = case.out[i : i + 1].clone()
            lora_delta(case.x[i : i + 1], case.pool, Segments.build([(slot, 1)], "cpu"), alone)
            assert torch.equal(alone[0], together[i])
        row += rows


def test_without_a_compiler_the_answers_are_the_same(make_case, monkeypatch):
    case = make_case([(8,), (5,)], [(0, 2), (1, 20)], dtype=torch.bfloat16)
    compiled = lora_delta(case.x, case.pool, case.segments(), case.out.clone())
    monkeypatch.setattr(native, "_library", lambda: None)
    close(lora_delta(case.x, case.pool, case.segments(), case.out.clone()), compiled, 1e-2)
