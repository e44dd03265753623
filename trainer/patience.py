"""Waiting out what is away: a ledger, a store or a disk that fails for now is said and tried again."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_when_event_set, wait_exponential

from riverdelta.core.errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

_LONGEST_SECONDS = 10.0


class Stopping(Exception):
    """Told to stop while waiting."""


class Patience:
    """Calls what may be `Unavailable`, again and again with growing pauses, until it answers or `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, action: Callable[[], T]) -> T:
        """What `action` gives; `Stopping` when told to stop meanwhile."""
        retrying = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_exponential(multiplier=0.2, max=_LONGEST_SECONDS),
            stop=stop_when_event_set(self._stop),
            sleep=self._nap,
            before_sleep=_tell,
            retry_error_callback=_give_up,
        )
        return retrying(action)

    def _nap(self, seconds: float) -> None:
        self._stop.wait(seconds)


def _tell(state: RetryCallState) -> None:
    log.warning("Waiting: %s", state.outcome.exception() if state.outcome else "")


def _give_up(_: RetryCallState) -> None:
    raise Stopping
