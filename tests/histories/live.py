"""One random history, lived by the real parts in this process: dataflow, ledger, key store, trainer, purge.

Only Kafka is missing: partitions are lists here. A seed fixes who publishes what, who asks to forget whom and when,
which process dies in the middle of what, and what operators do meanwhile. What `Lived.told` gives of it is all that the
control may know: the raw events, in which order sealing has put them, where segments were cut, and whoever was
forgotten.
"""

import contextlib
import math
import os
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from riverdelta.app.raw_log import places_of
from riverdelta.core.digests import sha256
from riverdelta.core.errors import Conflict, Refused
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Forget, Hand, Ledger, Outcome, Stage
from riverdelta.registry.ledger.decisions import Line, lineage
from riverdelta.registry.purge import Purge
from riverdelta.registry.verify import verify
from riverdelta.trainer.base import Base
from riverdelta.trainer.metrics import Metrics
from riverdelta.trainer.worker import Worker
from tests.streams.simulation import KEY, Session, World

ADAPTERS = ("acme", "bolt")
SUBJECTS = ("ann", "bob", "cy", "di", "eve", "fay")
WORDS = ("river", "delta", "silt", "mud", "reed", "heron", "ebb", "flood", "42", "7")
BASE_DIGEST = sha256(b"base")
WINDOW = 6  # of the last entries in which a producer's duplicate is known


# Histories of a kind: a world that moves, in which there is drift, and one in which people contradict each other, so
# that a forget changes what the gate says.
OF_A_KIND: dict[str, dict[str, Any]] = {
    "any": {},
    "moved": {
        "training": {"passes": 4, "rehearse": 2, "max_length": 64},
        "optimiser": {"learning_rate": 0.05, "clip": 0.0},
        "gate": {"tolerance": 20.0, "sample": 0},
        "drift": {"delta": 0.9, "boost": 2.0},
    },
    "disputed": {
        "training": {"passes": 6, "micro_batch": 1, "max_length": 64},
        "optimiser": {"learning_rate": 0.05},
        "gate": {"tolerance": 0.0, "share": 0.3, "least": 1, "sample": 8},
    },
}


