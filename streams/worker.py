"""The worker: what one dataflow process does with its parcels, from lease to ledger."""

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

from riverdelta.core.errors import NotFound, RiverdeltaError
from riverdelta.core.patience import Patience
from riverdelta.core.settings import Settings, new_holder
from riverdelta.core.store import ObjectStore
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger

from .delivery import Delivery
from .items import DeadLetter, Parcel, Where
from .metrics import Metrics
from .owner import Owner
from .sealing import Sealer

log = logging.getLogger(__name__)
LEASE_SECONDS = 5.0
_POSITIONS_SECONDS = 1.0
_TIDY_SECONDS = 5.0


class Worker:
    """Takes parcels, and commits what they led to. Both are called from the one thread of the dataflow."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        store: ObjectStore,
        keys: KeyStore,
        delivery: Delivery,
        patience: Patience,
        metrics: Metrics,
        wake: Callable[[str], None],
        thread: Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._delivery = delivery
        self._patience = patience
        self._metrics = metrics
        self._clock = clock
        self._holder = new_holder("stream")
        self.owner = Owner(settings, ledger, patience)
        self._sealer = Sealer(self.owner, ledger, store, keys, patience, metrics, wake, self._holder, thread)
        self._renewed = self._recorded = self._tidied = clock()
        self._looked_for: dict[int, int] = {}  # by reader, the last read that the fences were looked for at
        self._take_lease()

    # -- one round -------------------------------------------------------------------------------------------------

    def take(self, parcel: Parcel) -> None:
        """Decide a parcel's events. Fences are looked for once per read: what was forgotten before is not learned."""
        reader, serial = parcel.read
        if parcel.items and self._looked_for.get(reader) != serial:
            self._patience(self._look, "reading the ledger")
            self._looked_for[reader] = serial
        self.owner.take(parcel, self._clock())

    def commit(self, trigger: str = "") -> None:
        """Deliver dead letters, then seal what is due (or, with a `trigger`, all), then record positions."""
        at = self._clock()
        self._patience(lambda: self._hold_lease(at), "renewing the lease")
        if at - self._tidied > _TIDY_SECONDS:
            self._tidy(at)
        if self.owner.dead:
            self._deliver()
        self._sealer.seal_due(at, trigger)
        self._metrics.count(self.owner.tally)
        self.owner.tally.clear()
        if at - self._recorded > _POSITIONS_SECONDS:
            self._recorded = at
            self._record_positions()

    def close(self, seal_all: bool) -> None:
        """Leave nothing behind that is done already. `seal_all`: the log will be gone, so seal what is open."""
        self.commit("stop" if seal_all else "")
        self._sealer.land()
        self._record_positions()
        self._sealer.close()
        self._ledger.drop_lease(self._holder)
        left = sum(len(state.open) for state in self.owner.states())
        waiting = sum(len(state.joins) for state in self.owner.states())
        log.info(
            "stopped; everything is sealed" if seal_all else "stopped; what is open is read again at the next start",
            extra={"open_entries": left, "waiting_to_be_joined": waiting},
        )

    def abandon(self) -> None:
        """Leave as after a crash, except that nobody needs to wait for the lease to run out."""
        self._sealer.close()
        with contextlib.suppress(RiverdeltaError):
            self._ledger.drop_lease(self._holder)

    def _deliver(self) -> None:
        letters: list[DeadLetter] = self.owner.dead
        self._delivery.deliver(letters)
        self.owner.dead = []
        for letter in letters:
            self._metrics.dead.labels(letter.reason).inc()
            log.info(
                "dead letter",
                extra={"reason": letter.reason, "partition": letter.where[1], "offset": letter.offset},
            )

    # -- fences ----------------------------------------------------------------------------------------------------

    def _take_lease(self) -> None:
        fence = self._patience(lambda: self._ledger.take_lease(self._holder, "stream", LEASE_SECONDS), "taking a lease")
        self._patience(lambda: self.owner.start_at(fence), "reading the ledger")
        self._acked = fence

    def _look(self) -> None:
        fence = self._ledger.last_fence()
        if fence > self.owner.fence:
            self._sealer.land()
            self.owner.catch_up(fence)

    def _hold_lease(self, at: float) -> None:
        """Renew when it is time, or at once when a fence has been carried out and somebody waits for that."""
        self._look()
        if self.owner.fence == self._acked and at - self._renewed < LEASE_SECONDS / 4:
            return
        try:
            while self._ledger.renew_lease(self._holder, self.owner.fence) > self.owner.fence:
                self._look()
        except NotFound:
            log.warning("the lease was given up for lost; everything is read again under a new one")
            self._sealer.land()
            self._take_lease()
        self._acked, self._renewed = self.owner.fence, at

    # -- positions, memory, gauges -----------------------------------------------------------------------------------

    def _record_positions(self) -> None:
        moves: dict[tuple[str, int, int], int] = {}
        floors: list[tuple[dict[Where, int], dict[Where, int]]] = []
        for bucket in self.owner.buckets.values():
            bucket.busy = {name: state for name, state in bucket.busy.items() if not state.idle}
            moved = {w: at for w, at in bucket.floors().items() if at > bucket.recorded.get(w, -1)}
            floors.append((bucket.recorded, moved))
            moves.update({(run, partition, bucket.number): at for (run, partition), at in moved.items()})
        if moves:
            self._patience(lambda: self._ledger.move_positions(moves), "recording positions")
            for recorded, moved in floors:
                recorded.update(moved)

    def _tidy(self, at: float) -> None:
        self._tidied = at
        for kind, number in self.owner.expire(at).items():
            self._metrics.expired.labels(kind).inc(number)
        self.owner.let_go()
        states = list(self.owner.states())
        self._metrics.hold((state.name, len(state.open)) for state in states)
        self._metrics.waiting.set(sum(len(state.joins) for state in states))
        self._metrics.adapters.set(len(states))
