"""Ownership: the adapters of one worker's buckets, loaded from the ledger as their events come."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from riverdelta.core.curation import Curation
from riverdelta.core.errors import Conflict, NotFound, Refused
from riverdelta.core.patience import Patience
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import AdapterRecord, Ledger

from .admission import ADMITTED, CURATED, Admission
from .items import EXAMPLE, FEEDBACK, DeadLetter, Item, Parcel, Where
from .joining import Joins

T = TypeVar("T")
log = logging.getLogger(__name__)
_SAMPLED = 1000  # of events dropped by a rule, one in so many is told of
_REMEMBERED = 2_000_000  # event hashes that idle adapters may keep in memory, about 130 bytes each


class Bucket:
    """The adapters whose names hash to one number, and how far each partition has been read for them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.adapters: dict[str, Admission] = {}
        self.busy: dict[str, Admission] = {}  # those that may not be idle
        self.reached: dict[Where, int] = {}
        self.recorded: dict[Where, int] = {}  # as in the ledger: everything before is decided for good

    def floors(self) -> dict[Where, int]:
        """Per partition, from where a restart must read again."""
        floors = dict(self.reached)
        for state in self.busy.values():
            for where, offset in floors.items():
                held = state.floor(where)
                if held is not None and held < offset:
                    floors[where] = held
        return floors


