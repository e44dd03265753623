"""How a dataflow ends: because it was told to stop, or with the first error."""

import threading

from riverdelta.core.patience import Stopped


class Ending:
    """The flag that every part looks at, and the error, if there was one."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.error: Exception | None = None

    def by(self, error: Exception) -> None:
        """End because of `error`."""
        if not isinstance(error, Stopped) and self.error is None:
            self.error = error
        self.stop.set()
