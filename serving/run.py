"""`riverdelta serve`: the process around a server, from its socket to its clean end."""

import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings
from riverdelta.core.telemetry import set_up_logs

from .api import create_app
from .connections import BoundedProtocol
from .listening import bind, check_address
from .server import Server

log = logging.getLogger(__name__)
_GRACE_SECONDS = 2  # for answers to end after they were told to
_CONNECTIONS_BESIDE_QUEUE = 512
# How long a thread may keep Python to itself. A fence passes through three threads, a dozen times, each of which would
# wait so long for the step loop.
_SWITCH_SECONDS = 0.0005


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises what keeps the server from starting or running."""
    set_up_logs()
    sys.setswitchinterval(_SWITCH_SECONDS)
    serving = settings.serving
    check_address(serving)
    with bind(serving.host, serving.port) as sock:
        if serving.threads:
            import torch

            torch.set_num_threads(serving.threads)
        http = HttpServer(Server(settings), sock)
        http.run_until_stopped()
        if http.starting.is_alive():
            # Loading a model cannot be interrupted, and aborts Python if it ends meanwhile. Nothing is held yet.
            logging.shutdown()
            os._exit(0)


class HttpServer(uvicorn.Server):
    """uvicorn around a `Server`. HTTP answers at once; the base loads meanwhile."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.starting = threading.Thread(target=self._start, name="start", daemon=True)
        host, port = sock.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        super().__init__(
            uvicorn.Config(
                create_app(server),
                http=BoundedProtocol,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                limit_concurrency=server.settings.serving.max_queue + _CONNECTIONS_BESIDE_QUEUE,
            )
        )

    def run_until_stopped(self) -> None:
        """Serve; returns after a clean stop, raises what broke the server."""
        _many_files()
        self.starting.start()
        self.run(sockets=[self.sock])
        self.server.stop()
        if self.server.failure is not None:
            raise self.server.failure

    def stop(self) -> None:
        """Begin a clean stop, from any thread."""
        self.should_exit = True
        threading.Thread(target=self.server.stop, name="stop", daemon=True).start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        await super().startup(sockets)
        log.info("listening on %s", self.url)

    async def on_tick(self, counter: int) -> bool:
        """An engine that has failed is only cured by a new process."""
        if not self.should_exit and not self.server.alive:
            if self.server.failure is None:
                self.server.failure = Unavailable("The engine has failed.", "The log says why; start the server again.")
            self.stop()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal, and leave it at that: uvicorn would raise it again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            log.info("stopping on %s", signal.Signals(number).name)
            self.stop()

        held = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        try:
            self.server.start()
        except Exception as error:
            self.server.failure = error
            self.stop()


def _many_files() -> None:
    """Each connection is a file: take as many as the system lets us."""
    with suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
