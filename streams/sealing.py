"""Sealing: keys and payloads into their stores first, then one ledger transaction that also moves what is consumed.

What waits for the disk runs in a thread of its own, one batch at a time, while the dataflow admits more. Decisions
stay in the dataflow's thread: drafts before, what became of them after (`land`).
"""

import logging
import random
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

from riverdelta.core.errors import StaleEpoch
from riverdelta.core.patience import Patience
from riverdelta.core.store import ObjectStore
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, Manifest, Seal, SegmentRecord
from riverdelta.registry.written import Written

from .admission import Admission, Draft
from .metrics import Metrics
from .owner import Owner

log = logging.getLogger(__name__)
_AT_ONCE = 128  # seals in a transaction: others wait for the ledger's write lock meanwhile
_LOOK_SECONDS = 0.05  # between two looks at what still waits to be learned
_LOOKED_AT = 500  # adapters at a look
_OPEN_AT_MOST = 250_000  # entries; then the dataflow waits for the batch under way

Due = list[tuple[Admission, Draft]]
Result = SegmentRecord | Exception


@dataclass(frozen=True)
class Ask:
    """A draft as it stood when its batch began. `name` is that of its payload and keys."""

    name: str
    draft: Draft
    manifest: Manifest
    said: list[bytes | None]

    @property
    def payload(self) -> str:
        """The payload's key in the object store."""
        return f"segments/{self.draft.adapter}/{self.name}.seg"

    def encrypted(self) -> tuple[Seal, contents.Encrypted]:
        """What the ledger is asked, and what must be in the stores before."""
        draft, made = self.draft, contents.encrypt(self.name, self.manifest, self.said)
        seal = Seal(
            draft.adapter,
            draft.epoch,
            draft.first,
            made.manifest,
            draft.trigger,
            self.payload,
            made.digest,
            draft.consumed,
            self.name,
            made.root,
        )
        return seal, made


class Sealer:
    """Seals drafts and tells the owner what became of them."""

    def __init__(
        self,
        owner: Owner,
        ledger: Ledger,
        store: ObjectStore,
        keys: KeyStore,
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
        self._keys = keys
        self._patience = patience
        self._metrics = metrics
        self._wake = wake
        self._actor = actor
        self._thread = thread
        self._look_at = float("-inf")
        self._flight: tuple[Due, list[Ask], Future[list[Result]]] | None = None

    def seal_due(self, at: float, trigger: str = "") -> None:
        """Begin to seal what is due everywhere (with a `trigger`, everything that is open), once the batch before
        has landed."""
        if self._flight is not None:
            if not (trigger or self._flight[2].done() or self._owner.count_open() > _OPEN_AT_MOST):
                return
            self.land()
        early = {} if trigger else self._early(at)
        due = [
            (state, draft)
            for bucket in self._owner.buckets.values()
            for state in bucket.busy.values()
            for draft in state.cut(at, bucket.reached, early.get(state.name, trigger))
        ]
        if due:
            asks = [Ask(uuid.uuid4().hex, draft, draft.manifest(), draft.contents()) for _, draft in due]
            self._flight = due, asks, self._thread.submit(self._send, asks)

    def _early(self, at: float) -> dict[str, str]:
        """Which adapters' open entries are sealed before they are due, some adapters at a time, and why: they linger
        and nothing waits to be learned, or what was learned last had drifted."""
        if at < self._look_at:
            return {}
        lingering = [
            state.name for bucket in self._owner.buckets.values() for state in bucket.busy.values() if state.lingers(at)
        ]
        if not lingering:
            return {}
        self._look_at = at + _LOOK_SECONDS
        if len(lingering) > _LOOKED_AT:
            lingering = random.sample(lingering, _LOOKED_AT)
        behind = self._patience(lambda: self._ledger.behind(lingering), "reading the ledger")
        early = dict.fromkeys(set(lingering) - behind, "linger")
        if behind:
            drifting = self._patience(lambda: self._ledger.drifting(sorted(behind)), "reading the ledger")
            early |= dict.fromkeys(drifting, "drift")
        return early

    def land(self) -> None:
        """Wait for the batch under way, and let its adapters know what became of it."""
        if self._flight is None:
            return
        due, asks, future = self._flight
        results = future.result()
        self._flight = None
        refused: dict[str, tuple[Admission, Exception]] = {}
        unused: dict[str, list[Ask]] = {}
        for (state, draft), ask, result in zip(due, asks, results, strict=True):
            if isinstance(result, SegmentRecord):
                state.settle(draft)
                self._metrics.seal(draft.adapter, draft.trigger, len(draft.entries))
                self._wake(draft.adapter)
            else:
                refused.setdefault(draft.adapter, (state, result))
                unused.setdefault(draft.adapter, []).append(ask)
        for name, (state, why) in refused.items():
            self._resolve(state, why, unused[name])

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _send(self, asks: Sequence[Ask]) -> list[Result]:
        """In the thread: encrypt, write and record, some at a time; after a refusal the rest of that adapter is refused
        too."""
        done: dict[str, Result] = {}
        refused: dict[str, Result] = {}
        for start in range(0, len(asks), _AT_ONCE):
            kept = [ask for ask in asks[start : start + _AT_ONCE] if ask.draft.adapter not in refused]
            if not kept:
                continue
            made = [ask.encrypted() for ask in kept]
            results = self._patience(partial(self._record, made), "sealing")
            for ask, result in zip(kept, results, strict=True):
                done[ask.name] = result
                if isinstance(result, Exception):
                    refused.setdefault(ask.draft.adapter, result)
        return [done[ask.name] if ask.name in done else refused[ask.draft.adapter] for ask in asks]

    def _record(self, made: Sequence[tuple[Seal, contents.Encrypted]]) -> list[Result]:
        keyrings = {seal.keyring: written.keys for seal, written in made}
        written = Written(self._store, {seal.payload: each.data for seal, each in made}, self._keys, keyrings)
        return self._ledger.seal([seal for seal, _ in made], self._actor, written.look)

    def _resolve(self, state: Admission, why: Exception, asks: Sequence[Ask]) -> None:
        """Make the adapter ready to be sealed anew, and leave nothing in the stores that no segment names."""
        self._metrics.refused.labels(type(why).__name__).inc()
        number = state.next_segment
        again = self._owner.refresh if isinstance(why, StaleEpoch) else self._owner.reload
        self._patience(lambda: again(state), "reading the ledger")
        # The refused may be our own, sealed by a transaction whose acknowledgement was lost.
        segments = self._patience(lambda: self._ledger.segments(state.name, number), "reading the ledger")
        named = {segment.keyring for segment in segments}
        unused = [ask for ask in asks if ask.name not in named]
        delete = partial(self._keys.delete, [ask.name for ask in unused])
        self._patience(delete, "deleting unused keys")
        for ask in unused:
            self._patience(partial(self._store.delete, ask.payload), "deleting an unused payload")
