"""Frozen linear layers with their weights packed once for what this CPU does best."""

from __future__ import annotations

from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from riverdelta.kernels import native
from riverdelta.kernels.cpu_timing import cpu_seconds

Mode = Literal["fp32", "bf16", "fp16w", "torch"]
"""fp32: oneDNN, a row's bits independent of the others. bf16: for CPUs with bf16 arithmetic, by
`native.product` where the CPU and the shape fit it, else oneDNN. fp16w: FBGEMM,
half-precision weights and fp32 activations. torch: `torch.nn.functional.linear`, unpacked."""


_MEASURED_ROWS = 8192
"""A vocabulary's worth of rows takes seconds to pack: time so many of them, which no cache holds, and scale."""
_LEAST_RUNS, _SHAPE_SECONDS = 6, 0.2


class PackedLinear(nn.Module):
    """``x @ weight.T + bias``, `weight` [out, in] prepacked for `mode`; not trainable. `x` and answer in `dtype`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mode: Mode = "fp32") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.mode = mode
        self.dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        self.compiled = mode == "bf16" and native.fits_product(*weight.shape)
        """Whether `weight` and `bias` are as `native.product` takes them."""
        self.weight: object
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        if mode == "fp16w":
            self.weight = torch.ops.quantized.linear_prepack_fp16(
                weight.float(), None if bias is None else bias.float()
            )
        elif self.compiled:
            self.weight = native.pack(weight)
        elif mode in ("fp32", "bf16"):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous())
        else:
            self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(torch.float32 if self.compiled else self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if x.dtype != self.dtype:
            raise ValueError(f"this layer is packed for {self.dtype}, x is {x.dtype}; convert x")
        if self.mode == "fp16w":
            return cast(Tensor, torch.ops.quantized.linear_dynamic_fp16(x, self.weight))
        if self.mode == "torch":
            return nn.functional.linear(x, cast(Tensor, self.weight), self.bias)
        if self.compiled:
            return native.product(x, cast(Tensor, self.weight), self.bias)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


def has_bf16() -> bool:
    """Whether this CPU computes in bf16 (avx512_bf16 or AMX); elsewhere bf16 is emulated and slow."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_backend(shapes: list[tuple[int, int]], rows: int = 32, *, exact: bool = False) -> Mode:
    """The fastest mode for linears of these (out, in) shapes at `rows` rows, by a measurement of about a second.

    `exact`: fp32 whose rows do not depend on their batch mates; nothing is measured.
    """
    if exact:
        return "fp32"
    modes: list[Mode] = ["fp32", "torch", "fp16w"]
    if has_bf16():
        modes.append("bf16")
    seconds = dict.fromkeys(modes, 0.0)
    for out, into in sorted(set(shapes)):
        measured = min(out, _MEASURED_ROWS)
        for mode, best in _measure(modes, measured, into, rows).items():
            seconds[mode] += best * shapes.count((out, into)) * out / measured
    return min(modes, key=seconds.__getitem__)


def _measure(modes: list[Mode], out: int, into: int, rows: int) -> dict[Mode, float]:
    weight, x = torch.randn(1, into).expand(out, into).contiguous(), torch.randn(rows, into)
    layers = [PackedLinear(weight, None, mode) for mode in modes]
    with torch.inference_mode():
        calls = [partial(layer, x.to(layer.dtype)) for layer in layers]
        return dict(zip(modes, cpu_seconds(calls, _LEAST_RUNS, _SHAPE_SECONDS), strict=True))
