"""The dataflow in simulation: no processes, no Kafka, no clock; faults by a seeded schedule.

A world holds what survives a crash (Kafka's partitions, the ledger, the store, the dead letters). Sessions are workers
that read it; they crash, they are taken for dead and go on (zombies), their calls fail before or after their effect.
After the schedule one fresh session reads everything, and `check` holds the world to what was published.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import msgspec

from riverdelta.core.errors import Unavailable
from riverdelta.core.keys import SubjectKey
from riverdelta.core.patience import Patience
from riverdelta.core.recipe import Recipe, Seal
from riverdelta.core.settings import Settings, Streams
from riverdelta.registry import contents, gc, written
from riverdelta.registry.ledger import Ledger
from riverdelta.streams.intake import Intake, Read, Record
from riverdelta.streams.items import Where
from riverdelta.streams.metrics import Metrics
from riverdelta.streams.run import _floors
from riverdelta.streams.worker import Worker

from .memory import MemoryDelivery, MemoryKeys, MemoryLedger, MemoryStore

KEY = SubjectKey(bytes(32))
BUCKETS = 2
METRICS = Metrics()
ADAPTERS = ("ada", "bob", "cyd")
SUBJECTS = ("ann", "ben", "cat", "dan")


class Hasty(Patience):
    """Tries again at once."""

    def __call__(self, action: Callable[[], Any], what: str = "") -> Any:
        while True:
            try:
                return action()
            except Unavailable:
                pass


class Crash(BaseException):
    """The process is killed."""


class Faulty:
    """A ledger or store whose calls may fail, kill their caller or take long, before their effect or after it (a lost
    acknowledgement)."""

    def __init__(self, real: Any, world: "World") -> None:
        self._real, self._world = real, world

    def _fail(self, when: str) -> None:
        world = self._world
        if world.fault_rate and world.rng.random() < world.fault_rate:
            fault = world.rng.random()
            if fault > 0.9 and not world.locked:
                world.collect()
                return
            if fault < 0.2:
                world.lose()
                raise Crash
            raise Unavailable(when)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._real, name)
        if not callable(call):
            return call

        def maybe(*given: Any, **named: Any) -> Any:
            self._fail("before")
            world, held = self._world, self._world.locked
            if name == "seal" and world.fault_rate and world.rng.random() < 0.25:
                world.collect()  # the writer sleeps when what it has written is not yet named
            world.locked = True  # a call of the store in one of the ledger is made while that is held
            try:
                done = call(*given, **named)
            finally:
                world.locked = held
            self._fail("after")
            return done

        return maybe


class Sometime:
    """A thread that does its work at once, or when it is waited for, or never before the crash."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def submit(self, work: Callable[..., Any], *given: Any) -> "Sometime":
        self._result: list[Any] = []
        self._work = lambda: self._result or self._result.append(work(*given))
        if self._rng.random() < 0.5:
            self._work()
        return self

    def done(self) -> bool:
        if self._rng.random() < 0.5:
            self._work()
        return bool(self._result) and self._rng.random() < 0.7

    def result(self) -> Any:
        self._work()
        return self._result[0]


