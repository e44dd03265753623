"""Which rows of a step belong to which adapter slot: built once a step, shared by all sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 16
"""Rows that one GPU program handles: a tensor core's least height. Fixed, so that it cannot change a row's bits."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Runs of equally many rows on consecutive slots, in both orders: one batched product on a CPU."""

    first_slot: int
    n_slots: int
    first_row: int
    rows_each: int


class Segments:
    """Runs of consecutive rows, each of one slot (-1: no adapter).

    On a GPU the runs live in a table of row tiles on the device, of fixed capacity, so a captured CUDA graph stays
    valid: capture with `build(..., capacity=...)`, then `update()` before each replay.
    """

    def __init__(self, device: torch.device | str, capacity: int) -> None:
        self.device = torch.device(device)
        self.capacity = capacity
        self.runs: tuple[tuple[int, int], ...] = ()
        self.batches: tuple[Batch, ...] = ()
        self.rows = 0
        self.tiles = torch.zeros(capacity, 3, dtype=torch.int32, device=device)
        """int32 [capacity, 3]: slot, first row, number of rows; unused entries have no rows."""

    @classmethod
    def build(
        cls, runs: Sequence[tuple[int, int]], device: torch.device | str, *, capacity: int | None = None
    ) -> Segments:
        """`runs`: (slot, number of rows) in row order. `capacity`: row tiles to hold, by default what `runs` needs."""
        needed = sum(-(-rows // TILE_ROWS) for slot, rows in runs if slot >= 0)
        segments = cls(device, needed if capacity is None else capacity)
        segments.update(runs)
        return segments

    @property
    def empty(self) -> bool:
        """True when no row has an adapter."""
        return not self.batches

    def update(self, runs: Sequence[tuple[int, int]]) -> None:
        """Replace the runs in place, device table included."""
        tiles: list[tuple[int, int, int]] = []
        batches: list[Batch] = []
        row = 0
        for slot, rows in runs:
            if slot < -1 or rows < 0:
                raise ValueError(f"run (slot {slot}, {rows} rows): slots are >= -1 and row counts >= 0")
            if slot >= 0 and rows > 0:
                tiles += [(slot, row + i, min(TILE_ROWS, rows - i)) for i in range(0, rows, TILE_ROWS)]
                last = batches[-1] if batches else None
                if (
                    last is not None
                    and last.rows_each == rows
                    and last.first_slot + last.n_slots == slot
                    and last.first_row + last.n_slots * rows == row
                ):
                    batches[-1] = Batch(last.first_slot, last.n_slots + 1, last.first_row, rows)
                else:
                    batches.append(Batch(slot, 1, row, rows))
            row += rows
        if len(tiles) > self.capacity:
            raise ValueError(f"{len(tiles)} row tiles do not fit a capacity of {self.capacity}; build larger Segments")
        self.runs, self.batches, self.rows = tuple(runs), tuple(batches), row
        if self.capacity:
            tiles += [(0, 0, 0)] * (self.capacity - len(tiles))
            self._upload(torch.tensor(tiles, dtype=torch.int32))

    def _upload(self, tiles: Tensor) -> None:
        if self.device.type == "cuda":
            tiles = tiles.pin_memory()
        self.tiles.copy_(tiles, non_blocking=True)
