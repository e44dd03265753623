"""The HTTP application: routes, errors in one shape, health and metrics."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from riverdelta.core.errors import RiverdeltaError

from . import admin, catalogue, completions
from .envelope import Envelope
from .errors import describe, error_body, headers_of
from .server import Server


class ErrorDetail(BaseModel):
    """Why, in OpenAI's words; `code` is stable."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Any answer that is not a success."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(server: Server) -> ASGIApp:
    """The application over a server that may still be starting."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.writers.loop = asyncio.get_running_loop()
        yield

    app = FastAPI(
        title="Riverdelta",
        description="Adapters that keep learning, behind OpenAI's API.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))],
        responses=_ERRORS,
    )
    app.add_exception_handler(RiverdeltaError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    for router in (completions.routes(server), catalogue.routes(server), admin.routes(server), _health(server)):
        app.include_router(router)
    _without_422(app)
    return Envelope(app, server.keys, server.metrics, server.writers)


def _health(server: Server) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/livez")
    async def livez() -> Response:
        """200 unless a restart is the only cure."""
        return PlainTextResponse("ok" if server.alive else "dead", 200 if server.alive else 503)

    @router.get("/readyz")
    async def readyz() -> Response:
        """200 when the base is loaded, the lease is held and the releases have been read."""
        lacking = server.lacking()
        text = f"waiting for: {', '.join(lacking)}" if lacking else "ok"
        return PlainTextResponse(text, 503 if lacking else 200)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus metrics; they name adapters, so with API keys one of an admin of all of them is needed."""
        if not request.state.caller.everything:
            return JSONResponse(error_body(403, "refused", "This key may not read metrics."), 403)
        return Response(await asyncio.to_thread(server.metrics.text), media_type=CONTENT_TYPE_LATEST)

    return router


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, RiverdeltaError)
    status, body = describe(error, trusted=request.state.caller.admin)
    request.state.said["code"] = error.code
    return JSONResponse(body, status, headers_of(status))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    status, body = 400, _first(error.errors())
    request.state.said["code"] = body["error"]["code"]
    return JSONResponse(body, status)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large"}
    body = error_body(error.status_code, code.get(error.status_code, "bad_request"), str(error.detail))
    return JSONResponse(body, error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    """The envelope logs it."""
    text = f"The server failed. Its log names request {request.state.request_id}."
    return JSONResponse(error_body(500, "internal_error", text), 500)


def _first(errors: Sequence[Any]) -> dict[str, Any]:
    """What was wrong first, in the words that OpenAI uses where it has some."""
    # A field that may be of several types reports each: the longest path is the type that was meant.
    error = max(errors, key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    where = ".".join(str(part) for part in error["loc"] if part != "body" and not _is_type_name(part)) or None
    if error["type"] == "extra_forbidden":
        return error_body(400, "unknown_parameter", f"Unrecognized request argument supplied: {where}.", where)
    if error["type"] == "json_invalid":
        return error_body(400, "invalid_json", "The body is not valid JSON.")
    if error["type"] == "missing" and where is None:
        return error_body(400, "missing_body", "The body must be a JSON object.")
    code = error["type"] if error["type"] == "unsupported_parameter" else "invalid_value"
    message = f"Invalid value for {where}: {error['msg']}." if where else f"{error['msg']}."
    return error_body(400, code, message, where)


def _is_type_name(part: Any) -> bool:
    """Whether a part of a pydantic location names a branch of a union, which no client wrote."""
    return isinstance(part, str) and (part in ("str", "int", "TextPart") or "[" in part or "-" in part)


def _without_422(app: FastAPI) -> None:
    """FastAPI documents its own shape for invalid bodies; here they are answered with 400 and `ErrorBody`."""
    make: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
        return app.openapi_schema or document

    app.openapi = openapi  # type: ignore[method-assign]
