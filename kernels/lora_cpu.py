"""LoRA on PyTorch's own operators: few batched products a step, over views of the pool where the slots allow it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from riverdelta.kernels import native
from riverdelta.kernels.pool import LoraPool, SlotLayout
from riverdelta.kernels.segments import TILE_ROWS, Segments

_LONG = TILE_ROWS
"""Runs of more rows are products of their own."""
_EXACT_ROWS = 4
"""A BLAS sums in another order at other heights: where bits matter, every product is this high."""


@dataclass(frozen=True, slots=True)
class _Product:
    """Equally many rows for each of several items, an item being a slot whose layout is that of the others."""

    layout: SlotLayout
    slots: slice | Tensor
    items: int
    height: int
    rows: slice | Tensor
    """Adjacent rows, or which row stands where; a padded place repeats a row."""
    kept: Tensor | None
    """The places that are not padding, where there is any."""
    targets: Tensor | None
    """The rows that the kept places stand for; None where `rows` is a slice."""


def delta(x: Tensor, pool: LoraPool, segments: Segments, out: Tensor) -> None:
    """See `lora.lora_delta`. Cheapest when sequences with equally many rows lie side by side, in the order of slots."""
    runs = segments.runs
    if x.dtype == torch.bfloat16 and not segments.exact and native.available():
        if len(segments.short):
            native.lora(x, pool, segments.short, out)
        runs = segments.long
    for product in _products(runs, pool.layouts(runs), segments.exact):
        _apply(product, x, pool, out)


def _apply(product: _Product, x: Tensor, pool: LoraPool, out: Tensor) -> None:
    layout, shape = product.layout, (product.items, product.height, -1)
    rows = product.rows
    taken = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    hidden = torch.bmm(taken.view(shape), _weights(pool.a, 0, layout.rank, pool.in_features, product).transpose(1, 2))
    for part, scale in enumerate(layout.scales):
        begin, end = layout.offsets[part], layout.offsets[part + 1]
        if begin == end:
            continue
        columns = slice(pool.columns[part], pool.columns[part + 1])
        b = _weights(pool.b, pool.max_rank * columns.start, end - begin, pool.parts[part], product)
        if product.targets is None and len(pool.parts) == 1:
            out[rows].view(shape).baddbmm_(hidden, b, alpha=scale)
            continue
        # Scaled first and added then: as one operator the two round differently at the end of a vector.
        added = torch.bmm(hidden[..., begin:end], b).mul_(scale)
        if product.targets is None:
            out[rows].view(shape)[..., columns].add_(added)
            continue
        flat = added.flatten(0, 1)
        flat = flat if product.kept is None else flat.index_select(0, product.kept)
        out[:, columns].index_add_(0, product.targets, flat)


def _weights(stored: Tensor, begin: int, rank: int, width: int, product: _Product) -> Tensor:
    """[items, rank, width] of the product's slots; `begin`: where in a slot the matrix starts."""
    matrices = stored.flatten(1)[:, begin : begin + rank * width]
    if isinstance(product.slots, slice):
        matrices = matrices[product.slots]
        if matrices.shape[0] < product.items:
            matrices = matrices.expand(product.items, -1)
    else:
        matrices = matrices.index_select(0, product.slots)
    return matrices.view(-1, rank, width)


@lru_cache(maxsize=512)
def _products(runs: tuple[tuple[int, int], ...], layouts: tuple[SlotLayout, ...], exact: bool) -> tuple[_Product, ...]:
    """Group runs whose slots are alike and whose row counts are within a factor of two."""
    groups: dict[tuple[object, ...], list[tuple[int, int, int]]] = {}
    row = 0
    for (slot, count), layout in zip(runs, layouts, strict=True):
        if slot >= 0 and count > 0 and layout.rank > 0:
            alone = count > _LONG
            key = (layout, row if alone else 1 << (count - 1).bit_length())
            groups.setdefault(key, []).append((slot, row, count))
        row += count
    return tuple(_product(key[0], members, exact) for key, members in groups.items())  # type: ignore[arg-type]


def _product(layout: SlotLayout, members: list[tuple[int, int, int]], exact: bool) -> _Product:
    height = _EXACT_ROWS if exact else max(count for _, _, count in members)
    items = [
        (slot, [min(row + i, row + count - 1) for i in range(begin, begin + height)], count - begin)
        for slot, row, count in members
        for begin in range(0, count, height)
    ]
    if exact and len(items) == 1:  # a product of one item is computed another way than the same item among others
        items.append((items[0][0], items[0][1], 0))
    slots = [slot for slot, _, _ in items]
    places = [row for _, rows, _ in items for row in rows]
    kept = [at * height + i for at, (_, _, count) in enumerate(items) for i in range(min(height, count))]
    adjacent = len(kept) == len(places) and places == list(range(places[0], places[0] + len(places)))
    return _Product(
        layout,
        _view(slots),
        len(items),
        height,
        slice(places[0], places[-1] + 1) if adjacent and not exact else torch.tensor(places),
        None if len(kept) == len(places) else torch.tensor(kept),
        None if adjacent and not exact else torch.tensor([places[i] for i in kept]),
    )


def _view(slots: list[int]) -> slice | Tensor:
    if len(set(slots)) == 1:
        return slice(slots[0], slots[0] + 1)
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[-1] + 1)
    return torch.tensor(slots)
