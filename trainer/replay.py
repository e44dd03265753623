"""Replay: an adapter's lineage trained again from the base, alone, from contents and boundaries only.

No store, no ledger, no checkpoint log, no other adapter: what comes out must be, bit for bit, what the live stack made
of the same log on the same environment fingerprint. It is one side of the check that nothing forgotten has influence.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Hand

from .base import Base
from .drift import Usual
from .gate import BY_HAND, Gate, Judged, judge_whole, usual_of
from .increment import Candidate, Inputs, Learner, Untrainable, train
from .parts import Files, join, seed_of_shard

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Replayed:
    """What became of one segment: its version's digests and why the gate withheld it, or its parent's and why it was
    set aside."""

    digest: str
    state_digest: str
    losses: tuple[float, ...]
    set_aside: str = ""
    withheld: str = ""


@dataclass(frozen=True)
class Begun:
    """How far a chain of increments has come: its last files, what its segments were, and the contents of those,
    by number, that what follows may still look at."""

    files: Files | None
    usual: Sequence[Usual] = ()
    learned: Sequence[tuple[int, Sequence[bytes | None]]] = ()


@dataclass(frozen=True)
class Start:
    """A version to replay from in place of the base: its chains, one or as many as shards, and with shards all of
    them together."""

    lives: Sequence[Begun]
    whole: Begun


def replay(
    base: Base,
    recipe: Recipe,
    seed: int,
    segments: Sequence[Sequence[bytes | None]],
    told: Told | None = None,
    hands: Sequence[Hand] = (),
    shards: Sequence[Sequence[int]] = (),
    numbers: Sequence[int] = (),
    start: Start | None = None,
) -> list[Replayed]:
    """Train `segments` in order, each a list of contents in index order with None for tombstones; from `start` on,
    which is the base where it is not given.

    `told` hears (segments done, segments) before each; `hands` are people's decisions about them, none by default;
    `shards` says of every entry to which shard it belongs, where the recipe has several, and `numbers` which segments
    they are, where they are not all there were. The gate's decisions are not
    given: they are taken again. A parent that is still the base has empty digests.
    """
    done: list[Replayed] = []
    several = recipe.shards.count > 1
    own = [seed_of_shard(seed, shard) for shard in range(recipe.shards.count)] if several else [seed]
    begun = start or Start([Begun(None) for _ in own], Begun(None))
    lives = [_Life(base, recipe.of_a_shard, one, life) for one, life in zip(own, begun.lives, strict=True)]
    everything, usual = _Past(recipe, begun.whole.learned), list(begun.whole.usual)
    standing = begun.whole.files and begun.whole.files[0]
    last = Replayed("", "", ())
    for number, entries in enumerate(segments):
        if told is not None:
            told(number, len(segments))
        hand = hands[number] if hands else Hand.NONE
        called = numbers[number] if numbers else number + 1
        where = shards[number] if several else [0] * len(entries)
        refusals, learned = list[str](), False
        for shard, life in enumerate(lives):
            mine = [entry for entry, at in zip(entries, where, strict=True) if at == shard]
            if mine or not several:
                refusal = life.learn(mine, hand, called)
                refusals += [refusal] if refusal else []
                learned = learned or not refusal
        if not learned:
            done.append(Replayed(last.digest, last.state_digest, (), refusals[0]))
            continue
        if not several:
            made = lives[0].made
            assert made is not None
            last = Replayed(made.digest, made.state_digest, made.losses)
        else:
            joined = join(base, recipe, seed, [life.files for life in lives])
            last = Replayed(joined.digest, joined.state_digest, ())
            judged, past = Judged("", {}), everything.before(called)
            if recipe.gate.on:
                inputs = Inputs(recipe, seed, entries, past, standing, usual=usual, hand=hand)
                judged = judge_whole(base, inputs, joined.weights)
            if not judged.rejected:
                standing = joined.weights
                usual += usual_of([judged.metrics])
            last = replace(last, withheld=judged.rejected)
        everything.add(called, entries)
        done.append(last)
    return done


class _Past:
    """What has been learned, of which an increment sees what lies within the horizon."""

    def __init__(self, recipe: Recipe, held: Iterable[tuple[int, Sequence[bytes | None]]]) -> None:
        self._horizon = recipe.retain.horizon
        self._held = list(held)

    def add(self, number: int, entries: Sequence[bytes | None]) -> None:
        """A segment has been learned."""
        self._held.append((number, entries))

    def before(self, number: int) -> list[bytes | None]:
        """What an increment of this segment may look at."""
        since = number - self._horizon if self._horizon else 0
        return [entry for at, entries in self._held if at >= since for entry in entries]


class _Life:
    """One chain of increments: an adapter's, or a shard's."""

    def __init__(self, base: Base, recipe: Recipe, seed: int, begun: Begun) -> None:
        self._base, self._recipe, self._seed = base, recipe, seed
        self.made: Candidate | None = None
        self.files = begun.files  # weights and state, once there are any
        self._earlier = _Past(recipe, begun.learned)
        self._usual = list(begun.usual)

    def learn(self, entries: Sequence[bytes | None], hand: Hand, number: int) -> str:
        """Learn a segment, or say why not."""
        earlier, (weights, state) = self._earlier.before(number), self.files or (None, None)
        inputs = Inputs(self._recipe, self._seed, entries, earlier, weights, state, tuple(self._usual), hand)
        made, judged = one_increment(self._base, inputs)
        if made is None:
            return judged.rejected
        self._usual += usual_of([judged.metrics])
        self._earlier.add(number, entries)
        self.made, self.files = made, (made.weights, made.state)
        return ""


def one_increment(base: Base, inputs: Inputs) -> tuple[Candidate | None, Judged]:
    """The candidate, if there is one, and what the gate says."""
    if inputs.hand is Hand.DISCARD:
        return None, Judged(BY_HAND, {})
    learner = Learner(base, inputs)
    gate = Gate(base, inputs, learner) if inputs.recipe.gate.on else None
    try:
        made = train(base, learner)
    except Untrainable as error:
        return None, Judged(str(error), {})
    judged = gate.judge() if gate is not None else Judged("", {})
    return (None if judged.rejected else made), judged
