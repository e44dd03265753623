"""Admission: what one adapter makes of its events, decided without I/O.

Events come in, in offset order within a partition and in any order across partitions; entries take the next index;
segments are cut by count or age. What this decides counts once the ledger has recorded it: until then the same events
are read again after a crash and decided again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import replace

from riverdelta.core.curation import Curation
from riverdelta.core.recipe import FeedbackPolicy
from riverdelta.registry.ledger import Manifest, ManifestEntry

from .items import FEEDBACK, INTERACTION, Item, Where
from .joining import Joins, compose, teaches

# What became of an event.
ADMITTED = "admitted"  # it is an entry
SUPPRESSED = "suppressed"  # it is an entry, a tombstone from its start
DUPLICATE = "duplicate"  # a producer sent it before, within the window
REDELIVERED = "redelivered"  # it was decided before
WAITING = "waiting"  # for its interaction, or for feedback on it
CURATED = "curated_"  # dropped by the recipe's rules, which of them follows
UNUSED = "unused"  # feedback that leaves nothing to learn


_NOWHERE: Mapping[Where, int] = MappingProxyType({})


class OpenEntry(Struct, gc=False):
    """An admitted event that no segment holds yet. `content` is None for a tombstone.

    (`where`, `offset`) is its identity; `partner` is the place of the other event that a joined entry was made of.
    Until it is sealed its duplicates stay undecided, because a crash may lose it for good, when its topic was deleted
    or retention was faster: `copies` gives the lowest offset of them per partition, `partners` that of their partners.
    """

    where: Where
    offset: int
    event: bytes
    subjects: tuple[str, ...]
    content: bytes | None
    written_by: str
    arrived: float
    partner: tuple[Where, int] | None = None
    copies: Mapping[Where, int] = _NOWHERE
    partners: Mapping[Where, int] = _NOWHERE


def _places(entry: OpenEntry) -> list[tuple[Where, int, tuple[Where, int] | None]]:
    """An entry's identity and partner, and these exchanged."""
    places = [(entry.where, entry.offset, entry.partner)]
    return [*places, (*entry.partner, (entry.where, entry.offset))] if entry.partner else places


def _lowest(places: Iterable[tuple[Where, int]], known: Mapping[Where, int]) -> dict[Where, int]:
    lowest = dict(known)
    for where, offset in places:
        lowest[where] = min(offset, lowest.get(where, offset))
    return lowest


def _precede(following: dict[Where, int], entry: OpenEntry) -> None:
    """Without this entry, what is decided of each partition ends before its places."""
    following[entry.where] = entry.offset
    if entry.copies:
        following |= _lowest(entry.copies.items(), following)


@dataclass(frozen=True)
class Draft:
    """A segment to be sealed: consecutive open entries from the adapter's first unsealed index on, and how far
    sealing them moves what is consumed, as (from, to) per partition."""

    adapter: str
    epoch: int
    number: int
    first: int
    trigger: str
    entries: tuple[OpenEntry, ...]
    consumed: Mapping[Where, tuple[int, int]]

    def manifest(self) -> Manifest:
        """The entries as the ledger keeps them."""
        runs: dict[str, int] = {}
        entries = tuple(
            ManifestEntry(
                runs.setdefault(entry.where[0], len(runs)),
                entry.where[1],
                entry.offset,
                entry.event,
                entry.subjects,
                entry.content is None,
                entry.written_by,
            )
            for entry in self.entries
        )
        partners = {
            place: (runs.setdefault(where[0], len(runs)), where[1], offset)
            for place, entry in enumerate(self.entries)
            if entry.partner
            for where, offset in [entry.partner]
        }
        return Manifest(tuple(runs), entries, partners=partners)

    def contents(self) -> list[bytes | None]:
        """The entries as the payload keeps them."""
        return [entry.content for entry in self.entries]


