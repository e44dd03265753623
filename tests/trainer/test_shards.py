"""Shards: isolated parts that together are one plain adapter, of which a forget replays the one that it concerns."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from riverdelta.core import weights
from riverdelta.core.digests import sha256
from riverdelta.core.errors import Unavailable
from riverdelta.core.peft_format import check_servable
from riverdelta.core.recipe import Recipe
from riverdelta.core.shards import shard_of
from riverdelta.core.store import weights_key
from riverdelta.registry.ledger import Hand, Outcome, SegmentRecord, VersionRecord
from riverdelta.trainer import making
from riverdelta.trainer.adapter import AdapterWeights
from riverdelta.trainer.base import Base
from riverdelta.trainer.gate import Judged
from riverdelta.trainer.increment import Inputs, Learner, step
from riverdelta.trainer.inputs import Log
from riverdelta.trainer.parts import join, split
from riverdelta.trainer.replay import Replayed, replay
from tests.trainer.samples import contents, fact, recipe
from tests.trainer.stack import Stack, hashed
from tests.trainer.test_forget_equals_suppressed import Raw, decide, forget, strict

COUNT = 4


def sharded(like: Recipe | None = None, count: int = COUNT) -> Recipe:
    return Recipe.from_dict({**(like or recipe(micro_batch=2, rehearse=2)).to_dict(), "shards": {"count": count}})


def of_shard(shard: int, which: int = 0) -> str:
    """A subject of this shard."""
    return [s for n in range(100) if shard_of([hashed(s := f"s{n}")], 0, COUNT) == shard][which]


def settle(stack: Stack, base: Base) -> float:
    """Train all that waits; how many tokens it took."""
    worker = stack.worker(base)
    while worker.turn():
        pass
    worker.close()
    taken: float = worker._metrics.tokens._value.get()
    return taken


def line(stack: Stack) -> list[VersionRecord]:
    versions, found = stack.ledger.versions("acme"), []
    at = stack.ledger.adapter("acme").tip
    while at:
        found.append(versions[at])
        at = versions[at].parent
    return found[::-1]


def control(stack: Stack, base: Base, like: Recipe, raw: Raw) -> list[Replayed]:
    """The raw events admitted anew, with the forgotten suppressed from the start, trained alone from the base."""
    admitted = [None if subject in raw.forgotten else content for subject, content in raw.events]
    shards = [shard_of([hashed(subject)], 0, like.shards.count) for subject, _ in raw.events]
    cuts = list(pairwise([0, *raw.boundaries]))
    hands = [raw.hands.get(number, Hand.NONE) for number in range(1, len(cuts) + 1)]
    seed = stack.ledger.adapter("acme").seed
    held = [admitted[a:b] for a, b in cuts]
    made = replay(base, like, seed, held, hands=hands, shards=[shards[a:b] for a, b in cuts])
    return [each for each in made if not each.set_aside]


def same(stack: Stack, base: Base, like: Recipe, raw: Raw) -> bool:
    live = [(each.digest, each.state, each.withheld) for each in line(stack)]
    return live == [(each.digest, each.state_digest, each.withheld) for each in control(stack, base, like, raw)]


def begun(stack: Stack, like: Recipe, segments: list[list[str]]) -> Raw:
    """An adapter whose segments say something of these subjects."""
    raw, number = Raw(), 0
    stack.create("acme", like)
    for subjects in segments:
        said = [fact(number + place) for place in range(len(subjects))]
        number += len(subjects)
        raw.events += zip(subjects, said, strict=True)
        raw.boundaries.append(number)
        stack.seal("acme", said, subjects)
    return raw


def mixed() -> list[list[str]]:
    """Four segments of two subjects of each shard; the first subject of shard 2 comes in the second."""
    each = [of_shard(shard, which) for shard in range(COUNT) for which in range(2)]
    first = [subject for subject in each if subject != of_shard(2)]
    return [first, each, each[::-1], each]


# -- parts -----------------------------------------------------------------------------------------------------


def test_a_version_is_the_mean_of_its_parts_and_comes_apart_again(base: Base) -> None:
    like = sharded(count=2)
    small = like.of_a_shard
    files: list[Any] = [None, None]
    for shard in range(2):
        learner = Learner(base, Inputs(small, shard, contents(3, shard)))
        while not learner.done:
            step(base, [learner])
        candidate = learner.candidate()
        files[shard] = candidate.weights, candidate.state
    whole = join(base, like, 7, files)
    assert split(base, like, whole.weights, whole.state) == files
    config, tensors = weights.decode(whole.weights, whole.digest)
    sites = check_servable(config, tensors)
    assert {site.rank for site in sites} == {like.lora.rank}
    parts = [AdapterWeights.load(each[0], base.device).pairs() for each in files]
    for site in sites:
        deltas = [scale * (b @ a) for a, b, scale in (part[site.module] for part in parts)]
        mean = site.scale * (tensors[site.b_key] @ tensors[site.a_key])
        assert torch.allclose(mean, (deltas[0] + deltas[1]) / 2, atol=1e-6)
    only = join(base, like, 7, [None, files[1]])
    assert split(base, like, only.weights, only.state) == [None, files[1]]


def test_one_shard_is_no_shards() -> None:
    assert sharded(recipe(), 1).digest == recipe().digest
    assert sharded(recipe(), 1).of_a_shard == recipe()
    assert [shard_of(subjects, 3, 1) for subjects in ([], ["ab"])] == [0, 0]


# -- forgetting ------------------------------------------------------------------------------------------------


def test_a_forget_replays_one_part_from_where_its_subject_came_in(tmp_path: Path, base: Base) -> None:
    stack, like = Stack(tmp_path), sharded()
    raw = begun(stack, like, mixed())
    settle(stack, base)
    assert same(stack, base, like, raw)
    before = line(stack)
    forget(stack, raw, of_shard(2))
    taken = settle(stack, base)
    after = line(stack)
    assert same(stack, base, like, raw)
    assert [v.digest for v in before][:1] == [v.digest for v in after][:1]  # clean: it came before the subject
    for was, now in zip(before[1:], after[1:], strict=True):
        moved = [shard for shard in range(COUNT) if was.parts[shard] != now.parts[shard]]
        assert moved == [2]
    assert taken == sum(v.parts[2].metrics["tokens"] for v in after[1:])
    assert 0 < taken < sum(v.metrics["tokens"] for v in after[1:]) / 3
    assert after[-1].digest == sha256(stack.store.get(weights_key(after[-1].digest)))


def test_entries_about_several_subjects_and_about_nobody(tmp_path: Path, base: Base) -> None:
    """A forget of any of several replays the one part that the entry is in; what nobody is about has a part, too."""
    stack, like = Stack(tmp_path), sharded()
    ann, bob = of_shard(0), of_shard(1)
    about: list[tuple[str, ...]] = [(ann, bob), (), (of_shard(2),), (bob,), (), (of_shard(3),), (ann,), (bob, ann)]
    said = [fact(number) for number in range(len(about))]
    stack.create("acme", like)
    for first in (0, 4):
        stack.seal("acme", said[first : first + 4], about[first : first + 4])
    settle(stack, base)
    before = line(stack)
    stack.forget("acme", bob)
    settle(stack, base)
    after = line(stack)
    where = [shard_of([hashed(each) for each in whose], index, COUNT) for index, whose in enumerate(about)]
    held = [None if bob in whose else content for content, whose in zip(said, about, strict=True)]
    seed = stack.ledger.adapter("acme").seed
    made = replay(base, like, seed, [held[:4], held[4:]], shards=[where[:4], where[4:]])
    assert [(each.digest, each.state) for each in after] == [(each.digest, each.state_digest) for each in made]
    touched = {shard for shard, whose in zip(where, about, strict=True) if bob in whose}
    moved = {
        shard
        for was, now in zip(before, after, strict=True)
        for shard in range(COUNT)
        if was.parts[shard] != now.parts[shard]
    }
    assert moved == touched
    assert len(touched) < COUNT


@pytest.mark.parametrize("seed", range(4))
def test_histories(tmp_path: Path, base: Base, seed: int) -> None:
    """Seals, forgets and words of people at any moment, trainers lost and replaced, gates that turn parts down."""
    draw = random.Random(seed)
    like = sharded(strict(sample=draw.randrange(1, 5), share=draw.choice([0.3, 0.5])) if seed % 2 else None)
    subjects = [f"s{n}" for n in range(6)]
    stack, raw = Stack(tmp_path), Raw()
    stack.create("acme", like)
    worker = stack.worker(base)
    for number in range(4):
        who = [draw.choice(subjects) for _ in range(draw.randrange(1, 8))]
        said = [fact(1000 * seed + 10 * number + place) for place in range(len(who))]
        raw.events += zip(who, said, strict=True)
        raw.boundaries.append(len(raw.events))
        stack.seal("acme", said, who)
        for _ in range(draw.randrange(0, 12)):
            worker.turn()
        if draw.random() < 0.4:
            worker.close()
            worker = stack.worker(base, f"t{number}")
        if draw.random() < 0.5:
            forget(stack, raw, draw.choice(subjects))
        if draw.random() < 0.4:
            decide(stack, raw, draw.randrange(1, number + 2), draw.choice([Hand.ACCEPT, Hand.DISCARD]))
    forget(stack, raw, raw.events[0][0])
    while worker.turn():
        pass
    worker.close()
    assert same(stack, base, like, raw)


@pytest.mark.parametrize("leak", ["none", "stale", "rehearsal"])
def test_a_leak_across_shards_is_caught(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    """A part taken over although its own entries have changed; a part that rehearses another's entries."""
    stack, like = Stack(tmp_path), sharded()
    if leak == "stale":
        key_of = making.key_of

        def blind(by: Any, before: str, segment: int, hand: str, live: list[bool]) -> str:
            return key_of(by, before, segment, hand, [True] * len(live))

        monkeypatch.setattr(making, "key_of", blind)
    raw = begun(stack, like, mixed())
    if leak == "rehearsal":
        said = Log.said

        def leaky(self: Log, segment: SegmentRecord, shard: int | None = None) -> list[bytes | None]:
            if shard == 1 and segment.number == 2:  # learned so, and rehearsed so later
                return [*said(self, segment, 1)[:-1], said(self, segment, 2)[0]]
            return said(self, segment, shard)

        monkeypatch.setattr(Log, "said", leaky)
    settle(stack, base)
    forget(stack, raw, of_shard(2))
    settle(stack, base)
    assert same(stack, base, like, raw) is (leak == "none")


