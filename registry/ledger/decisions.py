"""What may happen to an adapter, decided without I/O: records in, a `Change` or an error out.

The ledger applies a change in one transaction; tests drive the same functions without a database.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from riverdelta.core.errors import BadInput, Conflict, NotFound, Refused, StaleEpoch
from riverdelta.core.recipe import Recipe

from .records import AdapterRecord, Cause, Fact, Hand, Outcome, SegmentRecord, VersionRecord

Versions = Mapping[int, VersionRecord]
_REJECTED = (Cause.GATE, Cause.ERROR)
_RETIRED = "Retired: a forget reached beyond the horizon."
_BEYOND = "Beyond the forget horizon: its contents are gone."


@dataclass(frozen=True)
class Change:
    """The adapter's next head, the segments and versions that change with it, and the facts that say so. `dropped`
    versions lose their files."""

    adapter: AdapterRecord
    facts: tuple[tuple[str, dict[str, Any]], ...]
    segments: tuple[SegmentRecord, ...] = ()
    revoked: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


def lineage(versions: Versions, number: int) -> list[int]:
    """A version and its ancestors, newest first; the base (0) is not listed."""
    line = []
    while number:
        line.append(number)
        number = versions[number].parent
    return line


def newest_clean(versions: Versions, number: int, dirty: Iterable[int] = ()) -> int:
    """The newest of a version and its ancestors that is neither revoked nor dirty and has its files; 0 when none."""
    dirty = set(dirty)
    for candidate in lineage(versions, number):
        # A clean version cannot have a dirty ancestor, so the first clean one is clean all the way down.
        if candidate not in dirty and versions[candidate].usable:
            return candidate
    return 0


@dataclass(frozen=True)
class Line:
    """What a version and its ancestors made of the segments: `trained` by which version, `rejected` on which parent.
    `root` is the imported version that it began with, 0 for the base.
    """

    root: int
    trained: dict[int, int]
    rejected: dict[int, int]

    @classmethod
    def of(cls, versions: Versions, number: int) -> "Line":
        """The line that ends in a version."""
        root, trained, used = 0, dict[int, int](), dict[int, int]()
        for version in map(versions.__getitem__, reversed(lineage(versions, number))):
            if version.segment is None:
                root = version.number
            else:
                trained[version.segment] = version.number
            for segment in version.saw:
                used.setdefault(segment, version.parent)
        return cls(root, trained, {segment: parent for segment, parent in used.items() if segment not in trained})

    @property
    def segments(self) -> set[int]:
        """Every segment that the line learned or decided on."""
        return self.trained.keys() | self.rejected.keys()

    def place(self, segment: SegmentRecord) -> SegmentRecord | None:
        """The segment with its outcome in this line; None when the line says nothing about it."""
        if segment.number in self.trained:
            version = self.trained[segment.number]
            return segment.outcome_as(Outcome.TRAINED, version)
        if segment.number in self.rejected:
            cause = segment.cause if segment.cause in _REJECTED else Cause.GATE
            parent = self.rejected[segment.number]
            return segment.outcome_as(Outcome.SET_ASIDE, parent, cause, segment.note, segment.metrics)
        return None


def words(facts: Iterable[Fact], versions: Versions, number: int) -> dict[int, Hand]:
    """What people had said of each segment of a version's line when that learned or rejected it. Since then they may
    have said something else, which holds for what is decided from then on."""
    line, of_line = Line.of(versions, number), set(lineage(versions, number))
    now, found = dict[int, Hand](), dict[int, Hand]()
    rejected: dict[tuple[int, int], Hand] = {}
    for fact in facts:
        body = fact.body
        if fact.kind == "by_hand":
            now[body["segment"]] = Hand(body["hand"])
        elif fact.kind == "rollback":
            now |= dict.fromkeys(_taken_back(now, Line.of(versions, body["to"])), Hand.NONE)
        elif fact.kind == "set_aside":
            rejected[body["parent"], body["segment"]] = now.get(body["segment"], Hand.NONE)
        elif fact.kind == "increment" and body["version"] in of_line:
            found[body["segment"]] = now.get(body["segment"], Hand.NONE)
            for segment in versions[body["version"]].saw:
                if line.rejected.get(segment) == body["parent"]:
                    found.setdefault(segment, rejected.get((body["parent"], segment), Hand.NONE))
    return found


def _taken_back(hands: Mapping[int, Hand], line: Line) -> set[int]:
    """The discarded segments that the line which a rollback goes back to has learned: the later word counts."""
    return {number for number in line.trained if hands.get(number) is Hand.DISCARD}


def decide_seal(
    adapter: AdapterRecord,
    epoch: int,
    first: int,
    count: int,
    tombstones: int,
    trigger: str,
    root: str = "",
    manifest: str = "",
) -> Change:
    """Append a segment: `StaleEpoch` after a forget, `Conflict` when another owner has appended. `root` and `manifest`
    are digests of what the entries say and of what they are: the journal binds both."""
    if count < 1:
        raise BadInput("A segment needs an entry.", "Seal when there is one.")
    if epoch != adapter.epoch:
        raise StaleEpoch(
            f"{adapter.name} is at epoch {adapter.epoch}, the segment at {epoch}.",
            "Suppress again, then seal.",
        )
    if first != adapter.next_index:
        raise Conflict(f"{adapter.name} continues at index {adapter.next_index}, not {first}.", "Read the head again.")
    number = adapter.next_segment
    fact = {"segment": number, "first": first, "count": count, "tombstones": tombstones, "trigger": trigger}
    bound = {"root": root, "manifest": manifest}
    return Change(
        replace(adapter, next_index=first + count, next_segment=number + 1),
        (("sealed", {**fact, **bound, "held": adapter.held is not None}),),
    )


def check_work(adapter: AdapterRecord, segment: SegmentRecord, first: int | None, epoch: int, parent: int) -> None:
    """Refuse an outcome for work that the ledger has moved past. `first` is the first segment that awaits one."""
    if epoch != adapter.epoch:
        raise StaleEpoch(
            f"{adapter.name} is at epoch {adapter.epoch}, the work at {epoch}.", "Drop it and start again."
        )
    if parent != adapter.tip:
        raise Conflict(f"{adapter.name} builds on version {adapter.tip}, not {parent}.", "Drop it and start again.")
    if segment.outcome is not Outcome.AWAITING:
        raise Conflict(f"Segment {segment.number} of {adapter.name} is {segment.outcome}.", "Look for other work.")
    if segment.number != first:
        raise Conflict(f"Segment {first} of {adapter.name} comes before {segment.number}.", "Take segments in order.")


def decide_increment(
    adapter: AdapterRecord,
    segment: SegmentRecord,
    first: int | None,
    epoch: int,
    parent: int,
    digest: str,
    saw: Sequence[int],
    parts: Sequence[str] = (),
    withheld: str = "",
) -> Change:
    """Accept a candidate: it becomes the tip and, as nothing else holds the release, the release, unless the gate has
    `withheld` it. `parts` are the digests of its shards; what it `saw` decides which forgets reach it, so the journal
    binds that.

    While a rollback holds the release only a rebuild awaits, and the hold moves to the rebuilt version.
    """
    check_work(adapter, segment, first, epoch, parent)
    number = adapter.next_version
    held = None if adapter.held is None else number
    more = {**({"parts": list(parts)} if parts else {}), **({"withheld": withheld} if withheld else {})}
    made = {"version": number, "parent": parent, "segment": segment.number, "digest": digest}
    body = {**made, "saw": list(saw), **more}
    facts = [("increment", body)]
    after = replace(adapter, next_version=number + 1, tip=number, held=held)
    if not withheld or held is not None:
        facts.append(("release", {"from": adapter.release, "to": number, "digest": digest}))
        after = replace(after, release=number)
    return Change(after, tuple(facts), (segment.outcome_as(Outcome.TRAINED, number),))


def decide_set_aside(
    adapter: AdapterRecord,
    segment: SegmentRecord,
    first: int | None,
    epoch: int,
    parent: int,
    cause: Cause,
    note: str,
    metrics: Mapping[str, Any],
) -> Change:
    """Record that a segment was not learned, and why; the next increment builds on the same parent. `metrics` are not
    part of the fact: a forget must be able to take them back."""
    check_work(adapter, segment, first, epoch, parent)
    if cause not in _REJECTED:
        raise BadInput(f"A trainer cannot set aside for {cause!r}.", "Give gate or error.")
    note = note.replace("\0", "")[:500]
    return Change(
        adapter,
        (("set_aside", {"segment": segment.number, "parent": parent, "cause": str(cause), "note": note}),),
        (segment.outcome_as(Outcome.SET_ASIDE, parent, cause, note, metrics),),
    )


def releasable(adapter: AdapterRecord, versions: Versions, number: int) -> str:
    """The digest of a version that may be released (empty for 0, the base); `NotFound` or `Refused` otherwise."""
    if number == 0:
        return ""
    hint = f"`riverdelta registry show {adapter.name}` lists what can be released."
    if number not in versions:
        raise NotFound(f"{adapter.name} has no version {number}.", hint)
    if versions[number].revoked:
        raise Refused(f"{adapter.name}@{number} is revoked: it saw what was since forgotten.", hint)
    if versions[number].purged:
        raise Refused(f"{adapter.name}@{number} has been dropped, as its recipe's `retain` says.", hint)
    return versions[number].digest


def decide_release(adapter: AdapterRecord, versions: Versions, number: int) -> Change:
    """Move the release without a hold: the next increment's version takes over from it."""
    if adapter.held is not None:
        raise Conflict(
            f"{adapter.name} is held at version {adapter.held}.",
            "Resume it first, or roll back to the version.",
        )
    digest = releasable(adapter, versions, number)
    return Change(
        replace(adapter, release=number),
        (("release", {"from": adapter.release, "to": number, "digest": digest}),),
    )


