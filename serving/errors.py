"""Errors in OpenAI's shape: what a client reads, and what stays in the log."""

from typing import Any

from riverdelta.core.errors import Corrupt, NotFound, Refused, RiverdeltaError, Unavailable

RETRY_SECONDS = 1


class ModelNotFound(NotFound):
    """Absent and not allowed look the same."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{model[:100]}` does not exist or you do not have access to it.", "GET /v1/models lists yours."
        )


class VersionGone(Refused):
    """A version asked for by its number that may never be served again."""

    http_status = 410
    code = "version_revoked"


class AnswerRevoked(Unavailable):
    """The version that was writing an answer, or was about to, is fenced off."""

    code = "version_revoked"

    def __init__(self) -> None:
        super().__init__("The version that wrote this answer was revoked.", "Ask again: another version answers.")


class RequestError(RiverdeltaError):
    """An HTTP error that only the HTTP face knows."""

    def __init__(self, status: int, code: str, message: str, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint)
        self.http_status = status
        self.code = code
        self.param = param


def error_body(status: int, code: str | None, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON object that OpenAI's clients expect."""
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": clean(message), "type": kind, "param": param and clean(param), "code": code}}


def describe(error: RiverdeltaError, trusted: bool = False) -> tuple[int, dict[str, Any]]:
    """Status and body of an error. What names databases or folders is told to `trusted` callers only."""
    inside = type(error) in (Unavailable, Corrupt, RiverdeltaError)
    text = "A part of the server is away for now. Try again." if inside and not trusted else str(error)
    return error.http_status, error_body(error.http_status, error.code, text, getattr(error, "param", None))


def headers_of(status: int) -> dict[str, str]:
    """What goes with a status."""
    if status in (429, 503):
        return {"retry-after": str(RETRY_SECONDS)}
    return {"www-authenticate": "Bearer"} if status == 401 else {}


def clean(text: str) -> str:
    """Text that can be written as UTF-8, whatever a request had in it."""
    return text.encode("utf-8", "replace").decode()
