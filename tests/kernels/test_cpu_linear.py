"""Packed linears against float64, and the exact mode's bits."""

from __future__ import annotations

import pytest
import torch

from riverdelta.kernels import PackedLinear, choose_backend, native
from riverdelta.kernels.cpu_linear import has_bf16

MODES = [("fp32", 1e-6), ("torch", 1e-6), ("fp16w", 1e-3), *([("bf16", 1e-2)] if has_bf16() else [])]


@pytest.mark.parametrize(("mode", "tolerance"), MODES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 96), (1, 96), (2, 5, 96)])
def test_matches_float64(mode, tolerance, bias, shape):
    torch.manual_seed(0)
    weight, offset, x = torch.randn(70, 96), torch.randn(70) if bias else None, torch.randn(shape)
    layer = PackedLinear(weight, offset, mode)
    got = layer(x.to(layer.dtype))
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert got.shape == expected.shape
    assert got.dtype == layer.dtype
    assert (got.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.skipif(native.products() is None, reason="this CPU has no bf16 arithmetic, or there is no C compiler")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (96, 2048), (4128, 64)])
def test_compiled_products_are_a_rows_own(bias, shape):
    torch.manual_seed(0)
    weight, offset = torch.randn(shape), torch.randn(shape[0]) if bias else None
    layer = PackedLinear(weight, offset, "bf16")
    assert layer.compiled
    x = torch.randn(101, shape[1]).bfloat16()
    whole = layer(x)
    expected = torch.nn.functional.linear(
        x.double(), weight.bfloat16().double(), None if offset is None else offset.double()
    )
    assert (whole.double() - expected).norm() / expected.norm() < 3e-3
    for rows in (1, 7, 8, 15, 16, 17, 32, 33, 64):
        assert torch.equal(layer(x[:rows]), whole[:rows])
    spoilt = x.clone()
    spoilt[::2] = float("nan")
    assert torch.equal(layer(spoilt)[1::2], whole[1::2])


def test_exact_rows_do_not_depend_on_their_mates():
    torch.manual_seed(0)
    layer = PackedLinear(torch.randn(256, 640), None, choose_backend([(256, 640)], exact=True))
    x = torch.randn(96, 640)
    alone = torch.cat([layer(row[None]) for row in x])
    for rows in (1, 2, 3, 5, 8, 17, 31, 32, 96):
        assert torch.equal(layer(x[:rows]), alone[:rows])
        assert torch.equal(layer(x[:rows].flip(0)), alone[:rows].flip(0))


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="convert x"):
        PackedLinear(torch.randn(4, 8))(torch.randn(1, 8, dtype=torch.float64))


def test_the_choice_is_a_mode_this_cpu_can_run():
    mode = choose_backend([(64, 64)], rows=4)
    assert mode in dict(MODES)
    assert PackedLinear(torch.randn(64, 64), None, mode).mode == mode
