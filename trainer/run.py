"""The trainer as a process: opens its parts, turns until told to stop."""

import logging
import signal
import threading
from functools import partial

from riverdelta.core import base as base_files
from riverdelta.core.patience import Patience, Stopped
from riverdelta.core.settings import Settings, new_holder
from riverdelta.core.store import ObjectStore
from riverdelta.core.telemetry import set_up_logs
from riverdelta.registry.belonging import check_base, key_store
from riverdelta.registry.ledger import Ledger
from riverdelta.registry.wakeups import Wakeups

log = logging.getLogger(__name__)


def run(settings: Settings, stop: threading.Event | None = None) -> None:
    """Train until SIGTERM, SIGINT or `stop`; leaves within one step."""
    set_up_logs()
    stop = stop or threading.Event()
    wake = threading.Event()

    def leave(*_: object) -> None:
        stop.set()
        wake.set()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)
        signal.signal(signal.SIGINT, leave)

    from .base import Base
    from .metrics import Metrics
    from .worker import Worker

    options = settings.trainer
    metrics = Metrics()
    metrics.serve(settings.metrics_host, options.metrics_port)
    folder = base_files.resolve(settings.base)
    log.info("Loading the base model from %s", folder)
    base = Base.load(folder, options.device, options.dtype, options.threads)
    patience = Patience(stop)
    wakeups = Wakeups(settings)
    ledger = None
    try:
        ledger = patience(lambda: _open(settings, base.digest), "Opening the ledger")
        wakeups.listen(settings.topics.jobs, wake)
        worker = Worker(
            ledger,
            ObjectStore(settings.store_url),
            patience(partial(key_store, ledger, settings), "Opening the key store"),
            base,
            settings.data / "trainer",
            new_holder("trainer"),
            stop,
            lambda adapter: wakeups.send(settings.topics.releases, adapter),
            metrics,
        )
        log.info("Ready to train on %s with %d threads", base.device, base.threads)
        try:
            while not stop.is_set():
                wake.clear()
                if not worker.turn():
                    wake.wait(options.poll_seconds)
        finally:
            worker.close()
    except Stopped:
        pass
    finally:
        wakeups.close()
        if ledger is not None:
            ledger.close()
    log.info("Stopped")


def _open(settings: Settings, base: str) -> Ledger:
    """The ledger, whose adapters must be of this base."""
    ledger = Ledger.open(settings.ledger_url)
    check_base(ledger, base)
    return ledger
