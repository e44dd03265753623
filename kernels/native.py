"""Fused CPU operators in C (`*.c` beside this file), compiled at first use by this machine's compiler.

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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from riverdelta.kernels.pool import LoraPool

logger = logging.getLogger(__name__)

_SOURCES = ("native.c", "products.c", "screen.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
LANES = 16
MAX_DIM, MAX_GROUP = 512, 16
ACTIVATIONS = ("silu", "gelu_tanh")
_APART = 32  # as in products.c

_pointer, _size, _real, _flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


class _Attention(ctypes.Structure):
    _fields_ = [(n, _size) for n in ("heads", "kv_heads", "dim", "block", "window")]
    _fields_ += [("scale", _real), ("eps", _real), ("norm", _pointer), ("k", _pointer), ("v", _pointer)]


class _Sequences(ctypes.Structure):
    _fields_ = [("rows", _size), ("width", _size)]
    _fields_ += [(n, _pointer) for n in ("places", "tables", "lengths", "cosine", "sine")]


class _Adapters(ctypes.Structure):
    _fields_ = [(n, _pointer) for n in ("a", "b", "offsets", "scales", "columns")]
    _fields_ += [(n, _size) for n in ("parts", "max_rank", "in_features")]


class _Tiles(ctypes.Structure):
    _fields_ = [("at", _pointer), ("count", _size), ("hidden", _pointer)]


class _Site(ctypes.Structure):
    _fields_ = [("packed", _pointer), ("bias", _pointer), ("out", _size), ("adapters", _Adapters)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("eps", ctypes.c_double)]


class _Layer(ctypes.Structure):
    _fields_ = [(n, _Site) for n in ("qkv", "o", "gate_up", "down")]
    _fields_ += [(n, _Norm) for n in ("before", "after", "before_mlp", "after_mlp")]
    _fields_ += [("attention", _Attention), ("hidden", _size), ("activation", _size)]


class _Room(ctypes.Structure):
    _fields_ = [(n, _pointer) for n in ("x", "q", "wide")]


def available() -> bool:
    """Whether the operators of this file can be called."""
    return _library() is not None


Products = Literal["tiles", "vectors"]


@cache
def products() -> Products | None:
    """What `product` and `Layer` multiply bf16 by on this CPU: tiles (AMX) or vectors (avx512_bf16). None: they cannot
    be called."""
    library = _library()
    kind = library.products() if library is not None else 0
    # The kernel grants a process its tiles when it asks.
    if kind == 1 and torch.cpu._init_amx():
        return "tiles"
    return "vectors" if kind == 2 else None


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        with tempfile.TemporaryDirectory(prefix="riverdelta-") as made:
            compiled = [f"{made}/{source}.o" for source in _SOURCES]
            for source, to in zip(_SOURCES, compiled, strict=True):
                command = [*compiler, *_FLAGS, "-c", str(Path(__file__).with_name(source)), "-o", to]
                subprocess.run(command, check=True, capture_output=True)
            # Linked without an OpenMP library: torch's, which is loaded already, shares its threads.
            linked = f"{made}/native.so"
            subprocess.run([*compiler, "-shared", *compiled, "-o", linked, "-lm"], check=True, capture_output=True)
            library = ctypes.CDLL(linked)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.info("No fused CPU operators, the slower ones of PyTorch serve instead: %s", error)
        return None
    library.rms_norm.argtypes = [_pointer, _flag, _size, _pointer, _pointer, _size, _size, _real, _flag]
    library.rotate.argtypes = [_pointer, _size, *[_pointer] * 3, _flag]
    library.attend.argtypes = [*[_pointer] * 4, _flag]
    library.gated.argtypes = [_pointer, _pointer, _size, _size, _flag, _flag]
    library.lora.argtypes = [_pointer, _size, *[_pointer] * 3, _size, _flag]
    names = ["rms_norm", "rotate", "attend", "gated", "lora"]
    if library.products():
        library.product.argtypes = [_pointer, _size, *[_pointer] * 3, *[_size] * 3, _flag]
        library.decode.argtypes = [*[_pointer] * 5, _flag]
        names += ["product", "decode"]
    for name in names:
        getattr(library, name).restype = None
    if library.products() == 1:
        library.screen.argtypes = [
            _pointer,
            _pointer,
            _size,
            _size,
            *[_pointer] * 4,
            _size,
            *[_pointer] * 4,
            _size,
            _pointer,
            _flag,
        ]
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask available() first"
    return library


def _to(of: ctypes.Structure) -> object:
    return ctypes.byref(of)


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
    to = _Attention(heads, k_cache.shape[-2], dim, 0, 0, 0.0, eps, _at(norm), _at(k_cache), _at(v_cache))
    at = _Sequences(rows, 0, _at(places), None, None, _at(cosine), _at(sine))
    _loaded().rotate(_at(qkv), qkv.stride(0), _to(to), _to(at), _at(q), torch.get_num_threads())
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
    block, kv_heads = k_cache.shape[1:3]
    to = _Attention(heads, kv_heads, dim, block, window, scale, 0.0, None, _at(k_cache), _at(v_cache))
    at = _Sequences(rows, tables.shape[1], None, _at(tables), _at(lengths), None, None)
    _loaded().attend(_at(q), _to(to), _to(at), _at(out), torch.get_num_threads())


def gated(x: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of contiguous bf16 `x` [..., gate and up], each a multiple of `LANES` wide."""
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=torch.bfloat16)
    kind = ACTIVATIONS.index(activation)
    _loaded().gated(_at(x), _at(out), out.numel() // width, width, kind, torch.get_num_threads())
    return out


def lora(x: Tensor, pool: LoraPool, tiles: Tensor, out: Tensor) -> None:
    """`lora.lora_delta` for bf16 and rows named by `tiles`, int32 [n, 3]: slot, first row, at most 16 rows."""
    hidden = torch.empty(_hidden(tiles, pool), dtype=torch.float32)
    given, to = _adapters(pool), _Tiles(_at(tiles), len(tiles), _at(hidden))
    _loaded().lora(_at(x), x.stride(0), _to(given), _to(to), _at(out), out.stride(0), torch.get_num_threads())


def fits_product(out_features: int, in_features: int) -> bool:
    """Whether `product` can do such weights here."""
    return products() is not None and out_features % 32 == 0 and in_features % 32 == 0


def pack(weight: Tensor) -> Tensor:
    """bf16 `weight` [out, in] in the order in which `product` reads it."""
    out, into = weight.shape
    pairs = weight.bfloat16().view(out // 16, 16, into // 32, 16, 2)
    return pairs.permute(0, 2, 3, 1, 4).contiguous()


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for bf16 `x` [..., in], `packed` by `pack`, fp32 `bias`; a row's bits are its own."""
    into, width = packed.shape[1] * 32, packed.shape[0] * 16
    rows = x.numel() // into
    padded = x.new_empty(-(-rows // 16) * 16, into + _APART)
    padded[:rows, :into] = x.reshape(rows, into)
    out = torch.empty(*x.shape[:-1], width, dtype=torch.bfloat16)
    _loaded().product(
        _at(padded), into + _APART, _at(packed), _at(bias), _at(out), rows, width, into, torch.get_num_threads()
    )
    return out


SCREEN_ROWS = 32
"""Rows that `screen` takes at most."""


def fits_screen(vocab: int, width: int) -> bool:
    """Whether `screen` can do such a head here."""
    return products() == "tiles" and vocab % 16 == 0 and width % 64 == 0


def pack_bytes(weight: Tensor) -> Tensor:
    """int8 `weight` [vocab, width] in the order in which `screen` reads it."""
    vocab, width = weight.shape
    return weight.view(vocab // 16, 16, width // 64, 64).transpose(1, 2).contiguous()


def screen(
    hidden: Tensor, smooth: Tensor, packed: Tensor, scale: Tensor, lost: Tensor, weight: Tensor, most: int
) -> Tensor | None:
    """The greedy tokens, int64 [rows], of fp32 `hidden` [rows, width] for fp32 `weight` [vocab, width]: as `screen.c`
    has it. None if more than `most` groups of tokens a row cannot be ruled out."""
    rows, width = hidden.shape
    vocab = len(weight)
    most *= rows
    parts = torch.empty(4 * 16 * width, dtype=torch.int8)
    upper, value = torch.empty(vocab // 16 * SCREEN_ROWS), torch.empty(most)
    found, best = torch.empty(most, 2, dtype=torch.int32), torch.empty(rows, dtype=torch.int64)
    done = _loaded().screen(
        *(_at(hidden), _at(smooth), rows, width, _at(packed), _at(scale), _at(lost), _at(weight), vocab),
        *(_at(parts), _at(upper), _at(found), _at(value), most, _at(best), torch.get_num_threads()),
    )
    return best if done else None


@dataclass(frozen=True, slots=True)
class Site:
    """A linear site of `Layer`: weights packed by `pack`, fp32 bias, adapters."""

    packed: Tensor
    bias: Tensor | None
    pool: LoraPool


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm of `Layer`: fp32 weight."""

    weight: Tensor
    eps: float


class Layer:
    """A decoder layer's decode step in one call: sites and norms by their place, attention as in `rotate`, `attend`."""

    def __init__(
        self,
        sites: tuple[Site, Site, Site, Site],
        norms: tuple[Norm, Norm | None, Norm, Norm | None],
        activation: str,
        heads: int,
        qk_norm: tuple[Tensor | None, float],
        scale: float,
        window: int,
        caches: tuple[Tensor, Tensor],
    ) -> None:
        """`sites`: q/k/v, o, gate/up, down. `norms`: before and after attention, before and after the MLP."""
        block, kv_heads, dim = caches[0].shape[1:]
        self._kept = (sites, norms, qk_norm, caches)
        self._sites = sites
        self._columns = max(s.pool.out_features for s in sites)
        self._inputs = max(s.pool.in_features for s in sites)
        self._queries = heads * dim
        self._layer = _Layer(
            *(_Site(_at(s.packed), _at(s.bias), s.pool.out_features, _adapters(s.pool)) for s in sites),
            *(_Norm(None, 0.0) if n is None else _Norm(_at(n.weight), n.eps) for n in norms),
            _Attention(
                heads, kv_heads, dim, block, window, scale, qk_norm[1], _at(qk_norm[0]), _at(caches[0]), _at(caches[1])
            ),
            sites[0].pool.in_features,
            ACTIVATIONS.index(activation),
        )

    def decode(
        self,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        places: Tensor,
        tables: Tensor,
        lengths: Tensor,
        tiles: Tensor,
    ) -> None:
        """fp32 `hidden` [rows, hidden] through the layer, in place; the rest as in `rotate`, `attend` and `lora`."""
        rows = len(hidden)
        padded = -(-rows // 16) * 16
        widths = [padded * (self._inputs + _APART), padded * self._queries, rows * self._columns]
        x, q, wide = torch.split(torch.empty(sum(widths), dtype=torch.bfloat16), widths)
        ranks = torch.empty(max(_hidden(tiles, s.pool) for s in self._sites), dtype=torch.float32)
        at = _Sequences(rows, tables.shape[1], *map(_at, (places, tables, lengths, cosine, sine)))
        tile = _Tiles(_at(tiles), len(tiles), _at(ranks))
        room = _Room(_at(x), _at(q), _at(wide))
        threads = torch.get_num_threads()
        _loaded().decode(_to(self._layer), _to(at), _to(tile), _at(hidden), _to(room), threads)


def _adapters(pool: LoraPool) -> _Adapters:
    held = (pool.a, pool.b, pool.offsets, pool.scales, pool.host_columns)
    return _Adapters(*map(_at, held), len(pool.parts), pool.max_rank, pool.in_features)


def _hidden(tiles: Tensor, pool: LoraPool) -> int:
    return len(tiles) * LANES * len(pool.parts) * pool.max_rank


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
