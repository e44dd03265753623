"""Several processes of one dataflow on this machine, and their end when one of them ends.

The processes exchange parcels over loopback TCP in Bytewax's own format, which trusts whoever can connect.
"""

import logging
import multiprocessing
import signal
import socket
import time
from multiprocessing.process import BaseProcess

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings
from riverdelta.core.telemetry import set_up_logs

log = logging.getLogger(__name__)
_STOP_SECONDS = 5.0


def run_cluster(settings: Settings) -> None:
    """Run `streams.workers` processes until told to stop; `Unavailable` when one of them died."""
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(settings.streams.workers)]
    spawn = multiprocessing.get_context("spawn")
    children: list[BaseProcess] = [
        spawn.Process(target=_child, args=(settings, addresses, index), name=f"stream-{index}")
        for index in range(len(addresses))
    ]
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: told.append(received))
    for child in children:
        child.start()
    while not told and all(child.is_alive() for child in children):
        time.sleep(0.1)
    died = [f"{child.name} ({child.exitcode})" for child in children if not child.is_alive()]
    _stop(children)
    if died and not told:
        raise Unavailable(f"Dataflow workers died: {', '.join(died)}.", "Start again: nothing is lost.")


def _child(settings: Settings, addresses: list[str], index: int) -> None:
    from .run import run_process

    set_up_logs()
    run_process(settings, addresses, index)


def _stop(children: list[BaseProcess]) -> None:
    for child in children:
        if child.is_alive():
            child.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            log.warning("killed", extra={"worker": child.name})
            child.kill()
            child.join()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
