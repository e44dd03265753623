"""Leaks to plant in the live stack: each lets what is forgotten go on shaping an adapter, and must be caught.

`PLANTED[name](monkeypatch)` plants one, in this process alone: the control has another."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from riverdelta.registry.ledger import Ledger, decisions
from riverdelta.trainer import inputs, making, worker
from riverdelta.trainer.gate import Gate
from riverdelta.trainer.increment import Inputs, Learner
from riverdelta.trainer.optimiser import AdamW

Patch = pytest.MonkeyPatch


class Kept(Sequence[bytes | None]):
    """Earlier entries as somebody read them first, erased or not."""

    def __init__(self, earlier: Any, memory: dict[tuple[str, int, int], bytes]) -> None:
        self._earlier, self._memory = earlier, memory

    def __len__(self) -> int:
        return len(self._earlier)

    def __getitem__(self, slot: Any) -> Any:
        content, held = self._earlier[slot], self._earlier
        which = bisect_right(held._ends, slot) - 1
        segment = held._segments[which]
        place = (segment.adapter, segment.number, held._log.places(segment, held._shard)[slot - held._ends[which]])
        return self._memory.setdefault(place, content) if content is not None else self._memory.get(place)


def _rehearsal(patch: Patch) -> None:
    """What is rehearsed comes from a memory of what was rehearsed before."""
    memory: dict[tuple[str, int, int], bytes] = {}
    begin = Learner.__init__

    def init(self: Any, base: Any, given: Inputs) -> None:
        if isinstance(given.earlier, inputs.Earlier):
            given = replace(given, earlier=Kept(given.earlier, memory))
        begin(self, base, given)

    patch.setattr(Learner, "__init__", init)


def _scoring(patch: Patch) -> None:
    """The gate scores earlier entries from a memory of what it scored before."""
    memory: dict[tuple[str, int, int], bytes] = {}
    begin = Gate.__init__

    def init(self: Any, base: Any, given: Inputs, learner: Any) -> None:
        begin(self, base, replace(given, earlier=Kept(given.earlier, memory)), learner)

    patch.setattr(Gate, "__init__", init)


def _gate(patch: Patch) -> None:
    """A verdict stands, although the parent or the segment is not what it was."""
    verdicts: dict[tuple[str, int], Any] = {}
    make, judge = making.Making.__init__, Gate.judge

    def init(self: Any, base: Any, ledger: Any, store: Any, keys: Any, work: Any) -> None:
        make(self, base, ledger, store, keys, work)
        for share in self.shares if not work.segment.hand else []:
            if share.gate is not None:
                key = (work.adapter.name, work.segment.number)
                share.gate.judge = lambda gate=share.gate, key=key: verdicts.setdefault(key, judge(gate))

    patch.setattr(making.Making, "__init__", init)


def _learning_rate(patch: Patch) -> None:
    """Micro-batches of tombstones do not count, so that the rate tells how many there are."""
    patch.setattr(AdamW, "skip", lambda self: None)


def _batch_layout(patch: Patch) -> None:
    """Micro-batches are made of what is left of a segment."""
    begin = Learner.__init__

    def init(self: Any, base: Any, given: Inputs) -> None:
        begin(self, base, replace(given, entries=[entry for entry in given.entries if entry is not None]))

    patch.setattr(Learner, "__init__", init)


def _optimiser_state(patch: Patch) -> None:
    """A rebuild goes on with the moments that the optimiser had."""
    moments: dict[tuple[str, int | None], bytes | None] = {}
    read = making.files_of

    def reading(store: Any, version: Any) -> Any:
        weights, state = read(store, version)
        return weights, state if version.parts else moments.setdefault((version.adapter, version.segment), state)

    patch.setattr(making, "files_of", reading)


def _interactions(patch: Patch) -> None:
    """What a revoked version wrote stays, and more of it is learned."""
    look = Ledger._mentioning

    def mentioning(self: Any, c: Any, mentions: Any) -> Any:
        written = {held.digest for head in self.adapters() for held in self.versions(head.name).values()}
        return look(self, c, set(mentions) - written)

    patch.setattr(Ledger, "_mentioning", mentioning)
    patch.setattr(Ledger, "revoked_digests", lambda self: frozenset())


def _stale_clean_state(patch: Patch) -> None:
    """The first version that saw what is forgotten counts as clean."""
    find = decisions.dirty_versions

    def later(versions: Any, touched: Any, *copies: Any) -> set[int]:
        dirty = find(versions, touched, *copies)
        return dirty - {min(dirty, default=0)}

    patch.setattr(decisions, "dirty_versions", later)


def _dedupe_window(patch: Patch) -> None:
    """The ids of what is erased are no longer known, so that whether it was there decides what is a duplicate."""
    load = Ledger.manifests

    def manifests(self: Any, adapter: str, index: int = 0) -> Any:
        return [
            (segment, msgspec.structs.replace(held, entries=tuple(
                msgspec.structs.replace(entry, event=b"") if entry.tombstone else entry for entry in held.entries
            )))
            for segment, held in load(self, adapter, index)
        ]  # fmt: skip

    patch.setattr(Ledger, "manifests", manifests)


def _checkpoints(patch: Patch) -> None:
    """A checkpoint log is known by its segment, whatever has become of its entries."""
    name = worker.digest_of

    def key(self: Any, work: Any) -> str:
        return name([work.adapter.name, work.segment.number])

    patch.setattr(worker.Worker, "_key", key)
    patch.setattr(worker.Worker, "_wanted", lambda self, active: True)


def _a_shard(patch: Patch) -> None:
    """A shard's part is taken over although some of its entries are tombstones since."""
    name = making.key_of
    patch.setattr(
        making, "key_of", lambda by, before, number, hand, live: name(by, before, number, hand, [True] * len(live))
    )


def _decisions_unseen(patch: Patch) -> None:
    """A version is dirty by what it learned, not by what was set aside on the way to it."""
    find = decisions.dirty_versions

    def learned(versions: Any, touched: Any, *copies: Any) -> set[int]:
        trained = {held.segment for held in versions.values()}
        return find(versions, set(touched) & trained, *copies)

    patch.setattr(decisions, "dirty_versions", learned)


PLANTED: dict[str, Callable[[Patch], None]] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _rehearsal,
        _scoring,
        _gate,
        _learning_rate,
        _batch_layout,
        _optimiser_state,
        _interactions,
        _stale_clean_state,
        _a_shard,
        _dedupe_window,
        _checkpoints,
        _decisions_unseen,
    )
}
