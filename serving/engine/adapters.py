"""Adapter weights in host memory and in device slots: one LoRA pool per linear site, filled off the step loop."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riverdelta.core.errors import Unsupported
from riverdelta.core.peft_format import check_servable
from riverdelta.kernels import LoraPool

Source = Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """One version's LoRA matrices on the host: module path -> (A [r, in], B [out, r], scale)."""

    sites: dict[str, tuple[Tensor, Tensor, float]]
    rank: int
    nbytes: int


def read_adapter(
    source: Source, linears: Mapping[str, tuple[int, int]], max_rank: int, dtype: torch.dtype, pin: bool
) -> HostAdapter:
    """Fetch a PEFT adapter and check that this base and these slots can serve it; `Unsupported` says why not."""
    config, tensors = source()
    sites: dict[str, tuple[Tensor, Tensor, float]] = {}
    for site in check_servable(config, tensors, linears):
        if site.rank > max_rank:
            raise Unsupported(
                f"The adapter has rank {site.rank} at {site.module}, this server's slots hold {max_rank}.",
                "Start the server with a larger max_rank.",
            )
        a, b = (tensors[k].detach().to(dtype).contiguous() for k in (site.a_key, site.b_key))
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise Unsupported(f"The adapter holds values that are not finite at {site.module}.", "Train it again.")
        sites[site.module] = (a.pin_memory(), b.pin_memory(), site.scale) if pin else (a, b, site.scale)
    rank = max(a.shape[0] for a, _, _ in sites.values())
    return HostAdapter(sites, rank, sum(a.nbytes + b.nbytes for a, b, _ in sites.values()))


class HostTier:
    """Registered digests and where to read them; the least recently used weights leave memory above a bound."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.sources: dict[str, Source] = {}
        self._held: OrderedDict[str, HostAdapter] = OrderedDict()

    def put(self, digest: str, source: Source, adapter: HostAdapter) -> None:
        """Register `digest`, its weights just read."""
        self.sources[digest] = source
        self.keep(digest, adapter)

    def keep(self, digest: str, adapter: HostAdapter) -> None:
        """Hold weights in memory; others leave while there is too little room."""
        self._held[digest] = adapter
        self._held.move_to_end(digest)
        while self.nbytes > self.max_bytes and len(self._held) > 1:
            self._held.popitem(last=False)

    def get(self, digest: str) -> HostAdapter | None:
        """The weights, if memory holds them."""
        if digest in self._held:
            self._held.move_to_end(digest)
        return self._held.get(digest)

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def drop(self, digest: str) -> None:
        """Forget `digest` altogether."""
        self.sources.pop(digest, None)
        self._held.pop(digest, None)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(a.nbytes for a in self._held.values())


class DeviceTier:
    """The pools of all sites. A pool's parts are the modules that read the same input."""

    def __init__(self, sites: Mapping[tuple[str, ...], LoraPool]) -> None:
        self.sites = sites

    def write(self, slot: int, adapter: HostAdapter) -> None:
        """Bring an adapter into a clear slot that no step uses."""
        for modules, pool in self.sites.items():
            parts = [adapter.sites.get(m) for m in modules]
            if any(parts):
                pool.write(
                    slot,
                    [p and p[0] for p in parts],
                    [p and p[1] for p in parts],
                    [p[2] if p else 0.0 for p in parts],
                )

    def clear(self, slot: int) -> None:
        """Erase a slot that no step uses."""
        for pool in self.sites.values():
            pool.clear(slot)
