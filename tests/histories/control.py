"""The control of a history: trained alone in a process of its own, from raw events, boundaries and operators' acts.

    python -m tests.histories.control < PATHS

Each line names a file of what `Lived.told` gave; each line of the answer is the path, per adapter what its line has
learned, and whatever does not fit. Nothing is ever forgotten here: forgotten events arrive suppressed. No payload, no
store, no checkpoint log, no other adapter beside the one that trains, and what is an entry, a duplicate or a tombstone
is decided from the raw events. A text that a version wrote is learned if that version has come about here.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from riverdelta.app.raw_log import Lesson, lessons_of
from riverdelta.core.events import ContractError, Event, decode
from riverdelta.core.recipe import Recipe
from riverdelta.core.shards import shard_of
from riverdelta.registry.ledger import Cause, Increment, Ledger, ManifestEntry, Work
from riverdelta.registry.ledger.decisions import Line, lineage
from riverdelta.trainer.base import Base
from riverdelta.trainer.gate import usual_of
from riverdelta.trainer.increment import Inputs
from riverdelta.trainer.near_duplicates import without_near_duplicates
from riverdelta.trainer.replay import one_increment, replay
from tests.registry.histories import Act, World, _replay
from tests.streams.simulation import KEY


class Alone(World):
    """A ledger whose increments are trained one at a time from contents in memory."""

    def __init__(self, ledger: Ledger, base: Base) -> None:
        super().__init__(ledger)
        self.base = base
        self.subjects: dict[tuple[str, int], tuple[str, ...]] = {}
        self.files: dict[str, bytes] = {}

    def finish(self, work: Work, contents: Sequence[Any]) -> None:
        """Commit an increment, or set its segment aside where the gate or an error says so."""
        name, number, tip = work.adapter.name, work.segment.number, work.adapter.tip
        recipe = Recipe.from_dict(work.adapter.recipe)
        made = self.shards(work, recipe) if recipe.shards.count > 1 else self.one(work, recipe)
        if isinstance(made, str):
            self.ledger.set_aside(name, number, 0, tip, Cause.GATE, made, "control")
            self.turned_down.setdefault((name, tip), set()).add(number)
            return
        self.ledger.commit(made, "control")

    def one(self, work: Work, recipe: Recipe) -> Increment | str:
        """The increment of an adapter without shards, or why there is none."""
        name, number, tip = work.adapter.name, work.segment.number, work.adapter.tip
        versions = self.ledger.versions(name)
        line = [versions[each] for each in reversed(lineage(versions, tip))]
        learned = [self.distinct(name, each.segment, recipe) for each in line if each.segment is not None]
        parent = work.parent
        made, judged = one_increment(
            self.base,
            Inputs(
                recipe,
                work.adapter.seed,
                self.distinct(name, number, recipe),
                [content for segment in learned for content in segment],
                self.files[parent.digest] if parent else None,
                self.files[parent.state] if parent else None,
                usual_of(each.metrics for each in line),
                work.segment.hand,
            ),
        )
        if made is None:
            return judged.rejected
        self.files |= {made.digest: made.weights, made.state_digest: made.state}
        metrics = {**made.metrics, **judged.metrics}
        return Increment(name, number, 0, tip, made.digest, made.state_digest, (number,), {}, metrics)

    def shards(self, work: Work, recipe: Recipe) -> Increment | str:
        """With shards, the whole line is trained again from the base, segment by segment."""
        name, number, tip = work.adapter.name, work.segment.number, work.adapter.tip
        numbers = [*sorted(Line.of(self.ledger.versions(name), tip).segments), number]
        firsts = [self.ledger.segment(name, each).first for each in numbers]
        said = [self.distinct(name, each, recipe) for each in numbers]
        shards = [
            [
                shard_of(sorted(map(KEY.subject, self.subjects[name, i])), i, recipe.shards.count)
                for i in range(first, first + len(some))
            ]
            for first, some in zip(firsts, said, strict=True)
        ]
        hands = [self.ledger.segment(name, each).hand for each in numbers]
        made = replay(self.base, recipe, work.adapter.seed, said, hands=hands, shards=shards)[-1]
        if made.set_aside:
            return made.set_aside
        self.files |= {made.digest: b"", made.state_digest: b""}
        return Increment(
            name, number, 0, tip, made.digest, made.state_digest, (number,), {}, withheld=made.withheld
        )  # fmt: skip

    def distinct(self, name: str, number: int, recipe: Recipe) -> list[bytes | None]:
        """A segment's contents without a subject's near-duplicates."""
        held: Any = self.live(name, number)
        first = self.ledger.segment(name, number).first
        about = [self.subjects[name, first + place] for place in range(len(held))]
        return without_near_duplicates(held, about, recipe.curate.alike)

    def settle(self) -> None:
        """Train whatever awaits."""
        for name in self.ledger.heads():
            while self.train(name):
                pass


class Control:
    """One history told again."""

    def __init__(self, told: dict[str, Any], base: Base, folder: Path) -> None:
        self.told, self.problems = told, list[str]()
        self.world = Alone(Ledger.open(f"sqlite:///{folder}/control.db"), base)
        self.events: dict[str, dict[tuple[int, int], Event]] = {name: {} for name in told["adapters"]}
        for part, records in told["records"].items():
            for offset, value in enumerate(records):
                try:
                    event = decode(value.encode())
                except ContractError:
                    continue
                self.events[event.adapter][int(part), offset] = event
        for name, (recipe, seed) in told["adapters"].items():
            made = self.world.ledger.create(name, Recipe.from_dict(recipe), "control")
            assert made.seed == seed, "the seed follows from the name and the recipe"

    def run(self) -> dict[str, Any]:
        """Every seal and act in its order, each trained to its end before the next."""
        acts = list(self.told["acts"])
        for number, sealed in enumerate(self.told["seals"]):
            self.act(acts, number)
            self.seal(sealed["adapter"], sealed["entries"])
            self.world.settle()
        self.act(acts, len(self.told["seals"]))
        lines = {}
        for name in self.told["adapters"]:
            self.check_admitted(name)
            ledger = self.world.ledger
            versions = ledger.versions(name)
            line = reversed(lineage(versions, ledger.adapter(name).tip))
            lines[name] = [(versions[v].segment, versions[v].digest, versions[v].state) for v in line]
        self.world.ledger.close()
        return {"lines": lines, "problems": self.problems}

    def act(self, acts: list[dict[str, Any]], sealed: int) -> None:
        while acts and acts[0]["sealed"] == sealed:
            held = acts.pop(0)
            line = frozenset(held["line"])
            _replay(self.world, held["adapter"], Act(sealed, held["kind"], line, held["segment"]))
            self.world.settle()

    def seal(self, name: str, entries: list[list[Any]]) -> None:
        """A segment of entries at these places, tombstones where the events are forgotten."""
        first = self.world.ledger.adapter(name).next_index
        recipe = Recipe.from_dict(self.told["adapters"][name][0])
        places = [(part, offset, partner and (partner[0], partner[1])) for part, offset, partner, *_ in entries]
        lessons = lessons_of(self.events[name], name, places, recipe)
        listed = []
        for index, (place, (*_, event, left_out)) in enumerate(zip(places, entries, strict=True), start=first):
            lesson = lessons[place]
            gone = self.is_forgotten(name, index, lesson) or left_out
            said = bytes.fromhex(event)
            listed.append(ManifestEntry(0, place[0], place[1], said, lesson.subjects, gone, lesson.written_by))
            self.world.contents[name, index] = lesson.content  # type: ignore[assignment]
            self.world.subjects[name, index] = lesson.subjects
        self.world.append(name, listed)

    def is_forgotten(self, name: str, index: int, lesson: Lesson) -> bool:
        gone = self.told["forgotten"][name]
        if any(who in gone and (gone[who] is None or index < gone[who]) for who in lesson.subjects):
            return True
        known = {"", self.told["base_digest"]} | self.world.files.keys()
        return lesson.written_by not in known

    def check_admitted(self, name: str) -> None:
        """Every event of its own is an entry once, every duplicate within the window none, whoever was forgotten."""
        ledger, window = self.world.ledger, self.told["window"]
        entries = [entry for _, manifest in ledger.manifests(name) for entry in manifest.entries]
        places = Counter((entry.partition, entry.offset, entry.event) for entry in entries)
        self.problems += [f"{name}: {place} is {times} entries" for place, times in places.items() if times > 1]
        last: dict[bytes, int] = {}
        for index, entry in enumerate(entries):
            if entry.event and index - last.get(entry.event, index - window - 1) <= window:
                self.problems.append(f"{name}: entry {index} is a duplicate of {last[entry.event]}")
            last[entry.event] = index
        at = {(entry.partition, entry.offset) for entry in entries}
        for place, event in self.events[name].items():
            identity = KEY.event(event.record.source, event.record.id) if event.record.id else b""
            if event.kind == "example" and place not in at and (not identity or identity not in last):
                self.problems.append(f"{name}: the event at {place} is no entry")


def main() -> None:
    """Answer for every path that comes."""
    bases: dict[str, Base] = {}
    for path in sys.stdin:
        told = json.loads(Path(path.strip()).read_text())
        if told["base"] not in bases:
            bases[told["base"]] = Base.load(Path(told["base"]), threads=int(told["threads"]))
        with tempfile.TemporaryDirectory(prefix="control-") as folder:
            answer = Control(told, bases[told["base"]], Path(folder)).run()
        print(json.dumps({"path": path.strip(), **answer}), flush=True)


if __name__ == "__main__":
    main()
