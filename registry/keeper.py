"""The keeper: shows the ledger in MLflow, hears the control topic, and brings forgets to their end.

One keeper works at a time; others stand by. Each of its tasks derives what is due from the ledger, so a keeper that
is killed anywhere is followed by one that goes on.
"""

import logging
import signal
import threading
import time

from riverdelta.core.errors import Conflict, Corrupt, NotFound, RiverdeltaError, Unavailable
from riverdelta.core.settings import Settings, new_holder
from riverdelta.core.store import ObjectStore
from riverdelta.core.telemetry import set_up_logs

from . import contents
from .belonging import key_store, subject_key
from .control import Control
from .ledger import Forget, Lease, Ledger, Stage
from .mlflow_projection import Projection
from .operations import KEEPER
from .purge import Purge
from .wakeups import Wakeups
from .written import ORPHAN_SECONDS

log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
_ADOPT_SECONDS = 2.0
_STAND_BY_SECONDS = 1.0


def run(settings: Settings, stop: threading.Event | None = None) -> None:
    """Keep until SIGTERM, SIGINT or `stop`."""
    set_up_logs()
    stop = stop or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    ledger = Ledger.open(settings.ledger_url)
    try:
        told = False
        while not stop.is_set():
            with ledger.db.exclusive(KEEPER) as alone:
                if alone:
                    _keep(ledger, settings, stop)
                    return
            if not told:
                log.info("Another keeper is at work; standing by")
            told = True
            stop.wait(_STAND_BY_SECONDS)
    finally:
        ledger.close()
        log.info("Stopped")


def _keep(ledger: Ledger, settings: Settings, stop: threading.Event) -> None:
    import sqlalchemy.orm  # noqa: F401 - MLflow's thread imports it, and statements made meanwhile see it by halves

    try:
        subject_key(ledger, settings)
    except Corrupt as error:  # requests wait for it by themselves, and what is under way needs nothing of it
        log.error("No request can be carried out: %s", error)
    keeper = Keeper(ledger, settings, ObjectStore(settings.store_url))
    wakeups = Wakeups(settings)
    moved = threading.Event()
    wakeups.listen(settings.topics.releases, moved)
    control = threading.Thread(target=Control(ledger, settings, wakeups, stop).run, name="control", daemon=True)
    control.start()
    holder = new_holder("registry")
    showing = threading.Thread(target=lambda: _show(keeper, settings, stop, moved), name="mlflow", daemon=True)
    showing.start()
    log.info("Keeping %s", settings.data)
    held = 0.0
    try:
        while not stop.is_set():
            try:
                if time.monotonic() >= held:
                    _hold_lease(ledger, holder)
                    held = time.monotonic() + LEASE_SECONDS / 3
                keeper.advance_forgets()
            except Unavailable as error:
                log.warning("Waiting: %s", error)
            stop.wait(settings.registry.poll_seconds)
    finally:
        for thread in (control, showing):
            thread.join(timeout=1)
        try:
            ledger.drop_lease(holder)
        except Unavailable as error:
            log.warning("The lease runs out by itself: %s", error)
        wakeups.close()


def _hold_lease(ledger: Ledger, holder: str) -> None:
    """A lease says that a keeper is there; the keeper holds nothing that a fence concerns."""
    try:
        ledger.renew_lease(holder, ledger.last_fence())
    except NotFound:
        ledger.take_lease(holder, "registry", LEASE_SECONDS)


def _show(keeper: "Keeper", settings: Settings, stop: threading.Event, moved: threading.Event) -> None:
    """Keep MLflow in step: all of it at the start, then what moves, and aliases that people move."""
    repaired, adopted = False, 0.0
    while not stop.is_set():
        moved.clear()
        try:
            if not repaired:
                keeper.projection.adopt()  # an alias may have been moved while no keeper was there
                keeper.projection.repair()
                repaired = True
            keeper.projection.catch_up()
            if time.monotonic() >= adopted:
                keeper.projection.adopt()
                adopted = time.monotonic() + _ADOPT_SECONDS
        except (Unavailable, Conflict, NotFound) as error:
            log.warning("MLflow is behind: %s", error)
            stop.wait(2 * _STAND_BY_SECONDS)
        except Exception:  # whatever MLflow throws, the ledger and its forgets go on
            log.exception("MLflow is behind")
            stop.wait(5 * _STAND_BY_SECONDS)
        if not stop.is_set():
            moved.wait(settings.registry.poll_seconds)


