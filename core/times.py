"""Times as they are written down: RFC 3339 in UTC with milliseconds."""

from datetime import UTC, datetime, timedelta


def now() -> str:
    """The time now."""
    return _written(datetime.now(UTC))


def of_epoch(seconds: float) -> str:
    """A time given in seconds since 1970.

    >>> of_epoch(0.25)
    '1970-01-01T00:00:00.250Z'
    """
    return _written(datetime.fromtimestamp(seconds, UTC))


def later(at: str, seconds: float) -> str:
    """A time so many seconds after another, in the same form.

    >>> later("2026-11-24T10:00:00.000Z", 90)
    '2026-11-24T10:01:30.000Z'
    """
    return _written(datetime.fromisoformat(at) + timedelta(seconds=seconds))


def _written(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
