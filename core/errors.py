"""Errors that say what went wrong and what to do next, with the exit code and HTTP status that they mean."""


class RiverdeltaError(Exception):
    """Base of every error that a user may see.

    `message` says what went wrong, `hint` what to do next. `exit_code` is what a command ends with,
    `http_status` what an HTTP face answers with, `code` a stable word for scripts.
    """

    exit_code = 1
    http_status = 500
    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadInput(RiverdeltaError):
    """A name, option, file or message that does not have the form it must have."""

    exit_code = 2
    http_status = 400
    code = "bad_input"


class NotFound(RiverdeltaError):
    """No such adapter, version, segment or file."""

    exit_code = 3
    http_status = 404
    code = "not_found"


class Gone(NotFound):
    """What a check needs was there once: Kafka's retention, or a forget horizon, has let it go since."""

    exit_code = 9
    http_status = 410
    code = "gone"


class Conflict(RiverdeltaError):
    """The ledger has moved on since the caller looked: read again and decide anew."""

    exit_code = 4
    http_status = 409
    code = "conflict"


class StaleEpoch(Conflict):
    """Work done before a forget: it may contain what must not be learned, and is refused."""

    code = "stale_epoch"


class Refused(RiverdeltaError):
    """Understood, and not allowed: a revoked version, a cap reached, a tenant that may not."""

    exit_code = 5
    http_status = 403
    code = "refused"


class Unsupported(RiverdeltaError):
    """A valid thing that Riverdelta cannot handle, such as an adapter kind that serving has no path for."""

    exit_code = 6
    http_status = 422
    code = "unsupported"


class Corrupt(RiverdeltaError):
    """Stored bytes that are not what was written."""

    exit_code = 7
    code = "corrupt"


class Unavailable(RiverdeltaError):
    """A part that is away for now (broker, database, store): try again."""

    exit_code = 8
    http_status = 503
    code = "unavailable"
