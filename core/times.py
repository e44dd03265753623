"""Times as they are written down: RFC 3339 in UTC with milliseconds."""

from datetime import UTC, datetime, timedelta


def now() -> str:
    """The time now."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def later(at: str, seconds: float) -> str:
    """A time so many seconds after another, in the same form.

    >>> later("2026-11-24T10:00:00.000Z", 90)
    '2026-11-24T10:01:30.000Z'
    """
    moved = datetime.fromisoformat(at) + timedelta(seconds=seconds)
    return moved.isoformat(timespec="milliseconds").replace("+00:00", "Z")
