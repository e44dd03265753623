"""The processes of a dataflow: one alone, several on this machine, or one of those that several machines run.

They exchange parcels over TCP in Bytewax's own format, which trusts whoever can connect: over loopback on one machine,
between machines over a network that lets in nobody else.
"""

import logging
import multiprocessing
import signal
import socket
import time
from multiprocessing.process import BaseProcess

from riverdelta.core.errors import BadInput, Unavailable
from riverdelta.core.settings import Settings

from .run import run as run_process

log = logging.getLogger(__name__)
_STOP_SECONDS = 5.0


def run(settings: Settings) -> None:
    """Run what the settings ask for until SIGTERM or SIGINT. `BadInput` when they contradict each other."""
    streams = settings.streams
    if not streams.cluster:
        if streams.workers > 1:
            _run_here(settings)
        else:
            run_process(settings, [], 0)
        return
    if streams.workers > 1:
        raise BadInput(
            "streams.workers starts processes on this machine, streams.cluster joins those of others.",
            "Give one of them.",
        )
    addresses = [address.strip() for address in streams.cluster.split(",")]
    if streams.process >= len(addresses):
        raise BadInput(
            f"streams.process is {streams.process}, and streams.cluster names {len(addresses)} addresses.",
            "Count processes from 0, in the order of their addresses.",
        )
    run_process(settings, addresses, streams.process)


def _run_here(settings: Settings) -> None:
    """Run `streams.workers` processes; `Unavailable` when one of them died."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(settings.streams.workers)]
    spawn = multiprocessing.get_context("spawn")
    children: list[BaseProcess] = [
        spawn.Process(target=run_process, args=(settings, addresses, index), name=f"stream-{index}")
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


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address on which nobody listens."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