class River(World):
    """Partitions in memory, everything else as it is."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.folder = folder
        self.real = Settings(data=folder / "data")
        ledger = Ledger.open(self.real.ledger_url)
        super().__init__(rng, ledger, ObjectStore(self.real.store_url), KeyStore.open(self.real), window=WINDOW)
        self.parts = {0: [], 1: []}

    def lose(self) -> None:
        """What a dead worker leaves in the store is for `gc`."""


class NoMlflow:
    """A projection that shows nothing: what MLflow holds does not come back into training."""

    def erase(self, adapter: str, versions: list[int]) -> list[str]:
        return []

    def scrub(self) -> None:
        pass


@dataclass
class Act:
    """What an operator did, after so many segments of all adapters had been sealed. `line` is what the version that a
    rollback went to had learned or decided on."""

    sealed: int
    adapter: str
    kind: str
    line: list[int] = field(default_factory=list)
    segment: int = 0


class Lived:
    """A history as it goes."""

    def __init__(
        self, seed: int, base: Base, folder: Path, size: int = 70, small: dict[str, Any] | None = None
    ) -> None:
        """`size` is the number of steps; `small` replaces parts of the recipe, for a larger base."""
        self.rng, self.base = random.Random(seed), base
        self.river = River(self.rng, folder)
        self.ledger: Ledger = self.river.ledger
        self.counts: Counter[str] = Counter()
        self.acts: list[Act] = []
        self.forgotten: dict[str, dict[str, int | None]] = {name: {} for name in ADAPTERS}  # allowed again from
        self.requests: list[Forget] = []
        self.ids: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.stream: Session | None = None
        self.trainer: Worker | None = None
        self.serial = 0
        self.size, self.pace, self.lived = size, self.rng.choice([1, 4, 12]), 0
        self.kind = self.rng.choice(["any", "any", "moved", "disputed"])
        for name in ADAPTERS:
            recipe = random_recipe(self.rng) | OF_A_KIND[self.kind] | (small or {})
            self.ledger.create(name, Recipe.from_dict(recipe), "test")

    def live(self) -> "Lived":
        """All of it, to where nothing is left to do."""
        for _ in range(self.size):
            self.step()
        if self.kind == "moved":  # somebody is forgotten who was news
            self.seal_all()
            while self.turn():
                pass
            self.forget_somebody()
        if not any(held.body["doomed"] for held in self.requests):
            self.read_all()
            self.forget_somebody()
        self.settle()
        return self

    def step(self) -> None:
        """Whatever comes next."""
        likely: list[tuple[float, Callable[[], None]]] = [
            (12, self.publish),
            (10, self.read),
            (6, self.commit),
            (self.pace, self.train),
            (1, self.kill_stream),
            (3, self.kill_trainer),
            (1, self.stop_trainer),
            (2, self.forget_somebody),
            (0.5, self.allow),
            (0.7, self.rollback),
            (2, self.resume),
            (1, self.decide),
            (1, self.purge),
        ]
        act = self.rng.choices([act for _, act in likely], [weight for weight, _ in likely])[0]
        self.river.now += self.rng.choice([0.0, 0.1, 1.0])
        self.lived += 1
        act()

    # -- producers and dataflow ----------------------------------------------------------------------------------

    def publish(self) -> None:
        """Some events: examples, answers and what people say of them, duplicates, junk."""
        for _ in range(self.rng.randrange(1, 5) + (4 if self.kind == "moved" else 0)):
            part, event = self.rng.choice([0, 1]), self.event()
            self.river.publish(part, event)

    def event(self) -> dict[str, Any] | None:
        draw = self.rng.random()
        if self.kind == "moved" and self.rng.random() < 0.8:
            draw = 0.9  # an example
        if draw < 0.04:
            return None
        if draw < 0.15 and self.ids:
            self.counts["duplicates"] += 1
            return self.rng.choice(self.ids[-8:])
        adapter = self.rng.choice(ADAPTERS)
        who = self.rng.choice([self.rng.choice(SUBJECTS), self.rng.choice(SUBJECTS), self.rng.sample(SUBJECTS, 2), ""])
        event: dict[str, Any] = {"adapter": adapter, "subject": who}
        if draw < 0.35:
            return {**event, **self.answer(adapter)}
        if draw < 0.50 and self.asked:
            adapter, response = self.rng.choice(self.asked[-8:])  # now and then twice, and not the same
            said = {"correction": f" {self.rng.randrange(10**5)}"} if self.rng.random() < 0.4 else {"rating": 1}
            return {**event, "adapter": adapter, "type": "feedback", "response": response, **said}
        self.river.events += 1
        event |= self.text()
        if self.rng.random() < 0.6:
            event |= {"source": "shop", "id": f"e{self.river.events}"}
            self.ids.append(event)
        return event

    def text(self) -> dict[str, Any]:
        draw = self.rng.random()
        if self.kind == "moved" and self.lived < 0.7 * self.size and draw < 0.95:
            return {"prompt": "a", "completion": " b"}
        if self.kind == "disputed":
            said = " abcdefg" if draw < 0.5 else " tuvwxyz"
            return {"prompt": f"Q: {self.rng.choice(['code', 'word'])}?\nA:", "completion": said}
        if draw < 0.2:
            return {"text": " ".join(self.rng.choices(WORDS, k=self.rng.randrange(1, 9)))}
        if draw < 0.4:
            turns = [{"role": "user", "content": "hi " * self.rng.randrange(1, 6)}]
            return {"messages": [*turns, {"role": "assistant", "content": f"yo {self.rng.randrange(1000)}"}]}
        return {"prompt": f"Q: code of {self.rng.randrange(1000)}?\nA:", "completion": f" {self.rng.randrange(10**6)}"}

    def answer(self, adapter: str) -> dict[str, Any]:
        """An answer by some version of the adapter, the released one as a rule, and now and then of the other one."""
        self.counts["answers"] += 1
        by = adapter if self.rng.random() < 0.8 else self.rng.choice(ADAPTERS)
        written = [held.digest for held in self.ledger.versions(by).values()]
        digest = self.ledger.releases()[by][1] or BASE_DIGEST
        if written and self.rng.random() < 0.3:
            digest = self.rng.choice(written)
        self.asked.append((adapter, f"r{self.counts['answers']}"))
        return {
            "type": "interaction",
            "response": self.asked[-1][1],
            "digest": digest,
            "prompt": f"Q: tell {self.counts['answers']}\nA:",
            "completion": f" {digest[:8]}",
        }

    def flow(self) -> Session:
        if self.stream is None:
            self.serial += 1
            self.stream = Session(self.river, self.serial)
        return self.stream

    def read(self) -> None:
        self.flow().read(self.rng.choice([0, 1]), self.rng.randrange(1, 9))

    def read_all(self) -> None:
        self.flow().drain()

    def seal_all(self) -> None:
        self.read_all()
        self.flow().worker.commit("end")
        self.flow().worker._sealer.land()

    def commit(self) -> None:
        """Seal what is due, or all that is open."""
        self.flow().worker.commit("test" if self.rng.random() < 0.3 else "")

    def kill_stream(self) -> None:
        """What was not sealed is read again by the next one, from the positions in the ledger."""
        if self.stream is not None:
            self.counts["dataflows killed"] += 1
        self.stream = None

    # -- trainers ------------------------------------------------------------------------------------------------

    def worker(self) -> Worker:
        if self.trainer is None:
            self.serial += 1
            self.trainer = Worker(
                self.ledger,
                self.river.store,
                self.river.keys,
                self.base,
                self.river.folder / "trainer",
                f"t{self.serial}",
                threading.Event(),
                lambda name: None,
                Metrics(),
            )
        return self.trainer

    def train(self) -> None:
        for _ in range(self.rng.randrange(1, 5)):
            if not self.turn():
                break

    def turn(self) -> bool:
        """One round of the trainer; False when there was nothing to do."""
        busy = self.worker().turn()
        self.counts["packed steps"] += len(self.worker()._active) > 1
        return busy

    def kill_trainer(self) -> None:
        """What its threads had not written is lost with it; its folder's lock goes as the kernel takes it, its lease
        and claims as if their time had passed."""
        if self.trainer is None:
            return
        self.counts["trainers killed"] += bool(self.trainer._active)
        for log in (log for active in self.trainer._active.values() for log in active.checkpoints):
            with log._changed:
                log._records, log._snapshot = [], None
            log.close()
        self.trainer._claims.close()
        self.trainer._lease.drop()
        os.close(self.trainer._folder._lock)
        self.trainer = None

    def stop_trainer(self) -> None:
        """In good order: what it was at goes on from where it was."""
        if self.trainer is not None:
            self.counts["trainers stopped"] += bool(self.trainer._active)
            self.trainer.close()
        self.trainer = None

    # -- operators -----------------------------------------------------------------------------------------------

    def forget_somebody(self) -> None:
        """As a rule, somebody who has left something."""
        held = Counter(
            mention
            for name in ADAPTERS
            for _, manifest in self.ledger.manifests(name)
            for mention in sorted(manifest.mentions)
        )
        left = [who for who in SUBJECTS if held[KEY.subject(who)]]
        subject = self.rng.choice(left if left and self.rng.random() < 0.8 else SUBJECTS)
        self.forget(subject, self.rng.choice([None, None, *([name] for name in ADAPTERS)]))

    def forget(self, subject: str, adapters: list[str] | None) -> None:
        held = self.ledger.forget(uuid.UUID(int=self.rng.getrandbits(128)).hex, KEY.subject(subject), adapters, "test")
        if self.rng.random() < 0.8:  # else whoever forgot was killed before
            contents.erase(self.ledger, self.river.keys, held)
        self.requests.append(held)
        self.counts["forgets"] += 1
        self.counts["drifts forgotten"] += sum(
            bool(versions[number].metrics.get("drift"))
            for part in held.body["doomed"]
            for versions in [self.ledger.versions(part["adapter"])]
            for number in part["versions"]
        )
        self.counts["entries forgotten"] += sum(part["entries"] for part in held.body["doomed"])
        for name in adapters or ADAPTERS:
            self.forgotten[name][subject] = None

    def allow(self) -> None:
        """Somebody forgotten may be learned again."""
        gone = [(name, who) for name in ADAPTERS for who, index in self.forgotten[name].items() if index is None]
        if not gone:
            return
        name, subject = self.rng.choice(gone)
        try:
            allowed = self.ledger.allow(KEY.subject(subject), [name], "test")
        except Conflict:  # forgotten everywhere, and so allowed only everywhere
            return
        for lifted in allowed:
            self.counts["allowed again"] += 1
            self.forgotten[lifted][subject] = self.ledger.adapter(lifted).next_index

    def rollback(self) -> None:
        name = self.rng.choice(ADAPTERS)
        versions = self.ledger.versions(name)
        clean = [0, *(number for number, held in versions.items() if not held.revoked)]
        number = self.rng.choice(clean[-3:])
        line = sorted(Line.of(versions, number).segments)
        self.ledger.rollback(name, number, "test")
        self.acted(name, "rollback", line)

    def resume(self) -> None:
        name = self.rng.choice(ADAPTERS)
        mode: Any = self.rng.choice(["continue", "replay", "tip"])
        with contextlib.suppress(Conflict):
            self.ledger.resume(name, mode, "test")
            self.acted(name, mode)

    def decide(self) -> None:
        name = self.rng.choice(ADAPTERS)
        segments = self.ledger.segments(name)
        if not segments or "shards" in self.ledger.adapter(name).recipe:
            return
        number, hand = self.rng.choice(segments).number, self.rng.choice([Hand.ACCEPT, Hand.DISCARD])
        with contextlib.suppress(Conflict, Refused):
            self.ledger.decide_by_hand(name, number, hand, "test")
            self.acted(name, str(hand), segment=number)

    def acted(self, name: str, kind: str, line: list[int] | None = None, segment: int = 0) -> None:
        self.counts[kind] += 1
        sealed = sum(head.next_segment - 1 for head in self.ledger.adapters())
        self.acts.append(Act(sealed, name, kind, line or [], segment))

    # -- the keeper ----------------------------------------------------------------------------------------------

    def purge(self) -> None:
        """Take every forget as far as it goes now, as the keeper does; the trainers' and dataflows' leases are held
        here, so that they are asked first."""
        for held in self.ledger.forgets(unfinished=True):
            contents.erase(self.ledger, self.river.keys, held)
            if not self.ledger.is_rebuilt(held) or self.trainer is not None or self.stream is not None:
                continue
            self.ledger.advance(held.id, Stage.REBUILT, {}, "test")
            mlflow: Any = NoMlflow()
            given = (self.ledger, self.river.store, self.river.keys, mlflow, self.river.real)
            assert Purge(*given, orphan_seconds=0.0).run(self.ledger.forget_of(held.id)) == ""
            self.counts["purges"] += 1

    # -- the end -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Until everything published is sealed, learned and purged."""
        self.seal_all()
        self.kill_stream()
        for name in ADAPTERS:  # half of what is held goes on, and learns what was set aside
            if self.ledger.adapter(name).held is not None and self.rng.random() < 0.5:
                mode: Any = self.rng.choice(["replay", "tip"])
                self.ledger.resume(name, mode, "test")
                self.acted(name, mode)
        while self.turn():
            pass
        self.stop_trainer()
        self.purge()
        for name in ADAPTERS:
            segments = self.ledger.segments(name)
            assert all(each.outcome is not Outcome.AWAITING for each in segments), f"{name} has not learned all"
            self.counts["rejected"] += sum(each.cause == "gate" and not each.hand for each in segments)
            self.counts["segments"] += len(segments)
            self.counts["drifts"] += sum(bool(v.metrics.get("drift")) for v in self.ledger.versions(name).values())
            facts = self.ledger.facts(name)
            learned = {fact.body["segment"] for fact in facts if fact.kind == "increment"}
            turned = {
                fact.body["segment"] for fact in facts if fact.kind == "set_aside" and fact.body["cause"] == "gate"
            }
            self.counts["verdicts changed"] += len(
                learned & turned - {act.segment for act in self.acts if act.adapter == name}
            )
            assert verify(self.ledger, self.river.store, self.river.keys, name).problems == ()
        assert self.ledger.forgets(unfinished=True) == []

    def told(self, base: str) -> dict[str, Any]:
        """What the control may know, as plain values."""
        facts = sorted(
            (f for name in ADAPTERS for f in self.ledger.facts(name) if f.kind == "sealed"), key=lambda f: f.id
        )
        return {
            "base": base,
            "window": WINDOW,
            "base_digest": BASE_DIGEST,
            "adapters": {head.name: [head.recipe, head.seed] for head in self.ledger.adapters()},
            "records": {
                str(part): [(record[4] or b"").decode() for record in records]
                for part, records in self.river.parts.items()
            },
            "seals": [self._sealed(fact.adapter, fact.body["segment"]) for fact in facts],
            "acts": [asdict(act) for act in self.acts],
            "forgotten": self.forgotten,
        }

    def _sealed(self, adapter: str, number: int) -> dict[str, Any]:
        """Where its entries came from. Of text that a version wrote it says whether it was written off: that is
        recorded, in certificates too, because equal weights may be revoked at one time and clean at another. Of entries
        about somebody who is allowed again it says whether they had come in before."""
        segment, manifest = self.ledger.segment(adapter, number), self.ledger.manifest(adapter, number)
        again = {KEY.subject(who): index for who, index in self.forgotten[adapter].items() if index is not None}
        entries = []
        for place, (at, entry) in enumerate(zip(places_of(manifest), manifest.entries, strict=True)):
            allowed = any(segment.first + place >= again.get(who, math.inf) for who in entry.subjects)
            self.counts["came before they were allowed"] += entry.tombstone and allowed
            entries.append([*at, entry.event.hex(), entry.tombstone and (bool(entry.written_by) or allowed)])
        return {"adapter": adapter, "entries": entries}

    def lines(self) -> dict[str, list[tuple[int | None, str, str]]]:
        """Per adapter, what its line has learned: segment, weights and optimiser state."""
        found = {}
        for name in ADAPTERS:
            versions = self.ledger.versions(name)
            line = reversed(lineage(versions, self.ledger.adapter(name).tip))
            found[name] = [(versions[v].segment, versions[v].digest, versions[v].state) for v in line]
        return found

    def close(self) -> None:
        """Let go of threads and files."""
        if self.trainer is not None:
            self.kill_trainer()
        self.river.keys.close()
        self.ledger.close()


