"""The counterfactual: an adapter trained anew, alone, from the raw events, with subjects suppressed from the start.

What it takes from the ledger are the facts that a forget keeps: which events made which entries, their order, the
segments' boundaries, which segments the live version's lineage came to, what people decided about them, and from which
index on a subject was allowed again. The gate decides anew. Contents come from Kafka, and which entries are tombstones
is decided here, from the subjects' plain names.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from riverdelta.core.errors import Conflict, Corrupt, NotFound, Refused
from riverdelta.core.keys import SubjectKey
from riverdelta.core.printing import print_json
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.shards import shard_of
from riverdelta.registry.belonging import check_base, open_ledger, subject_key
from riverdelta.registry.ledger import Hand, Ledger
from riverdelta.registry.ledger.decisions import Line, words
from riverdelta.registry.report import print_replayed

from .raw_log import Lesson, Place, check_incarnation, places_of, read_lessons

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """Where each entry of the segments that a version's line learned or rejected lies in Kafka, and what is to come
    out."""

    adapter: str
    version: int
    digest: str
    recipe: dict[str, Any]
    seed: int
    segments: tuple[tuple[Place, ...], ...]
    numbers: tuple[int, ...]
    hands: tuple[Hand, ...]
    indexes: dict[Place, int]
    allowed: dict[str, int]  # per keyed hash of a subject, the index from which it may be learned again
    incarnations: frozenset[str]
    revoked: frozenset[str]
    written_off: frozenset[Place]  # what versions wrote that were revoked at the time, whatever has come of them since
    came_before: frozenset[Place]  # what had come in, suppressed, before its subject was allowed again
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Both digests; `tombstones` counts the entries that the counterfactual left out, `unmatched` names those of the
    subjects to be left out that no event is about."""

    adapter: str
    version: int
    live: str
    counterfactual: str
    entries: int
    tombstones: int
    same_environment: bool
    unmatched: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the live weights are those of a run that never had the subjects' data."""
        return self.live == self.counterfactual


def plan(ledger: Ledger, adapter: str, version: int | None = None) -> Plan:
    """What to train, read from the ledger; `version` defaults to the release."""
    head, versions = ledger.adapter(adapter), ledger.versions(adapter)
    number = head.release if version is None else version
    if not number and any(adapter in forget.adapters and not ledger.is_rebuilt(forget) for forget in ledger.forgets()):
        raise Conflict(
            f"{adapter} is being rebuilt after a forget.", "Ask again when `riverdelta registry list` says it is done."
        )
    if not number:
        raise NotFound(f"{adapter} has learned nothing that is released.", "Publish events first.")
    if number not in versions:
        raise NotFound(f"{adapter} has no version {number}.", f"`riverdelta registry show {adapter}` lists them.")
    line = Line.of(versions, number)
    if line.root:
        raise Refused(
            f"{adapter}@{line.root} was imported: what it learned before is not in the log.",
            "Only versions that were trained here can be trained again.",
        )
    numbers = sorted(line.segments)
    manifests = [ledger.manifest(adapter, each) for each in numbers]
    segments = tuple(tuple(places_of(manifest)) for manifest in manifests)
    firsts = [ledger.segment(adapter, each).first for each in numbers]
    facts = ledger.facts(adapter)
    said, allowed = words(facts, versions, number), dict[str, int]()
    for fact in facts:
        if fact.kind == "allow":
            allowed[fact.body["subject"]] = fact.body["index"]
        elif fact.kind == "forget":
            allowed.pop(fact.body["subject"], None)
    entries = [
        (at, first + place, entry)
        for first, places, manifest in zip(firsts, segments, manifests, strict=True)
        for place, (at, entry) in enumerate(zip(places, manifest.entries, strict=True))
    ]
    return Plan(
        adapter,
        number,
        versions[number].digest,
        head.recipe,
        head.seed,
        segments,
        tuple(numbers),
        tuple(said.get(each, Hand.NONE) for each in numbers),
        {at: index for at, index, _ in entries},
        allowed,
        frozenset(run for manifest in manifests for run in manifest.incarnations),
        ledger.revoked_digests(),
        frozenset(at for at, _, entry in entries if entry.tombstone and entry.written_by),
        frozenset(
            at
            for at, index, entry in entries
            if entry.tombstone and any(allowed.get(who, math.inf) <= index for who in entry.subjects)
        ),
        versions[number].fingerprint,
    )


