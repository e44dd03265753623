"""The right to answer: a lease's deadline on this process's own clock, and the versions that are fenced off.

Checked at the last moment before bytes leave, so that a process that was stopped and wakes up later sends nothing that
it may no longer send.
"""

import math
import threading
import time
from collections.abc import Callable, Collection

from .engine import AdaptersHalted
from .errors import AnswerRevoked


def clock() -> float:
    """Seconds that also pass while the machine sleeps, where the system can tell."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class Permit:
    """Whether adapters may be served now. It starts halted; `resume` grants the first term."""

    def __init__(self) -> None:
        self._deadline = -math.inf
        self._halted = True
        self._stopped = False
        self._revoked: set[str] = set()
        self._halt: Callable[[bool], None] = lambda on: None
        self._changed = threading.Condition()
        self._guard = threading.Thread(target=self._watch, name="lease-guard", daemon=True)

    def start(self, halt: Callable[[bool], None]) -> None:
        """Watch the deadline from a thread of its own; `halt` stops and frees the engine's adapters."""
        self._halt = halt
        halt(True)
        self._guard.start()

    def stop(self) -> None:
        """Halt for good."""
        with self._changed:
            self._stopped = True
            self._halted = True
            self._changed.notify_all()
        if self._guard.is_alive():
            self._guard.join()

    @property
    def valid(self) -> bool:
        """Whether the lease stands."""
        return not self._halted and clock() < self._deadline

    @property
    def halted(self) -> bool:
        """Whether adapters were stopped; only `resume` frees them."""
        return self._halted

    def extend(self, deadline: float) -> None:
        """The lease was renewed. A permit that has halted meanwhile stays so until `resume`."""
        with self._changed:
            self._deadline = deadline
            self._changed.notify_all()

    def resume(self, deadline: float) -> None:
        """Everything was read again under a lease that ends at `deadline`."""
        with self._changed:
            if self._stopped:
                return
            self._deadline = deadline
            if self._halted:
                self._halted = False
                self._halt(False)
            self._changed.notify_all()

    def halt(self) -> None:
        """Stop adapters now."""
        with self._changed:
            self._stop_adapters()

    def revoke(self, digests: Collection[str]) -> None:
        """Nothing more from these weights."""
        self._revoked.update(digests)

    def reinstate(self, digests: Collection[str]) -> None:
        """A clean version turned out to have these weights."""
        self._revoked.difference_update(digests)

    def revoked(self, digest: str) -> bool:
        """Whether the weights are fenced off."""
        return digest in self._revoked

    def check(self, digest: str | None) -> None:
        """Raise unless bytes that these weights (None: the base) produced may leave now."""
        if digest is None:
            return
        if digest in self._revoked:
            raise AnswerRevoked()
        if not self.valid:
            raise AdaptersHalted("This server may not serve adapters for now.", "Try again, or ask for base.")

    def _stop_adapters(self) -> None:
        if not self._halted:
            self._halted = True
            self._halt(True)

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                left = math.inf if self._halted else self._deadline - clock()
                if left <= 0:
                    self._stop_adapters()
                else:
                    self._changed.wait(None if left == math.inf else left)