def random_recipe(rng: random.Random) -> dict[str, Any]:
    """Everything that shapes training: here and there a rate that falls, a gate that rejects what spoils the least,
    near-duplicates, a base to stay near to, shards."""
    gate: dict[str, Any] = {"on": False}
    steep = rng.random() < 0.6
    if steep:
        gate = {"tolerance": 0.0, "share": rng.choice([0.0, 0.0, 0.4]), "least": 1, "sample": rng.choice([2, 8])}
        gate["questions"] = [{"prompt": "hi", "completion": f" wo rd {rng.randrange(100)}"}]
    return {
        "lora": {"rank": 2, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]},
        "training": {
            "passes": rng.choice([1, 2, 3]),
            "micro_batch": rng.randrange(1, 3),
            "rehearse": rng.choice([0, 1, 2]),
            "max_length": 64,
            "near": rng.choice([0.0, 0.0, 0.1]),
        },
        "optimiser": {
            "learning_rate": 0.2 if steep else 0.005,
            "clip": 0.0 if steep else 1.0,
            "decay": rng.choice([0.0, 0.1]),
            "weight_decay": rng.choice([0.0, 0.01]),
        },
        "gate": gate,
        "drift": {"delta": rng.choice([0.002, 0.9]), "boost": 2.0},
        **({"shards": {"count": 2}} if rng.random() < 0.2 else {}),
        "curate": {"alike": rng.choice([0.0, 0.0, 0.7])},
        "seal": {"count": rng.choice([3, 4, 6]), "age": rng.choice([0.5, 5.0])},
    }
