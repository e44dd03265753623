"""A server in a process of its own that stamps what it sends: when each message was written, and by which weights.

    python -m tests.serving.stamped FILE < settings.json

CLOCK_MONOTONIC is the same for every process of a machine, so stamps can be compared with a fence's acknowledgement.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from riverdelta.core.settings import Settings


class Stamped:
    """A running server, and the file of its stamps."""

    def __init__(self, settings: Settings, stamps: Path) -> None:
        self.settings, self.stamps = settings, stamps
        self.url = settings.serving_url
        command = [sys.executable, "-m", "tests.serving.stamped", str(stamps)]
        with stamps.with_suffix(".log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)
        assert self.process.stdin is not None
        self.process.stdin.write(settings.model_dump_json().encode())
        self.process.stdin.close()

    def await_ready(self) -> None:
        """Return once it serves adapters."""
        while True:
            if self.process.poll() is not None:
                raise RuntimeError("the server did not start")
            try:
                if httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    def written(self) -> Iterator[tuple[float, float, str]]:
        """Every message so far that weights produced: when its last check was behind it, when it had left, and their
        digest. A process that is stopped may be so between the two."""
        with self.stamps.open() as lines:
            for line in lines:
                if line.endswith("\n"):
                    checked, left, digest = line.split()
                    yield float(checked), float(left), digest

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def fleet_of(settings: Settings, count: int, folder: Path) -> Iterator[list[Stamped]]:
    """So many ready servers on the same ledger."""
    servers: list[Stamped] = []
    try:
        for _ in range(count):
            servers.append(one_more(settings, folder))
        for server in servers:
            server.await_ready()
        yield servers
    finally:
        for server in servers:
            server.stop()


def one_more(settings: Settings, folder: Path) -> Stamped:
    """A further server, starting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serving = settings.serving.model_copy(update={"port": port})
    return Stamped(settings.model_copy(update={"serving": serving}), folder / f"stamps-{port}")


def serve(stamps: str) -> None:
    """Serve the settings on standard input, stamping every write after it was done."""
    from riverdelta.serving import run, writing

    file = os.open(stamps, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    write = writing.Writers.write

    async def stamping(self: Any, send: Any, message: Any, digest: str | None) -> None:
        async def sending(part: Any) -> None:
            checked = time.monotonic()
            await send(part)
            if digest is not None:
                os.write(file, f"{checked:.6f} {time.monotonic():.6f} {digest}\n".encode())

        await write(self, sending, message, digest)

    writing.Writers.write = stamping  # type: ignore[method-assign]
    run.run(Settings.model_validate_json(sys.stdin.read()))


if __name__ == "__main__":
    serve(sys.argv[1])
