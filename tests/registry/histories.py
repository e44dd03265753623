"""Random histories of an adapter on a real ledger, with a training that is a pure function of what it is given.

`trained` and `rejected` stand for any trainer that keeps its promise: weights, and a gate's verdict, are functions of
the parent's weights and the live contents. So what the ledger decides can be compared, digest by digest, with a control
ledger in which the forgotten entries arrived as tombstones.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from riverdelta.core import merkle
from riverdelta.core.digests import digest_of
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import (
    Cause,
    Hand,
    Increment,
    Ledger,
    Manifest,
    ManifestEntry,
    Outcome,
    Seal,
    Work,
)
from riverdelta.registry.ledger.decisions import Line
from riverdelta.registry.verify import check_ledger

RUN = "run-1"


def keyed(subject: str) -> str:
    """A subject's hash, as the ledger knows it."""
    return digest_of(["subject", subject])


def trained(parent: str, contents: Sequence[str | None]) -> str:
    """The digest that an increment leads to; tombstones teach nothing."""
    live = [content for content in contents if content is not None]
    return digest_of([parent, live]) if live else parent or digest_of("untrained")


def rejected(parent: str, contents: Sequence[str | None]) -> bool:
    """The gate's verdict, a function of the same things."""
    return int(digest_of(["gate", parent, contents])[:2], 16) < 48


@dataclass
class World:
    """A ledger with what its entries say."""

    ledger: Ledger
    contents: dict[tuple[str, int], str] = field(default_factory=dict)
    turned_down: dict[tuple[str, int], set[int]] = field(default_factory=dict)  # segments, by the parent they met

    def seal(self, adapter: str, entries: Sequence[tuple[Sequence[str], str]], epoch: int | None = None) -> object:
        """Append entries of (subjects, writer's digest), suppressed as a dataflow worker would."""
        head = self.ledger.adapter(adapter)
        suppressed, revoked = self.ledger.suppressed(adapter), self.ledger.revoked_digests()
        listed = []
        for place, (subjects, writer) in enumerate(entries):
            hashes = tuple(sorted(map(keyed, subjects)))
            barred = writer in revoked or self.ledger.tainted(adapter, {writer})
            gone = bool(barred) or not suppressed.isdisjoint(hashes)
            offset = head.next_index + place
            listed.append(ManifestEntry(0, 0, offset, b"", hashes, gone, writer))
            self.contents[adapter, offset] = digest_of([adapter, offset])
        # The head that was read before the suppression list: a forget between the two must refuse the seal.
        return self.append(adapter, listed, head.epoch if epoch is None else epoch)

    def append(self, adapter: str, entries: Sequence[ManifestEntry], epoch: int | None = None) -> object:
        """Append entries as they are."""
        head = self.ledger.adapter(adapter)
        start = self.ledger.consumed(adapter).get((RUN, 0), 0)
        seal = Seal(
            adapter,
            head.epoch if epoch is None else epoch,
            head.next_index,
            Manifest((RUN,), tuple(entries)),
            "count",
            f"segments/{adapter}/{uuid.uuid4()}.seg",
            "0" * 64,
            {(RUN, 0): (start, start + len(entries))},
            root=merkle.root([]).hex(),
        )
        return self.ledger.seal([seal], "stream")[0]

    def live(self, adapter: str, segment: int) -> list[str | None]:
        """What a segment's entries say, None for tombstones."""
        first = self.ledger.segment(adapter, segment).first
        entries = self.ledger.manifest(adapter, segment).entries
        return [None if e.tombstone else self.contents[adapter, first + i] for i, e in enumerate(entries)]

    def finish(self, work: Work, contents: Sequence[str | None]) -> None:
        """Commit an increment, or set its segment aside where the gate says so."""
        name, number, epoch = work.adapter.name, work.segment.number, work.adapter.epoch
        parent = work.parent.digest if work.parent else ""
        hand = work.segment.hand
        if hand is Hand.DISCARD or (hand is Hand.NONE and rejected(parent, contents)):
            self.ledger.set_aside(name, number, epoch, work.adapter.tip, Cause.GATE, "worse", "trainer")
            self.turned_down.setdefault((name, work.adapter.tip), set()).add(number)
        else:
            digest = trained(parent, contents)
            state = digest_of(["state", digest])
            self.ledger.commit(
                Increment(name, number, epoch, work.adapter.tip, digest, state, (number,), {}), "trainer"
            )

    def train(self, adapter: str) -> bool:
        """One increment, if one awaits."""
        work = self.ledger.work(adapter)
        if work is not None:
            self.finish(work, self.live(adapter, work.segment.number))
        return work is not None

    def line(self, adapter: str, version: int) -> frozenset[int]:
        """The segments that a version's line learned or decided on."""
        return frozenset(Line.of(self.ledger.versions(adapter), version).segments)


