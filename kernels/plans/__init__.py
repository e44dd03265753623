"""How a site's LoRA kernels are launched on each GPU architecture: as measured by `tune`, kept as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from riverdelta.kernels.pool import LoraPool


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch sizes of one site.

    Only `chunk` and `block_k` touch the order of sums; all of them depend on the site alone, never on the batch.
    """

    chunk: int
    """Input columns that one program sums."""
    block_k: int
    shrink_rank: int
    """Rank rows of all parts that one shrink program covers."""
    shrink_warps: int
    stages: int
    block_n: int
    """Output columns that one expand program covers."""
    expand_rank: int
    """Rank rows of a part that expand takes at once."""
    expand_warps: int
    fused: bool = False


def site_key(in_features: int, parts: tuple[int, ...], max_rank: int) -> str:
    """The name of a site's plan: widths and rank."""
    return f"{in_features}->{'+'.join(map(str, parts))} r{_power(max_rank)}"


def plan_for(pool: LoraPool) -> Plan:
    """The measured plan of this site on this GPU, or one worked out from its widths."""
    return _plan(architecture(pool.device), pool.in_features, pool.parts, pool.max_rank)


def default_plan(in_features: int, parts: tuple[int, ...], max_rank: int) -> Plan:
    """A plan for a site that nobody measured: enough programs to fill a GPU, a few kilobytes of weights each."""
    chunk = min(512, max(64, _power(in_features) // 8))
    rank = min(64, max(16, _power(max_rank)))
    return Plan(
        chunk=chunk,
        block_k=min(chunk, 128),
        shrink_rank=min(64, max(16, _power(max_rank * len(parts)))),
        shrink_warps=4,
        stages=3,
        block_n=min(256 if rank < 64 else 128, max(16, _power(max(parts)))),
        expand_rank=rank,
        expand_warps=4,
    )


def write_plans(arch: str, plans: dict[str, Plan], folder: Path | None = None) -> Path:
    """Merge measured plans into the architecture's file and return its path."""
    path = (folder or Path(__file__).parent) / f"{arch}.json"
    merged = _read(path) | {key: asdict(plan) for key, plan in plans.items()}
    path.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n")
    _table.cache_clear()
    _plan.cache_clear()
    return path


@cache
def _plan(arch: str, in_features: int, parts: tuple[int, ...], max_rank: int) -> Plan:
    found = _table(arch).get(site_key(in_features, parts, max_rank))
    return found or default_plan(in_features, parts, max_rank)


@cache
def _table(arch: str) -> dict[str, Plan]:
    return {key: Plan(**fields) for key, fields in _read(Path(__file__).parent / f"{arch}.json").items()}


@cache
def architecture(device: torch.device) -> str:
    """`sm90` and so on; a CPU is its own architecture."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
