"""An adapter's log read again from Kafka alone: what its events said, in the order that the ledger gave them."""

import base64
import contextlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from riverdelta.core.curation import Curation
from riverdelta.core.errors import Corrupt, Gone
from riverdelta.core.events import ContractError, Event, Feedback, Interaction, content_of, decode
from riverdelta.core.recipe import FeedbackPolicy, Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Manifest
from riverdelta.streams.joining import compose, teaches
from riverdelta.streams.whole_topic import read_all

Where = tuple[int, int]  # partition and offset
Place = tuple[int, int, Where | None]  # and those of the other event, where an answer and feedback make an entry


@dataclass(frozen=True)
class Lesson:
    """What one entry teaches, whom it is about, and the digest of the weights that wrote it, if any did."""

    content: bytes
    subjects: tuple[str, ...]
    written_by: str = ""


def check_incarnation(settings: Settings, wanted: Collection[str]) -> None:
    """`Gone` unless the events topic is the one that every entry came from."""
    from riverdelta.streams.topics import admin

    name = settings.topics.events
    with admin(settings) as client:
        topics = [topic for topic in client.describe_topics([name]) if not topic["error_code"]]
    if {_id(each) for each in wanted} != {uuid.UUID(str(topic["topic_id"])) for topic in topics}:
        raise Gone(
            f"The topic {name} is no longer the one that the entries came from.",
            "It was deleted, or a memory-only broker has restarted: the raw events are gone. From the stored entries, "
            "`riverdelta registry verify CERTIFICATE --replay` trains.",
        )


def _id(incarnation: str) -> uuid.UUID:
    """A topic's id from the form that librdkafka, which the dataflow reads with, writes it in: base64, unpadded.

    >>> str(_id("AAAAAAAAAAEAAAAAAAAAAg"))
    '00000000-0000-0001-0000-000000000002'
    """
    return uuid.UUID(
        bytes=base64.b64decode(incarnation + "==", altchars=b"-_" if set("-_") & set(incarnation) else None)
    )


def read_lessons(settings: Settings, adapter: str, wanted: Sequence[Place], recipe: Recipe) -> dict[Place, Lesson]:
    """The lessons of the entries at these places of the events topic, as the recipe's rules leave them; `Gone`
    when Kafka no longer holds one, `Corrupt` when the rules would not have let it in."""
    events = _events(settings, adapter, {where for place in wanted for where in (place[:2], place[2]) if where})
    return lessons_of(events, adapter, wanted, recipe)


def places_of(manifest: Manifest) -> list[Place]:
    """Where the entries of a segment lie."""
    partners = {at: (partition, offset) for at, (_, partition, offset) in manifest.partners.items()}
    return [(entry.partition, entry.offset, partners.get(at)) for at, entry in enumerate(manifest.entries)]


def lessons_of(
    events: Mapping[Where, Event], adapter: str, wanted: Sequence[Place], recipe: Recipe
) -> dict[Place, Lesson]:
    """The same of an adapter's events that have been read already, with the partners of those that have one."""
    curate = Curation(recipe.curate)
    lessons: dict[Place, Lesson] = {}
    for place in wanted:
        event, partner = events.get(place[:2]), place[2] and events.get(place[2])
        lesson = None
        if event is not None and bool(partner) is bool(place[2]):
            lesson = _lesson(event, partner, recipe.feedback)
        if lesson is None:
            raise Gone(
                f"Kafka no longer holds what {adapter} learned at {place[0]}:{place[1]}.",
                "Retention has removed it, or a memory-only broker has restarted; the ledger's own check is "
                f"`riverdelta registry verify {adapter}`.",
            )
        content, why = curate(lesson.content)
        if content is None:
            raise Corrupt(
                f"{adapter} learned what is at {place[0]}:{place[1]}, which its recipe's rules drop ({why}).",
                "Was the ledger's recipe changed by hand?",
            )
        lessons[place] = replace(lesson, content=content)
    return lessons


def _lesson(event: Event, partner: Event | None, policy: FeedbackPolicy) -> Lesson | None:
    """What an event, or its meeting with its partner, taught; None for a pair that does not belong together."""
    if partner is None:
        paired = isinstance(event.record, Interaction | Feedback)
        return None if paired else Lesson(content_of(event.record), event.subjects)
    asked, said = event.record, partner.record
    if isinstance(asked, Feedback):
        asked, said = said, asked
    if not isinstance(asked, Interaction) or not isinstance(said, Feedback) or asked.response != said.response:
        return None
    if not teaches(content_of(said), policy):
        return None
    content, by_model = compose(content_of(asked), content_of(said))
    return Lesson(content, tuple(sorted({*event.subjects, *partner.subjects})), asked.digest if by_model else "")


def _events(settings: Settings, adapter: str, wanted: set[Where]) -> dict[Where, Event]:
    """The adapter's events, from each partition's beginning until all that is wanted is there."""
    found: dict[Where, Event] = {}
    missing = set(wanted)
    with contextlib.closing(read_all(settings, settings.topics.events)) as records:
        for record in records:
            place = (record.partition, record.offset)
            with contextlib.suppress(ContractError):
                event = decode(record.value, record.headers)
                if event.adapter == adapter:
                    found[place] = event
                    missing.discard(place)
            if not missing:
                break
    return found
