"""A trainer's claims: taken before work begins, renewed by a thread of their own while a long step runs."""

import logging
import threading
from collections.abc import Sequence

from riverdelta.core.errors import Unavailable
from riverdelta.core.patience import Patience
from riverdelta.registry.ledger import Ledger

log = logging.getLogger(__name__)

SECONDS = 6.0
_BEAT_SECONDS = 1.5


class Claims:
    """What one trainer has claimed, by adapter with its token."""

    def __init__(self, ledger: Ledger, holder: str, patiently: Patience) -> None:
        self._ledger, self._holder, self._patiently = ledger, holder, patiently
        self._held: dict[str, int] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, waiting: Sequence[str], most: int) -> dict[str, int]:
        """Claim up to `most` of the adapters that wait, in their order; the token of each."""
        free = self._patiently(lambda: self._ledger.unclaimed(waiting)) if most > 0 else []
        if not free:
            return {}
        taken = self._patiently(lambda: self._ledger.claim(free, self._holder, SECONDS, most))
        with self._lock:
            self._held |= taken
            self._lost -= taken.keys()
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._thread.start()
        return taken

    def lost(self, adapter: str) -> bool:
        """Whether another trainer has it, or may have it, now."""
        with self._lock:
            return adapter in self._lost

    def end(self, *adapters: str) -> None:
        """Give claims up; they run out by themselves where the ledger is away."""
        with self._lock:
            tokens = {name: self._held.pop(name) for name in adapters if name in self._held}
            self._lost.difference_update(adapters)
        if tokens:
            try:
                self._ledger.end_claims(tokens, self._holder)
            except Unavailable as error:
                log.warning("Claims run out by themselves: %s", error)

    def close(self) -> None:
        """Give all up."""
        self._closed.set()
        self.end(*self._held)

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            with self._lock:
                tokens = dict(self._held)
            if not tokens:
                continue
            try:
                lost = self._ledger.renew_claims(tokens, self._holder, SECONDS)
            except Unavailable as error:
                log.warning("Claims are not renewed: %s", error)
                continue
            with self._lock:
                lost = {name for name in lost if self._held.get(name) == tokens[name]}
                self._lost |= lost
                for name in lost:
                    del self._held[name]
