"""Around every request: its id, its caller, bounds on its body, one line in the log."""

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_keys import Keys
from .errors import error_body, headers_of
from .metrics import Metrics
from .writing import ReaderGone, Writers, abort, drained, send_json

log = logging.getLogger(__name__)
MAX_BODY = 4 << 20
_BODY_SECONDS = 30.0
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OPEN = {"/livez", "/readyz"}
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Envelope:
    """ASGI middleware. `scope["state"]` gets `request_id`, `caller`, and `said`: fields for the log line."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, writers: Writers) -> None:
        self._app, self._keys, self._metrics, self._writers = app, keys, metrics, writers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(12)
        said: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, said=said)
        began = time.monotonic()
        status, whole = 0, False

        async def sending(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)
            await drained(scope)  # as long as it waits for its reader it can be cut off
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            refused = self._refused(scope, headers)
            if refused is None:
                await self._app(scope, _bounded(receive), sending)
            else:
                code, body = refused
                await send_json(self._writers, sending, code, body, headers_of(code))
        except ReaderGone:
            status = 499  # nginx's, for a client that did not wait
            await abort(scope)
        except Exception:
            log.exception("request failed", extra={"request_id": request_id})
            if not whole:
                await abort(scope)
        finally:
            self._note(scope, request_id, status, time.monotonic() - began, said)

    def _refused(self, scope: Scope, headers: Headers) -> tuple[int, dict[str, Any]] | None:
        path = scope["path"]
        if path in _OPEN:
            return None
        caller = self._keys.caller(headers.get("authorization", ""))
        if caller is None:
            return 401, error_body(401, "invalid_api_key", "No valid API key was given: send Authorization: Bearer.")
        scope["state"]["caller"] = caller
        scope["state"]["said"]["caller"] = caller.name
        # Without keys a web page must not get here through its visitor's browser, under a name that it points at us.
        if not self._keys.required and not _LOCAL_HOST.fullmatch(headers.get("host", "")):
            return 403, error_body(403, "refused", "Without API keys this server answers to localhost only.")
        if path.startswith("/admin/") and not caller.admin:
            return 403, error_body(403, "refused", "This key may not act on the registry.")
        if scope["method"] == "POST":
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > MAX_BODY:
                return 413, error_body(413, "request_too_large", f"The body may have {MAX_BODY} bytes.")
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return 415, error_body(415, "unsupported_media_type", "Send JSON, with Content-Type: application/json.")
        return None

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float, said: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http(route, status)
        level = logging.DEBUG if route in (*_OPEN, "/metrics") and status in (200, 503) else logging.INFO
        fields = {"request_id": request_id, "route": route, "status": status, "seconds": round(seconds, 4), **said}
        log.log(level, "%s %s", scope["method"], route, extra=fields)


def _bounded(receive: Receive) -> Receive:
    """The body in time and of a size, else an HTTP error where the application reads it."""
    deadline = time.monotonic() + _BODY_SECONDS
    size, whole = 0, False

    async def receiving() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(408, f"The body did not arrive within {_BODY_SECONDS:.0f} s.") from error
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > MAX_BODY:
            raise HTTPException(413, f"The body may have {MAX_BODY} bytes.")
        return message

    return receiving
