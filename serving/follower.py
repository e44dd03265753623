"""Follows the ledger: holds the server's lease, carries out fences, moves releases."""

import logging
import threading
from collections.abc import Callable

from riverdelta.core.errors import NotFound, RiverdeltaError
from riverdelta.core.settings import Settings, new_holder
from riverdelta.registry.ledger import Ledger

from .fleet import Fleet
from .permit import Permit, clock
from .releases import Release

log = logging.getLogger(__name__)
_FULL_READ_SECONDS = 2.0
_GLANCE_SECONDS = 0.002  # between two looks at whether the ledger's file has moved
_PAUSE_SECONDS = 0.05  # in which a fence goes before steps
_RENEWALS = 4  # times per term
_SHARE = 4  # reading releases may take one part in so many of the time


class Follower:
    """A thread that reads the ledger whenever it moves."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        fleet: Fleet,
        permit: Permit,
        on_fence: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.holder = new_holder("server")
        self.wake = threading.Event()
        self.ready = threading.Event()
        self._ttl, self._poll = settings.serving.lease_seconds, settings.serving.poll_seconds
        self._preload = settings.serving.adapter_slots
        self._ledger, self._fleet, self._permit = ledger, fleet, permit
        self._on_fence = on_fence
        self._stop = threading.Event()
        self._held = False
        self._acked: int | None = None
        self._clock = -1
        self._dirty = True
        self._deadline = self._renew_at = self._read_at = self._rest_until = 0.0
        self._wanted: dict[str, Release] | None = None
        self._loaded = threading.Event()
        self._troubled = False
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Start the thread; `ready` is set once a lease is held and the releases were read under it."""
        self._thread.start()

    def on_loaded(self) -> None:
        """Weights are loaded now: aliases that waited for them can move."""
        self._loaded.set()
        self.wake.set()

    def stop(self) -> None:
        """End the thread and give the lease up. The engine must have stopped: nobody waits for its answers then."""
        self._stop.set()
        self.wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)
        if self._held and not self._thread.is_alive():
            try:
                self._ledger.drop_lease(self.holder)
            except RiverdeltaError as error:
                log.warning("lease not given up: %s", error)

    def _run(self) -> None:
        look, pulse = self._ledger.watch_pulse(), None
        while not self._stop.is_set():
            woken = self.wake.is_set() and not self._loaded.is_set()
            self.wake.clear()
            try:
                self._turn(woken, pulse)
                if self._troubled:
                    self._troubled = False
                    log.info("the ledger answers again")
            except RiverdeltaError as error:
                if not self._troubled:
                    log.warning("the ledger cannot be followed: %s", error)
                self._troubled = True
            except Exception:
                log.exception("the follower failed and goes on")
                self._troubled = True
            pulse = self._rest(look)

    def _rest(self, look: Callable[[], tuple[int, int] | None] | None) -> tuple[int, int] | None:
        """Until something is to be looked at: a wake-up, another writer's commit where that can be seen (the pulse
        then), or time."""
        if look is None:
            self.wake.wait(self._poll)
            return None
        until = clock() + self._poll
        while not self.wake.wait(max(0.0, min(_GLANCE_SECONDS, until - clock()))):
            if (pulse := look()) is not None or clock() >= until:
                return pulse
        return None

    def _turn(self, woken: bool, pulse: tuple[int, int] | None) -> None:
        if not self._held:
            self._take()
        # Only reading, so that events that are sealed do not make every server write.
        fence, now = pulse or self._ledger.pulse()
        moved, self._clock = now != self._clock, now
        self._dirty |= moved or woken
        acked = self._acked or 0
        if fence > acked:
            with self._fleet.pause(_PAUSE_SECONDS):
                self._carry_out()
                self._renew()
        elif fence < acked or clock() >= self._renew_at:  # a ledger with fewer fences was restored: no renewal
            self._renew()
        if self._held and (self._permit.halted or self._due()):
            self._read()
        elif self._loaded.is_set() and self._wanted is not None:
            self._follow(self._wanted)

    def _due(self) -> bool:
        return clock() >= (self._rest_until if self._dirty else self._read_at)

    def _take(self) -> None:
        asked = clock()
        fence = self._ledger.take_lease(self.holder, "server", self._ttl)
        if self._acked is not None:
            log.info("took a new lease", extra={"holder": self.holder})
            self._acked = 0  # the ledger may be an older one, restored: none of its fences counts as carried out
            self._carry_out()
        self._held = True
        self._acked = fence if self._acked is None else max(fence, self._acked)
        self._extend(asked)

    def _renew(self) -> None:
        assert self._acked is not None
        while True:
            asked = clock()
            try:
                last = self._ledger.renew_lease(self.holder, self._acked)
            except NotFound:
                log.warning("the lease was given up for lost: adapters stop until a new one is taken")
                self._held = False
                self._permit.halt()
                self.wake.set()
                return
            if last <= self._acked:
                self._extend(asked)
                return
            self._carry_out()

    def _extend(self, asked: float) -> None:
        self._deadline = asked + self._ttl
        self._renew_at = asked + self._ttl / _RENEWALS
        self._permit.extend(self._deadline)

    def _carry_out(self) -> None:
        assert self._acked is not None
        began = clock()
        number, digests = self._fleet.carry_out(self._acked)
        self._dirty, self._wanted = True, None
        self._rest_until = 0.0  # an alias may point at what is gone
        self._acked = number
        self._on_fence(clock() - began)
        log.info("fence carried out", extra={"fence": number, "digests": len(digests)})

    def _read(self) -> None:
        began = clock()
        self._ledger.call_in()  # whether or not a keeper is there
        wanted = {name: Release(version, digest) for name, (version, digest) in self._ledger.releases().items()}
        self._wanted = wanted  # until a fence: then only what is read after it counts
        self._follow(wanted)
        self._dirty = False
        self._read_at = began + _FULL_READ_SECONDS
        self._rest_until = clock() + _SHARE * (clock() - began)
        if self._permit.halted:
            self._permit.resume(self._deadline)
        if not self.ready.is_set():
            self._fleet.preload(self._preload)
            self.ready.set()
            log.info("following the ledger", extra={"holder": self.holder, "adapters": len(wanted)})

    def _follow(self, wanted: dict[str, Release]) -> None:
        self._loaded.clear()
        steps = self._fleet.follow(wanted)
        if steps.flips and self.ready.is_set():
            moves = {name: release and release.version for name, release in list(steps.flips.items())[:5]}
            log.info("releases moved", extra={"count": len(steps.flips), "first": moves})