class Admission:
    """One adapter's open entries, and what it needs to know of its past to admit the next event."""

    def __init__(
        self,
        name: str,
        *,
        epoch: int,
        next_index: int,
        next_segment: int,
        count: int,
        age: float,
        linger: float,
        curate: Curation,
        feedback: FeedbackPolicy,
        dedupe: int,
        consumed: Mapping[Where, int],
        suppressed: frozenset[str],
        revoked: frozenset[str],
        recent: Iterable[tuple[int, bytes]],
        joins: Joins,
        allowed_from: Mapping[str, Mapping[Where, int]] = MappingProxyType({}),
    ) -> None:
        """`recent` gives index and event hash of the last `dedupe` sealed entries, `allowed_from` per subject that was
        allowed again (and per version that saw one) the offsets before which nothing of it is learned: it came in while
        the subject was suppressed, or before, and a crash has it read once more."""
        self.name = name
        self.epoch = epoch
        self.next_index = next_index  # of the first open entry
        self.next_segment = next_segment
        self.suppressed = suppressed
        self._allowed_from = allowed_from
        self.open: list[OpenEntry] = []
        self.joins = joins
        self._count = count
        self._age = age
        self._linger = linger
        self._curate = curate
        self._feedback = feedback
        self._dedupe = dedupe
        self.revoked = revoked
        self._window = {event: index for index, event in recent if event}
        self._loaded = dict(consumed)  # what earlier runs have decided
        self._consumed = dict(consumed)  # what the ledger has recorded
        self._decided = dict(consumed)  # what is decided here
        self._loose: set[Where] = set()  # partitions with decisions, since the last seal, that made no entry
        self._first: dict[Where, int] = {}  # lowest open offset per partition
        self._last: dict[Where, int] = {}  # the offset appended last per partition
        self._ordered = True  # the open entries are in offset order within each partition

    @property
    def idle(self) -> bool:
        """Nothing here that the ledger does not have."""
        return not self.open and not len(self.joins)

    def texts(self) -> dict[str, list[tuple[Where, int]]]:
        """Per version that wrote what is open, or an answer that waits, the places of the events."""
        found: dict[str, list[tuple[Where, int]]] = {}
        for entry in self.open:
            if entry.written_by and entry.content is not None:
                found.setdefault(entry.written_by, []).extend((where, offset) for where, offset, _ in _places(entry))
        for digest, place in self.joins.texts():
            if digest:
                found.setdefault(digest, []).append(place)
        return found

    @property
    def remembered(self) -> int:
        """How many event hashes it keeps."""
        return len(self._window)

    # -- events --------------------------------------------------------------------------------------------------

    def admit(self, item: Item, at: float) -> str:
        """Decide an example that arrived at `at` (seconds, any clock that only rises)."""
        where = item.where
        if item.offset < self._decided.get(where, 0):
            return REDELIVERED
        self._decided[where] = item.offset + 1
        return self._enter(OpenEntry(where, item.offset, item.event, item.subjects, item.content, "", at))

    def join(self, item: Item, at: float, age: float) -> list[str]:
        """Decide an interaction or feedback that was `age` seconds old on arrival: an entry for each pair it makes."""
        fresh = item.offset >= self._decided.get(item.where, 0)
        if fresh:
            self._decided[item.where] = item.offset + 1
            self._loose.add(item.where)
        if item.kind == FEEDBACK and not (item.event and item.content and teaches(item.content, self._feedback)):
            return [UNUSED]
        if not self.suppressed.isdisjoint(item.subjects) or self._came_before(item.subjects, item.where, item.offset):
            item = replace(item, content=None, raw=None)
        verdicts = []
        for key, interaction, feedback, copies in self.joins.meet(item, fresh, at, age):
            other = feedback if key is interaction else interaction
            subjects = tuple(sorted({*interaction.subjects, *feedback.subjects}))
            content, written_by = None, ""
            if interaction.content is not None and feedback.content is not None:
                composed, by_model = compose(interaction.content, feedback.content)
                content, written_by = composed or None, interaction.digest if by_model else ""
            partner = (other.where, other.offset)
            entry = OpenEntry(key.where, key.offset, feedback.event, subjects, content, written_by, at, partner)
            entry.copies = _lowest([place for place in copies if place[1] >= self._consumed.get(place[0], 0)], {})
            verdicts.append(self._enter(entry))
        if fresh and item.kind == INTERACTION:
            self._meet_again(item)
        return verdicts or [WAITING if fresh else REDELIVERED]

    def readmit(self, other: "Admission") -> int:
        """After another worker has sealed: take over what it has not sealed of `other`'s; the number taken."""
        for entry in other.open:
            entry.copies = {w: offset for w, offset in entry.copies.items() if offset >= self._decided.get(w, 0)}
            # The other worker may have one event of a pair waiting still: then the entry is the other event's.
            for where, offset, partner in _places(entry):
                if offset >= self._decided.get(where, 0):
                    entry.where, entry.offset, entry.partner = where, offset, partner
                    self._append(entry)
                    break
        self.joins = other.joins
        self.joins.outdate(self._consumed)
        for where, following in other._decided.items():
            self._decided[where] = max(following, self._decided.get(where, 0))
            self._loose.add(where)
        return len(self.open)

    def _enter(self, entry: OpenEntry) -> str:
        """Append what the recipe's rules leave of an entry."""
        if entry.content is not None:
            entry.content, why = self._curate(entry.content)
            if entry.content is None:  # by nothing but the event itself: whoever reads it again decides the same
                self._loose.add(entry.where)
                return f"{CURATED}{why}"
        return self._append(entry)

    def _append(self, entry: OpenEntry) -> str:
        event = entry.event
        index = self.next_index + len(self.open)
        if event:
            before = self._window.get(event)
            if before is not None and before >= index - self._dedupe:
                self._loose.add(entry.where)
                if before >= self.next_index:
                    self._copy(self.open[before - self.next_index], entry)
                return DUPLICATE
            self._window[event] = index
            if len(self._window) > 2 * self._dedupe + 1024:
                oldest = index - self._dedupe
                self._window = {held: known for held, known in self._window.items() if known >= oldest}
        if (self.suppressed or entry.written_by or self._allowed_from) and self._is_barred(entry):
            entry.content = None
        self.open.append(entry)
        self._hold(entry)
        self._pass(entry.where, entry.offset)
        for where, offset in entry.copies.items():
            self._pass(where, offset)
        return SUPPRESSED if entry.content is None else ADMITTED

    def _copy(self, known: OpenEntry, entry: OpenEntry) -> None:
        """Keep an open entry's duplicate readable and undecided for as long as the entry is open."""
        known.copies = _lowest([(entry.where, entry.offset), *entry.copies.items()], known.copies)
        known.partners = _lowest([*([entry.partner] if entry.partner else ()), *entry.partners.items()], known.partners)
        for where, offset in [(entry.where, entry.offset), *entry.copies.items()]:
            self._pass(where, offset)
        self._hold(known)

    def _meet_again(self, item: Item) -> None:
        """Keep an interaction that was sent again undecided while what was learned of it is open: if both of a pair
        count as decided, so does the pair."""
        place, known = (item.where, item.offset), self.joins.known(item.response)
        if known == place:
            return
        pairs = [entry for entry in self.open if known in ((entry.where, entry.offset), entry.partner)]
        for entry in pairs:
            entry.copies = _lowest([place], entry.copies)
            self._hold(entry)
        if pairs:
            self._pass(*place)

    def _pass(self, where: Where, offset: int) -> None:
        if offset <= self._last.get(where, -1):
            self._ordered = False
        self._last[where] = offset

    def _hold(self, entry: OpenEntry) -> None:
        where, offset = entry.where, entry.offset
        if offset < self._first.setdefault(where, offset):
            self._first[where] = offset
        if entry.partner is not None or entry.copies:
            others = (entry.partner,) if entry.partner else ()
            self._first = _lowest([*others, *entry.copies.items(), *entry.partners.items()], self._first)

    def _came_before(self, mentions: tuple[str, ...], where: Where, offset: int) -> bool:
        """Whether an event was sent before one of its subjects was allowed again, or whom its writer saw."""
        known = self._allowed_from
        return bool(known) and any(offset < known[who].get(where, 0) for who in mentions if who in known)

    def _is_barred(self, entry: OpenEntry) -> bool:
        if not self.suppressed.isdisjoint(entry.subjects) or entry.written_by in self.revoked:
            return True
        if entry.partner is None:
            return self._came_before(entry.subjects, entry.where, entry.offset)
        # Of a pair each was looked at when it came, but not who wrote it.
        return any(self._came_before((entry.written_by,), where, offset) for where, offset, _ in _places(entry))

    # -- segments ------------------------------------------------------------------------------------------------

    def lingers(self, at: float) -> bool:
        """Whether what is open is due as soon as nothing of the adapter waits to be learned."""
        return bool(self.open) and self._linger <= at - self.open[0].arrived < self._age

    def cut(self, at: float, reached: Mapping[Where, int], trigger: str = "") -> list[Draft]:
        """The segments that are due: full ones, and what is left if its oldest entry is old or `trigger` names why.

        `reached` says how far each partition that is still read has been read: while waiting items are being
        collected again after a restart, nothing is cut.
        """
        if not self.open or (len(self.joins) and self._is_behind(reached)):
            return []
        full, left = divmod(len(self.open), self._count)
        parts = [(self._count, "count")] * full
        if left and (trigger or at - self.open[-left].arrived >= self._age):
            parts.append((left, trigger or "age"))
        if parts and not self._ordered:  # only the whole is sure to be all that lies below some offset
            parts = [(len(self.open), parts[-1][1])]
        return self._drafts(parts) if parts else []

    def _is_behind(self, reached: Mapping[Where, int]) -> bool:
        return any(reached[where] < loaded for where, loaded in self._loaded.items() if where in reached)

    def _drafts(self, parts: list[tuple[int, str]]) -> list[Draft]:
        end = total = sum(size for size, _ in parts)
        following = dict(self._decided)  # per partition, the first offset that the entries so far leave undecided
        for entry in reversed(self.open[total:]):
            _precede(following, entry)
        targets: list[dict[Where, int]] = []
        for size, _ in reversed(parts):
            entries = self.open[end - size : end]
            moved = {entry.where for entry in entries}.union(*[entry.copies for entry in entries if entry.copies])
            if end == total:
                moved |= self._loose
            targets.append({where: following[where] for where in moved})
            for entry in reversed(entries):
                _precede(following, entry)
            end -= size
        drafts = []
        consumed = dict(self._consumed)
        for number, (size, why) in enumerate(parts, start=self.next_segment):
            target = targets.pop()
            moves = {where: (consumed.get(where, 0), to) for where, to in target.items() if to > consumed.get(where, 0)}
            consumed |= {where: to for where, (_, to) in moves.items()}
            entries = self.open[end : end + size]
            first = self.next_index + end
            drafts.append(Draft(self.name, self.epoch, number, first, why, tuple(entries), moves))
            end += size
        return drafts

    def settle(self, draft: Draft) -> None:
        """The ledger has recorded the first draft."""
        if draft.first != self.next_index:
            raise AssertionError(f"draft of {draft.first} settled at {self.next_index}")
        self.next_index += len(draft.entries)
        self.next_segment += 1
        del self.open[: len(draft.entries)]
        for where, (_, to) in draft.consumed.items():
            self._consumed[where] = to
        self._loose.difference_update(w for w, (_, to) in draft.consumed.items() if to == self._decided[w])
        self._ordered = self._ordered or not self.open
        self._first = {}
        for entry in self.open:
            self._hold(entry)

    # -- forgetting, and what must be read again -----------------------------------------------------------------

    def suppress(
        self,
        suppressed: frozenset[str],
        revoked: frozenset[str],
        epoch: int,
        allowed_from: Mapping[str, Mapping[Where, int]] = MappingProxyType({}),
        gone: frozenset[str] = frozenset(),
    ) -> int:
        """Learn nothing of these subjects, nor of what revoked versions wrote, nor, of what is here already, about
        subjects and by versions that are `gone`; the number of entries erased."""
        self.suppressed = suppressed
        self._allowed_from = allowed_from
        self.revoked = revoked
        self.epoch = epoch
        erased = 0
        for entry in self.open:
            if entry.content is not None and (
                entry.written_by in gone or not gone.isdisjoint(entry.subjects) or self._is_barred(entry)
            ):
                entry.content = None
                erased += 1
        self.joins.erase(suppressed | gone)
        return erased

    def floor(self, where: Where) -> int | None:
        """The offset of a partition from which this adapter needs to read again after a restart, if any."""
        held = [at for at in (self._first.get(where), self.joins.floor(where)) if at is not None]
        return min(held, default=None)
