"""Which rows of a step belong to which adapter slot: built once a step, shared by all sites."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TILE_ROWS = 16
"""Rows that one GPU program handles: a tensor core's least height. Fixed, so that it cannot change a row's bits."""


class Segments:
    """Runs of consecutive rows, each of one slot (-1: no adapter).

    On a GPU the runs live in a table of row tiles on the device, of fixed capacity, so a captured CUDA graph stays
    valid: capture with `build(..., capacity=...)`, then `update()` before each replay.
    """

    def __init__(self, device: torch.device | str, capacity: int, exact: bool = False) -> None:
        self.device = torch.device(device)
        self.capacity = capacity
        self.exact = exact
        self.runs: tuple[tuple[int, int], ...] = ()
        self.rows = 0
        self.empty = True
        """Whether no row has an adapter."""
        self.short = torch.zeros(0, 3, dtype=torch.int32)
        """On the host, int32 [n, 3]: slot, first row, number of rows, for each run that fits one tile."""
        self.long: tuple[tuple[int, int], ...] = ()
        """The runs, those that `short` names without their slot."""
        self.tiles = torch.zeros(capacity, 3, dtype=torch.int32, device=device)
        """int32 [capacity, 3]: slot, first row, number of rows; unused entries have no rows."""

    @classmethod
    def build(
        cls,
        runs: Sequence[tuple[int, int]],
        device: torch.device | str,
        *,
        capacity: int | None = None,
        exact: bool = False,
    ) -> Segments:
        """`runs`: (slot, number of rows) in row order.

        `capacity`: row tiles to hold, by default what `runs` needs. `exact`: let no row's bits depend on other runs on
        a CPU either, at some cost (on a GPU they depend on no other row).
        """
        needed = sum(-(-rows // TILE_ROWS) for slot, rows in runs if slot >= 0)
        segments = cls(device, needed if capacity is None else capacity, exact)
        segments.update(runs)
        return segments

    def update(self, runs: Sequence[tuple[int, int]]) -> None:
        """Replace the runs in place, device table included."""
        tiles: list[tuple[int, int, int]] = []
        short: list[tuple[int, int, int]] = []
        row = 0
        for slot, rows in runs:
            if slot < -1 or rows < 0:
                raise ValueError(f"run (slot {slot}, {rows} rows): slots are >= -1 and row counts >= 0")
            if slot >= 0 and 0 < rows <= TILE_ROWS:
                short.append((slot, row, rows))
            if slot >= 0:
                tiles += [(slot, row + i, min(TILE_ROWS, rows - i)) for i in range(0, rows, TILE_ROWS)]
            row += rows
        if len(tiles) > self.capacity:
            raise ValueError(f"{len(tiles)} row tiles do not fit a capacity of {self.capacity}; build larger Segments")
        self.runs, self.rows, self.empty = tuple(runs), row, not tiles
        self.long = tuple((slot if rows > TILE_ROWS else -1, rows) for slot, rows in runs)
        self.short = torch.tensor(short, dtype=torch.int32).view(-1, 3)
        if self.capacity:
            tiles += [(0, 0, 0)] * (self.capacity - len(tiles))
            host = torch.tensor(tiles, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            self.tiles.copy_(host, non_blocking=True)
