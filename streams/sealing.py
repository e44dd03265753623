"""Sealing: payloads into the store first, then one ledger transaction that also moves what is consumed."""

import logging
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from riverdelta.core import payload
from riverdelta.core.errors import StaleEpoch
from riverdelta.core.store import ObjectStore
from riverdelta.registry.ledger import Ledger, Seal, SegmentRecord

from .admission import Admission, Draft
from .metrics import Metrics
from .owner import Owner
from .patience import Patience

log = logging.getLogger(__name__)
_AT_ONCE = 128  # seals in a transaction: others wait for the ledger's write lock meanwhile


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
    ) -> None:
        """`wake` is called with each adapter that has a new segment."""
        self._owner = owner
        self._ledger = ledger
        self._store = store
        self._patience = patience
        self._metrics = metrics
        self._wake = wake
        self._actor = actor

    def seal_due(self, at: float, trigger: str = "") -> None:
        """Seal what is due everywhere; with a `trigger`, everything that is open."""
        due = [
            (state, draft)
            for bucket in self._owner.buckets.values()
            for state in bucket.busy.values()
            for draft in state.cut(at, bucket.reached, trigger)
        ]
        refused: set[str] = set()
        for start in range(0, len(due), _AT_ONCE):
            refused |= self._seal([pair for pair in due[start : start + _AT_ONCE] if pair[1].adapter not in refused])

    def _seal(self, due: Sequence[tuple[Admission, Draft]]) -> set[str]:
        """Seal drafts in order; the adapters of which one was refused."""
        seals = self._write([draft for _, draft in due])
        results = self._patience.until(lambda: self._ledger.seal(seals, self._actor), "sealing in the ledger")
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
        return set(refused)

    def _write(self, drafts: Sequence[Draft]) -> list[Seal]:
        objects: dict[str, bytes] = {}
        seals = []
        for draft in drafts:
            data, digest = payload.encode(draft.contents())
            key = f"segments/{draft.adapter}/{uuid.uuid4().hex}.seg"
            objects[key] = data
            seals.append(
                Seal(
                    draft.adapter,
                    draft.epoch,
                    draft.first,
                    draft.manifest(),
                    draft.trigger,
                    key,
                    digest,
                    draft.consumed,
                )
            )
        self._patience.until(lambda: self._store.put_all(objects), "writing payloads")
        return seals

    def _resolve(self, state: Admission, why: Exception, payloads: Sequence[str]) -> None:
        """Make the adapter ready to be sealed anew, and leave nothing in the store that no segment names."""
        self._metrics.refused.labels(type(why).__name__).inc()
        if isinstance(why, StaleEpoch):
            self._patience.until(lambda: self._owner.refresh(state), "reading the ledger")
            named: set[str] = set()
        else:
            number = state.next_segment
            self._patience.until(lambda: self._owner.reload(state), "reading the ledger")
            # The refused may be our own, sealed by a transaction whose acknowledgement was lost.
            segments = self._patience.until(lambda: self._ledger.segments(state.name, number), "reading the ledger")
            named = {segment.payload for segment in segments}
        for key in payloads:
            if key not in named:
                self._patience.until(partial(self._store.delete, key), "deleting an unused payload")
