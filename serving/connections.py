"""HTTP connections with bounded cost: no endless headers, and readers that hang can be dropped."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .writing import reset

HEADER_SECONDS = 10.0


class BoundedProtocol(H11Protocol):
    """Gives the application its `transport`, so that it can abort it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that sends no whole request head in time is let go."""
        self.app_state = {**self.app_state, "transport": transport}
        super().connection_made(transport)
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
