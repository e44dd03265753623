"""The dataflow: read ▸ sort into buckets ▸ admit, one owner per bucket ▸ commit."""

import gc
import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import bytewax.operators as op
from bytewax._bytewax import cluster_main
from bytewax.dataflow import Dataflow

from riverdelta.core.errors import BadInput
from riverdelta.core.patience import Patience, Stopped
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.core.telemetry import set_up_logs
from riverdelta.registry.belonging import key_store, subject_key
from riverdelta.registry.ledger import Gap, Ledger
from riverdelta.registry.wakeups import Wakeups

from . import topics
from .delivery import Delivery
from .ending import Ending
from .intake import Intake
from .metrics import Metrics
from .source import Reader, Source
from .stage import Owned, Stage
from .worker import Worker

log = logging.getLogger(__name__)
_EPOCH = timedelta(seconds=1)  # how far a reader may run ahead; nothing is snapshotted, Kafka is read again


def run(settings: Settings, addresses: list[str], index: int) -> None:
    """Run one process of the dataflow until SIGTERM or SIGINT: alone, or as number `index` of those on `addresses`."""
    set_up_logs()
    began = time.monotonic()
    log.info("starting", extra={"worker": index})
    ending = Ending()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ending.stop.set())
    patience = Patience(ending.stop)
    metrics = Metrics(settings.streams.metrics_adapters)
    metrics.serve(settings.metrics_host, settings.streams.metrics_port + index if settings.streams.metrics_port else 0)
    wakeups = Wakeups(settings)
    ledger = None
    try:
        ledger = patience(lambda: Ledger.open(settings.ledger_url), "opening the ledger")
        buckets = _fixed_buckets(settings, ledger)
        patience(lambda: topics.ensure(settings), "looking at the topics")
        worker = Worker(
            settings,
            ledger,
            ObjectStore(settings.store_url),
            patience(partial(key_store, ledger, settings), "opening the key store"),
            Delivery(settings, patience),
            patience,
            metrics,
            lambda adapter: wakeups.send(settings.topics.jobs, adapter),
            ThreadPoolExecutor(1, "seal"),
        )
        stage = Stage(worker, ending, began)
        intake = Intake(patience(partial(subject_key, ledger, settings), "looking at the keys"), buckets)
        floors = partial(_floors, ledger, patience, buckets)
        record = partial(_record, ledger, patience)
        source = Source(lambda number, count: Reader(settings, number, count, floors, record, ending, metrics))
        _spare_the_collector()
        cluster_main(dataflow(source, intake, stage), addresses, index, epoch_interval=_EPOCH)  # type: ignore[no-untyped-call]
        stage.close(settings.running().get("embedded") == "true")
    except Stopped:
        log.info("stopped before it began")
    finally:
        wakeups.close()
        if ledger is not None:
            ledger.close()
    if ending.error is not None:
        raise ending.error


def dataflow(source: Source, intake: Intake, stage: "Stage") -> Dataflow:
    """Read ▸ sort into buckets ▸ admit ▸ commit. Exactly one worker owns a bucket, whatever partition feeds it."""
    flow = Dataflow("riverdelta")
    reads = op.input("read", flow, source)
    parcels = op.flat_map_batch("sort", reads, stage.guarded(intake.sort_all))
    decided = op.stateful_batch("admit", parcels, lambda _resumed: Owned(stage))
    op.output("commit", decided, stage)
    return flow


def _spare_the_collector() -> None:
    """Open entries are many and long-lived, and none is part of a circle: looking at them all again and again costs an
    eighth of the work."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _fixed_buckets(settings: Settings, ledger: Ledger) -> int:
    """The number of buckets, which recorded positions rest on: it cannot change in the life of a ledger."""
    asked = settings.streams.buckets
    held = int(ledger.remember("buckets", str(asked)))
    if held != asked:
        raise BadInput(
            f"This ledger's adapters are spread over {held} buckets, not {asked}.", f"Set streams.buckets to {held}."
        )
    return held


def _floors(ledger: Ledger, patience: Patience, buckets: int, run: str) -> dict[int, int]:
    """Per partition, the lowest position of any bucket; none for a partition that not every bucket has recorded."""
    positions = patience(lambda: ledger.positions(run), "reading the ledger")
    held: dict[int, list[int]] = {}
    for (partition, _), offset in positions.items():
        held.setdefault(partition, []).append(offset)
    return {partition: min(offsets) for partition, offsets in held.items() if len(offsets) == buckets}


def _record(ledger: Ledger, patience: Patience, gap: Gap) -> None:
    patience(lambda: ledger.record_gap(gap), "recording a gap")
