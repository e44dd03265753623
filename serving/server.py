"""What a running server is made of, and the order in which it starts and stops."""

import logging
import threading
import time
from typing import Any

from riverdelta.core import base
from riverdelta.core.settings import Serving, Settings
from riverdelta.core.store import ObjectStore
from riverdelta.registry.belonging import KeptOpen, check_base
from riverdelta.registry.ledger import Ledger
from riverdelta.registry.wakeups import Wakeups

from .api_keys import Keys
from .engine import Engine, EngineConfig, EngineStopped
from .fleet import Fleet
from .follower import Follower
from .generation import Generator
from .interactions import Interactions
from .metrics import Metrics
from .permit import Permit
from .writing import Writers

log = logging.getLogger(__name__)
_BLOCK = 16


class Server:
    """Answers HTTP from the beginning; everything else arrives while `start` works, and `ready` says when it is there.

    `generator` and `fleet` raise `EngineStopped` until then.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = Keys.load(settings.serving.api_keys)
        self.key_store = KeptOpen(settings)  # what a forget by HTTP deletes from
        self.metrics = Metrics()
        self.permit = Permit()
        self.writers = Writers(self.permit)
        self.interactions = Interactions(settings, self.metrics)
        self.started_at = int(time.time())
        self.failure: Exception | None = None
        self._engine: Engine | None = None
        self._fleet: Fleet | None = None
        self._generator: Generator | None = None
        self._ledger: Ledger | None = None
        # None without a broker: then the ledger is only polled.
        self.wakeups = Wakeups(settings) if settings.kafka.bootstrap else None
        self._follower: Follower | None = None
        self._stopping = False
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load the base, take the lease, then read the releases. Blocks until the follower runs."""
        self.interactions.start()
        folder = base.resolve(self.settings.base)
        log.info("loading the base model %s", folder)
        began = time.monotonic()
        digest = base.digest(folder)
        ledger = self._ledger = Ledger.open(self.settings.ledger_url)
        check_base(ledger, digest)
        engine = Engine.from_pretrained(folder, engine_config(self.settings.serving))
        with self._lock:
            if self._stopping:
                return
            engine.start()
            self._engine = engine
        self.permit.start(self._halt)
        self.metrics.watch(engine.stats, self._figures)
        store = ObjectStore(self.settings.store_url)
        self._fleet = Fleet(engine, ledger, store, self.permit, self.writers.flush, self.settings.serving.max_queue)
        self._generator = Generator(engine, self._fleet, digest)
        log.info("the base model answers", extra={"digest": digest, "seconds": round(time.monotonic() - began, 1)})
        follower = Follower(self.settings, ledger, self._fleet, self.permit, self.metrics.fence)
        self._fleet.on_loaded = follower.on_loaded
        if self.wakeups is not None and not ledger.db.sqlite:  # else the follower sees the ledger's file move
            self.wakeups.listen(self.settings.topics.releases, follower.wake)
        with self._lock:
            if not self._stopping:
                follower.start()
                self._follower = follower

    def stop(self) -> None:
        """End every answer, then give the lease up. May be called at any time, from any thread, again too."""
        with self._lock:
            first, self._stopping = not self._stopping, True
        if not first:
            self._stopped.wait()
            return
        try:
            self._stop()
        finally:
            self._stopped.set()

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.stop()
        self.permit.stop()
        self.interactions.stop()
        if self._fleet is not None:
            self._fleet.close()
        if self._follower is not None:
            self._follower.stop()
        if self.wakeups is not None:
            self.wakeups.close()
        self.key_store.close()

    @property
    def engine(self) -> Engine:
        """The engine, once it has loaded the base."""
        if self._engine is None:
            raise EngineStopped("The base model is still loading.", "GET /readyz says when it is there.")
        return self._engine

    @property
    def fleet(self) -> Fleet:
        """The adapters, once the base is loaded."""
        if self._fleet is None:
            raise EngineStopped("The base model is still loading.", "GET /readyz says when it is there.")
        return self._fleet

    @property
    def generator(self) -> Generator:
        """What answers prompts, once the base is loaded."""
        if self._generator is None:
            raise EngineStopped("The base model is still loading.", "GET /readyz says when it is there.")
        return self._generator

    @property
    def ledger(self) -> Ledger:
        """The ledger, once it is open."""
        if self._ledger is None:
            raise EngineStopped("The server is still starting.", "GET /readyz says when it is there.")
        return self._ledger

    @property
    def alive(self) -> bool:
        """False once a restart is the only cure."""
        return self.failure is None and (self._stopping or self._engine is None or self._engine.healthy)

    def lacking(self) -> list[str]:
        """What is missing for adapters to be served; empty when ready."""
        lacking = []
        if self._engine is None or not self._engine.healthy:
            lacking.append("engine")
        if self._follower is None or not self._follower.ready.is_set():
            lacking.append("releases")
        if not self.permit.valid:
            lacking.append("lease")
        return lacking

    def _halt(self, on: bool) -> None:
        self.engine.halt_adapters(on)
        if on:
            self.writers.halt()

    def _figures(self) -> dict[str, float]:
        fleet = self._fleet
        return {
            "lease_valid": float(self.permit.valid),
            "adapters": float(len(fleet.releases())) if fleet else 0.0,
            "release_flips": float(fleet.flips) if fleet else 0.0,
        }


def engine_config(serving: Serving) -> EngineConfig:
    """The engine's limits, from the settings."""
    given: dict[str, Any] = {
        name: getattr(serving, name)
        for name in (
            "max_batch",
            "max_model_len",
            "prefill_chunk",
            "adapter_slots",
            "max_rank",
            "max_queue",
            "device",
            "batch_invariant",
        )
    }
    if serving.dtype != "auto":
        given["dtype"] = serving.dtype
    elif serving.device != "cpu":
        given["dtype"] = "bfloat16"
    if serving.dtype == "float32":
        given["cpu_backend"] = "fp32"  # asked for by name: exact, not whatever is fastest
    tokens = max(serving.kv_tokens, serving.max_model_len)
    return EngineConfig(**given, block_size=_BLOCK, kv_blocks=-(-tokens // _BLOCK))
