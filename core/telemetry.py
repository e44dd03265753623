"""Logs as one JSON object a line or as plain lines, the same fields in both."""

import json
import logging
import os
import sys

from .times import now

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


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


def set_up_logs() -> None:
    """Log to standard error. RIVERDELTA_LOG_JSON=1 chooses JSON, RIVERDELTA_LOG_LEVEL the level (default info)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format(os.environ.get("RIVERDELTA_LOG_JSON", "") == "1"))
    logging.basicConfig(
        level=os.environ.get("RIVERDELTA_LOG_LEVEL", "info").upper(),
        handlers=[handler],
        force=True,
    )
    for noisy in ("alembic", "httpx", "mlflow", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Its warnings are about its own loop on a busy machine; who uses it says what did not work.
    logging.getLogger("kafka").setLevel(logging.ERROR)
