"""Which entries make which micro-batch, and how a micro-batch lies in memory: pure functions of the log.

A tombstone keeps its slot in every micro-batch and puts nothing into it, so what it once held has no way in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from riverdelta.core.digests import seed_of
from riverdelta.core.recipe import Training
from riverdelta.core.template import IGNORE


@dataclass(frozen=True)
class Row:
    """One entry as token ids, with labels (`IGNORE` where there is no loss)."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learns(self) -> bool:
        """Whether any token of the row has loss."""
        return self.targets > 0

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens that have loss, without the last one, which ends it."""
        return tuple(label for label in self.labels[1:] if label != IGNORE)[:-1]

    @property
    def targets(self) -> int:
        """How many tokens have loss; the first one never has, as nothing predicts it."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Block:
    """Rows of one adapter and one bucket that lie side by side: `rows` of `length` tokens from token `first` on."""

    first: int
    rows: int
    length: int


@dataclass(frozen=True)
class Batch:
    """The flat form of one step, adapter after adapter.

    `keep` are the places whose next token is a target; `tokens_each` and `targets_each` say how many of each every
    adapter has.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    blocks: tuple[Block, ...]
    keep: tuple[int, ...]
    targets: tuple[int, ...]
    tokens_each: tuple[int, ...]
    targets_each: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What one learning-rate position takes: slots of the segment, and earlier slots to rehearse with them."""

    slots: tuple[int, ...]
    earlier: tuple[int, ...]


def plan(slots: int, earlier: int, training: Training, seed: int, position: int) -> tuple[MicroBatch, ...]:
    """The micro-batches of an increment whose segment has `slots` slots, after a lineage of `earlier` slots.

    Every pass visits each slot once, in an order drawn from the adapter's seed, the pass's position and the slot. The
    earlier slots are visited evenly, in strides from a drawn start, as experience replay does (Rolnick et al., 2019).

    >>> [len(batch.slots) for batch in plan(5, 0, Training(passes=2, micro_batch=2, steps=6), seed=1, position=0)]
    [2, 2, 1, 2, 2, 1]
    """
    size, many = training.micro_batch, min(training.rehearse, earlier)
    visit, stride = seed_of(seed, "rehearse", position) % max(1, earlier), _stride(earlier)
    batches = []
    for _ in range(max(training.passes, -(-training.steps // max(1, -(-slots // size))))):
        drawn = sorted(range(slots), key=lambda slot: (seed_of(seed, "order", position, slot), slot))
        for first in range(0, slots, size):
            again = sorted((visit + turn * stride) % earlier for turn in range(many))
            visit += many * stride
            # Within a micro-batch, sums run in index order.
            batches.append(MicroBatch(tuple(sorted(drawn[first : first + size])), tuple(again)))
        position += -(-slots // size)
    return tuple(batches)


def spread(slots: int, many: int, start: int) -> tuple[int, ...]:
    """At most `many` of the slots, far apart, from a drawn start.

    >>> spread(10, 3, 25)
    (2, 5, 9)
    """
    return tuple(sorted((start + turn * _stride(slots)) % slots for turn in range(min(many, slots))))


def _stride(slots: int) -> int:
    """A step that visits all slots before any of them twice, far apart from each other: near the golden section."""
    stride = max(1, round(slots * 0.618034))
    while math.gcd(stride, slots) > 1:
        stride += 1
    return stride


def bucket(length: int) -> int:
    """The shape at which a row of `length` tokens is computed: a multiple of 4, at most a quarter longer from 16 on.

    >>> [bucket(n) for n in (1, 8, 18, 33, 100, 512, 513)]
    [4, 8, 20, 40, 112, 512, 640]
    """
    step = max(4, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def arrange(groups: Sequence[Sequence[Row]], filler: int) -> Batch:
    """Lay out each adapter's rows, in index order within their buckets; `filler` follows a row in its bucket."""
    tokens: list[int] = []
    positions: list[int] = []
    blocks: list[Block] = []
    keep: list[int] = []
    targets: list[int] = []
    tokens_each: list[int] = []
    targets_each: list[int] = []
    for rows in groups:
        start, wanted = len(tokens), len(targets)
        for length in sorted({bucket(len(row.tokens)) for row in rows}):
            members = [row for row in rows if bucket(len(row.tokens)) == length]
            blocks.append(Block(len(tokens), len(members), length))
            for row in members:
                for place, label in enumerate(row.labels[1:]):
                    if label != IGNORE:
                        keep.append(len(tokens) + place)
                        targets.append(label)
                tokens += [*row.tokens, *[filler] * (length - len(row.tokens))]
                positions += range(length)
        tokens_each.append(len(tokens) - start)
        targets_each.append(len(targets) - wanted)
    return Batch(
        tuple(tokens),
        tuple(positions),
        tuple(blocks),
        tuple(keep),
        tuple(targets),
        tuple(tokens_each),
        tuple(targets_each),
    )
