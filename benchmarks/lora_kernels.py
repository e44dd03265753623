"""One LoRA site at a time on a GPU: ours, vLLM's, SGLang's, and the floor, a copy of the same bytes.

Each implementation runs in a CUDA graph of its own that rotates through input sets until four times the L2 cache has
moved, so nothing is warm; the graphs take turns and medians are reported. Sites are those of an 8B Llama. Bring the
peers with `python -m benchmarks.fetch_peers` first; without them the command measures ours and the floor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import peers
from riverdelta.kernels import LoraPool, Segments, lora_delta
from riverdelta.kernels.timing import capture, cold_sets, microseconds

SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
MIXED = (8, 16, 32, 64)
RESULT = Path(__file__).parent / "results" / "lora_kernels.json"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Cell:
    """One measurement: a site, how many rows, how many adapters share them, their ranks."""

    site: str
    rows: int
    adapters: int
    rank: int | str

    @property
    def ranks(self) -> list[int]:
        if isinstance(self.rank, int):
            return [self.rank] * self.adapters
        return [MIXED[i % len(MIXED)] for i in range(self.adapters)]

    @property
    def bytes(self) -> int:
        """The least that must move: the weights once, x once, the output twice."""
        in_features, parts = SITES[self.site]
        weights = sum(self.ranks) * (in_features * len(parts) + sum(parts))
        return 2 * (weights + self.rows * (in_features + 2 * sum(parts)))


def cells(full: bool) -> Iterator[Cell]:
    """32 rows with every rank; the other row counts with rank 16 (every rank where `full`)."""
    for site in SITES:
        for rows in (1, 8, 32, 128):
            for adapters in (1, 8, 32):
                for rank in (8, 16, 64, "mixed"):
                    if adapters <= rows and (full or rows == 32 or rank == 16) and (rank != "mixed" or adapters > 1):
                        yield Cell(site, rows, adapters, rank)


class Inputs:
    """The rotating sets of one cell."""

    def __init__(self, cell: Cell, sets: int | None = None) -> None:
        self.cell = cell
        in_features, parts = SITES[cell.site]
        self.sets = sets or cold_sets(cell.bytes)
        self.runs = [(slot, cell.rows // cell.adapters) for slot in range(cell.adapters)]
        self.x = torch.randn(self.sets, cell.rows, in_features, dtype=DTYPE, device="cuda")
        self.base = torch.randn(self.sets, cell.rows, sum(parts), dtype=DTYPE, device="cuda")
        self.a = [[self._adapter(r, in_features, parts) for r in cell.ranks] for _ in range(self.sets)]
        self.b = [
            [[torch.randn(w, r, dtype=DTYPE, device="cuda") for w in parts] for r in cell.ranks]
            for _ in range(self.sets)
        ]

    @staticmethod
    def _adapter(rank: int, in_features: int, parts: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(rank, in_features, dtype=DTYPE, device="cuda") * in_features**-0.5 for _ in parts]

    def expected(self) -> Tensor:
        """The first set's answer in float64."""
        answer, row = self.base[0].double(), 0
        for (_, n), a, b in zip(self.runs, self.a[0], self.b[0], strict=True):
            rows = self.x[0, row : row + n].double()
            answer[row : row + n] += torch.cat(
                [rows @ pa.double().T @ pb.double().T for pa, pb in zip(a, b, strict=True)], 1
            )
            row += n
        return answer


Calls = tuple[list[Callable[[], object]], Tensor]
"""One call per set, and the outputs that they write."""


def ours(inputs: Inputs) -> Calls:
    """`lora_delta` over one pool that holds every set's adapters in slots of its own."""
    cell = inputs.cell
    in_features, parts = SITES[cell.site]
    pool = LoraPool(inputs.sets * cell.adapters, in_features, sum(parts), max(cell.ranks), DTYPE, "cuda", parts=parts)
    out = inputs.base.clone()
    calls: list[Callable[[], object]] = []
    for i in range(inputs.sets):
        for slot in range(cell.adapters):
            pool.write(i * cell.adapters + slot, inputs.a[i][slot], inputs.b[i][slot], 1.0)
        segments = Segments.build([(i * cell.adapters + slot, n) for slot, n in inputs.runs], "cuda")
        calls.append(lambda i=i, segments=segments: lora_delta(inputs.x[i], pool, segments, out[i]))
    return calls, out


def peer(inputs: Inputs, name: str) -> Calls:
    """A peer's launches, each set with weights of its own."""
    cell = inputs.cell
    kind = peers.PEERS[name]
    kernels = kind(*SITES[cell.site], cell.ranks, inputs.runs)
    out = inputs.base.clone()
    weights = [kind.weights(a, b, max(cell.ranks)) for a, b in zip(inputs.a, inputs.b, strict=True)]
    return [lambda i=i: kernels.apply(inputs.x[i], weights[i], out[i]) for i in range(inputs.sets)], out