def decide_rollback(
    adapter: AdapterRecord, versions: Versions, segments: Iterable[SegmentRecord], number: int
) -> Change:
    """Move the release to a version and hold it there; what is not in that version's lineage is set aside. The later
    word counts: what the version has learned is no longer discarded.
    """
    digest = releasable(adapter, versions, number)
    line, segments = Line.of(versions, number), list(segments)
    taken_back = _taken_back({segment.number: segment.hand for segment in segments}, line)
    changed = []
    for segment in segments:
        after = line.place(segment)
        if after is None and segment.outcome in (Outcome.TRAINED, Outcome.AWAITING):
            after = segment.outcome_as(Outcome.SET_ASIDE, cause=Cause.ROLLBACK)
        elif after is None and segment.cause in _REJECTED:
            # The line that rejected it is no longer the adapter's.
            after = segment.outcome_as(Outcome.SET_ASIDE, None, segment.cause, segment.note)
        if after is not None and segment.number in taken_back:
            after = replace(after, hand=Hand.NONE)
        if after is not None and after != segment:
            changed.append(after)
    body = {
        "from": adapter.release,
        "to": number,
        "digest": digest,
        "index": adapter.next_index,
        "set_aside": [segment.number for segment in changed if segment.cause is Cause.ROLLBACK],
    }
    held_tip = adapter.tip if adapter.held is None else adapter.held_tip
    return Change(
        replace(adapter, release=number, tip=number, held=number, held_tip=held_tip),
        (("rollback", body),),
        tuple(changed),
    )


