"""Why the engine does not take or does not finish a request; each `code` is stable and reaches the client."""

from riverdelta.core.errors import BadInput, Conflict, NotFound, Refused, Unavailable


class InvalidRequest(BadInput):
    """The prompt or the sampling parameters cannot be served."""

    code = "invalid_request"


class SchemaTooHard(InvalidRequest):
    """Holding an answer to its JSON Schema turned out to cost more than one answer may."""

    code = "schema_too_hard"


class PromptTooLong(InvalidRequest):
    """Prompt and answer would not fit the model's or the engine's length."""

    code = "context_length_exceeded"


class AdapterNotLoaded(NotFound):
    """No weights of this digest are registered with the engine."""

    code = "adapter_not_loaded"


class VersionRevoked(Refused):
    """The weights were revoked; no token may come from them any more."""

    code = "version_revoked"


class AdaptersHalted(Unavailable):
    """The server may not serve adapters for now (it lost its lease); the base still answers."""

    code = "adapters_halted"


class AdapterLoadFailed(Unavailable):
    """The weights could not be read again from their source."""

    code = "adapter_load_failed"


class QueueFull(Unavailable):
    """More requests wait than the engine admits."""

    http_status = 429
    code = "queue_full"


class DuplicateRequest(Conflict):
    """A request of this id is already in the engine."""

    code = "duplicate_request"


class EngineStopped(Unavailable):
    """The step loop does not run."""

    code = "engine_stopped"