@dataclass
class World:
    """What survives."""

    rng: random.Random
    ledger: Any = field(default_factory=MemoryLedger)
    store: Any = field(default_factory=MemoryStore)
    keys: Any = field(default_factory=MemoryKeys)
    delivery: MemoryDelivery = field(default_factory=MemoryDelivery)
    run: str = "run-0"
    parts: dict[int, list[Record]] = field(default_factory=lambda: {0: [], 1: [], 2: []})
    published: dict[tuple[str, int, int], dict[str, Any]] = field(default_factory=dict)
    junk: set[tuple[str, int, int]] = field(default_factory=set)
    forgotten: set[tuple[str, int, int]] = field(default_factory=set)  # never learned, whoever is allowed since
    lost: set[str] = field(default_factory=set)  # payloads and keys written by a worker that died before it sealed
    events: int = 0
    now: float = 0.0
    fault_rate: float = 0.0
    window: int = 10_000
    locked: bool = False

    def settings(self) -> Settings:
        streams = Streams(buckets=BUCKETS, unknown_adapters="create", dedupe_window=self.window, join_seconds=1e9)
        return Settings(data="/nowhere", kafka={"bootstrap": "none"}, streams=streams)

    def publish(self, part: int, event: dict[str, Any] | None) -> None:
        offset = len(self.parts[part])
        where = (self.run, part, offset)
        if event is None:
            self.junk.add(where)
            value = b"junk"
        else:
            self.published[where] = event
            value = msgspec.json.encode(event)
        self.parts[part].append((part, offset, 0, None, value, ()))

    def make_again(self) -> None:
        """Delete the topic and make it again: offsets start at 0, under another id."""
        self.run = f"run-{int(self.run[4:]) + 1}"
        self.parts = {part: [] for part in range(2)}

    def collect(self) -> None:
        """Everybody else sleeps for so long that what nothing names counts as left over."""
        self.now += 40.0
        held = [*self.store.objects, *(f"keys/{name}" for name in self.keys.held)]
        self.ledger.delete_unnamed(held, partial(gc.delete, self.store, self.keys))

    def lose(self) -> None:
        """A worker dies: what it has written and not sealed stays."""
        self.lost |= {*self.store.objects, *self.keys.held}

    def forget(self, subject: str, digests: tuple[str, ...] = ()) -> None:
        self.ledger.forget(KEY.subject(subject), ADAPTERS, digests)
        self._stays_forgotten(subject)

    def allow(self, subject: str) -> None:
        """What is sent from now on may be learned again."""
        if any(KEY.subject(subject) in self.ledger.suppressed(name) for name in ADAPTERS):
            self._stays_forgotten(subject)
        ends = {(self.run, part): len(records) for part, records in self.parts.items()}
        self.ledger.allow(KEY.subject(subject), ADAPTERS, ends)

    def _stays_forgotten(self, subject: str) -> None:
        self.forgotten |= {place for place, event in self.published.items() if event["subject"] == subject}


class Session:
    """One worker reading the world from the ledger's floors."""

    def __init__(self, world: World, serial: int) -> None:
        self.world, self.serial, self.reads = world, serial, 0
        patience = Hasty(threading.Event())
        ledger = cast(Ledger, Faulty(world.ledger, world))
        store, keys = cast(Any, Faulty(world.store, world)), cast(Any, Faulty(world.keys, world))
        self.intake = Intake(KEY, BUCKETS)
        self.worker = Worker(
            world.settings(), ledger, store, keys, cast(Any, world.delivery), patience, METRICS, lambda _: None,
            cast(Any, Sometime(world.rng)), lambda: world.now,
        )  # fmt: skip
        self.begin()

    def begin(self) -> None:
        """Turn to the topic's present incarnation, as a reader does."""
        self.run = self.world.run
        floors = _floors(self.world.ledger, Hasty(threading.Event()), BUCKETS, self.run)
        self.reached: dict[Where, int] = {(self.run, part): floors.get(part, 0) for part in self.world.parts}

    def read(self, part: int, count: int) -> None:
        if self.run != self.world.run:
            self.begin()
        start = self.reached.setdefault((self.run, part), 0)
        records = self.world.parts[part][start : start + count]
        self.reached[self.run, part] = start + len(records)
        self.reads += 1
        read = Read((self.serial, self.reads), self.run, records, dict(self.reached))
        for _, parcel in self.intake.sort(read):
            self.worker.take(parcel)

    def drain(self) -> None:
        for _ in range(3):
            for part in self.world.parts:
                self.read(part, len(self.world.parts[part]))
            self.world.now += 100.0
            for _ in range(2):
                self.worker.commit()
                self.worker._sealer.land()