def train(ledger: Ledger, settings: Settings, wanted: Plan, without: Collection[str], progress: Progress) -> Result:
    """Train the plan from the base on, as one adapter alone, and compare; `Corrupt` or `Refused` where the subject key
    or the base model is not the ledger's."""
    from riverdelta.core.base import resolve
    from riverdelta.trainer.base import Base
    from riverdelta.trainer.fingerprint import fingerprint
    from riverdelta.trainer.near_duplicates import without_near_duplicates
    from riverdelta.trainer.replay import replay

    places = [at for segment in wanted.segments for at in segment]
    key, trainer = subject_key(ledger, settings), settings.trainer
    progress("loading the base model", 0, len(places))
    base = Base.load(resolve(settings.base), trainer.device, trainer.dtype, trainer.threads)
    check_base(ledger, base.digest)
    progress("reading the events", 0, len(places))
    check_incarnation(settings, wanted.incarnations)
    recipe = Recipe.from_dict(wanted.recipe)
    lessons = read_lessons(settings, wanted.adapter, places, recipe)
    until = {hashed: wanted.allowed.get(hashed, math.inf) for hashed in map(key.subject, without)}
    about = {at: [key.subject(name) for name in lesson.subjects] for at, lesson in lessons.items()}
    left_out = {
        at
        for at, lesson in lessons.items()
        if at in wanted.came_before
        or (lesson.written_by and (lesson.written_by in wanted.revoked or at in wanted.written_off))
        or any(wanted.indexes[at] < until.get(hashed, 0) for hashed in about[at])
    }
    segments = [
        without_near_duplicates(
            [None if at in left_out else lessons[at].content for at in segment],
            [lessons[at].subjects for at in segment],
            recipe.curate.alike,
        )
        for segment in wanted.segments
    ]
    made = replay(
        base,
        recipe,
        wanted.seed,
        segments,
        lambda done, of: progress("training segment by segment", done, of),
        wanted.hands,
        [
            [shard_of(about[at], wanted.indexes[at], recipe.shards.count) for at in segment]
            for segment in wanted.segments
        ],
        wanted.numbers,
    )
    return Result(
        wanted.adapter,
        wanted.version,
        wanted.digest,
        made[-1].digest,
        len(places),
        len(left_out),
        fingerprint(base) == wanted.fingerprint,
        unmatched(key, lessons.values(), without),
    )


def unmatched(key: SubjectKey, lessons: Iterable[Lesson], without: Iterable[str]) -> tuple[str, ...]:
    """Those of some subjects that no lesson is about."""
    known = {key.subject(name) for lesson in lessons for name in lesson.subjects}
    return tuple(name for name in without if key.subject(name) not in known)


def main(settings: Settings, adapter: str, without: Collection[str], as_json: bool) -> int:
    """Run it and print both digests; the exit code, as of `registry verify --replay`."""
    result = run(settings, adapter, without)
    (print_json if as_json else print_replayed)(result)
    return 0 if result["equal"] else Corrupt.exit_code


def run(settings: Settings, adapter: str, without: Collection[str]) -> dict[str, Any]:
    """Train it, saying how far it is, and compare: a `Result`'s fields, whom it did without, and whether both are
    equal."""
    from rich.console import Console

    from .progress import progress

    ledger = open_ledger(settings)
    try:
        with progress(Console(stderr=True)) as show:
            result = train(ledger, settings, plan(ledger, adapter), without, show)
        if not result.equal and ledger.version(adapter, result.version).revoked:
            raise Conflict(f"{adapter}@{result.version} was revoked while it was trained again.", "Ask once more.")
    finally:
        ledger.close()
    return {**asdict(result), "without": list(without), "equal": result.equal}
