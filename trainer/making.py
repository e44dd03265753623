"""An increment in the making: what each shard has still to learn of a segment, and what comes of all of them together.

An adapter without shards is one share. With shards, each share learns its own entries on its own parent, rehearses its
own past and has a gate of its own; a gate on the whole decides only whether the version is released. A share that an
earlier line has made of the very same entries, as all but one do after a forget, is taken from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean
from typing import Any

import msgspec

from riverdelta.core.errors import Corrupt, NotFound, RiverdeltaError
from riverdelta.core.recipe import Recipe
from riverdelta.core.store import ObjectStore
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, PartRecord, VersionRecord, Work

from .base import Base
from .gate import Gate, Judged, judge_whole, usual_of
from .increment import Candidate, Inputs, Learner
from .inputs import Earlier, Log, files_of, learned_by, line_of
from .parts import Files, join, key_of, seed_of_shard, split


@dataclass
class Share:
    """What one shard learns of a segment: `number` is the shard, `key` names what it will have learned from."""

    number: int
    learner: Learner
    gate: Gate | None
    earlier: Earlier
    key: str = ""

    def made(self) -> tuple[Candidate, Judged]:
        """What the share has come to, and its gate's verdict; raises the learner's failure, if it has one."""
        candidate = self.learner.candidate()
        return candidate, self.gate.judge() if self.gate is not None else Judged("", {})


def _share(base: Base, number: int, inputs: Inputs, earlier: Earlier, key: str = "") -> Share:
    learner = Learner(base, inputs)
    return Share(number, learner, Gate(base, inputs, learner) if inputs.recipe.gate.on else None, earlier, key)


@dataclass(frozen=True)
class Made:
    """What an increment has come to: a candidate, with its shards' parts and why it is not to be released, or none
    and why."""

    candidate: Candidate | None
    judged: Judged
    parts: tuple[PartRecord, ...] = ()
    withheld: str = ""


class Making:
    """The increment of an adapter without shards: one share. `masked` counts the segment's near-duplicates."""

    def __init__(self, base: Base, ledger: Ledger, store: ObjectStore, keys: KeyStore, work: Work) -> None:
        """Read what the increment is made from; `NotFound` or `Corrupt` where a store does not hold it."""
        recipe, seed = Recipe.from_dict(work.adapter.recipe), work.adapter.seed
        log = Log(ledger, store, keys, recipe)
        self.masked = log.masked(work.segment)
        line = line_of(ledger, work)
        earlier = Earlier(log, learned_by(ledger, line, log.since(work.segment)))
        weights, state = files_of(store, line[-1]) if line else (None, None)
        usual = usual_of(version.metrics for version in line)
        inputs = Inputs(recipe, seed, log.said(work.segment), earlier, weights, state, usual, work.segment.hand)
        self.shares = [_share(base, 0, inputs, earlier)]
        self._segment = work.segment.number

    @property
    def saw(self) -> set[int]:
        """The segments used so far."""
        return {self._segment}.union(*(share.earlier.used for share in self.shares))

    def finish(self) -> Made:
        """What the shares have come to when all of them are done; raises the failure, if there is one. `Unavailable`
        while a store is away: ask again."""
        candidate, judged = self.shares[0].made()
        return Made(None if judged.rejected else candidate, judged)


@dataclass
class _Parts:
    """Per shard its record and its files."""

    records: list[PartRecord]
    files: list[Files | None]
    errors: list[RiverdeltaError] = field(default_factory=list)