Mode = Literal["continue", "replay", "tip"]


def decide_resume(adapter: AdapterRecord, versions: Versions, segments: Iterable[SegmentRecord], mode: Mode) -> Change:
    """End a hold: continue with new segments only, replay what was set aside, or go back to the newest version.

    `tip` means the line that the rollback left. Where a forget has revoked its end since, what is missing of it awaits
    training again, on the longest clean stretch of it that there is.
    """
    if adapter.held is None:
        raise Conflict(f"{adapter.name} is not held.", "Only a rolled-back adapter can be resumed.")
    tip = adapter.tip
    left = Line.of(versions, adapter.held_tip or 0)
    if mode == "tip":
        tip = _longest_clean(versions, left, (adapter.held_tip or 0, adapter.tip))
    digest = releasable(adapter, versions, tip)
    line = Line.of(versions, tip)
    changed = []
    for segment in segments:
        after = line.place(segment)
        if after is None and (segment.outcome is not Outcome.AWAITING):
            if mode == "tip":
                after = _return(segment, left)
            elif _behind(segment):
                left_behind = segment.outcome_as(Outcome.SET_ASIDE, cause=Cause.LEFT, note=segment.note)
                after = left_behind if mode == "continue" else _awaiting(segment)
        if after is not None and after != segment:
            changed.append(after)
    body = {
        "mode": mode,
        "from": adapter.release,
        "to": tip,
        "digest": digest,
        "index": adapter.next_index,
    }
    return Change(
        replace(adapter, release=tip, tip=tip, held=None, held_tip=None),
        (("resume", body),),
        tuple(changed),
    )


