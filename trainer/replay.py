"""Replay: an adapter's lineage trained again from the base, alone, from contents and boundaries only.

No store, no ledger, no checkpoint log, no other adapter: what comes out must be, bit for bit, what the live stack made
of the same log on the same environment fingerprint. It is one side of the check that nothing forgotten has influence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Hand

from .base import Base
from .gate import BY_HAND, Gate, Judged, usual_of
from .increment import Candidate, Learner, Untrainable, step

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Replayed:
    """What became of one segment: its version's digests, or its parent's and why it was set aside."""

    digest: str
    state_digest: str
    losses: tuple[float, ...]
    set_aside: str = ""


def replay(
    base: Base,
    recipe: Recipe,
    seed: int,
    segments: Sequence[Sequence[bytes | None]],
    told: Told | None = None,
    hands: Sequence[Hand] = (),
) -> list[Replayed]:
    """Train `segments` in order, each a list of contents in index order with None for tombstones.

    `told` hears (segments done, segments) before each; `hands` are people's decisions about them, none by default. The
    gate's decisions are not given: they are taken again. A parent that is still the base has empty digests.
    """
    done: list[Replayed] = []
    weights = state = None
    earlier: list[bytes | None] = []
    usual: list[float] = []
    last = Replayed("", "", ())
    for number, entries in enumerate(segments):
        if told is not None:
            told(number, len(segments))
        hand = hands[number] if hands else Hand.NONE
        made, judged = _increment(base, recipe, seed, entries, earlier, usual, weights, state, hand)
        if made is None:
            done.append(Replayed(last.digest, last.state_digest, (), judged.rejected))
            continue
        usual += usual_of([judged.metrics])
        weights, state = made.weights, made.state
        earlier += entries
        last = Replayed(made.digest, made.state_digest, made.losses)
        done.append(last)
    return done


def _increment(
    base: Base,
    recipe: Recipe,
    seed: int,
    entries: Sequence[bytes | None],
    earlier: Sequence[bytes | None],
    usual: Sequence[float],
    weights: bytes | None,
    state: bytes | None,
    hand: Hand,
) -> tuple[Candidate | None, Judged]:
    """The candidate, if there is one, and what the gate says."""
    if hand is Hand.DISCARD:
        return None, Judged(BY_HAND, {})
    learner = Learner(base, recipe, seed, entries, earlier, weights, state)
    gate = Gate(base, recipe, seed, learner, earlier, usual, hand) if recipe.gate.on else None
    while not learner.done:
        step(base, [learner])
    try:
        made = learner.candidate()
    except Untrainable as error:
        return None, Judged(str(error), {})
    judged = gate.judge() if gate is not None else Judged("", {})
    return (None if judged.rejected else made), judged