@triton.jit
def _copy(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)


def floor(inputs: Inputs, block: int, warps: int) -> Calls:
    """A copy that moves as many bytes as the cell must, half of them read and half written."""
    n = inputs.cell.bytes // 4
    source = torch.randn(inputs.sets, n, device="cuda").to(DTYPE)
    target = torch.empty_like(source)

    def call(i: int) -> object:
        return _copy[(triton.cdiv(n, block),)](source[i], target[i], n, BLOCK=block, num_warps=warps)

    return [lambda i=i: call(i) for i in range(inputs.sets)], target


def measure(cell: Cell, names: list[str]) -> dict[str, Any]:
    """Microseconds a site, with each implementation's error."""
    inputs = Inputs(cell)
    expected = inputs.expected()
    found: dict[str, Any] = {}
    graphs = {}
    errors = {}
    held = []  # a graph knows addresses only: what lies there must live as long
    for name in ["ours", *names]:
        try:
            calls, out = ours(inputs) if name == "ours" else peer(inputs, name)
            calls[0]()
            torch.cuda.synchronize()
            errors[name] = float((out[0].double() - expected).norm() / expected.norm())
            graphs[name] = capture(calls)
            held.append((calls, out))
        except Exception as error:
            if name == "ours":
                raise
            found[f"{name}_failed"] = f"{type(error).__name__}: {error}"[:200]
    for block, warps in ((1024, 4), (2048, 4), (4096, 8)):
        held.append(floor(inputs, block, warps))
        graphs[f"floor {block}"] = capture(held[-1][0])
    if "vllm" in graphs:
        peers.Vllm.forget()
    times = microseconds([(graph, inputs.sets) for graph in graphs.values()])
    by_name = dict(zip(graphs, times, strict=True))
    floors = [by_name.pop(name) for name in list(by_name) if name.startswith("floor")]
    found |= {"site": cell.site, "rows": cell.rows, "adapters": cell.adapters, "rank": cell.rank}
    found |= {"bytes": cell.bytes, "sets": inputs.sets, "floor_us": min(floors), "errors": errors}
    found |= {f"{name}_us": us for name, us in by_name.items()}
    rivals = [us for name, us in by_name.items() if name != "ours" and errors[name] < 2e-2]
    found["of_floor"] = found["floor_us"] / found["ours_us"]
    found["x_best_peer"] = min(rivals) / found["ours_us"] if rivals else None
    return found


def main() -> None:
    """Measure every cell, keep the results, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="every rank at every row count")
    parser.add_argument("--only", nargs=4, metavar=("SITE", "ROWS", "ADAPTERS", "RANK"), action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.manual_seed(0)
    chosen = [Cell(s, int(m), int(n), r if r == "mixed" else int(r)) for s, m, n, r in args.only]
    chosen = chosen or list(cells(args.full))
    with multiprocessing.get_context("spawn").Pool(min(12, os.cpu_count() or 1)) as pool:
        pool.map(compile_cell, chosen, chunksize=2)
    results = []
    for cell in chosen:
        results.append(measure(cell, available()))
        shown = {k: round(v, 2) for k, v in results[-1].items() if isinstance(v, float)}
        print(cell.site, cell.rows, cell.adapters, cell.rank, shown, flush=True)
    args.out.parent.mkdir(exist_ok=True)
    report = {"command": "python -m benchmarks.lora_kernels", "date": str(date.today()), "machine": machine()}
    args.out.write_text(json.dumps(report | {"peers": peers.versions(), "cells": results}, indent=1) + "\n")
    print(json.dumps(summary(results)))


def compile_cell(cell: Cell) -> None:
    """Leave the cell's kernels in Triton's cache; whatever fails will fail again in `measure`, which reports it."""
    inputs = Inputs(cell, sets=1)
    for name in ["ours", *available()]:
        with contextlib.suppress(Exception):
            for call in (ours(inputs) if name == "ours" else peer(inputs, name))[0]:
                call()
    torch.cuda.synchronize()


def available() -> list[str]:
    """The peers that were fetched."""
    return [name for name in peers.PEERS if name.partition("_")[0] in peers.versions()]


def machine() -> dict[str, str]:
    """What it ran on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Against the best peer at 32 rows, and against the floor at 32 adapters: geometric means and the worst."""
    at_32_rows = [c["x_best_peer"] for c in results if c["rows"] == 32 and c["x_best_peer"]]
    at_32_adapters = [c["of_floor"] for c in results if c["adapters"] == 32]
    found: dict[str, Any] = {"cells": len(results)}
    if at_32_rows:
        found |= {"x_best_peer_32_rows": geometric_mean(at_32_rows), "x_best_peer_32_rows_worst": min(at_32_rows)}
    if at_32_adapters:
        found |= {"of_floor_32_adapters": geometric_mean(at_32_adapters), "of_floor_worst": min(at_32_adapters)}
    return found


if __name__ == "__main__":
    main()
