"""The trainer's lease: renewed between steps, and with it the word that every fence has been carried out."""

import logging
import time
from collections.abc import Callable

from riverdelta.core.errors import NotFound, Unavailable
from riverdelta.core.patience import Patience
from riverdelta.registry.ledger import Ledger

log = logging.getLogger(__name__)

SECONDS = 10.0


class Lease:
    """A lease of kind `trainer`. Take it before reading anything that it is to guard."""

    def __init__(self, ledger: Ledger, holder: str, patiently: Patience) -> None:
        self._ledger, self._holder, self._patiently = ledger, holder, patiently
        self._due = 0.0
        self._acked = self._take()

    def keep(self, carry_out: Callable[[], None], lost: Callable[[], None]) -> None:
        """Renew when it is time. New fences are acknowledged after `carry_out`; `lost` must drop everything, when a
        forget has waited in vain and given this holder up."""
        if time.monotonic() < self._due:
            return
        try:
            fence = self._renew(self._acked)
            while fence > self._acked:
                carry_out()
                self._acked = fence
                fence = self._renew(fence)
        except NotFound:
            log.warning("The lease was given up for lost: beginning anew")
            lost()
            self._acked = self._take()
        self._due = time.monotonic() + SECONDS / 5

    def drop(self) -> None:
        """Give it up."""
        try:
            self._ledger.drop_lease(self._holder)
        except Unavailable as error:
            log.warning("The lease runs out by itself: %s", error)

    def _renew(self, acked: int) -> int:
        return self._patiently(lambda: self._ledger.renew_lease(self._holder, acked))

    def _take(self) -> int:
        return self._patiently(lambda: self._ledger.take_lease(self._holder, "trainer", SECONDS))
