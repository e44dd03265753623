"""`lora_delta`: add each row's adapter to a site's output, in place."""

from __future__ import annotations

from torch import Tensor

from riverdelta.kernels import lora_cpu
from riverdelta.kernels.device import use_triton
from riverdelta.kernels.pool import LoraPool
from riverdelta.kernels.segments import Segments


def lora_delta(x: Tensor, pool: LoraPool, segments: Segments, out: Tensor) -> Tensor:
    """``out[row] += scale * (x[row] A^T) B^T`` with the row's slot of `pool`; rows of slot -1 stay untouched.

    `x` [rows, in] and `out` [rows, out] are in the pool's dtype, the elements of a row contiguous. Returns `out`. With
    no adapter in the batch nothing is launched. After Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023).
    """
    if segments.empty:
        return out
    if x.shape[0] < segments.rows or out.shape[0] < segments.rows:
        raise ValueError(f"segments cover {segments.rows} rows, x has {x.shape[0]} and out {out.shape[0]}")
    if x.shape[1] != pool.in_features or out.shape[1] != pool.out_features:
        raise ValueError(
            f"this pool maps {pool.in_features} -> {pool.out_features}, got x {list(x.shape)} and out {list(out.shape)}"
        )
    if x.dtype != pool.dtype or out.dtype != pool.dtype:
        raise ValueError(f"x is {x.dtype}, out {out.dtype}, the pool {pool.dtype}; use one dtype for the three")
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the elements of a row of x and out must be contiguous; call contiguous() on x")
    if use_triton(x):
        from riverdelta.kernels import lora_triton

        lora_triton.delta(x, pool, segments, out)
    else:
        lora_cpu.delta(x, pool, segments, out)
    return out
