"""Patience: an action is tried again while a part is away, until it answers or the process is told to stop."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, wait_exponential

from .errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")


class Stopped(Exception):
    """The wait ended because the process stops."""


class Patience:
    """Runs actions that may meet `Unavailable` parts, and says when it waits for one."""

    def __init__(self, stop: threading.Event, longest: float = 5.0) -> None:
        """`longest` seconds pass between two attempts at most."""
        self.stop = stop
        self._longest = longest

    def __call__(self, action: Callable[[], T], what: str = "") -> T:
        """What `action` returns, once it does; `Stopped` when told to stop before. `what` says what is being done."""
        trying = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_exponential(multiplier=0.1, max=self._longest),
            sleep=sleep_using_event(self.stop),
            stop=lambda _: self.stop.is_set(),
            before_sleep=lambda state: _tell(state, what),
            retry_error_callback=_stopped,
        )
        done: T = trying(action)
        if trying.statistics.get("attempt_number", 1) > 1:
            log.info("%s", f"{what}: going on" if what else "Going on")
        return done


def _tell(state: RetryCallState, what: str) -> None:
    if state.attempt_number in (1, 5) or state.attempt_number % 20 == 0:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s %s", f"{what}: waiting." if what else "Waiting:", error)


def _stopped(state: RetryCallState) -> None:
    raise Stopped from (state.outcome.exception() if state.outcome else None)
