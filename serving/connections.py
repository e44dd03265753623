"""HTTP connections with bounded cost: no endless headers, and what readers have not taken can be dropped."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .writing import reset

HEADER_SECONDS = 10.0


class BoundedProtocol(H11Protocol):
    """Gives the application its `transport`, so that it can abort it, and `drained`, to wait until the system has all
    that was written."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that sends no whole request head in time is let go."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `drained` waits for the last byte
        self.app_state = {**self.app_state, "transport": transport, "drained": self.flow.drain}
        self.loop.call_later(HEADER_SECONDS, self._no_request_yet)

    def timeout_keep_alive_handler(self) -> None:
        """An idle client that has not even taken its last answer would keep the connection for ever."""
        if self.transport.get_write_buffer_size():
            reset(self.transport)
        else:
            super().timeout_keep_alive_handler()

    def _no_request_yet(self) -> None:
        cycle: Any = self.cycle
        if cycle is None and not self.transport.is_closing():
            reset(self.transport)