def random_event(world: World, rng: random.Random, joins: bool) -> dict[str, Any] | None:
    """Something a producer may send: now and then junk, a duplicate, feedback before its interaction."""
    if rng.random() < 0.05:
        return None
    world.events += 1
    event: dict[str, Any] = {"adapter": rng.choice(ADAPTERS), "subject": rng.choice(SUBJECTS)}
    if joins and rng.random() < 0.5:
        response = f"r{rng.randrange(12)}"
        event["adapter"] = ADAPTERS[int(response[1:]) % 3]
        if rng.random() < 0.5:
            return {
                **event, "type": "interaction", "response": response, "digest": f"d{rng.randrange(3)}",
                "prompt": f"q-{response}", "completion": "a",
            }  # fmt: skip
        if rng.random() < 0.5:
            return {**event, "type": "feedback", "response": response, "correction": f"c{rng.randrange(3)}"}
        return {**event, "type": "feedback", "response": response, "rating": rng.choice([1, 1, -1])}
    if rng.random() < 0.5:
        event |= {"id": f"e{rng.randrange(40)}", "source": "s"}
    return {**event, "text": f"t{world.events}"}


def recipe(rng: random.Random) -> Recipe:
    return Recipe(seal=Seal(count=rng.choice([1, 2, 3, 7]), age=rng.choice([0.5, 5.0]), linger=5.0))


def simulate(seed: int, joins: bool = True, forgets: bool = True, world: World | None = None) -> World:
    """Run one schedule to its end; the world as it is after a fresh session has read everything."""
    with patch.object(written, "SURE_SECONDS", 0.0):  # the clock here is the world's
        return _simulate(random.Random(seed), joins, forgets, world)


def _simulate(rng: random.Random, joins: bool, forgets: bool, world: World | None) -> World:
    world = world or World(rng)
    world.rng, world.fault_rate = rng, rng.choice([0.0, 0.0, 0.05])
    for name in ADAPTERS[: rng.randrange(4)]:
        world.ledger.create(name, recipe(rng), "test")
    sessions: list[Session] = []
    steps = rng.randrange(20, 120)
    for step in range(steps):
        world.now += rng.choice([0.0, 0.1, 0.3, 2.0])
        session = rng.choice(sessions) if sessions else None
        try:
            if session is None:
                sessions.append(Session(world, step))
            else:
                _step(world, sessions, session, step, joins, forgets)
        except Crash:
            if session in sessions:
                sessions.remove(session)
    world.fault_rate = 0.0
    last = Session(world, steps)
    last.drain()
    for session in sessions:  # zombies wake up once more
        session.worker._sealer.land()
        session.worker.commit()
        session.worker._sealer.land()
    last.drain()
    return world


def _step(world: World, sessions: list[Session], session: Session, step: int, joins: bool, forgets: bool) -> None:
    rng, act = world.rng, world.rng.random()
    if act < 0.35:
        for _ in range(rng.randrange(1, 6)):
            world.publish(rng.choice(list(world.parts)), random_event(world, rng, joins))
    elif act < 0.65:
        session.read(rng.choice(list(world.parts)), rng.randrange(1, 12))
    elif act < 0.85:
        session.worker.commit()
    elif act < 0.91:  # a crash, or a worker taken for dead that goes on
        if len(sessions) > 1 or rng.random() < 0.7:
            sessions.remove(session)
            world.lose()
        if rng.random() < 0.3:
            sessions.append(Session(world, step))
    elif act < 0.95 and forgets:
        if rng.random() < 0.8:
            world.forget(subject := rng.choice(SUBJECTS), rng.choice([(), (), ("d0",)]))
            if step % 2:  # before anybody has looked
                world.allow(subject)
        else:
            world.allow(rng.choice(SUBJECTS))
    elif act < 0.96:
        world.ledger.held.clear()  # every lease is given up for lost
    elif act < 0.97:
        world.parts[len(world.parts)] = []
    elif act < 0.975:
        world.make_again()


