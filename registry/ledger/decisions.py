"""What may happen to an adapter, decided without I/O: records in, a `Change` or an error out.

The ledger applies a change in one transaction; tests drive the same functions without a database.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from riverdelta.core.errors import Conflict, NotFound, Refused, StaleEpoch

from .records import AdapterRecord, Cause, Outcome, SegmentRecord, VersionRecord

Versions = Mapping[int, VersionRecord]


@dataclass(frozen=True)
class Change:
    """The adapter's next head, the segments and versions that change with it, and the facts that say so."""

    adapter: AdapterRecord
    facts: tuple[tuple[str, dict[str, Any]], ...]
    segments: tuple[SegmentRecord, ...] = ()
    revoked: tuple[int, ...] = ()


def lineage(versions: Versions, number: int) -> list[int]:
    """A version and its ancestors, newest first; the base (0) is not listed."""
    line = []
    while number:
        line.append(number)
        number = versions[number].parent
    return line


def newest_clean(versions: Versions, number: int, dirty: Iterable[int] = ()) -> int:
    """The newest of a version and its ancestors that is neither revoked nor dirty; 0 when none is."""
    dirty = set(dirty)
    for candidate in lineage(versions, number):
        # A clean version cannot have a dirty ancestor, so the first clean one is clean all the way down.
        if candidate not in dirty and not versions[candidate].revoked:
            return candidate
    return 0


def learned(versions: Versions, number: int) -> dict[int | None, int]:
    """The segments that a version and its ancestors trained on, each with the version that did."""
    return {versions[v].segment: v for v in lineage(versions, number)}


def decide_seal(adapter: AdapterRecord, epoch: int, first: int, count: int, tombstones: int, trigger: str) -> Change:
    """Append a segment: `StaleEpoch` after a forget, `Conflict` when another owner has appended."""
    if epoch != adapter.epoch:
        raise StaleEpoch(
            f"{adapter.name} is at epoch {adapter.epoch}, the segment at {epoch}.",
            "Suppress again, then seal.",
        )
    if first != adapter.next_index:
        raise Conflict(f"{adapter.name} continues at index {adapter.next_index}, not {first}.", "Read the head again.")
    number = adapter.next_segment
    fact = {"segment": number, "first": first, "count": count, "tombstones": tombstones, "trigger": trigger}
    return Change(
        replace(adapter, next_index=first + count, next_segment=number + 1),
        (("sealed", {**fact, "held": adapter.held is not None}),),
    )


def check_work(adapter: AdapterRecord, segment: SegmentRecord, epoch: int, parent: int) -> None:
    """Refuse an outcome for work that the ledger has moved past."""
    if epoch != adapter.epoch:
        raise StaleEpoch(
            f"{adapter.name} is at epoch {adapter.epoch}, the work at {epoch}.", "Drop it and start again."
        )
    if parent != adapter.tip:
        raise Conflict(f"{adapter.name} builds on version {adapter.tip}, not {parent}.", "Drop it and start again.")
    if segment.outcome is not Outcome.AWAITING:
        raise Conflict(f"Segment {segment.number} of {adapter.name} is {segment.outcome}.", "Look for other work.")


def decide_increment(adapter: AdapterRecord, segment: SegmentRecord, epoch: int, parent: int, digest: str) -> Change:
    """Accept a candidate: it becomes the tip and, as nothing else holds the release, the release.

    While a rollback holds the release only a rebuild awaits, and the hold moves to the rebuilt version.
    """
    check_work(adapter, segment, epoch, parent)
    number = adapter.next_version
    held = None if adapter.held is None else number
    return Change(
        replace(adapter, next_version=number + 1, tip=number, release=number, held=held),
        (
            ("increment", {"version": number, "parent": parent, "segment": segment.number, "digest": digest}),
            ("release", {"from": adapter.release, "to": number, "digest": digest}),
        ),
        (replace(segment, outcome=Outcome.TRAINED, version=number, cause=Cause.NONE, note=""),),
    )


def decide_set_aside(
    adapter: AdapterRecord, segment: SegmentRecord, epoch: int, parent: int, cause: Cause, note: str
) -> Change:
    """Record that a segment was not learned, and why; the next increment builds on the same parent."""
    check_work(adapter, segment, epoch, parent)
    return Change(
        adapter,
        (("set_aside", {"segment": segment.number, "parent": parent, "cause": str(cause), "note": note}),),
        (replace(segment, outcome=Outcome.SET_ASIDE, version=parent, cause=cause, note=note),),
    )


def find_version(adapter: AdapterRecord, versions: Versions, number: int) -> VersionRecord:
    """A version that may be released; `NotFound` or `Refused` otherwise."""
    if number not in versions:
        raise NotFound(
            f"{adapter.name} has no version {number}.",
            f"`riverdelta registry show {adapter.name}` lists them.",
        )
    if versions[number].revoked:
        raise Refused(
            f"{adapter.name}@{number} is revoked: it saw what was since forgotten.",
            f"`riverdelta registry show {adapter.name}` lists what can be released.",
        )
    return versions[number]


def decide_release(adapter: AdapterRecord, versions: Versions, number: int) -> Change:
    """Move the release without a hold: the next increment's version takes over from it."""
    if adapter.held is not None:
        raise Conflict(
            f"{adapter.name} is held at version {adapter.held}.",
            "Resume it first, or roll back to the version.",
        )
    version = find_version(adapter, versions, number)
    return Change(
        replace(adapter, release=number),
        (("release", {"from": adapter.release, "to": number, "digest": version.digest}),),
    )


