"""`riverdelta publish`: JSON lines to the events topic, every delivery checked."""

import json
import sys
from pathlib import Path
from typing import IO

import typer

from riverdelta.core.errors import NotFound
from riverdelta.core.printing import many, print_json
from riverdelta.core.settings import Settings


def publish(settings: Settings, file: Path, adapter: str, subject: str, as_json: bool) -> None:
    """Publish a file, or standard input for `-`, and say what arrived.

    Of a file nothing is sent when one of its lines is no event.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from riverdelta.streams.publish import check_lines
    from riverdelta.streams.publish import publish as send

    columns = (TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _open(file) as lines, shown as bar:
        total = None
        if str(file) != "-" and lines.seekable():
            total = check_lines(fill(line, adapter, subject) for line in lines)
            lines.seek(0)
        task = bar.add_task("", total=total)
        done = send(
            settings,
            (fill(line, adapter, subject) for line in lines),
            progress=lambda count: bar.update(task, completed=count),
        )
    if as_json:
        print_json({"events": done.events, "adapters": dict(done.adapters), "last": done.last})
    else:
        of = ", ".join(f"{name} {count}" for name, count in sorted(done.adapters.items()))
        typer.echo(
            f"{many(done.events, 'event')} arrived on {settings.topics.events} at {settings.kafka.bootstrap}"
            f"{f' ({of})' if of else ''}."
        )


def fill(line: bytes, adapter: str, subject: str) -> bytes:
    """An event's JSON with the adapter and subject that it does not name itself; what is not JSON stays as it is.

    >>> fill(b'{"text": "hi"}', "acme", "ann")
    b'{"text":"hi","adapter":"acme","subject":"ann"}'
    """
    if not (adapter or subject) or not line.strip():
        return line
    try:
        held = json.loads(line)
    except ValueError:
        return line
    if not isinstance(held, dict):
        return line
    data = held.get("data") if "specversion" in held else held  # CloudEvents, structured mode
    if not isinstance(data, dict):
        return line
    if adapter:
        data.setdefault("adapter", adapter)
    if subject and "subject" not in data:
        held.setdefault("subject", subject)
    return json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()


def _open(file: Path) -> IO[bytes]:
    if str(file) == "-":
        return sys.stdin.buffer
    try:
        return file.open("rb")
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}.", "Give a file of JSON lines, or -.") from error