class Wrong(AssertionError):
    """The world is not what was published."""


Place = tuple[str, int, int]


def check(world: World) -> None:
    """Every valid event is one entry, or a duplicate of one; nothing else is; nothing forgotten is live.

    Of a topic that was deleted, what nobody had read is gone: there, at most one.
    """
    named: set[str] = set()
    entries = {name: _entries(world, name, named) for name in ADAPTERS if name in world.ledger.heads}
    if orphans := ({*world.store.objects, *world.keys.held}) - named - world.lost:
        raise Wrong(f"payloads and keys that no segment names: {orphans}")
    for name in ADAPTERS:
        _check_adapter(world, name, Counter(entries.get(name, ())))
    dead = {(letter.where[0], letter.where[1], letter.offset) for letter in world.delivery.letters}
    if not dead <= world.junk or {place for place in world.junk - dead if place[0] == world.run}:
        raise Wrong(f"dead letters {dead ^ world.junk}")


def _entries(world: World, adapter: str, named: set[str]) -> list[Place]:
    following, places = 0, []
    suppressed = world.ledger.suppressed(adapter)
    for segment, manifest in world.ledger.manifests(adapter):
        named |= {segment.payload, segment.keyring}
        if segment.first != following:
            raise Wrong(f"{adapter} jumps from index {following} to {segment.first}")
        following += segment.count
        held = contents.read_openings(world.store, world.keys, segment, manifest)
        for index, (entry, content) in enumerate(zip(manifest.entries, held, strict=True)):
            own = (entry.run, entry.partition, entry.offset)
            both = [(manifest.incarnations[at[0]], *at[1:]) for at in (own, manifest.partners.get(index, own))]
            places.append(both[0])
            if entry.tombstone:
                continue
            if content is None:
                raise Wrong(f"{places[-1]} is live and says nothing")
            if not suppressed.isdisjoint(entry.subjects) or entry.written_by in world.ledger.revoked:
                raise Wrong(f"{places[-1]} is live and forgotten")
            if not world.forgotten.isdisjoint(both):
                raise Wrong(f"{both} is live, and came before its subject was allowed again")
    if following != world.ledger.heads[adapter].next_index:
        raise Wrong(f"{adapter} ends at {following}")
    return places


def _check_adapter(world: World, adapter: str, counts: Counter[Place]) -> None:
    mine = {place: event for place, event in world.published.items() if event["adapter"] == adapter}
    once: dict[object, list[Place]] = {}
    for place, event in mine.items():
        if "text" in event:
            once.setdefault(event.get("id", place), []).append(place)
    for what, places in once.items():
        times = sum(counts.pop(place, 0) for place in places)
        if times > 1 or (times == 0 and any(place[0] == world.run for place in places)):
            raise Wrong(f"{what} of {adapter} is {times} entries")
    asked: dict[str, set[str]] = {}
    for place, event in mine.items():
        if event.get("type") == "interaction":
            asked.setdefault(event["response"], set()).add(place[0])
    lessons: dict[tuple[str, bool], bool] = {}  # whether both of the pair are in the topic as it is now
    for place, event in mine.items():
        teaches = event.get("type") == "feedback" and ("correction" in event or event["rating"] > 0)
        if teaches and event["response"] in asked:
            here = place[0] == world.run and world.run in asked[event["response"]]
            key = (event["response"], "correction" in event)
            lessons[key] = lessons.get(key, False) or here
    if not sum(lessons.values()) <= sum(counts.values()) <= len(lessons):
        raise Wrong(f"{adapter} learned {sum(counts.values())} answers of {len(lessons)}")


if __name__ == "__main__":  # python -m tests.streams.simulation SEED: one schedule again
    import sys

    check(simulate(int(sys.argv[1])))
    print("as published")
