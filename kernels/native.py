"""Fused CPU operators in C (`native.c`), compiled at first use by this machine's compiler.

They take bf16 and fp32 tensors that they do not check: callers do. Where no compiler is, `available()` is False and
PyTorch's operators do the same work in more steps.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from riverdelta.kernels.pool import LoraPool

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
LANES = 16
MAX_DIM, MAX_GROUP = 512, 16
ACTIVATIONS = ("silu", "gelu_tanh")


def available() -> bool:
    """Whether the operators of this file can be called."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        with tempfile.TemporaryDirectory(prefix="riverdelta-") as made:
            compiled, linked = f"{made}/native.o", f"{made}/native.so"
            subprocess.run([*compiler, *_FLAGS, "-c", str(_SOURCE), "-o", compiled], check=True, capture_output=True)
            # Linked without an OpenMP library: torch's, which is loaded already, shares its threads.
            subprocess.run([*compiler, "-shared", compiled, "-o", linked, "-lm"], check=True, capture_output=True)
            library = ctypes.CDLL(linked)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.info("No fused CPU operators, the slower ones of PyTorch serve instead: %s", error)
        return None
    pointer, size, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    library.rms_norm.argtypes = [pointer, flag, size, pointer, pointer, size, size, real, flag]
    library.rotate.argtypes = [pointer, size, pointer, real, *[pointer] * 6, *[size] * 4, flag]
    library.attend.argtypes = [*[pointer] * 6, *[size] * 7, real, flag]
    library.gated.argtypes = [pointer, pointer, size, size, flag, flag]
    library.lora.argtypes = [pointer, size, *[pointer] * 5, *[size] * 3, pointer, size, pointer, size, pointer, flag]
    for name in ("rms_norm", "rotate", "attend", "gated", "lora"):
        getattr(library, name).restype = None
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask available() first"
    return library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation (Zhang & Sennrich 2019) of contiguous bf16 or fp32 `x` [..., dim], `weight` fp32; fp32 out."""
    out = torch.empty(x.shape, dtype=torch.float32)
    dim = x.shape[-1]
    half = x.dtype == torch.bfloat16
    _loaded().rms_norm(
        x.data_ptr(),
        half,
        dim,
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // dim,
        dim,
        eps,
        torch.get_num_threads(),
    )
    return out


def rotate(
    qkv: Tensor,
    norm: Tensor | None,
    eps: float,
    cosine: Tensor,
    sine: Tensor,
    places: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
) -> Tensor:
    """The queries of bf16 `qkv` [rows, heads + 2 kv_heads, dim], normalised where `norm` fp32 [heads + kv_heads, dim]
    says so, and rotated by fp32 `cosine` and `sine` [rows, dim] (Su et al. 2021): bf16 [rows, heads, dim]. Keys,
    treated alike, and values go to the bf16 caches [..., kv_heads, dim] at int64 `places` [rows]."""
    rows, _, dim = qkv.shape
    q = torch.empty(rows, heads, dim, dtype=torch.bfloat16)
    _loaded().rotate(
        qkv.data_ptr(),
        qkv.stride(0),
        None if norm is None else norm.data_ptr(),
        eps,
        cosine.data_ptr(),
        sine.data_ptr(),
        places.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        rows,
        heads,
        k_cache.shape[-2],
        dim,
        torch.get_num_threads(),
    )
    return q


def fits_rotate(heads: int, kv_heads: int, dim: int) -> bool:
    """Whether `rotate` and `attend` can do such heads."""
    return dim % (2 * LANES) == 0 and dim <= MAX_DIM and heads % kv_heads == 0 and heads // kv_heads <= MAX_GROUP


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, out: Tensor, scale: float, window: int
) -> None:
    """Paged attention of one token a sequence: bf16 `q` and `out` [rows, heads, dim], caches [blocks, block, kv_heads,
    dim], int32 `tables` [rows, width] and `lengths` [rows]; `window` 0: all tokens."""
    rows, heads, dim = q.shape
    _loaded().attend(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        tables.data_ptr(),
        lengths.data_ptr(),
        out.data_ptr(),
        rows,
        heads,
        k_cache.shape[2],
        dim,
        k_cache.shape[1],
        tables.shape[1],
        window,
        scale,
        torch.get_num_threads(),
    )


def gated(x: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of contiguous bf16 `x` [..., gate and up], each a multiple of `LANES` wide."""
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=torch.bfloat16)
    kind = ACTIVATIONS.index(activation)
    _loaded().gated(x.data_ptr(), out.data_ptr(), out.numel() // width, width, kind, torch.get_num_threads())
    return out


def lora(x: Tensor, pool: LoraPool, tiles: Tensor, out: Tensor) -> None:
    """`lora.lora_delta` for bf16 and rows named by `tiles`, int32 [n, 3]: slot, first row, at most 16 rows."""
    parts = len(pool.parts)
    hidden = torch.empty(len(tiles) * LANES * parts * pool.max_rank, dtype=torch.float32)
    _loaded().lora(
        x.data_ptr(),
        x.stride(0),
        pool.a.data_ptr(),
        pool.b.data_ptr(),
        pool.offsets.data_ptr(),
        pool.scales.data_ptr(),
        pool.host_columns.data_ptr(),
        parts,
        pool.max_rank,
        pool.in_features,
        tiles.data_ptr(),
        len(tiles),
        out.data_ptr(),
        out.stride(0),
        hidden.data_ptr(),
        torch.get_num_threads(),
    )