class Owner:
    """One worker's share of the adapters."""

    def __init__(self, settings: Settings, ledger: Ledger, patience: Patience) -> None:
        self._settings = settings.streams
        self._ledger = ledger
        self._patience = patience
        self._recipe = Recipe.load(Path(settings.streams.recipe)) if settings.streams.recipe else Recipe()
        self._positions: dict[str, dict[tuple[int, int], int]] = {}
        self._used: dict[str, float] = {}
        self.buckets: dict[int, Bucket] = {}
        self.revoked: frozenset[str] = frozenset()
        self.fence = 0
        self.dead: list[DeadLetter] = []
        self.tally: Counter[str] = Counter()
        self._curated: Counter[str] = Counter()

    def states(self) -> Iterator[Admission]:
        """Every adapter in memory."""
        for bucket in self.buckets.values():
            yield from bucket.adapters.values()

    def count_open(self) -> int:
        """How many entries are open."""
        return sum(len(state.open) for bucket in self.buckets.values() for state in bucket.busy.values())

    # -- events --------------------------------------------------------------------------------------------------

    def take(self, parcel: Parcel, at: float) -> None:
        """Decide a parcel's events, knowing everything that the ledger knew when the parcel was read."""
        bucket = self.buckets.setdefault(parcel.bucket, Bucket(parcel.bucket))
        self._follow(bucket, parcel)
        if parcel.items:
            self._admit(bucket, parcel.items, at)
        for letter in parcel.dead:
            if letter.offset >= bucket.recorded.get(letter.where, 0):
                self.dead.append(letter)
        bucket.reached.update(parcel.reached)

    def _follow(self, bucket: Bucket, parcel: Parcel) -> None:
        """Notice partitions that are new, and those that belong to a topic made again."""
        for where in parcel.reached.keys() - bucket.reached.keys():
            run, partition = where
            for gone in [held for held in bucket.reached if held[1] == partition and held[0] != run]:
                del bucket.reached[gone]
            if run not in self._positions:
                self._positions[run] = self._read(partial(self._ledger.positions, run))
            recorded = self._positions[run].get((partition, bucket.number))
            if recorded is not None:
                bucket.recorded[where] = recorded

    def _admit(self, bucket: Bucket, items: list[Item], at: float) -> None:
        refused: dict[str, tuple[str, str]] = {}
        confirmed: set[str] = set()
        states, busy, tally, recorded, used = bucket.adapters, bucket.busy, self.tally, bucket.recorded, self._used
        wall = time.time()
        for item in items:
            if item.offset < recorded.get(item.where, 0):
                continue
            name = item.adapter
            state = states.get(name)
            if state is None:
                state = self._loaded(states, item, refused)
                if state is None:
                    continue
            if (state.suppressed or item.digest) and name not in confirmed and self._may_be_barred(state, item):
                self._read(partial(self.refresh, state))  # it may have been allowed again since
                confirmed.add(name)
            busy[name] = state
            used[name] = at
            if item.kind == EXAMPLE:
                verdict = state.admit(item, at)
                tally[verdict] += 1
                if verdict != ADMITTED and verdict.startswith(CURATED):
                    self._sample(item, verdict)
                continue
            for verdict in state.join(item, at, max(0.0, wall - item.logged) if item.logged > 0 else 0.0):
                tally[verdict] += 1
                if verdict.startswith(CURATED):
                    self._sample(item, verdict)

    def _loaded(
        self, states: dict[str, Admission], item: Item, refused: dict[str, tuple[str, str]]
    ) -> Admission | None:
        """The adapter of an item, read from the ledger; None, and a dead letter, where there is none to be had."""
        name = item.adapter
        if name not in refused:
            try:
                state = states[name] = self._read(partial(self.load, name, create=True))
                return state
            except (NotFound, Refused) as error:
                reason = "unknown_adapter" if isinstance(error, NotFound) else "adapter_cap"
                refused[name] = (reason, error.message)
        if item.raw is not None:
            self.dead.append(DeadLetter(item.raw, item.where, item.offset, *refused[name]))
        return None

    def _sample(self, item: Item, verdict: str) -> None:
        """Tell of the first event that a rule drops, and of every thousandth, where in Kafka it lies."""
        self._curated[verdict] += 1
        if self._curated[verdict] % _SAMPLED == 1:
            log.info(
                "dropped by the recipe's rules",
                extra={
                    "adapter": item.adapter,
                    "rule": verdict.removeprefix(CURATED),
                    "partition": item.where[1],
                    "offset": item.offset,
                    "dropped": self._curated[verdict],
                },
            )

    def _read(self, action: Callable[[], T]) -> T:
        return self._patience(action, "reading the ledger")

    def _may_be_barred(self, state: Admission, item: Item) -> bool:
        return (
            (bool(state.suppressed) and not state.suppressed.isdisjoint(item.subjects))
            or item.digest in self.revoked
            or item.digest in state.revoked
        )

    # -- the ledger's view -----------------------------------------------------------------------------------------

    def load(self, name: str, create: bool = False) -> Admission:
        """An adapter as the ledger has it. `create`: make it if the settings say so; else `NotFound`, and `Refused`
        when there are too many."""
        try:
            head = self._ledger.adapter(name)
        except NotFound:
            if not create or self._settings.unknown_adapters != "create":
                raise
            head = self._create(name)
        # The head before the suppression list: a forget between the two makes the epoch too old, never the list.
        suppressed = self._ledger.suppressed(name)
        recipe = Recipe.from_dict(head.recipe)
        seal = recipe.seal
        oldest = max(0, head.next_index - self._settings.dedupe_window)
        recent = (
            (index, entry.event)
            for segment, manifest in (self._ledger.manifests(name, oldest) if head.next_index else ())
            for index, entry in enumerate(manifest.entries, start=segment.first)
        )
        return Admission(
            name,
            epoch=head.epoch,
            next_index=head.next_index,
            next_segment=head.next_segment,
            count=seal.count,
            age=seal.age,
            linger=seal.linger,
            curate=Curation(recipe.curate),
            feedback=recipe.feedback,
            dedupe=self._settings.dedupe_window,
            consumed=self._ledger.consumed(name),
            suppressed=suppressed,
            revoked=self.revoked,
            recent=recent,
            joins=Joins(self._settings.join_limit, self._settings.join_seconds),
            allowed_from=self._ledger.allowed_from(name),
        )

    def _create(self, name: str) -> AdapterRecord:
        try:
            made = self._ledger.create(name, self._recipe, "stream", "its first event", self._settings.max_adapters)
            log.info("adapter created", extra={"adapter": name})
            return made
        except Conflict:
            return self._ledger.adapter(name)  # somebody else was faster

    def refresh(self, *states: Admission) -> int:
        """Read adapters' epochs and suppression lists again, and erase what is open of them; how many entries.

        Who was forgotten since the last look may be allowed again already. What is open was sent before that look, and
        so before the forget: it goes all the same.
        """
        if not states:
            return 0
        # The heads before all else: a forget in between makes an epoch too old, never what is erased under it too
        # little.
        heads = [self._ledger.adapter(state.name) for state in states]
        forgets = [held for held in self._ledger.forgets(after=self.fence) if held.began > self.fence]
        revoked = self._ledger.revoked_digests()
        erased = 0
        for state, head in zip(states, heads, strict=True):
            _check_not_restored(head.next_index, state)
            name, texts = state.name, state.texts()
            forgotten = frozenset(held.subject for held in forgets if held.names(name))
            suppressed = self._ledger.suppressed(name)  # first: who is allowed in between is so from some offset on
            allowed_from = self._ledger.allowed_from(name, texts)
            tainted = self._ledger.tainted(name, texts)
            gone = forgotten | self._ledger.tainted(name, texts, forgotten) if forgotten else forgotten
            erased += state.suppress(suppressed, revoked | tainted, head.epoch, allowed_from, gone)
        return erased

    def start_at(self, fence: int) -> None:
        """Under a lease just taken: read anew whatever is in memory; nothing else remains of the fences so far."""
        self.revoked = self._ledger.revoked_digests()
        self.refresh(*self.states())
        self.fence = fence

    def catch_up(self, fence: int) -> None:
        """Carry out every fence up to `fence`: erase what is open of what was forgotten since the last one."""
        forgets = self._ledger.forgets(after=self.fence)
        everywhere = any(forget.everywhere for forget in forgets)  # in adapters made since, too
        named = {name for forget in forgets for name in forget.adapters}
        revoked = self._ledger.revoked_digests()
        reached = [
            state
            for state in self.states()
            if everywhere or state.name in named or (revoked != self.revoked and not state.idle)
        ]
        erased = self.refresh(*reached)
        self.revoked = revoked
        self.fence = fence
        log.info("fence carried out", extra={"fence": fence, "erased": erased})

    def reload(self, state: Admission) -> Admission:
        """Another worker has sealed for an adapter: read it again and keep what is still unsealed."""
        for bucket in self.buckets.values():
            if bucket.adapters.get(state.name) is state:
                fresh = self.load(state.name)
                self.refresh(state)  # after: what is forgotten in between makes the fresh one's epoch too old
                bucket.adapters[state.name] = fresh
                kept = fresh.readmit(state)
                bucket.busy[state.name] = fresh
                log.warning(
                    "another worker sealed for this adapter; its log was read again",
                    extra={"adapter": state.name, "open": len(state.open), "kept": kept},
                )
                return fresh
        raise AssertionError(f"{state.name} is not owned here")

    def let_go(self) -> None:
        """Forget idle adapters, the least recently used first, while too many event hashes are in memory."""
        total = sum(state.remembered for state in self.states())
        if total <= _REMEMBERED:
            return
        owners = {name: bucket for bucket in self.buckets.values() for name in bucket.adapters}
        for name in sorted(owners, key=lambda name: self._used.get(name, 0.0)):
            state = owners[name].adapters[name]
            if state.idle:
                total -= state.remembered
                del owners[name].adapters[name]
                owners[name].busy.pop(name, None)
                self._used.pop(name, None)
            if total <= _REMEMBERED * 0.8:
                return

    def expire(self, at: float) -> Counter[str]:
        """Drop interactions and feedback that met nothing in time; how many of each kind."""
        gone: Counter[str] = Counter()
        for state in self.states():
            if len(state.joins):
                for waiting in state.joins.expire(at):
                    item = waiting.item
                    gone[item.kind] += 1
                    if item.kind == FEEDBACK and waiting.fresh and item.raw is not None:
                        message = "No interaction with this response came in time."
                        self.dead.append(DeadLetter(item.raw, item.where, item.offset, "unmatched", message))
        return gone


def _check_not_restored(next_index: int, state: Admission) -> None:
    """`Conflict` where a ledger has lost entries that it had sealed: they must be read again, so begin anew."""
    if next_index < state.next_index:
        raise Conflict(
            f"The ledger has {next_index} entries of {state.name} after {state.next_index}: an older one was restored.",
            "Start the dataflow again: it reads on from where that ledger stands.",
        )
