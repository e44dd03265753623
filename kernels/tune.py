"""The tuner: `python -m riverdelta.kernels.tune 4096:4096+1024+1024 ...` measures plans on this GPU and keeps them.

Each site is searched a group of knobs at a time, from the plan worked out from its widths: what shrink does, what
expand does, whether the two are one kernel. The score is the geometric mean over batches of 32 rows with 1, 8 and 32
adapters, the weights cold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import geometric_mean

import torch

from riverdelta.kernels import lora_triton
from riverdelta.kernels.plans import Plan, architecture, default_plan, site_key, write_plans
from riverdelta.kernels.pool import LoraPool
from riverdelta.kernels.segments import Segments
from riverdelta.kernels.timing import capture, cold_sets, microseconds

logger = logging.getLogger(__name__)

Site = tuple[int, tuple[int, ...], int]
"""Input width, output widths of the parts, rank."""
_BATCHES = ((32, 1), (32, 8), (32, 32))
_DTYPE = torch.bfloat16


def shrink_plans(base: Plan, site: Site) -> Iterator[Plan]:
    """Variants of how the input is cut."""
    in_features, parts, rank = site
    stacked = max(16, 1 << (rank * len(parts) - 1).bit_length())
    for chunk in (256, 512, 1024):
        for tile in sorted({16, min(64, stacked)}):
            loops = [(128, 3, 4), (256, 2, 4), (128, 3, 2), (128, 4, 2)] if tile == 16 else [(128, 3, 4), (64, 4, 4)]
            for block_k, stages, warps in loops:
                if chunk <= in_features:
                    yield replace(
                        base, chunk=chunk, block_k=block_k, shrink_rank=tile, stages=stages, shrink_warps=warps
                    )


def expand_plans(base: Plan, site: Site) -> Iterator[Plan]:
    """Variants of how the output is cut."""
    _, parts, _ = site
    for block_n, warps in itertools.product((64, 128, 256, 512, 1024), (2, 4, 8)):
        if block_n <= max(parts) and 16 <= block_n // warps <= 128 and block_n * base.expand_rank <= 16384:
            yield replace(base, block_n=block_n, expand_warps=warps)


def fused_plans(base: Plan, site: Site) -> Iterator[Plan]:
    """Variants with one kernel, which keep the chunk and so the bits."""
    _, parts, _ = site
    for block_n, stages in itertools.product((256, 512, 1024), (2, 3)):
        if block_n <= max(parts) and block_n * base.expand_rank <= 16384:
            yield replace(base, fused=True, block_n=block_n, stages=stages, block_k=min(base.chunk, 128))


def tune(site: Site) -> tuple[Plan, dict[str, float]]:
    """The fastest plan of a site and how long it and the untuned one take, in microseconds."""
    bench = _Bench(site)
    best = start = default_plan(*site)
    for variants in (shrink_plans, expand_plans, fused_plans):
        best = bench.best([best, *variants(best, site)])
    return best, {"tuned_us": bench.times[best], "default_us": bench.time(start)}


class _Bench:
    """One site's pool, large enough that every round finds its caches cold."""

    def __init__(self, site: Site) -> None:
        in_features, parts, rank = site
        self.pool = LoraPool(1, in_features, sum(parts), rank, _DTYPE, "cuda", parts=parts)
        per_adapter = self.pool.a.nbytes + self.pool.b.nbytes
        sets = [cold_sets(per_adapter * adapters) for _, adapters in _BATCHES]
        slots = max(n * adapters for n, (_, adapters) in zip(sets, _BATCHES, strict=True))
        self.pool = random_pool(slots, site)
        self.batches = [
            [Segments.build(_runs(rows, adapters, i), "cuda") for i in range(n)]
            for n, (rows, adapters) in zip(sets, _BATCHES, strict=True)
        ]
        rows = max(rows for rows, _ in _BATCHES)
        self.x = torch.randn(rows, in_features, dtype=_DTYPE, device="cuda")
        self.out = torch.randn(rows, sum(parts), dtype=_DTYPE, device="cuda")
        self.times: dict[Plan, float] = {}

    def best(self, plans: list[Plan]) -> Plan:
        return min(dict.fromkeys(plans), key=self.time)

    def time(self, plan: Plan) -> float:
        if plan not in self.times:
            try:
                self.times[plan] = self._measure(plan)
            except Exception as error:  # too much shared memory, for one: the plan is not for this GPU
                logger.info("%s: %s", plan, type(error).__name__)
                self.times[plan] = float("inf")
        return self.times[plan]

    def _measure(self, plan: Plan) -> float:
        graphs = []
        for segments in self.batches:
            calls = [lambda s=s: lora_triton.delta(self.x, self.pool, s, self.out, plan) for s in segments]
            graphs.append((capture(calls), len(calls)))
        return geometric_mean(microseconds(graphs, rounds=5))


def random_pool(slots: int, site: Site, dtype: torch.dtype = _DTYPE) -> LoraPool:
    """A pool on the GPU whose every slot holds a random adapter of the full rank."""
    in_features, parts, rank = site
    pool = LoraPool(slots, in_features, sum(parts), rank, dtype, "cuda", parts=parts)
    a = [torch.randn(rank, in_features, dtype=dtype, device="cuda") * in_features**-0.5 for _ in parts]
    b = [torch.randn(width, rank, dtype=dtype, device="cuda") for width in parts]
    for slot in range(slots):
        pool.write(slot, a, b, 1.0)
    return pool


def _runs(rows: int, adapters: int, turn: int) -> list[tuple[int, int]]:
    return [(turn * adapters + i, rows // adapters) for i in range(adapters)]


def _compile(job: tuple[Site, Plan]) -> None:
    site, plan = job
    try:
        pool = random_pool(1, site)
        x = torch.randn(1, site[0], dtype=_DTYPE, device="cuda")
        out = torch.randn(1, sum(site[1]), dtype=_DTYPE, device="cuda")
        lora_triton.delta(x, pool, Segments.build([(0, 1)], "cuda"), out, plan)
        torch.cuda.synchronize()
    except Exception:  # noqa: S110 - the measurement reports it
        pass


def _compile_all(sites: list[Site]) -> None:
    """Fill Triton's cache from many processes: compiling takes far longer than measuring."""
    jobs: dict[tuple[Site, Plan], None] = {}
    for site in sites:
        for plan in shrink_plans(default_plan(*site), site):
            jobs[site, plan] = None
            if (plan.block_k, plan.stages, plan.shrink_rank) == (128, 3, 16):
                for variant in expand_plans(plan, site):
                    jobs[site, variant] = None
                for fused in fused_plans(plan, site):
                    jobs[site, fused] = None
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        pool.map(_compile, jobs, chunksize=4)


def main() -> None:
    """Tune the sites named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sites", nargs="+", help="IN:OUT or IN:OUT+OUT+OUT for merged sites")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--folder", type=Path, help="where to write the plans (default: beside the shipped ones)")
    args = parser.parse_args()
    sites: list[Site] = []
    for text, rank in itertools.product(args.sites, args.ranks):
        width, _, outs = text.partition(":")
        sites.append((int(width), tuple(int(n) for n in outs.split("+")), rank))
    _compile_all(sites)
    plans, figures = {}, {}
    for site in sites:
        plan, figures[site_key(*site)] = tune(site)
        plans[site_key(*site)] = plan
        print(site_key(*site), figures[site_key(*site)], asdict(plan), flush=True)  # noqa: T201
    write_plans(architecture(torch.device("cuda")), plans, args.folder)
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    main()