def _awaiting(segment: SegmentRecord) -> SegmentRecord:
    if segment.dropped:
        return segment.outcome_as(Outcome.SET_ASIDE, cause=Cause.LEFT, note=_BEYOND)
    return segment.outcome_as(Outcome.AWAITING)


def _behind(segment: SegmentRecord) -> bool:
    """Whether a hold or a rollback, and not a decision that stands, keeps a segment from being learned."""
    return segment.cause in (Cause.HOLD, Cause.ROLLBACK) or (segment.cause in _REJECTED and segment.version is None)


def _return(segment: SegmentRecord, left: Line) -> SegmentRecord | None:
    """A segment that the resumed stretch does not hold, as the line that the rollback left would have it."""
    if segment.number in left.segments:
        return _awaiting(segment)  # revoked since: rebuild it
    if segment.cause is Cause.LEFT:
        return None
    if segment.number < max(left.segments, default=0):
        # Segments are learned in order, so the line had passed it over; only the held branch took it up.
        return segment.outcome_as(Outcome.SET_ASIDE, cause=Cause.LEFT)
    return _awaiting(segment)


def _longest_clean(versions: Versions, left: Line, ends: Iterable[int]) -> int:
    """The clean version, of these and their ancestors, that has gone furthest along a line and nowhere else."""
    root = left.root if left.root and not versions[left.root].revoked else 0  # the line begins anew at the base
    found, length = newest_clean(versions, root), 0
    wanted = sorted(left.segments)
    for number in dict.fromkeys(ancestor for end in ends for ancestor in lineage(versions, end)):
        here = Line.of(versions, number)
        steps = sorted(here.segments)
        along = here.root == root and steps == wanted[: len(steps)]
        if along and len(steps) > length and versions[number].usable:
            found, length = number, len(steps)
    return found


def decide_by_hand(
    adapter: AdapterRecord, versions: Versions, segments: Iterable[SegmentRecord], number: int, hand: Hand
) -> Change:
    """Let a person's word about a segment stand above the gate's, from now on and at every rebuild.

    Where the word differs from what became of the segment, the tip goes back to before it, and everything since awaits
    training again, so that segments are learned in order whenever somebody decides. The release goes back only from
    what learned a discarded segment.
    """
    segments = list(segments)
    segment = next((each for each in segments if each.number == number), None)
    if segment is None:
        raise NotFound(f"{adapter.name} has no segment {number}.", f"`riverdelta registry show {adapter.name}`.")
    if adapter.held is not None:
        raise Conflict(f"{adapter.name} is held at version {adapter.held}.", "Resume it first.")
    stands = segment.cause in _REJECTED and segment.version is not None
    if segment.outcome is Outcome.SET_ASIDE and not stands:
        raise Conflict(
            f"Segment {number} of {adapter.name} is set aside by a {segment.cause}, not by the gate.",
            "A rollback's `resume --replay` learns what it set aside.",
        )
    if segment.hand is hand:
        raise Conflict(f"Segment {number} of {adapter.name} has that word already.", "There is nothing to do.")
    tip, release, again = adapter.tip, adapter.release, set[int]()
    trained = segment.outcome is Outcome.TRAINED
    wholly = trained and not (segment.version and versions[segment.version].partial)
    differs = trained if hand is Hand.DISCARD else not wholly
    if differs and segment.outcome is not Outcome.AWAITING:
        learned = segment.version if segment.outcome is Outcome.TRAINED else None
        tip = newest_clean(versions, versions[learned].parent if learned else segment.version or 0)
        kept = Line.of(versions, tip).segments
        again = {each for each in Line.of(versions, adapter.tip).segments if each >= number or each not in kept}
        again |= {e.number for e in segments if e.number >= number and e.cause in _REJECTED and e.version is not None}
        if any(each.dropped for each in segments if each.number in again):
            raise Refused(f"Segment {number} of {adapter.name} lies beyond the forget horizon.", "It stays as it is.")
        if learned in lineage(versions, release):
            release = tip
    body = {
        "segment": number,
        "hand": str(hand),
        "from": adapter.release,
        "to": release,
        "digest": versions[release].digest if release else "",
        "again": sorted(again),
        "index": adapter.next_index,
    }
    told = {each.number: _awaiting(each) if each.number in again else each for each in segments}
    told[number] = replace(told[number], hand=hand)
    return Change(
        replace(adapter, tip=tip, release=release),
        (("by_hand", body),),
        tuple(told[each] for each in sorted(again | {number})),
    )


