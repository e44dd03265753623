"""The trainer's loop: find work in the ledger, take steps, commit what is finished, drop what has been overtaken."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_when_event_set, wait_exponential

from riverdelta.core.digests import digest_of
from riverdelta.core.errors import Conflict, Corrupt, NotFound, RiverdeltaError, Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.core.store import ObjectStore, state_key, weights_key
from riverdelta.registry.ledger import Cause, Increment, Ledger, Work

from .base import Base
from .checkpoints import CheckpointLog
from .fingerprint import fingerprint
from .folder import TrainerFolder
from .increment import Candidate, Learner, step
from .inputs import read_inputs
from .packing import packs_exactly

log = logging.getLogger(__name__)
T = TypeVar("T")

LEASE_SECONDS = 10.0
# A damaged payload or parent is for people to mend: it is said again this often, and other adapters go on.
_STALLED_SECONDS = 30.0
_PROGRESS_SECONDS = 2.0
# What a step holds at most of several adapters, unless one alone has more.
_STEP_TOKENS = 4096


class Stopping(Exception):
    """The trainer was told to stop while it waited for something."""


@dataclass
class Active:
    """An increment in the making, the segments that it uses, and the ledger's head when it was last seen wanted."""

    work: Work
    learner: Learner
    checkpoints: CheckpointLog
    saw: set[int]
    head: int
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Adapter and segment, for the log."""
        return f"{self.work.adapter.name} segment {self.work.segment.number}"


class Worker:
    """One trainer. `turn` does one round of the loop; between rounds nothing but `active` is held in memory."""

    def __init__(
        self,
        ledger: Ledger,
        store: ObjectStore,
        base: Base,
        folder: Path,
        holder: str,
        stop: threading.Event,
        released: Callable[[str], None],
        most: int = 16,
    ) -> None:
        """`folder` holds checkpoint logs; `released` hears the adapter after each commit; `most` adapters are trained
        side by side, if that changes no bit."""
        self._ledger, self._store, self._base = ledger, store, base
        self._holder, self._stop, self._released, self._most = holder, stop, released, most
        self._fingerprint = fingerprint(base)
        self._active: dict[str, Active] = {}
        self._stalled: dict[str, float] = {}
        self._exact: bool | None = None
        self._lease_due = 0.0
        self._acked = self._patiently(lambda: ledger.take_lease(holder, "trainer", LEASE_SECONDS))
        self._folder = self._patiently(lambda: TrainerFolder(folder, store))
        self._patiently(lambda: self._folder.sweep(self._next_key))

    @property
    def idle(self) -> bool:
        """Whether nothing is being trained."""
        return not self._active

    def turn(self) -> bool:
        """Keep the lease, take up what waits, and take one step; False when there was nothing to do."""
        self._keep_lease()
        self._drop_overtaken()
        self._take_up()
        if not self._active:
            return False
        for group in self._groups():
            self._step(group)
        for active in list(self._active.values()):
            self._record(active)
            self._tell(active)
            if active.learner.done and active.work.adapter.name in self._active:
                self._finish(active)
                self._drop(active)
        return True

    def close(self) -> None:
        """Leave the increments where another trainer can go on with them, and give the lease up."""
        for active in self._active.values():
            active.checkpoints.close(active.learner)
        self._active.clear()
        self._folder.close()
        try:
            self._ledger.drop_lease(self._holder)
        except Unavailable as error:
            log.warning("The lease runs out by itself: %s", error)

    # -- lease and fences ------------------------------------------------------------------------------------

    def _keep_lease(self) -> None:
        if time.monotonic() < self._lease_due:
            return
        try:
            fence = self._patiently(lambda: self._ledger.renew_lease(self._holder, self._acked))
            if fence > self._acked:
                # What a forget touched has another epoch now: dropping that carries out every fence up to here.
                self._drop_overtaken()
                self._patiently(lambda: self._folder.sweep(self._next_key, frozenset(self._active)))
                self._acked = fence
                self._patiently(lambda: self._ledger.renew_lease(self._holder, fence))
        except NotFound:
            log.warning("The lease was given up for lost: beginning anew")
            for active in self._active.values():
                active.checkpoints.discard()
            self._active.clear()
            self._acked = self._patiently(lambda: self._ledger.take_lease(self._holder, "trainer", LEASE_SECONDS))
            self._patiently(lambda: self._folder.sweep(self._next_key))
        self._lease_due = time.monotonic() + LEASE_SECONDS / 5

    def _drop_overtaken(self) -> None:
        for active in list(self._active.values()):
            if not self._patiently(lambda active=active: self._wanted(active)):  # type: ignore[misc]
                log.info("Dropped %s: the ledger has moved on", active.name)
                self._drop(active)

    def _drop(self, active: Active) -> None:
        del self._active[active.work.adapter.name]
        active.checkpoints.discard()

    def _wanted(self, active: Active) -> bool:
        name = active.work.adapter.name
        head = self._ledger.adapter(name)
        if head.head != active.head:
            work = self._ledger.work(name)
            if work is None or self._key(work) != self._key(active.work):
                return False
            active.head = work.adapter.head
        return True

    # -- work ------------------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        if len(self._active) >= self._most:
            return
        now = time.monotonic()
        for name, _ in self._patiently(self._ledger.waiting):
            if len(self._active) >= self._most or self._stop.is_set():
                return
            if self._active and name not in self._active and not self._may_pack():
                return
            if name in self._active or self._stalled.get(name, 0.0) > now:
                continue
            try:
                self._begin(name)
            except (Corrupt, NotFound) as error:
                self._stalled[name] = now + _STALLED_SECONDS
                log.error("%s waits until this is mended: %s", name, error)

    def _may_pack(self) -> bool:
        if self._exact is None:
            log.info("Trying whether adapters can be trained side by side without changing a bit")
            self._exact = packs_exactly(self._base)
            if not self._exact:
                log.warning("On this machine they cannot: adapters are trained one after the other")
        if not self._exact:
            self._most = 1
        return self._exact

    def _begin(self, name: str) -> None:
        work = self._patiently(lambda: self._ledger.work(name))
        if work is None:
            return
        try:
            learner, saw = self._patiently(lambda: self._learner(work))
        except NotFound:
            # A purge may have replaced the payload, or a forget the parent, since the ledger was read.
            if self._patiently(lambda: self._ledger.work(name)) == work:
                raise
            return
        except (Corrupt, Unavailable):
            raise
        except RiverdeltaError as error:  # the recipe does not fit this base, or the parent does not fit the recipe
            self._set_aside(work, error)
            return
        self._stalled.pop(name, None)
        checkpoints = self._folder.open(name, self._key(work))
        spared = self._patiently(lambda: checkpoints.resume(learner))
        self._active[name] = Active(work, learner, checkpoints, saw, work.adapter.head)
        log.info(
            "Training %s on version %d: %d entries, %d steps",
            f"{name} segment {work.segment.number}",
            work.parent.number if work.parent else 0,
            work.segment.count,
            len(learner.plan),
        )
        if spared:
            log.info("Resumed %s segment %d after step %d", name, work.segment.number, spared)

    def _learner(self, work: Work) -> tuple[Learner, set[int]]:
        inputs = read_inputs(self._ledger, self._store, work)
        learner = Learner(
            self._base,
            Recipe.from_dict(work.adapter.recipe),
            work.adapter.seed,
            inputs.entries,
            inputs.earlier,
            inputs.weights,
            inputs.state,
        )
        return learner, {work.segment.number, *inputs.earlier.used}

    def _key(self, work: Work) -> str:
        """Names an increment by everything that shapes it; an epoch stands for its tombstones."""
        parent = work.parent
        return digest_of(
            [
                work.adapter.name,
                work.adapter.seed,
                work.adapter.recipe_digest,
                work.adapter.epoch,
                work.segment.number,
                [parent.number, parent.digest, parent.state] if parent else None,
                self._fingerprint,
            ]
        )

    def _next_key(self, adapter: str) -> str | None:
        try:
            work = self._ledger.work(adapter)
        except NotFound:
            return None
        return None if work is None else self._key(work)

    def _groups(self) -> list[list[Active]]:
        """Who takes the next step together: adapters that change the same modules, up to so many tokens."""
        groups: list[list[Active]] = []
        room: dict[tuple[str, ...], int] = {}
        at: dict[tuple[str, ...], int] = {}
        for active in self._active.values():
            targets = tuple(target.module for target in active.learner.weights.shape.targets)
            tokens = active.learner.next_tokens()
            if room.get(targets, 0) < tokens:
                at[targets], room[targets] = len(groups), _STEP_TOKENS
                groups.append([])
            groups[at[targets]].append(active)
            room[targets] -= tokens
        return groups

    def _step(self, group: list[Active]) -> None:
        try:
            step(self._base, [active.learner for active in group])
        except (RuntimeError, MemoryError) as error:  # nobody has learned from this step yet
            if len(group) > 1:
                for active in group:
                    self._step([active])
                return
            log.error("%s waits: its step failed: %s", group[0].name, error)
            self._stalled[group[0].work.adapter.name] = time.monotonic() + _STALLED_SECONDS
            self._drop(group[0])

    def _record(self, active: Active) -> None:
        if active.learner.failure is not None or not active.learner.losses:
            return
        try:
            self._patiently(lambda: active.checkpoints.record(active.learner))
        except Corrupt as error:
            log.error("Beginning %s anew: %s", active.name, error)
            self._drop(active)

    def _tell(self, active: Active) -> None:
        learner = active.learner
        now = time.monotonic()
        if learner.losses and (learner.done or now - active.told > _PROGRESS_SECONDS):
            active.told = now
            log.info("%s: step %d of %d, loss %.4f", active.name, learner.place, len(learner.plan), learner.losses[-1])

    # -- outcomes --------------------------------------------------------------------------------------------

    def _finish(self, active: Active) -> None:
        try:
            candidate = active.learner.candidate()
        except RiverdeltaError as error:
            self._set_aside(active.work, error)
            return
        work = active.work
        self._patiently(lambda: self._store.put(weights_key(candidate.digest), candidate.weights))
        self._patiently(lambda: self._store.put(state_key(candidate.state_digest), candidate.state))
        increment = Increment(
            work.adapter.name,
            work.segment.number,
            work.adapter.epoch,
            work.parent.number if work.parent else 0,
            candidate.digest,
            candidate.state_digest,
            tuple(sorted(active.saw)),
            self._fingerprint,
            {**candidate.metrics, "seconds": round(time.monotonic() - active.began, 3)},
        )
        try:
            version = self._patiently(lambda: self._ledger.commit(increment, self._holder))
        except Conflict as refused:
            log.info("Dropped %s: %s", active.name, refused)
            self._discard(candidate)
            return
        log.info(
            "Committed %s@%d, digest %s, in %.1f s",
            version.adapter,
            version.number,
            version.digest[:12],
            time.monotonic() - active.began,
        )
        self._released(version.adapter)

    def _set_aside(self, work: Work, reason: RiverdeltaError) -> None:
        name, number = work.adapter.name, work.segment.number
        parent = work.parent.number if work.parent else 0
        log.error("Segment %d of %s is set aside: %s", number, name, reason)
        try:
            self._patiently(
                lambda: self._ledger.set_aside(
                    name, number, work.adapter.epoch, parent, Cause.ERROR, str(reason), self._holder
                )
            )
        except Conflict as refused:
            log.info("Dropped that outcome: %s", refused)
            return
        self._released(name)

    def _discard(self, candidate: Candidate) -> None:
        """Refused work may hold what must not be kept."""
        used = self._patiently(self._ledger.digests_in_use)
        if candidate.digest not in used:
            self._patiently(lambda: self._store.delete(weights_key(candidate.digest)))
        if candidate.state_digest not in used:
            self._patiently(lambda: self._store.delete(state_key(candidate.state_digest)))

    def _patiently(self, action: Callable[[], T]) -> T:
        """Wait out a ledger or store that is away; `Stopping` when told to stop meanwhile."""

        def tell(state: RetryCallState) -> None:
            log.warning("Waiting: %s", state.outcome.exception() if state.outcome else "")

        def nap(seconds: float) -> None:
            self._stop.wait(seconds)

        def give_up(_: RetryCallState) -> T:
            raise Stopping

        retrying = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_exponential(multiplier=0.2, max=10),
            stop=stop_when_event_set(self._stop),
            sleep=nap,
            before_sleep=tell,
            retry_error_callback=give_up,
        )
        return retrying(action)
