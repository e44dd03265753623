"""Where a server may listen: an address that only this machine reaches, or one whose callers have keys."""

import ipaddress
import socket

from riverdelta.core.errors import BadInput, Conflict
from riverdelta.core.settings import Serving


def check_address(serving: Serving) -> None:
    """`BadInput` when keys are missing for an address beyond loopback."""
    if not serving.api_keys and not is_loopback(serving.host):
        raise BadInput(
            f"Serving on {serving.host} needs API keys.",
            "Set serving.api_keys to a file of keys, or serve on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket of our own, before anything slow; `Conflict` when the port is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # `localhost` is both; most clients try IPv4.
        family, kind, protocol, _, address = min(found, key=lambda option: option[0] != socket.AF_INET)
        # asyncio turns Nagle's algorithm off only where the protocol is named; with it a token can wait 40 ms.
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Two servers that bind without listening would both succeed: listening settles it.
        sock.listen(2048)
    except OSError as error:
        raise Conflict(
            f"Cannot listen on {host}:{port}: {error.strerror or error}.",
            "Stop what listens there, or choose another with --port (0: any free one).",
        ) from error
    return sock