# -- decisions -------------------------------------------------------------------------------------------------


def test_a_part_that_its_gate_turns_down_keeps_no_other_from_learning(tmp_path: Path, base: Base) -> None:
    stack, like = Stack(tmp_path), sharded(strict(sample=8))
    raw = begun(stack, like, mixed())
    settle(stack, base)
    refused = [(v.segment, shard) for v in line(stack) for shard, part in enumerate(v.parts) if part.refused]
    assert refused
    assert same(stack, base, like, raw)
    decide(stack, raw, refused[0][0] or 0, Hand.ACCEPT)
    settle(stack, base)
    assert not any(part.refused for v in line(stack) if v.segment == refused[0][0] for part in v.parts)
    assert same(stack, base, like, raw)


def test_the_gate_of_the_whole_decides_the_release_alone(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, like = Stack(tmp_path), sharded()
    begun(stack, like, mixed()[:2])
    settle(stack, base)
    stack.seal("acme", [fact(90)], [of_shard(1)])
    with monkeypatch.context() as patch:
        patch.setattr(making.ShardedMaking, "_judge", lambda *_: Judged("Worse.", {}))
        settle(stack, base)
    head = stack.ledger.adapter("acme")
    assert (head.tip, head.release) == (3, 2)
    assert stack.ledger.version("acme", 3).withheld == "Worse."
    stack.seal("acme", [fact(91)], [of_shard(1)])
    settle(stack, base)
    head = stack.ledger.adapter("acme")
    assert (head.tip, head.release) == (4, 4)
    assert stack.ledger.version("acme", 4).parent == 3


def test_a_store_away_when_a_whole_is_judged_is_waited_for(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack(tmp_path)
    begun(stack, sharded(), mixed()[:2])
    judge = making.judge_whole
    away = [Unavailable("The store is away."), Unavailable("The store is away.")]

    def judged(*given: Any) -> Judged:
        if away:
            raise away.pop()
        return judge(*given)

    monkeypatch.setattr(making, "judge_whole", judged)
    settle(stack, base)
    assert [version.segment for version in line(stack)] == [1, 2]
    assert {segment.outcome for segment in stack.ledger.segments("acme")} == {Outcome.TRAINED}
