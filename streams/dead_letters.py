"""Dead letters: what was refused, on `<events>.DLT` with its original bytes, the reason and the origin in headers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from riverdelta.core.errors import BadInput
from riverdelta.core.settings import Settings
from riverdelta.core.times import now

from .items import DeadLetter, Headers
from .whole_topic import read_all

REASONS = (
    *("empty", "malformed", "too_large", "invalid", "type", "adapter"),
    *("unknown_adapter", "adapter_cap", "unmatched"),
)
_PREFIX = "dlt."


@dataclass(frozen=True)
class HeldLetter:
    """A dead letter as the topic holds it. `whole` is False where the value did not fit and only its start is kept."""

    reason: str
    message: str
    topic: str
    incarnation: str
    origin_partition: int
    origin_offset: int
    at: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    whole: bool


def headers_of(letter: DeadLetter, topic: str, whole: bool = True) -> list[tuple[str, bytes | None]]:
    """The original headers, then ours."""
    ours = {
        "reason": letter.reason,
        "message": letter.message[:1000],
        "topic": topic,
        "incarnation": letter.where[0],
        "partition": letter.where[1],
        "offset": letter.offset,
        "at": now(),
    }
    if not whole:
        ours["whole"] = "no"
    kept = [(name, value) for name, value in letter.raw.headers if not name.startswith(_PREFIX)]
    return kept + [(f"{_PREFIX}{name}", str(value).encode()) for name, value in ours.items()]


def list_dead_letters(settings: Settings) -> list[HeldLetter]:
    """The dead letters that Kafka holds, oldest first, each origin once."""
    found: dict[tuple[str, int, int], HeldLetter] = {}
    for record in read_all(settings, settings.topics.dead_letters):
        letter = _read(record)
        found.setdefault((letter.incarnation, letter.origin_partition, letter.origin_offset), letter)
    return sorted(found.values(), key=lambda letter: letter.at)


def check_reason(reason: str) -> None:
    """`BadInput` for a reason that no dead letter has."""
    if reason not in REASONS:
        raise BadInput(f"No dead letter has the reason {reason!r}.", f"Give one of {', '.join(REASONS)}.")


def replay_dead_letters(settings: Settings, selection: Callable[[HeldLetter], bool]) -> tuple[int, int]:
    """Publish the original bytes of the selected letters on the events topic again, every delivery checked.

    Returns how many were published, and how many cannot be because the topic holds them cut short.
    """
    from .publish import Publisher

    chosen = [letter for letter in list_dead_letters(settings) if selection(letter)]
    whole = [letter for letter in chosen if letter.whole]
    with Publisher(settings) as publisher:
        for number, letter in enumerate(whole, start=1):
            publisher.send(f"dead letter {number}", letter.key, letter.value, letter.headers)
    return len(whole), len(chosen) - len(whole)


def _read(record: Any) -> HeldLetter:
    ours = {name[len(_PREFIX) :]: value.decode() for name, value in record.headers if name.startswith(_PREFIX)}
    return HeldLetter(
        ours.get("reason", ""),
        ours.get("message", ""),
        ours.get("topic", ""),
        ours.get("incarnation", ""),
        int(ours.get("partition", -1)),
        int(ours.get("offset", -1)),
        ours.get("at", ""),
        record.key,
        record.value,
        tuple((name, value) for name, value in record.headers if not name.startswith(_PREFIX)),
        ours.get("whole") != "no",
    )
