"""Sending answers: bytes leave only while they may, and a reader that does not read is dropped."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from riverdelta.core.errors import RiverdeltaError

from .errors import describe, headers_of
from .permit import Permit

PATIENCE = 30.0
_FLUSH_SECONDS = 5.0


class ReaderGone(Exception):
    """Nobody takes the answer, or nobody may any more; the connection is to be dropped."""


class Writers:
    """The answers that are being sent now. Belongs to the event loop; `flush` may be called from any thread."""

    def __init__(self, permit: Permit) -> None:
        self.permit = permit
        self.loop: asyncio.AbstractEventLoop | None = None
        self._writing: dict[asyncio.Task[Any], str | None] = {}
        self._cut_off: set[asyncio.Task[Any]] = set()

    def flush(self, digests: Collection[str]) -> Callable[[], object]:
        """Begin to clear the way between the check and the socket of what these weights, which pass it no more, have
        produced. Once what is returned has returned, nothing is there: what had passed is written, and answers that
        wait for a slow reader are cut off."""
        fenced = frozenset(digests)
        if self.loop is None or self.loop.is_closed():
            return lambda: None
        begun = asyncio.run_coroutine_threadsafe(self._cut(fenced.__contains__), self.loop)
        return lambda: begun.result(_FLUSH_SECONDS)

    def halt(self) -> None:
        """Cut off every adapter's answers that wait for a slow reader, without waiting for that."""
        if self.loop is not None and not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._cut(lambda _: True), self.loop)

    async def _cut(self, fenced: Callable[[str], bool]) -> None:
        for task, digest in self._writing.items():
            if digest is not None and fenced(digest):  # it passed the check, and waits for its reader
                self._cut_off.add(task)
                task.cancel()

    async def write(self, send: Send, message: dict[str, Any], digest: str | None) -> None:
        """Send what `digest` (None: nothing but the base) produced. Between the check and the socket nothing else runs,
        unless the reader is slow. `ReaderGone` when it takes nothing for too long or is cut off."""
        task = asyncio.current_task()
        assert task is not None
        self.permit.check(digest)
        self._writing[task] = digest
        try:
            async with asyncio.timeout(PATIENCE):
                await send(message)
        except TimeoutError as error:
            raise ReaderGone from error
        except asyncio.CancelledError as error:
            if task not in self._cut_off:
                raise
            task.uncancel()
            raise ReaderGone from error
        finally:
            del self._writing[task]
            self._cut_off.discard(task)


async def drained(scope: Scope) -> None:
    """Return once the system has all that was written to this connection; `ReaderGone` if that takes too long."""
    wait = scope.get("state", {}).get("drained")
    if wait is not None:
        try:
            async with asyncio.timeout(PATIENCE):
                await wait()
        except TimeoutError as error:
            raise ReaderGone from error


async def abort(scope: Scope) -> None:
    """Drop the connection with whatever it has not taken, in the system's buffers too."""
    transport = scope.get("state", {}).get("transport")
    if transport is not None:
        reset(transport)
        await asyncio.sleep(0)  # until the server knows that the client is gone


def reset(transport: asyncio.Transport) -> None:
    """Close a connection at once: TCP's reset, not its orderly end."""
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def gone(receive: Receive) -> None:
    """Return once the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def frame(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def send_json(
    writers: Writers, send: Send, status: int, body: Any, headers: dict[str, str], digest: str | None = None
) -> None:
    """A whole JSON answer."""
    data = msgspec.json.encode(body)
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    raw += [(name.encode(), value.encode()) for name, value in headers.items()]
    await writers.write(send, {"type": "http.response.start", "status": status, "headers": raw}, digest)
    await writers.write(send, {"type": "http.response.body", "body": data}, digest)


async def send_stream(
    writers: Writers, send: Send, frames: AsyncIterator[bytes], headers: dict[str, str], digest: str | None
) -> str:
    """Server-sent events as `frames` makes them. An error before the first becomes a plain JSON answer, a later one an
    event of its own, with no [DONE] after it. Returns how it ended: `ok` or the error's code."""
    started = False
    try:
        async for data in frames:
            if not started:
                raw = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                raw += [(name.encode(), value.encode()) for name, value in headers.items()]
                await writers.write(send, {"type": "http.response.start", "status": 200, "headers": raw}, digest)
                started = True
            await writers.write(send, {"type": "http.response.body", "body": data, "more_body": True}, digest)
    except RiverdeltaError as error:
        status, body = describe(error)
        if not started:
            await send_json(writers, send, status, body, {**headers, **headers_of(status)})
            return error.code
        await writers.write(send, {"type": "http.response.body", "body": frame(body), "more_body": True}, None)
        await writers.write(send, {"type": "http.response.body", "body": b""}, None)
        return error.code
    await writers.write(send, {"type": "http.response.body", "body": b""}, None)
    return "ok"