class Keeper:
    """What one keeper remembers between two looks at the ledger; losing it costs time, nothing else."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        store: ObjectStore,
        orphan_seconds: float = ORPHAN_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._keys = key_store(ledger, settings)
        self._settings = settings
        self._store = store
        self._orphan_seconds = orphan_seconds
        self._projection: Projection | None = None
        self._making = threading.Lock()
        self._looked_back = False
        self._seen: dict[int, float] = {}  # fence -> when this keeper first saw it
        self._erased: set[str] = set()
        self._purges: dict[str, Purge] = {}
        self._told: dict[str, str] = {}

    @property
    def projection(self) -> Projection:
        """The projection, made on first use: importing MLflow takes seconds."""
        from .mlflow_store import MlflowStore

        with self._making:
            if self._projection is None:
                self._projection = Projection(self._ledger, self._store, MlflowStore(self._settings))
            return self._projection

    def advance_forgets(self) -> list[Forget]:
        """Take every unfinished forget as far as it can go now; those that remain."""
        self._look_back()
        left = []
        for forget in self._ledger.forgets(unfinished=True):
            try:
                moved = self._advance(forget)
            except RiverdeltaError as error:  # one procedure that fails, or waits, must not keep the others waiting
                self._purges.pop(forget.id, None)
                waits = isinstance(error, Unavailable)
                self._tell(forget, f"cannot go on: {error}", logging.WARNING if waits else logging.ERROR)
                moved = forget
            except Exception as error:
                self._purges.pop(forget.id, None)
                if self._told.get(forget.id) != repr(error):
                    log.exception("Forget %s cannot go on", forget.id)
                self._told[forget.id] = repr(error)
                moved = forget
            if moved.stage is not Stage.PURGED:
                left.append(moved)
        return left

    def _look_back(self) -> None:
        """Once, before anything is certified: delete what finished forgets have deleted, as the key store may be from a
        backup, and a forget that is repeated finds nothing live any more."""
        if not self._looked_back:
            finished = [forget for forget in self._ledger.forgets() if forget.stage is Stage.PURGED]
            try:
                contents.erase(self._ledger, self._keys, *finished)
            except Corrupt as error:
                log.error("Keys that were forgotten may be left: %s", error)
            self._looked_back = True

    def _advance(self, forget: Forget) -> Forget:
        if forget.id not in self._erased:  # whoever fenced may have been killed before
            contents.erase(self._ledger, self._keys, forget)
            self._erased.add(forget.id)
        if forget.stage is Stage.LENDING:
            self._ledger.call_in([forget.id] if self._ledger.is_rebuilt(forget) else ())
            forget = self._ledger.forget_of(forget.id)
            if forget.stage is Stage.LENDING:
                self._tell(forget, f"lets servers go on until {forget.body['until']}, or its rebuild")
                return forget
        waited = time.monotonic() - self._seen.setdefault(forget.fence, time.monotonic())
        if forget.stage is Stage.FENCED:
            servers, lost = self._ledger.settle_fence(forget.fence, ["server"], waited)
            if servers:
                return self._waits(forget, servers)
            forget = self._ledger.advance(forget.id, Stage.ACKNOWLEDGED, {"lost": lost}, KEEPER)
        # Not before they have all let go of it: what is still in a worker's hands could be written after the purge.
        others, _ = self._ledger.settle_fence(forget.fence, ["stream", "trainer"], waited)
        if others:
            return self._waits(forget, others)
        if forget.stage is Stage.ACKNOWLEDGED:
            if not self._ledger.is_rebuilt(forget):
                self._tell(forget, "waits for its rebuild")
                return forget
            forget = self._ledger.advance(forget.id, Stage.REBUILT, {}, KEEPER)
        if forget.id not in self._purges:
            self._purges[forget.id] = Purge(
                self._ledger, self._store, self._keys, self.projection, self._settings, self._orphan_seconds
            )
        if waits := self._purges[forget.id].run(forget):
            self._tell(forget, f"waits for {waits}")
            return forget
        del self._purges[forget.id]
        return self._ledger.forget_of(forget.id)

    def _waits(self, forget: Forget, leases: list[Lease]) -> Forget:
        self._tell(forget, f"waits for {', '.join(lease.holder for lease in leases)}")
        return forget

    def _tell(self, forget: Forget, what: str, level: int = logging.INFO) -> None:
        if self._told.get(forget.id) != what:
            self._told[forget.id] = what
            log.log(level, "Forget %s %s", forget.id, what)