class ShardedMaking(Making):
    """The increment of an adapter with shards."""

    def __init__(
        self,
        base: Base,
        ledger: Ledger,
        store: ObjectStore,
        keys: KeyStore,
        work: Work,
        fingerprint: dict[str, Any],
    ) -> None:
        self._base, self._work, self._store = base, work, store
        self._recipe, self._segment = Recipe.from_dict(work.adapter.recipe), work.segment.number
        self._log = log = Log(ledger, store, keys, self._recipe)
        self.masked = log.masked(work.segment)
        self._line = line = line_of(ledger, work)
        since = log.since(work.segment)
        self._everything = Earlier(log, learned_by(ledger, line, since))
        before = [PartRecord() for _ in range(log.count)]
        files: list[Files | None] = [None] * log.count
        if line:
            before = [PartRecord(part.key, part.digest, part.state) for part in line[-1].parts]
            files = self._split(line[-1])
        self._parts = _Parts(before, files)
        self.shares = []
        earlier_lines = [v for v in ledger.versions(work.adapter.name).values() if v.segment == self._segment]
        found: dict[int, list[Files | None]] = {}
        small, seed, hand = self._recipe.of_a_shard, work.adapter.seed, work.segment.hand
        for shard in range(log.count):
            live = log.live(work.segment, shard)
            if not live:
                continue
            shaped_by = (work.adapter.recipe_digest, seed, shard, fingerprint)
            key = key_of(shaped_by, before[shard].key, self._segment, hand, live)
            if self._take(shard, key, earlier_lines, found):
                continue
            learned = Earlier(log, learned_by(ledger, line, since, shard), shard)
            own = seed_of_shard(seed, shard)
            weights, state = files[shard] or (None, None)
            usual = usual_of(version.parts[shard].metrics for version in line)
            inputs = Inputs(small, own, log.said(work.segment, shard), learned, weights, state, usual, hand)
            self.shares.append(_share(base, shard, inputs, learned, key))

    def finish(self) -> Made:
        """Join the parts and ask the gate of the whole."""
        parts = self._parts
        parts.errors.clear()
        for share in self.shares:
            self._finish(share)
        if all(record.key == before for record, before in zip(parts.records, self._keys_before(), strict=True)):
            refused = [record.note for record in parts.records if record.refused]
            if parts.errors and len(parts.errors) == len(refused):
                raise parts.errors[0]
            return Made(None, Judged(refused[0], {}))
        recipe, seed = self._recipe, self._work.adapter.seed
        joined = join(self._base, recipe, seed, parts.files)
        losses, metrics = self._metrics()
        candidate = Candidate(joined.weights, joined.digest, joined.state, joined.state_digest, losses, metrics)
        judged = self._judge(joined.weights)
        withheld = judged.rejected
        return Made(candidate, Judged("", judged.metrics), tuple(parts.records), withheld)

    def _finish(self, share: Share) -> None:
        parts, shard = self._parts, share.number
        try:
            candidate, judged = share.made()
        except RiverdeltaError as error:
            parts.errors.append(error)
            candidate, judged = None, Judged(str(error), {})
        if candidate is None or judged.rejected:
            parts.records[shard] = msgspec.structs.replace(
                parts.records[shard], refused=share.key, note=judged.rejected[:500]
            )
            return
        held = {**candidate.metrics, **judged.metrics}
        parts.records[shard] = PartRecord(share.key, candidate.digest, candidate.state_digest, metrics=held)
        parts.files[shard] = candidate.weights, candidate.state

    def _take(self, shard: int, key: str, lines: Sequence[VersionRecord], found: dict[int, list[Files | None]]) -> bool:
        """Take a part, or its refusal, over from a version that has learned the same; whether there was one.

        The version may be revoked for another shard's sake: what `key` names is in order.
        """
        for version in lines:
            part = version.parts[shard] if version.parts else PartRecord()
            if part.refused == key:
                kept = self._parts.records[shard]
                self._parts.records[shard] = msgspec.structs.replace(kept, refused=key, note=part.note)
                return True
            if part.key == key and not part.refused:
                try:
                    if version.number not in found:
                        found[version.number] = self._split(version)
                except (NotFound, Corrupt):  # purged meanwhile: it is learned again
                    continue
                self._parts.records[shard], self._parts.files[shard] = part, found[version.number][shard]
                return True
        return False

    def _split(self, version: VersionRecord) -> list[Files | None]:
        weights, state = files_of(self._store, version)
        assert state is not None
        return split(self._base, self._recipe, weights, state)

    def _keys_before(self) -> list[str]:
        return [part.key for part in self._line[-1].parts] if self._line else [""] * self._log.count

    def _metrics(self) -> tuple[tuple[float, ...], dict[str, Any]]:
        """What the parts' increments took together; a loss is the mean over those that took the step."""
        made = [
            record.metrics
            for record, before in zip(self._parts.records, self._keys_before(), strict=True)
            if record.key != before
        ]
        curves = zip_longest(*(each["losses"] for each in made))
        losses = tuple(fmean(loss for loss in step if loss is not None) for step in curves)
        total = {name: sum(each[name] for each in made) for name in ("steps", "entries", "tokens", "position")}
        return losses, {**total, "losses": [round(loss, 6) for loss in losses]}

    def _judge(self, weights: bytes) -> Judged:
        """The verdict on the whole, beside the newest of its line that was not withheld."""
        work, recipe, base = self._work, self._recipe, self._base
        if not recipe.gate.on:
            return Judged("", {})
        good = [version for version in self._line if not version.withheld]
        standing = files_of(self._store, good[-1])[0] if good else None
        usual = usual_of(version.metrics for version in good)
        entries, seed, hand = self._log.said(work.segment), work.adapter.seed, work.segment.hand
        inputs = Inputs(recipe, seed, entries, self._everything, standing, usual=usual, hand=hand)
        return judge_whole(base, inputs, weights)

    @property
    def saw(self) -> set[int]:
        """The segments used so far, the gate's sample of the whole included."""
        return super().saw | self._everything.used


def begin(
    base: Base, ledger: Ledger, store: ObjectStore, keys: KeyStore, work: Work, fingerprint: dict[str, Any]
) -> Making:
    """The increment that some work asks for."""
    if Recipe.from_dict(work.adapter.recipe).shards.count == 1:
        return Making(base, ledger, store, keys, work)
    return ShardedMaking(base, ledger, store, keys, work, fingerprint)