def dirty_versions(versions: Versions, touched: Iterable[int], copies: Iterable[int] = ()) -> set[int]:
    """The versions whose lineage saw any of these segments, or begins with one of these copies of what did."""
    touched, copies = set(touched), set(copies)
    dirty: set[int] = set()
    for number in sorted(versions):  # a parent's number is lower than its child's
        version = versions[number]
        if number in copies or version.parent in dirty or not touched.isdisjoint(version.saw):
            dirty.add(number)
    return dirty


def decide_forget(
    adapter: AdapterRecord,
    versions: Versions,
    segments: Iterable[SegmentRecord],
    touched: Iterable[int],
    about: Mapping[str, Any],
    copies: Collection[int] = (),
) -> Change:
    """Raise the epoch, revoke every version that saw the touched segments or stems from one of the `copies` of what
    did, move the release to the newest that did not, and let what was learned since await its rebuild. `about` joins
    the fact.

    Operators' acts stay: a held release is held at the version that the rebuild makes of it, and a decision
    (a gate's, an error's) that was taken on a revoked parent is taken again. What lies beyond the horizon cannot be
    learned again: it is left out of the rebuild, or the adapter is retired, held at the base, as its recipe says. Where
    nothing is touched, only the epoch moves: entries that are not sealed yet may be the subject's.
    """
    touched = set(touched)
    dirty = dirty_versions(versions, touched, copies) if touched or copies else set()
    tip = newest_clean(versions, adapter.tip, dirty) if dirty else adapter.tip
    release = newest_clean(versions, adapter.release, dirty) if dirty else adapter.release
    gone = set(lineage(versions, adapter.tip)) - set(lineage(versions, tip)) if dirty else set()
    rebuild = {versions[v].segment for v in gone}
    changed = []
    for segment in segments:
        # `touched` holds here even on a clean parent: the content that the decision used has changed.
        stands = segment.cause in _REJECTED and segment.version is not None
        if segment.number in rebuild or (stands and (segment.version in gone or segment.number in touched)):
            changed.append(segment)
    lost = any(segment.dropped for segment in changed)
    if retired := lost and Recipe.from_dict(adapter.recipe).retain.beyond == "retire":
        tip = release = 0
        changed = [segment.outcome_as(Outcome.SET_ASIDE, cause=Cause.LEFT, note=_RETIRED) for segment in segments]
    else:
        changed = [_awaiting(segment) for segment in changed]
    revoked = tuple(sorted(v for v in dirty if not versions[v].revoked))
    body = {
        **about,
        "epoch": adapter.epoch + 1,
        "index": adapter.next_index,
        "segments": sorted(touched),
        "revoked": list(revoked),
        "from": adapter.release,
        "to": release,
        "rebuild": [segment.number for segment in changed if segment.outcome is Outcome.AWAITING],
        **({"retired": True} if retired else {}),
    }
    held = tip if adapter.held is not None or retired else None
    return Change(
        replace(adapter, epoch=adapter.epoch + 1, tip=tip, release=release, held=held),
        (("forget", body),),
        tuple(changed),
        revoked,
    )
