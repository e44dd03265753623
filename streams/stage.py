"""The stage on which Bytewax calls the worker: operators that end the dataflow, not the process, on an error."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import DynamicSink, StatelessSinkPartition

from riverdelta.core.patience import Stopped

from .ending import Ending
from .items import Parcel
from .worker import Worker

log = logging.getLogger(__name__)
X = TypeVar("X")
Y = TypeVar("Y")


class Stage(DynamicSink[Any]):  # type: ignore[misc]
    """The sink, and the guard of every step: after the first error no step does anything, so nothing is recorded of
    what was decided by halves."""

    def __init__(self, worker: Worker, ending: Ending, began: float) -> None:
        """`began`: when the dataflow did, on the monotonic clock."""
        self.worker = worker
        self._ending = ending
        self._began: float | None = began
        self._broken = False

    def guarded(self, step: Callable[[list[X]], Iterable[Y]]) -> Callable[[list[X]], Iterable[Y]]:
        """The step, giving nothing after an error."""

        def guard(given: list[X]) -> Iterable[Y]:
            if self._broken:
                return ()
            try:
                return step(given)
            except Exception as error:
                self._broken = True
                self._ending.by(error)
                return ()

        return guard

    def build(self, _step_id: str, _worker_index: int, _worker_count: int) -> "Commits":
        """The worker's sink."""
        return Commits(self)

    def take(self, parcels: list[Parcel]) -> tuple[int]:
        """Decide."""
        for parcel in parcels:
            self.worker.take(parcel)
        if self._began is not None and any(parcel.items for parcel in parcels):
            log.info("first events decided", extra={"seconds": round(time.monotonic() - self._began, 3)})
            self._began = None
        return (1,)

    def commit(self, _decided: list[Any]) -> tuple[()]:
        """Make what was decided count."""
        self.worker.commit()
        return ()

    def close(self, seal_all: bool) -> None:
        """After the last batch."""
        if self._broken or self._ending.error is not None:
            self.worker.abandon()
            return
        try:
            self.worker.close(seal_all)
        except Stopped:
            self.worker.abandon()


class Owned(StatefulBatchLogic[Parcel, int, None]):  # type: ignore[misc]
    """One bucket. Its state lives in the worker and in the ledger; Bytewax routes to it and keeps nothing."""

    def __init__(self, stage: Stage) -> None:
        self._take = stage.guarded(stage.take)

    def on_batch(self, values: list[Parcel]) -> tuple[Iterable[int], bool]:
        """Decide, then let the sink commit."""
        return self._take(values), StatefulBatchLogic.RETAIN

    def snapshot(self) -> None:
        """Nothing: what can be read again from Kafka is."""


class Commits(StatelessSinkPartition[Any]):  # type: ignore[misc]
    """Commits after each round of the buckets."""

    def __init__(self, stage: Stage) -> None:
        self._commit: Callable[[list[Any]], Iterable[None]] = stage.guarded(stage.commit)

    def write_batch(self, items: list[Any]) -> None:
        """Whatever the items are: the buckets have decided something."""
        self._commit(items)
