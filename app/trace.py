"""`riverdelta trace`: what became of one event, from its offset to the versions that learned it."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import msgspec
import typer

from riverdelta.core.errors import NotFound
from riverdelta.core.printing import print_json
from riverdelta.core.settings import Settings
from riverdelta.registry.belonging import open_ledger, subject_key
from riverdelta.registry.ledger import Gap, Ledger, ManifestEntry
from riverdelta.registry.ledger.decisions import lineage

_ID_BYTES = 12  # of an event's hash, the id's share; the rest is the source's


@dataclass(frozen=True)
class Trace:
    """An event as the ledger knows it. `versions` hold it; `revoked` are those that had learned its segment. `live`:
    the adapter's release holds it."""

    adapter: str
    index: int
    partition: int
    offset: int
    incarnation: str
    segment: int
    outcome: str
    cause: str
    tombstone: bool
    versions: list[int]
    revoked: list[int]
    release: int
    live: bool


def trace(settings: Settings, event: str, source: str, adapter: str, as_json: bool) -> None:
    """Print what is known of an event; `NotFound` when nothing is."""
    ledger = open_ledger(settings)
    try:
        found = list(find(ledger, settings, event, source, adapter))
        gaps = [] if found else ledger.gaps()
    finally:
        ledger.close()
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        for each in found:
            typer.echo(describe(each))
    if not found:
        raise NotFound(
            f"The ledger has no entry for {event}. {_gap(gaps, event) or _refusal(settings, event)}".strip(),
            "An event becomes an entry when its segment is sealed; a duplicate becomes none. "
            "`riverdelta dlt list` shows what was refused.",
        )


def find(ledger: Ledger, settings: Settings, event: str, source: str = "", adapter: str = "") -> Iterator[Trace]:
    """Every entry that an event became. `event` is a producer's id or PARTITION:OFFSET."""
    at = re.fullmatch(r"(\d+):(\d+)", event)
    hashed = b"" if at else subject_key(ledger, settings).event(source, event)

    def matches(entry: ManifestEntry) -> bool:
        if at is not None:
            return (entry.partition, entry.offset) == (int(at[1]), int(at[2]))
        return entry.event == hashed if source else entry.event[:_ID_BYTES] == hashed[:_ID_BYTES]

    names = [adapter] if adapter else [record.name for record in ledger.adapters()]
    for name in names:
        head, versions = ledger.adapter(name), ledger.versions(name)
        for segment in ledger.segments(name):
            manifest = ledger.manifest(name, segment.number)
            for position, entry in enumerate(manifest.entries):
                if not matches(entry):
                    continue
                learned = [
                    number
                    for number in versions
                    if any(versions[ancestor].segment == segment.number for ancestor in lineage(versions, number))
                ]
                kept = [number for number in learned if not entry.tombstone and not versions[number].revoked]
                yield Trace(
                    name,
                    segment.first + position,
                    entry.partition,
                    entry.offset,
                    manifest.incarnations[entry.run],
                    segment.number,
                    str(segment.outcome),
                    str(segment.cause),
                    entry.tombstone,
                    kept,
                    [number for number in learned if versions[number].revoked],
                    head.release,
                    head.release in kept,
                )


def describe(found: Trace) -> str:
    """A trace in words."""
    outcome = found.outcome.replace("_", " ") + (f" ({found.cause})" if found.cause else "")
    what = "a tombstone: its content is suppressed or erased" if found.tombstone else "an entry"
    lines = [
        f"partition {found.partition}, offset {found.offset}",
        f"  {found.adapter}: index {found.index}, {what}",
        f"  segment {found.segment}: {outcome}",
        f"  versions {_numbers(found.versions)}, revoked {_numbers(found.revoked)}",
        f"  live: version {found.release}" if found.live else f"  the release, version {found.release}, is without it",
    ]
    return "\n".join(lines)


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _gap(gaps: list[Gap], event: str) -> str:
    """That an offset was never read, if it was not."""
    at = re.fullmatch(r"(\d+):(\d+)", event)
    for gap in gaps:
        if at is not None and gap.partition == int(at[1]) and gap.first <= int(at[2]) < gap.to:
            return f"It was removed by retention before it was read (offsets {gap.first} to {gap.to - 1}, {gap.at})."
    return ""


def _refusal(settings: Settings, event: str) -> str:
    """Why the event is a dead letter, if it is one and the broker is there."""
    from riverdelta.core.errors import RiverdeltaError
    from riverdelta.streams.dead_letters import list_dead_letters

    try:
        letters = list_dead_letters(settings) if settings.kafka.bootstrap else []
    except RiverdeltaError:
        return ""
    for letter in letters:
        if event in (f"{letter.origin_partition}:{letter.origin_offset}", _id_of(letter.value)):
            return f"It was refused ({letter.reason}): {letter.message}"
    return ""


def _id_of(value: bytes | None) -> str:
    """The id in a refused event's own bytes, if they say one.

    >>> _id_of(b'{"id": "order-1", "text": 5}'), _id_of(b"not JSON")
    ('order-1', '')
    """
    try:
        held = msgspec.json.decode(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return str(held.get("id", "")) if isinstance(held, dict) else ""