@dataclass(frozen=True)
class Act:
    """What happened to an adapter, at the number of segments that there were: the part that survives a forget."""

    segments: int
    kind: str
    line: frozenset[int] = frozenset()
    segment: int = 0


def control(folder: Path, live: World, adapter: str, acts: Sequence[Act]) -> World:
    """The same log on a fresh ledger, forgotten entries arriving as tombstones, with the operators' acts replayed."""
    world = World(Ledger.open(f"sqlite:///{folder}/control-{uuid.uuid4()}.db"), live.contents)
    world.ledger.create(adapter, Recipe(), "test")
    pending = list(acts)
    segments = live.ledger.segments(adapter)
    for number in range(len(segments) + 1):
        while pending and pending[0].segments == number:
            _settle(world, adapter)
            _replay(world, adapter, pending.pop(0))
        if number < len(segments):
            world.append(adapter, live.ledger.manifest(adapter, number + 1).entries)
    _settle(world, adapter)
    return world


def _settle(world: World, adapter: str) -> None:
    while world.train(adapter):
        pass


def _replay(world: World, adapter: str, act: Act) -> None:
    if act.kind == "rollback":
        # The version that stands where the live one stood: gates may have decided otherwise on the way there.
        lines = {0: frozenset[int]()} | {v: world.line(adapter, v) for v in world.ledger.versions(adapter)}
        stands = [
            v for v, line in lines.items() if line <= act.line <= line | world.turned_down.get((adapter, v), set())
        ]
        world.ledger.rollback(adapter, stands[-1], "test")
    elif act.kind in ("accept", "discard"):
        world.ledger.decide_by_hand(adapter, act.segment, Hand(act.kind), "test")
    else:
        world.ledger.resume(adapter, act.kind, "test")  # type: ignore[arg-type]


def check_adapter(world: World, adapter: str) -> None:
    """What holds of an adapter after every transaction."""
    ledger = world.ledger
    with ledger.view(adapter) as seen:
        assert check_ledger(seen)[0] == [], "a sound ledger is not called corrupt"
    head, versions, segments = ledger.adapter(adapter), ledger.versions(adapter), ledger.segments(adapter)
    following = 0
    for number, segment in enumerate(segments, start=1):
        assert (segment.number, segment.first) == (number, following), "indexes are contiguous and never reused"
        following += segment.count
        assert len(ledger.manifest(adapter, number).entries) == segment.count
    assert (head.next_index, head.next_segment) == (following, len(segments) + 1)
    assert sorted(versions) == list(range(1, head.next_version))

    line = Line.of(versions, head.tip)
    done = {s.number: s.version for s in segments if s.outcome is Outcome.TRAINED}
    assert done == line.trained, "trained is exactly what the tip's line learned"
    for segment in segments:
        if segment.outcome is Outcome.AWAITING:
            assert segment.version is None
            assert segment.cause is Cause.NONE
            assert segment.number > max(line.segments, default=0), "segments are learned in order"
        if segment.outcome is Outcome.SET_ASIDE:
            assert segment.cause is not Cause.NONE
            if segment.cause in (Cause.GATE, Cause.ERROR) and segment.version is not None:
                assert segment.version in (0, *line_of(versions, head.tip)), "a standing decision is of the tip's line"
    assert all(s.outcome is Outcome.SET_ASIDE for s in segments if s.number in line.rejected)

    for number in (head.release, head.tip):
        assert number == 0 or not versions[number].revoked, "nothing revoked is released or built on"
    if head.held is not None:
        assert head.release == head.held == head.tip
    for version in versions.values():
        assert version.parent < version.number
        if version.parent and versions[version.parent].revoked:
            assert version.revoked, "nothing revoked has a clean descendant"

    suppressed, revoked = ledger.suppressed(adapter), ledger.revoked_digests()
    manifests = [ledger.manifest(adapter, segment.number) for segment in segments]
    live = {entry.written_by for manifest in manifests for entry in manifest.entries if not entry.tombstone}
    assert not ledger.tainted(adapter, live), "what saw a suppressed subject elsewhere is not learned from here"
    for manifest in manifests:
        for entry in manifest.entries:
            if not entry.tombstone:
                assert entry.written_by not in revoked, "what a revoked version wrote is not learned"
                assert suppressed.isdisjoint(entry.subjects), "a suppressed subject's entries are tombstones"


def line_of(versions: Mapping[int, object], tip: int) -> list[int]:
    """A version and its ancestors."""
    from riverdelta.registry.ledger.decisions import lineage

    return lineage(versions, tip)  # type: ignore[arg-type]
