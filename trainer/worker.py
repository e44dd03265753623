"""The trainer's loop: find work in the ledger, take steps, commit what is finished, drop what has been overtaken."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from riverdelta.core.digests import digest_of
from riverdelta.core.errors import Corrupt, NotFound, RiverdeltaError, Unavailable
from riverdelta.core.patience import Patience
from riverdelta.core.store import ObjectStore
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Hand, Ledger, Work

from .base import Base
from .checkpoints import CheckpointLog
from .claims import Claims
from .fingerprint import fingerprint
from .folder import TrainerFolder
from .gate import BY_HAND
from .increment import Learner, step
from .lease import Lease
from .making import Making, begin
from .metrics import Metrics
from .outcomes import Outcomes
from .packing import packs_exactly

log = logging.getLogger(__name__)

# A damaged payload or parent is for people to mend: it is said again this often, and other adapters go on.
_STALLED_SECONDS = 30.0
_PROGRESS_SECONDS = 2.0
# What a step holds at most of several adapters, unless one alone has more.
_STEP_TOKENS = 4096


@dataclass
class Active:
    """An increment in the making, the checkpoint log of each of its shares with the number of losses recorded there,
    and the ledger's head when it was last seen wanted."""

    work: Work
    making: Making
    checkpoints: list[CheckpointLog]
    recorded: list[int]
    head: int
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Adapter and segment, for the log."""
        return f"{self.work.adapter.name} segment {self.work.segment.number}"

    @property
    def learners(self) -> list[Learner]:
        """What has still to be learned, or has been, share by share."""
        return [share.learner for share in self.making.shares]

    @property
    def done(self) -> bool:
        """Whether all of it has been."""
        return all(learner.done for learner in self.learners)


class Worker:
    """One trainer. `turn` does one round of the loop; between rounds nothing but `active` is held in memory."""

    def __init__(
        self,
        ledger: Ledger,
        store: ObjectStore,
        keys: KeyStore,
        base: Base,
        folder: Path,
        holder: str,
        stop: threading.Event,
        released: Callable[[str], None],
        metrics: Metrics,
        most: int = 16,
    ) -> None:
        """`folder` holds checkpoint logs; `released` hears the adapter after each outcome; `most` adapters are trained
        side by side, if that changes no bit."""
        self._ledger, self._store, self._keys, self._base = ledger, store, keys, base
        self._stop, self._most = stop, most
        self._patiently = Patience(stop)
        self._fingerprint = fingerprint(base)
        self._outcomes = Outcomes(ledger, store, holder, self._fingerprint, self._patiently, released, metrics)
        self._metrics = metrics
        self._active: dict[str, Active] = {}
        self._stalled: dict[str, float] = {}
        self._exact: bool | None = None
        self._lease = Lease(ledger, holder, self._patiently)
        self._claims = Claims(ledger, holder, self._patiently)
        self._folder = self._patiently(lambda: TrainerFolder(folder, store))
        self._patiently(lambda: self._folder.sweep(self._next_key))

    @property
    def idle(self) -> bool:
        """Whether nothing is being trained."""
        return not self._active

    def turn(self) -> bool:
        """Keep the lease, take up what waits, and take one step; False when there was nothing to do."""
        self._lease.keep(self._carry_out, self._drop_all)
        self._drop_overtaken()
        decided = self._take_up()
        self._metrics.active.set(len(self._active))
        if not self._active:
            return decided
        for group in self._groups():
            self._step(group)
        for active in list(self._active.values()):
            self._record(active)
            self._tell(active)
            if active.done and active.work.adapter.name in self._active:
                self._finish(active)
        return True

    def close(self) -> None:
        """Leave the increments where another trainer can go on with them, and give the lease up."""
        for active in self._active.values():
            for checkpoints, learner in zip(active.checkpoints, active.learners, strict=True):
                checkpoints.close(learner)
        self._active.clear()
        self._claims.close()
        self._folder.close()
        self._lease.drop()

    # -- what the ledger has moved past ----------------------------------------------------------------------

    def _carry_out(self) -> None:
        # What a forget touched has another epoch now: dropping that carries out every fence there is.
        self._drop_overtaken()
        self._patiently(lambda: self._folder.sweep(self._next_key, frozenset(self._active)))

    def _drop_all(self) -> None:
        for active in list(self._active.values()):
            self._drop(active)
        self._patiently(lambda: self._folder.sweep(self._next_key))

    def _drop_overtaken(self) -> None:
        for active in list(self._active.values()):
            if not self._patiently(lambda active=active: self._wanted(active)):  # type: ignore[misc]
                log.info("Dropped %s: the ledger has moved on", active.name)
                self._drop(active)

    def _drop(self, active: Active) -> None:
        del self._active[active.work.adapter.name]
        for checkpoints in active.checkpoints:
            self._patiently(checkpoints.discard)
        self._claims.end(active.work.adapter.name)

    def _wanted(self, active: Active) -> bool:
        name = active.work.adapter.name
        if self._claims.lost(name):
            return False
        head = self._ledger.adapter(name)
        if head.head != active.head:
            work = self._ledger.work(name)
            if work is None or self._key(work) != self._key(active.work):
                return False
            active.head = work.adapter.head
        return True

    # -- work ------------------------------------------------------------------------------------------------

    def _take_up(self) -> bool:
        """Claim and begin what waits; whether something came to its outcome without a step."""
        decided = False
        if self._taken() >= self._most:
            return decided
        now = time.monotonic()
        waiting = self._patiently(self._ledger.waiting)
        self._metrics.waiting.set(len(waiting))
        free = [name for name, _ in waiting if name not in self._active and self._stalled.get(name, 0.0) <= now]
        claimed = self._claims.take(free, self._share(len(waiting)) - len(self._active)) if free else {}
        for name, token in claimed.items():
            if self._taken() >= self._most or self._stop.is_set() or (self._active and not self._may_pack()):
                break
            try:
                decided |= self._begin(name, token)
            except (Corrupt, NotFound) as error:
                self._stalled[name] = now + _STALLED_SECONDS
                log.error("%s waits until this is mended: %s", name, error)
        self._claims.end(*(claimed.keys() - self._active.keys()))
        return decided

    def _taken(self) -> int:
        """How many adapters, and shards beyond the first, are being trained."""
        return sum(max(1, len(active.learners)) for active in self._active.values())

    def _share(self, waiting: int) -> int:
        """How many of the adapters that wait this trainer takes at most: as many as the others."""
        trainers = self._patiently(lambda: self._ledger.count_live("trainer"))
        return min(self._most, -(-waiting // max(1, trainers)))

    def _may_pack(self) -> bool:
        if self._exact is None:
            log.info("Trying whether adapters can be trained side by side without changing a bit")
            self._exact = packs_exactly(self._base)
            if not self._exact:
                log.warning("On this machine they cannot: adapters are trained one after the other")
        if not self._exact:
            self._most = 1
        return self._exact

    def _begin(self, name: str, token: int) -> bool:
        found = self._patiently(lambda: self._ledger.work(name))
        if found is None:
            return False
        work = replace(found, token=token)
        if work.segment.hand is Hand.DISCARD:
            self._outcomes.reject(work, BY_HAND, {})
            return True
        try:
            making = self._patiently(lambda: self._making(work))
        except NotFound:
            # A purge may have replaced the payload, or a forget the parent, since the ledger was read.
            if self._patiently(lambda: self._ledger.work(name)) == found:
                raise
            return False
        except (Corrupt, Unavailable):
            raise
        except RiverdeltaError as error:  # the recipe does not fit this base, or the parent does not fit the recipe
            self._outcomes.set_aside(work, error)
            return True
        self._stalled.pop(name, None)
        shares = making.shares
        checkpoints = [self._folder.open(name, self._key(work), share.number) for share in shares]
        spared = 0
        for each, share in zip(checkpoints, shares, strict=True):
            spared += self._patiently(lambda each=each, share=share: each.resume(share.learner))  # type: ignore[misc]
        recorded = [len(share.learner.losses) for share in shares]
        self._active[name] = Active(work, making, checkpoints, recorded, work.adapter.head)
        log.info(
            "Training %s on version %d: %d entries, %d steps",
            f"{name} segment {work.segment.number}",
            work.parent.number if work.parent else 0,
            work.segment.count,
            sum(len(share.learner.plan) for share in shares),
        )
        if spared:
            log.info("Resumed %s segment %d after step %d", name, work.segment.number, spared)
        return False

    def _making(self, work: Work) -> Making:
        return begin(self._base, self._ledger, self._store, self._keys, work, self._fingerprint)

    def _key(self, work: Work) -> str:
        """Names an increment by everything that shapes it: steps that were kept under another name are not its own."""
        parent = work.parent
        return digest_of(
            [
                work.adapter.name,
                work.adapter.seed,
                work.adapter.recipe_digest,
                work.segment.number,
                work.segment.hand,
                work.learns,
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

    def _groups(self) -> list[list[tuple[Active, Learner]]]:
        """Who takes the next step together: adapters, and shards, that change the same modules, up to so many
        tokens."""
        groups: list[list[tuple[Active, Learner]]] = []
        room: dict[tuple[str, ...], int] = {}
        at: dict[tuple[str, ...], int] = {}
        all_of_them = [(active, each) for active in self._active.values() for each in active.learners if not each.done]
        if len(all_of_them) > 1 and not self._may_pack():
            return [[one] for one in all_of_them]
        for active, learner in all_of_them:
            targets = tuple(target.module for target in learner.weights.shape.targets)
            tokens = learner.next_tokens()
            if targets not in at or room[targets] < tokens:
                at[targets], room[targets] = len(groups), _STEP_TOKENS
                groups.append([])
            groups[at[targets]].append((active, learner))
            room[targets] -= tokens
        return groups

    def _step(self, group: list[tuple[Active, Learner]]) -> None:
        learners = [learner for _, learner in group]
        before = sum(len(learner.losses) for learner in learners), sum(learner.tokens for learner in learners)
        try:
            step(self._base, learners)
        except (RuntimeError, MemoryError) as error:  # nobody has learned from this step yet
            if len(group) > 1:
                for each in group:
                    self._step([each])
                return
            active, name = group[0][0], group[0][0].work.adapter.name
            log.error("%s waits: its step failed: %s", active.name, error)
            self._stalled[name] = time.monotonic() + _STALLED_SECONDS
            if self._active.get(name) is active:
                self._drop(active)
            return
        self._metrics.steps.inc(sum(len(learner.losses) for learner in learners) - before[0])
        self._metrics.tokens.inc(sum(learner.tokens for learner in learners) - before[1])

    def _record(self, active: Active) -> None:
        for place, (checkpoints, learner) in enumerate(zip(active.checkpoints, active.learners, strict=True)):
            if len(learner.losses) == active.recorded[place]:
                continue
            active.recorded[place] = len(learner.losses)
            try:
                self._patiently(lambda to=checkpoints, of=learner: to.record(of))  # type: ignore[misc]
            except Corrupt as error:
                log.error("Beginning %s anew: %s", active.name, error)
                self._drop(active)
                return

    def _tell(self, active: Active) -> None:
        learners = [learner for learner in active.learners if learner.losses]
        now = time.monotonic()
        if learners and (active.done or now - active.told > _PROGRESS_SECONDS):
            active.told = now
            taken, of = (sum(each) for each in zip(*((one.place, len(one.plan)) for one in learners), strict=True))
            loss = fmean(learner.losses[-1] for learner in learners)
            log.info("%s: step %d of %d, loss %.4f", active.name, taken, of, loss)

    def _finish(self, active: Active) -> None:
        try:
            made = self._patiently(active.making.finish)
        except RiverdeltaError as error:
            self._outcomes.set_aside(active.work, error)
        else:
            if made.candidate is None:
                self._outcomes.reject(active.work, made.judged.rejected, made.judged.metrics)
            else:
                seconds = time.monotonic() - active.began
                self._outcomes.commit(active.work, made, active.making.saw, active.making.masked, seconds)
        self._drop(active)