def decide_rollback(
    adapter: AdapterRecord, versions: Versions, segments: Iterable[SegmentRecord], number: int
) -> Change:
    """Move the release to a version and hold it there; what is not in that version's lineage is set aside."""
    version = find_version(adapter, versions, number)
    trained = learned(versions, number)
    changed = []
    for segment in segments:
        if segment.number in trained:
            if segment.outcome is not Outcome.TRAINED or segment.version != trained[segment.number]:
                changed.append(
                    replace(
                        segment,
                        outcome=Outcome.TRAINED,
                        version=trained[segment.number],
                        cause=Cause.NONE,
                        note="",
                    )
                )
        elif segment.outcome in (Outcome.TRAINED, Outcome.AWAITING):
            changed.append(replace(segment, outcome=Outcome.SET_ASIDE, version=None, cause=Cause.ROLLBACK, note=""))
    aside = [segment.number for segment in changed if segment.outcome is Outcome.SET_ASIDE]
    return Change(
        replace(
            adapter,
            release=number,
            tip=number,
            held=number,
            held_tip=adapter.tip if adapter.held is None else adapter.held_tip,
        ),
        (
            (
                "rollback",
                {
                    "from": adapter.release,
                    "to": number,
                    "digest": version.digest,
                    "index": adapter.next_index,
                    "set_aside": aside,
                },
            ),
        ),
        tuple(changed),
    )


def decide_resume(
    adapter: AdapterRecord,
    versions: Versions,
    segments: Iterable[SegmentRecord],
    mode: Literal["continue", "replay", "tip"],
) -> Change:
    """End a hold: continue with new segments only, replay what was set aside, or go back to the newest version."""
    if adapter.held is None:
        raise Conflict(f"{adapter.name} is not held.", "Only a rolled-back adapter can be resumed.")
    tip = adapter.tip
    if mode == "tip":
        before = newest_clean(versions, adapter.held_tip or 0)
        if not learned(versions, before).keys() <= learned(versions, tip).keys():  # a rebuild may have overtaken it
            tip = before
    trained = learned(versions, tip)
    changed = []
    for segment in segments:
        if segment.number in trained:
            if segment.outcome is not Outcome.TRAINED or segment.version != trained[segment.number]:
                changed.append(
                    replace(
                        segment,
                        outcome=Outcome.TRAINED,
                        version=trained[segment.number],
                        cause=Cause.NONE,
                        note="",
                    )
                )
        elif segment.outcome is Outcome.TRAINED:
            # Only `tip` moves to another branch; what the held branch alone had learned is learned again.
            changed.append(replace(segment, outcome=Outcome.AWAITING, version=None, cause=Cause.NONE, note=""))
        elif segment.outcome is Outcome.SET_ASIDE and segment.cause in (Cause.HOLD, Cause.ROLLBACK):
            if mode == "continue":
                changed.append(replace(segment, cause=Cause.LEFT))
            else:
                changed.append(replace(segment, outcome=Outcome.AWAITING, version=None, cause=Cause.NONE, note=""))
    digest = versions[tip].digest if tip else ""
    return Change(
        replace(adapter, release=tip, tip=tip, held=None, held_tip=None),
        (
            (
                "resume",
                {
                    "mode": mode,
                    "from": adapter.release,
                    "to": tip,
                    "digest": digest,
                    "index": adapter.next_index,
                },
            ),
        ),
        tuple(changed),
    )


def dirty_versions(versions: Versions, touched: Iterable[int]) -> set[int]:
    """The versions whose lineage saw any of these segments."""
    touched = set(touched)
    dirty: set[int] = set()
    for number in sorted(versions):  # a parent's number is lower than its child's
        version = versions[number]
        if version.parent in dirty or not touched.isdisjoint(version.saw):
            dirty.add(number)
    return dirty


def decide_forget(
    adapter: AdapterRecord,
    versions: Versions,
    segments: Iterable[SegmentRecord],
    touched: Iterable[int],
    subject: str,
    request: str,
) -> Change:
    """Raise the epoch, revoke every version that saw the touched segments, move the release to the newest that
    did not, and let what was learned since await its rebuild.

    Operators' acts stay: a held release is held at the version that the rebuild makes of it, and a decision
    (a gate's, an error's) that was taken on a revoked parent is taken again.
    """
    touched = set(touched)
    dirty = dirty_versions(versions, touched)
    tip = newest_clean(versions, adapter.tip, dirty)
    release = newest_clean(versions, adapter.release, dirty)
    kept = set(lineage(versions, tip))
    rebuild = {versions[v].segment for v in lineage(versions, adapter.tip) if v not in kept}
    changed = []
    for segment in segments:
        # `touched` holds here even on a clean parent: the content that the decision used has changed.
        redecide = segment.cause in (Cause.GATE, Cause.ERROR) and (
            segment.version in dirty or segment.number in touched
        )
        if segment.number in rebuild or redecide:
            changed.append(replace(segment, outcome=Outcome.AWAITING, version=None, cause=Cause.NONE, note=""))
    revoked = tuple(sorted(v for v in dirty if not versions[v].revoked))
    return Change(
        replace(
            adapter,
            epoch=adapter.epoch + 1,
            tip=tip,
            release=release,
            held=None if adapter.held is None else tip,
        ),
        (
            (
                "forget",
                {
                    "request": request,
                    "subject": subject,
                    "epoch": adapter.epoch + 1,
                    "index": adapter.next_index,
                    "segments": sorted(touched),
                    "revoked": list(revoked),
                    "from": adapter.release,
                    "to": release,
                    "rebuild": [segment.number for segment in changed],
                },
            ),
        ),
        tuple(changed),
        revoked,
    )
