"""Logs as one JSON object a line or as plain lines, the same fields in both."""

import json
import logging
import os
import sys
from datetime import UTC, datetime, timedelta

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def now() -> str:
    """The time now, RFC 3339 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def later(at: str, seconds: float) -> str:
    """A time so many seconds after another, in the same form.

    >>> later("2026-11-24T10:00:00.000Z", 90)
    '2026-11-24T10:01:30.000Z'
    """
    moved = datetime.fromisoformat(at) + timedelta(seconds=seconds)
    return moved.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Format(logging.Formatter):
    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in vars(record).items() if name not in _PLAIN}
        text = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(
                {
                    "at": now(),
                    "level": record.levelname.lower(),
                    "logger": record.name,
                    "message": text,
                    **fields,
                },
                default=str,
            )
        exception = fields.pop("exception", None)
        tail = "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{now()[11:23]} {record.levelname.lower():7} {text}{tail}"
        return f"{line}\n{exception}" if exception else line


def set_up_logs(level: str = "") -> None:
    """Log to standard error. RIVERDELTA_LOG_JSON=1 chooses JSON, RIVERDELTA_LOG_LEVEL the level (default info)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format(os.environ.get("RIVERDELTA_LOG_JSON", "") == "1"))
    logging.basicConfig(
        level=(level or os.environ.get("RIVERDELTA_LOG_LEVEL", "info")).upper(),
        handlers=[handler],
        force=True,
    )
    for noisy in ("alembic", "httpx", "mlflow", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Its warnings are about its own loop on a busy machine; who uses it says what did not work.
    logging.getLogger("kafka").setLevel(logging.ERROR)
