"""Frozen linear layers with their weights packed once for what this CPU does best."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

Mode = Literal["fp32", "bf16", "fp16w", "torch"]
"""fp32: oneDNN, a row's bits independent of the others. bf16: oneDNN, for CPUs with bf16 arithmetic. fp16w: FBGEMM,
half-precision weights and fp32 activations. torch: `torch.nn.functional.linear`, unpacked."""


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with `weight` [out, in] prepacked for `mode`; not trainable."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mode: Mode = "fp32") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.mode = mode
        self.dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        self.weight: object
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        if mode == "fp16w":
            self.weight = torch.ops.quantized.linear_prepack_fp16(
                weight.float(), None if bias is None else bias.float()
            )
        elif mode in ("fp32", "bf16"):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous())
        else:
            self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.mode == "fp16w":
            return cast(Tensor, torch.ops.quantized.linear_dynamic_fp16(x, self.weight))
        if self.mode == "torch":
            return nn.functional.linear(x, cast(Tensor, self.weight), self.bias)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


def has_bf16() -> bool:
    """Whether this CPU computes in bf16 (avx512_bf16 or AMX); elsewhere bf16 is emulated and slow."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_backend(shapes: list[tuple[int, int]], rows: int = 32, *, exact: bool = False) -> Mode:
    """The fastest mode for linears of these (out, in) shapes at `rows` rows, by a measurement of well under a second.

    `exact`: fp32 whose rows do not depend on their batch mates; nothing is measured.
    """
    if exact:
        return "fp32"
    modes: list[Mode] = ["fp32", "torch", "fp16w"]
    if has_bf16():
        modes.append("bf16")
    return min(modes, key=lambda mode: sum(_seconds(mode, out, into, rows) for out, into in set(shapes)))


def _seconds(mode: Mode, out: int, into: int, rows: int) -> float:
    layer = PackedLinear(torch.randn(out, into), None, mode)
    x = torch.randn(rows, into, dtype=layer.dtype)
    return min(_timed(lambda: layer(x)) for _ in range(5))


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
