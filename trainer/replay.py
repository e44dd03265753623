"""Replay: an adapter's lineage trained again from the base, alone, from contents and boundaries only.

No store, no ledger, no checkpoint log, no other adapter: what comes out must be, bit for bit, what the live stack made
of the same log on the same environment fingerprint. It is one side of the check that nothing forgotten has influence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from riverdelta.core.recipe import Recipe

from .base import Base
from .increment import Untrainable, train

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
) -> list[Replayed]:
    """Train `segments` in order, each a list of contents in index order with None for tombstones.

    `told` hears (segments done, segments) before each. A parent that is still the base has empty digests.
    """
    done: list[Replayed] = []
    weights = state = None
    earlier: list[bytes | None] = []
    last = Replayed("", "", ())
    for number, entries in enumerate(segments):
        if told is not None:
            told(number, len(segments))
        try:
            made = train(base, recipe, seed, entries, earlier, weights, state)
        except Untrainable as error:
            done.append(Replayed(last.digest, last.state_digest, (), str(error)))
            continue
        weights, state = made.weights, made.state
        earlier += entries
        last = Replayed(made.digest, made.state_digest, made.losses)
        done.append(last)
    return done
