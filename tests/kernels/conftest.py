"""Random pools with their float64 reference, shared by the CPU and the Triton tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from riverdelta.kernels import LoraPool, Segments

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """A pool with adapters, an input, an output that already holds something, and the answer in float64."""

    pool: LoraPool
    adapters: list[tuple[list[Tensor | None], list[Tensor | None], list[float]]]
    x: Tensor
    out: Tensor
    runs: list[tuple[int, int]]

    def segments(self, **kwargs: Any) -> Segments:
        return Segments.build(self.runs, self.x.device, **kwargs)

    def expected(self) -> Tensor:
        answer, row = self.out.double(), 0
        for slot, rows in self.runs:
            if slot >= 0:
                for part, (a, b, scale) in enumerate(zip(*self.adapters[slot], strict=True)):
                    if a is not None and b is not None:
                        columns = slice(self.pool.columns[part], self.pool.columns[part + 1])
                        hidden = self.x[row : row + rows].double() @ a.double().T
                        answer[row : row + rows, columns] += scale * (hidden @ b.double().T)
            row += rows
        return answer

    def check(self, got: Tensor) -> None:
        expected = self.expected()
        error = (got.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[self.x.dtype], f"relative error {error}"  # NaN never passes


def make_case(
    ranks: Sequence[Sequence[int]],
    runs: Sequence[tuple[int, int]],
    *,
    in_features: int = 96,
    parts: Sequence[int] = (80,),
    max_rank: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    padding: int = 0,
    seed: int = 0,
) -> Case:
    """`ranks`: per slot, per part. `padding`: columns of NaN around x and out, so that their rows are not adjacent."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * std).to(dtype).to(device)

    pool = LoraPool(len(ranks), in_features, sum(parts), max_rank, dtype, device, parts=parts)
    # Whatever a slot does not hold is poison: a kernel that reads beyond an adapter's rank answers NaN.
    pool.a.fill_(float("nan"))
    pool.b.fill_(float("nan"))
    adapters = []
    for slot, slot_ranks in enumerate(ranks):
        a = [draw(r, in_features, std=in_features**-0.5) if r else None for r in slot_ranks]
        b = [draw(width, r) if r else None for width, r in zip(parts, slot_ranks, strict=True)]
        scales = [0.5 * (part + 1) + slot % 2 for part in range(len(parts))]
        if any(slot_ranks):
            pool.write(slot, a, b, scales)
        adapters.append((a, b, scales))
    rows = sum(n for _, n in runs)
    x = torch.full((rows, in_features + padding), float("nan"), dtype=dtype, device=device)[:, :in_features]
    out = torch.full((rows, sum(parts) + padding), float("nan"), dtype=dtype, device=device)[:, : sum(parts)]
    x.copy_(draw(rows, in_features))
    out.copy_(draw(rows, sum(parts)))
    return Case(pool, adapters, x, out, list(runs))


@pytest.fixture(name="make_case", scope="session")
def _make_case() -> object:
    return make_case
