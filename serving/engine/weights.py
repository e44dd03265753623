"""The versions an engine knows: registered, draining or revoked, and their way from store to host to device slot."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from .adapters import DeviceTier, HostAdapter, HostTier, Source, read_adapter
from .blocks import BlockPool
from .config import EngineConfig
from .errors import AdapterNotLoaded, VersionRevoked
from .model import PagedModel
from .slots import SlotTable

logger = logging.getLogger(__name__)


class Weights:
    """Guarded by `changed`, which its caller holds around every method but `read` and `load_loop`."""

    def __init__(self, model: PagedModel, config: EngineConfig, pool: BlockPool, changed: threading.Condition) -> None:
        self.slots = SlotTable(config.adapter_slots)
        self.host = HostTier(config.host_adapter_bytes)
        self.users: Counter[str] = Counter()
        self.revoked: set[str] = set()
        self._draining: set[str] = set()
        self._to_erase: set[str] = set()
        self._loading: str | None = None
        self._device = DeviceTier(model.sites)
        self._model, self._max_rank, self._pool, self._changed = model, config.max_rank, pool, changed

    def read(self, source: Source) -> HostAdapter:
        """Fetch and check a version's weights; `Unsupported` says why they cannot be served."""
        pin = self._model.device.type == "cuda"
        return read_adapter(source, self._model.linears, self._max_rank, self._model.dtype, pin)

    def known(self, digest: str) -> bool:
        """Whether `digest` is registered; a draining one is again from now on. `VersionRevoked` if it must not be."""
        self.refuse_revoked(digest)
        self._draining.discard(digest)
        return digest in self.host.sources

    def register(self, digest: str, source: Source, adapter: HostAdapter) -> None:
        """Take requests for `digest` from now on."""
        if not self.known(digest):
            self.host.put(digest, source, adapter)

    def check_servable(self, digest: str) -> None:
        """`VersionRevoked` or `AdapterNotLoaded` unless requests for `digest` are taken."""
        self.refuse_revoked(digest)
        if digest not in self.host.sources or digest in self._draining:
            raise AdapterNotLoaded(f"No weights {digest[:12]} are loaded.", "Ask for the adapter by its name.")

    def refuse_revoked(self, digest: str) -> None:
        """Raise `VersionRevoked` for a revoked digest."""
        if digest in self.revoked:
            raise VersionRevoked(f"Version {digest[:12]} was revoked.", "Ask for the adapter's live version.")

    def drain(self, digest: str) -> None:
        """Take no more requests for `digest`, and drop it when its last one has ended."""
        if digest in self.host.sources:
            self._draining.add(digest)
            self.drop_drained(digest)

    def drop_drained(self, digest: str) -> None:
        """Drop `digest` if it is draining and nobody uses it."""
        if digest in self._draining and self.users[digest] == 0 and self._loading != digest:
            self._draining.discard(digest)
            self.host.drop(digest)
            self.slots.drop(digest)
            self._pool.retire(digest)

    def erase(self, digests: Collection[str]) -> None:
        """Erase revoked weights, which nobody uses any more, when `erase_due` is next called."""
        self._to_erase.update(digests)

    def erased(self, digests: Collection[str]) -> bool:
        """Whether nothing of `digests` is left in memory."""
        return self._to_erase.isdisjoint(digests)

    def erase_due(self) -> None:
        """Erase what is to be erased. Only between two steps: nothing may read it meanwhile."""
        for digest in [d for d in self._to_erase if d != self._loading]:
            self._draining.discard(digest)
            self.host.drop(digest)
            self.slots.drop(digest)
            for slot in filter(self.slots.empty, self.slots.remains(digest)):
                self._device.clear(slot)
                self.slots.wiped(slot)
            self._model.cache.zero(self._pool.forget(digest))
            if not self.slots.remains(digest):  # else the loader wipes it, for who has its slot now
                self._to_erase.discard(digest)
                self._changed.notify_all()

    @property
    def loading(self) -> bool:
        """Whether a slot is being written to."""
        return self._loading is not None

    def load_loop(self, running: Callable[[], bool], failed: Callable[[str, Exception], None]) -> None:
        """A thread's work: bring adapters into the slots that the scheduler gave them. `failed` ends the requests of
        a digest that could not be brought."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.slots.to_load or not running())
                if not running():
                    return
                digest = self._loading = self.slots.to_load.popleft()
                slot, adapter, source = self.slots.slot(digest), self.host.get(digest), self.host.sources.get(digest)
            error: Exception | None = None
            try:
                assert slot is not None
                if adapter is None:
                    if source is None:
                        raise AdapterNotLoaded(f"No weights {digest[:12]} are loaded.")
                    adapter = self.read(source)
                self._device.clear(slot)
                self._device.write(slot, adapter)
            except Exception as raised:
                logger.exception("Adapter %s could not be loaded", digest[:12])
                error = raised
            with self._changed:
                self._loading = None
                if error is not None or adapter is None:
                    failed(digest, error or AdapterNotLoaded(f"No weights {digest[:12]} are loaded."))
                    self.slots.drop(digest)
                else:
                    self.slots.loaded(digest)
                    if digest in self.host.sources and digest not in self.revoked:
                        self.host.keep(digest, adapter)
                adapter = source = None  # nothing outlives a fence here
                self.drop_drained(digest)
                self._changed.notify_all()

    def stats(self) -> dict[str, dict[str, Any]]:
        """By digest: tier, slot, requests, whether it drains."""
        return {
            digest: {
                "tier": "device" if self.slots.ready(digest) else "host" if digest in self.host else "store",
                "slot": self.slots.slot(digest),
                "requests": self.users[digest],
                "draining": digest in self._draining,
            }
            for digest in self.host.sources
        }
