"""LoRA on PyTorch's own operators: batched products over views of the pool, few operators a step."""

from __future__ import annotations

import torch
from torch import Tensor

from riverdelta.kernels.pool import LoraPool
from riverdelta.kernels.segments import Batch, Segments


def delta(x: Tensor, pool: LoraPool, segments: Segments, out: Tensor) -> None:
    """Sequences sorted by slot make few batches; a batch whose slots are alike costs one product per matrix."""
    for batch in segments.batches:
        last = batch.first_slot + batch.n_slots - 1
        if pool.uniform(batch.first_slot, last):
            _batch(x, pool, batch, out)
            continue
        for i in range(batch.n_slots):
            row = batch.first_row + i * batch.rows_each
            _batch(x, pool, Batch(batch.first_slot + i, 1, row, batch.rows_each), out)


def _batch(x: Tensor, pool: LoraPool, batch: Batch, out: Tensor) -> None:
    layout = pool.layout(batch.first_slot)
    if layout.rank == 0:
        return
    slots = slice(batch.first_slot, batch.first_slot + batch.n_slots)
    rows = slice(batch.first_row, batch.first_row + batch.n_slots * batch.rows_each)
    shape = (batch.n_slots, batch.rows_each, -1)
    h = torch.bmm(x[rows].view(shape), pool.a[slots, : layout.rank].transpose(1, 2))
    y = out[rows].view(shape)
    for part, scale in enumerate(layout.scales):
        begin, end = layout.offsets[part], layout.offsets[part + 1]
        if end > begin:
            columns = slice(pool.columns[part], pool.columns[part + 1])
            b = pool.b[slots, : end - begin, columns]
            y[..., columns].baddbmm_(h[..., begin:end], b, alpha=scale)
