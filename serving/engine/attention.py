"""Attention over the paged KV cache, as a function that Hugging Face's own attention modules call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from riverdelta.core.errors import Unsupported
from riverdelta.kernels import native, paged_attention_decode, use_triton

NAME = "riverdelta_paged"

# Tokens that a step's chunks may see, row by row, to be handled as decoding rows are.
_BY_ROW = 32768


class AttentionOptions(NamedTuple):
    """What a model's attention module asks of the attention function."""

    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of one prompt: rows `first` to `first + count` of the step, at positions `start` on, with its cached
    `context` (flat cache positions of tokens 0 to start + count)."""

    first: int
    count: int
    start: int
    context: Tensor


@dataclass(slots=True)
class StepContext:
    """Where a step's rows live in the cache. Rows are decoding sequences first, then prompt chunks.

    `positions` int64 [rows]: each row's flat place in the cache; `tables` int32 [decodes, blocks] and `lengths`
    int32 [decodes] say what each decoding sequence attends to, its new token included.
    """

    cache: "KVCache"
    positions: Tensor
    tables: Tensor
    lengths: Tensor
    chunks: list[Chunk] = field(default_factory=list)
    options: dict[int, "AttentionOptions"] = field(default_factory=dict)
    """By layer: what the model's module passed, for who replaces that module."""
    exact: bool = False
    """Whether a row's arithmetic must not depend on its batch mates."""
    _views: dict[int | None, list["View"]] = field(default_factory=dict)
    _by_row: tuple[Tensor, Tensor] | None = None
    _derived: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def once(self, source: Tensor, derive: Callable[[Tensor], Tensor]) -> Tensor:
        """`derive(source)`, computed once a step for all layers."""
        if id(source) not in self._derived:
            self._derived[id(source)] = (source, derive(source))
        return self._derived[id(source)][1]

    def by_row(self) -> tuple[Tensor, Tensor] | None:
        """`tables` and `lengths` of every row, as if each were a sequence's new token; None where so much context is
        better read once a chunk."""
        if not self.chunks:
            return self.tables, self.lengths
        if sum(chunk.count * (chunk.start + chunk.count) for chunk in self.chunks) > _BY_ROW:
            return None
        if self._by_row is None:
            size, width = self.cache.block_size, self.tables.shape[1]
            width = max(width, *(-(-len(chunk.context) // size) for chunk in self.chunks))
            tables = self.tables.new_zeros(len(self.positions), width)
            tables[: len(self.tables), : self.tables.shape[1]] = self.tables
            lengths = [self.lengths]
            for chunk in self.chunks:
                blocks = chunk.context[::size] // size
                tables[chunk.first : chunk.first + chunk.count, : len(blocks)] = blocks
                lengths.append(torch.arange(chunk.start + 1, chunk.start + chunk.count + 1, dtype=torch.int32))
            self._by_row = tables, torch.cat(lengths)
        return self._by_row

    def views(self, window: int | None) -> list["View"]:
        """What decoding rows see through a sliding window; every layer of that window shares it."""
        if window not in self._views:
            self._views[window] = list(self._split(window))
        return self._views[window]

    def _split(self, window: int | None) -> Iterator["View"]:
        lengths = self.lengths.long()
        widths = -(-lengths // self.cache.block_size)
        if not self.exact:
            yield self._view(lengths, self.tables, int(widths.max()), window, None)
            return
        # A sum's order depends on its length: each row is padded to a length that is its own.
        widths = 2 ** widths.clamp_min(4).double().log2().ceil().long()
        for width in sorted(set(widths.tolist())):
            rows = (widths == width).nonzero()[:, 0]
            yield self._view(lengths[rows], self.tables[rows], width, window, rows)

    def _view(self, lengths: Tensor, tables: Tensor, width: int, window: int | None, rows: Tensor | None) -> "View":
        block, device = self.cache.block_size, tables.device
        lengths = lengths[:, None]
        index = torch.arange(width, device=device)[None].expand(len(lengths), -1)
        if window is not None and (seen := window // block + 2) < width:
            index = torch.arange(seen, device=device)[None] + (lengths - window).clamp_min(0) // block
        at = (index[:, :, None] * block + torch.arange(block, device=device)).flatten(1)
        hidden = at >= lengths
        if window is not None:
            hidden |= at < lengths - window
        blocks = tables.long().gather(1, index.clamp_max(tables.shape[1] - 1))
        # A block past a sequence's end may be another's: what is hidden must also be finite.
        blocks = torch.where(index * block < lengths, blocks, self.cache.blocks)
        bias = torch.zeros(at.shape, dtype=self.cache.dtype, device=device).masked_fill_(hidden, float("-inf"))
        return View(rows, blocks.flatten(), bias[:, None, None])


class View(NamedTuple):
    """Part of the decoding rows, their `rows` (None: all), and what they attend to: `blocks` [rows * n], the blocks of
    one after the other, and what to add to their scores, `bias` [rows, 1, 1, n * block_size]."""

    rows: Tensor | None
    blocks: Tensor
    bias: Tensor


class KVCache:
    """Keys and values of every layer: `k`, `v` [blocks + 1, block_size, kv_heads, head_dim], made on first use.

    The last block stays zero, for tables to point to where a sequence has no block.
    """

    def __init__(self, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.block_size, self.dtype, self.device = blocks, block_size, dtype, device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's cache, with the heads and widths of `k` and `v` [1, kv_heads, rows, dim]."""
        if index not in self.layers:
            self.layers[index] = (self._empty(k), self._empty(v))
        return self.layers[index]

    @torch.inference_mode()
    def zero(self, blocks: list[int]) -> None:
        """Erase what the blocks hold: values of whoever held them last must not meet another's mask as NaN."""
        if not blocks:
            return
        at = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        for k, v in self.layers.values():
            k.index_fill_(0, at, 0)
            v.index_fill_(0, at, 0)

    @property
    def nbytes(self) -> int:
        """Memory of all layers."""
        return sum(t.nbytes for pair in self.layers.values() for t in pair)

    def _empty(self, like: Tensor) -> Tensor:
        shape = (self.blocks + 1, self.block_size, like.shape[1], like.shape[3])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: StepContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `query` [1, heads, rows, dim] over the cache, which takes `key` and `value`
    [1, kv_heads, rows, dim] first. Returns [1, rows, heads, dim]."""
    if paged is None:
        raise RuntimeError(f"{NAME} attention runs only inside an engine's step")
    if softcap is not None or s_aux is not None:
        raise Unsupported(
            f"{type(module).__name__} caps or biases its attention scores.",
            "Serving has no path for that; choose another base model.",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index = int(module.layer_idx)  # type: ignore[arg-type]
    paged.options[index] = AttentionOptions(scaling, sliding_window)
    k_cache, v_cache = paged.cache.layer(index, key, value)
    k_flat, v_flat = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    dtype = k_cache.dtype
    query = query.to(dtype)
    k_flat.index_copy_(0, paged.positions, key[0].transpose(0, 1).to(dtype))
    v_flat.index_copy_(0, paged.positions, value[0].transpose(0, 1).to(dtype))
    parts = []
    if decodes := paged.lengths.shape[0]:
        rows = query[0, :, :decodes].transpose(0, 1)
        parts.append(_decode(rows, k_cache, v_cache, paged, scale, sliding_window))
    for chunk in paged.chunks:
        parts.append(_chunk(query, k_flat, v_flat, chunk, scale, sliding_window))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[None].to(value.dtype), None


def rotate_and_attend(
    module: torch.nn.Module,
    qkv: Tensor,
    norm: tuple[Tensor | None, float],
    position_embeddings: tuple[Tensor, Tensor],
    heads: int,
    options: AttentionOptions,
    paged: StepContext,
) -> Tensor:
    """What a rotary attention module does between its products, by compiled operators: `qkv` bf16 [rows, heads + 2
    kv_heads, dim] -> bf16 [rows, heads, dim]. `norm`: of queries and keys, its weight and eps."""
    index, dim = int(module.layer_idx), qkv.shape[-1]  # type: ignore[arg-type]
    scale = dim**-0.5 if options.scaling is None else options.scaling
    kv_heads = (qkv.shape[1] - heads) // 2
    like = qkv[:, :kv_heads].transpose(0, 1)[None]
    k_cache, v_cache = paged.cache.layer(index, like, like)
    q = native.rotate(qkv, *norm, *position_embeddings, paged.positions, k_cache, v_cache, heads)
    out = torch.empty_like(q)
    if paged.lengths.shape[0]:
        decodes = q[: paged.lengths.shape[0]]
        window = options.sliding_window or 0
        native.attend(decodes, k_cache, v_cache, paged.tables, paged.lengths, out, scale, window)
    query = q.transpose(0, 1)[None]
    for chunk in paged.chunks:
        k_flat, v_flat = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        got = _chunk(query, k_flat, v_flat, chunk, scale, options.sliding_window)
        out[chunk.first : chunk.first + chunk.count] = got
    return out


def _decode(
    rows: Tensor, k_cache: Tensor, v_cache: Tensor, paged: StepContext, scale: float, window: int | None
) -> Tensor:
    """Attention of one new token a sequence: `rows` and the result are [decodes, heads, dim]."""
    if use_triton(rows):
        args = (k_cache, v_cache, paged.tables, paged.lengths, scale, window)
        return paged_attention_decode(rows.contiguous(), *args)
    views = paged.views(window)
    if views[0].rows is None:
        return _attend(rows, k_cache, v_cache, views[0], scale)
    out = torch.empty_like(rows)
    for view in views:
        out[view.rows] = _attend(rows[view.rows], k_cache, v_cache, view, scale)
    return out


def _attend(rows: Tensor, k_cache: Tensor, v_cache: Tensor, view: View, scale: float) -> Tensor:
    count, heads, dim = rows.shape
    kv_heads = k_cache.shape[2]
    k = k_cache.flatten(1).index_select(0, view.blocks).view(count, -1, kv_heads, dim).transpose(1, 2)
    v = v_cache.flatten(1).index_select(0, view.blocks).view(count, -1, kv_heads, dim).transpose(1, 2)
    # The heads of a group attend to the same keys: to the operator they are rows of one query.
    q = rows.reshape(count, kv_heads, heads // kv_heads, dim)
    return scaled_dot_product_attention(q, k, v, attn_mask=view.bias, scale=scale).reshape(count, heads, dim)


def _chunk(query: Tensor, k_flat: Tensor, v_flat: Tensor, chunk: Chunk, scale: float, window: int | None) -> Tensor:
    """Attention of one prompt chunk over its context: [count, heads, dim]."""
    q = query[:, :, chunk.first : chunk.first + chunk.count]
    context = chunk.context
    offset = 0
    if window is not None and (offset := max(0, chunk.start - window + 1)):
        context = context[offset:]
    k = k_flat[context].transpose(0, 1)[None]
    v = v_flat[context].transpose(0, 1)[None]
    plain = chunk.start == 0 and (window is None or chunk.count <= window)
    mask = None
    if not plain:
        at = torch.arange(chunk.start, chunk.start + chunk.count, device=q.device)[:, None]
        seen = torch.arange(offset, chunk.start + chunk.count, device=q.device)[None]
        mask = seen <= at
        if window is not None:
            mask &= seen > at - window
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


AttentionInterface.register(NAME, paged_attention)
