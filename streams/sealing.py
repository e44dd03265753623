"""Sealing: payloads into the store first, then one ledger transaction that also moves what is consumed.

What waits for the disk runs in a thread of its own, one batch at a time, while the dataflow admits more. Decisions
stay in the dataflow's thread: drafts before, what became of them after (`land`).
"""

import logging
import random
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial

from riverdelta.core import payload
from riverdelta.core.errors import StaleEpoch
from riverdelta.core.store import ObjectStore
from riverdelta.registry.ledger import Ledger, Seal, SegmentRecord
from riverdelta.registry.written import Written

from .admission import Admission, Draft
from .metrics import Metrics
from .owner import Owner
from .patience import Patience

log = logging.getLogger(__name__)
_AT_ONCE = 128  # seals in a transaction: others wait for the ledger's write lock meanwhile
_LOOK_SECONDS = 0.05  # between two looks at what still waits to be learned
_LOOKED_AT = 500  # adapters at a look
_OPEN_AT_MOST = 250_000  # entries; then the dataflow waits for the batch under way

Due = list[tuple[Admission, Draft]]
Result = SegmentRecord | Exception


class Sealer:
    """Seals drafts and tells the owner what became of them."""

    def __init__(
        self,
        owner: Owner,
        ledger: Ledger,
        store: ObjectStore,
        patience: Patience,
        metrics: Metrics,
        wake: Callable[[str], None],
        actor: str,
        thread: Executor,
    ) -> None:
        """`wake` is called with each adapter that has a new segment."""
        self._owner = owner
        self._ledger = ledger
        self._store = store
        self._patience = patience
        self._metrics = metrics
        self._wake = wake
        self._actor = actor
        self._thread = thread
        self._look_at = float("-inf")
        self._flight: tuple[Due, list[Seal], Future[list[Result]]] | None = None

    def seal_due(self, at: float, trigger: str = "") -> None:
        """Begin to seal what is due everywhere (with a `trigger`, everything that is open), once the batch before
        has landed."""
        if self._flight is not None:
            if not (trigger or self._flight[2].done() or self._owner.count_open() > _OPEN_AT_MOST):
                return
            self.land()
        idle = set() if trigger else self._idle(at)
        due = [
            (state, draft)
            for bucket in self._owner.buckets.values()
            for state in bucket.busy.values()
            for draft in state.cut(at, bucket.reached, "linger" if state.name in idle else trigger)
        ]
        if due:
            seals, payloads = self._prepare([draft for _, draft in due])
            self._flight = due, seals, self._thread.submit(self._send, seals, payloads)

    def _idle(self, at: float) -> set[str]:
        """The adapters with open entries that linger, and nothing that waits to be learned; some at a time."""
        if at < self._look_at:
            return set()
        lingering = [
            state.name for bucket in self._owner.buckets.values() for state in bucket.busy.values() if state.lingers(at)
        ]
        if not lingering:
            return set()
        self._look_at = at + _LOOK_SECONDS
        if len(lingering) > _LOOKED_AT:
            lingering = random.sample(lingering, _LOOKED_AT)
        behind = self._patience.until(lambda: self._ledger.behind(lingering), "reading the ledger")
        return set(lingering) - behind

    def land(self) -> None:
        """Wait for the batch under way, and let its adapters know what became of it."""
        if self._flight is None:
            return
        due, seals, future = self._flight
        results = future.result()
        self._flight = None
        refused: dict[str, tuple[Admission, Exception]] = {}
        unused: dict[str, list[str]] = {}
        for (state, draft), seal, result in zip(due, seals, results, strict=True):
            if isinstance(result, SegmentRecord):
                state.settle(draft)
                self._metrics.segments.labels(draft.trigger).inc()
                self._metrics.sealed.inc(len(draft.entries))
                self._wake(draft.adapter)
            else:
                refused.setdefault(draft.adapter, (state, result))
                unused.setdefault(draft.adapter, []).append(seal.payload)
        for name, (state, why) in refused.items():
            self._resolve(state, why, unused[name])

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, drafts: Sequence[Draft]) -> tuple[list[Seal], list[bytes]]:
        seals, payloads = [], []
        for draft in drafts:
            data, digest = payload.encode(draft.contents())
            payloads.append(data)
            seals.append(
                Seal(
                    draft.adapter,
                    draft.epoch,
                    draft.first,
                    draft.manifest(),
                    draft.trigger,
                    f"segments/{draft.adapter}/{uuid.uuid4().hex}.seg",
                    digest,
                    draft.consumed,
                )
            )
        return seals, payloads

    def _send(self, seals: Sequence[Seal], payloads: Sequence[bytes]) -> list[Result]:
        """In the thread: write and record, some at a time; after a refusal the rest of that adapter is refused too."""
        done: dict[str, Result] = {}
        refused: dict[str, Result] = {}
        for start in range(0, len(seals), _AT_ONCE):
            pairs = zip(seals[start : start + _AT_ONCE], payloads[start : start + _AT_ONCE], strict=True)
            kept = [(seal, data) for seal, data in pairs if seal.adapter not in refused]
            if not kept:
                continue
            results = self._patience.until(partial(self._record, kept), "sealing")
            for (seal, _), result in zip(kept, results, strict=True):
                done[seal.payload] = result
                if isinstance(result, Exception):
                    refused.setdefault(seal.adapter, result)
        return [done[seal.payload] if seal.payload in done else refused[seal.adapter] for seal in seals]

    def _record(self, asked: Sequence[tuple[Seal, bytes]]) -> list[Result]:
        written = Written(self._store, {seal.payload: data for seal, data in asked})
        return self._ledger.seal([seal for seal, _ in asked], self._actor, written.look)

    def _resolve(self, state: Admission, why: Exception, payloads: Sequence[str]) -> None:
        """Make the adapter ready to be sealed anew, and leave nothing in the store that no segment names."""
        self._metrics.refused.labels(type(why).__name__).inc()
        number = state.next_segment
        again = self._owner.refresh if isinstance(why, StaleEpoch) else self._owner.reload
        self._patience.until(lambda: again(state), "reading the ledger")
        # The refused may be our own, sealed by a transaction whose acknowledgement was lost.
        segments = self._patience.until(lambda: self._ledger.segments(state.name, number), "reading the ledger")
        named = {segment.payload for segment in segments}
        for key in payloads:
            if key not in named:
                self._patience.until(partial(self._store.delete, key), "deleting an unused payload")
