"""What becomes of an increment in the ledger: committed, set aside with a reason, or refused and removed."""

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from riverdelta.core.errors import Conflict, RiverdeltaError
from riverdelta.core.patience import Patience
from riverdelta.core.recipe import Recipe
from riverdelta.core.store import ObjectStore, state_key, weights_key
from riverdelta.registry.ledger import Cause, Increment, Ledger, Work
from riverdelta.registry.written import Written

from .increment import Candidate
from .making import Made
from .metrics import Metrics

log = logging.getLogger(__name__)


class Outcomes:
    """Writes outcomes under a trainer's name; `told` hears the adapter after each."""

    def __init__(
        self,
        ledger: Ledger,
        store: ObjectStore,
        holder: str,
        fingerprint: dict[str, Any],
        patiently: Patience,
        told: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        self._ledger, self._store, self._holder = ledger, store, holder
        self._fingerprint, self._patiently, self._told = fingerprint, patiently, told
        self._metrics = metrics

    def commit(self, work: Work, made: Made, saw: Collection[int], masked: int, seconds: float) -> None:
        """Files first, then the ledger; a ledger that has moved on refuses, and the files go again."""
        candidate = made.candidate
        assert candidate is not None
        files = {weights_key(candidate.digest): candidate.weights, state_key(candidate.state_digest): candidate.state}
        increment = Increment(
            work.adapter.name,
            work.segment.number,
            work.adapter.epoch,
            work.parent.number if work.parent else 0,
            candidate.digest,
            candidate.state_digest,
            tuple(sorted(saw)),
            self._fingerprint,
            {**candidate.metrics, **made.judged.metrics, "masked": masked, "seconds": round(seconds, 3)},
            made.parts,
            made.withheld,
            work.token,
        )
        try:
            version = self._patiently(
                # Another trainer's equal work has the same files, and may be refused and remove them.
                lambda: self._ledger.commit(increment, self._holder, Written(self._store, files).look)
            )
        except Conflict as refused:
            log.info("Dropped %s segment %d: %s", work.adapter.name, work.segment.number, refused)
            self._metrics.outcomes.labels("refused").inc()
            self._remove(candidate)
            return
        self._metrics.outcomes.labels("trained").inc()
        self._metrics.masked.inc(masked)
        with contextlib.suppress(KeyError):
            self._metrics.rejected_in_a_row.remove(version.adapter)
        self._metrics.seconds.observe(seconds)
        if version.withheld:
            log.warning("%s@%d is not released: %s", version.adapter, version.number, version.withheld)
        log.info("Committed %s@%d, digest %s, in %.1f s", version.adapter, version.number, version.digest[:12], seconds)
        self._told(version.adapter)

    def set_aside(self, work: Work, reason: RiverdeltaError) -> None:
        """The segment cannot be learned, and the ledger says why."""
        log.error("Segment %d of %s is set aside: %s", work.segment.number, work.adapter.name, reason)
        if self._without(work, Cause.ERROR, str(reason), {}):
            self._metrics.outcomes.labels("set_aside").inc()

    def reject(self, work: Work, reason: str, metrics: Mapping[str, Any]) -> None:
        """The gate turned the candidate down; said loudly when it does so again and again."""
        name, number = work.adapter.name, work.segment.number
        log.warning("Segment %d of %s is set aside by the gate: %s", number, name, reason)
        if not self._without(work, Cause.GATE, reason, metrics):
            return
        self._metrics.outcomes.labels("rejected").inc()
        row = self._patiently(lambda: self._ledger.rejections(name)).get(name, 0)
        if row >= Recipe.from_dict(work.adapter.recipe).gate.alarm:
            self._metrics.rejected_in_a_row.labels(name).set(row)
            log.error(
                "%s learns nothing: its gate has rejected %d segments in a row. Look at them with `riverdelta registry "
                "show %s`, then `accept` or `discard` them.",
                name,
                row,
                name,
            )

    def _without(self, work: Work, cause: Cause, note: str, metrics: Mapping[str, Any]) -> bool:
        name, number, epoch = work.adapter.name, work.segment.number, work.adapter.epoch
        parent = work.parent.number if work.parent else 0
        try:
            self._patiently(
                lambda: self._ledger.set_aside(
                    name, number, epoch, parent, cause, note, self._holder, metrics, work.token
                )
            )
        except Conflict as refused:
            log.info("Dropped that outcome: %s", refused)
            return False
        self._told(name)
        return True

    def _remove(self, candidate: Candidate) -> None:
        # Refused work may hold what must not be kept; equal files may be an accepted version's.
        files = (weights_key(candidate.digest), state_key(candidate.state_digest))
        self._patiently(lambda: self._ledger.delete_unnamed(files, self._store.delete, revoked=True))
