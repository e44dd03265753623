"""Which entries make which micro-batch, and how a micro-batch lies in memory: pure functions of the log.

A tombstone keeps its slot in every micro-batch and puts nothing into it, so what it once held has no way in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from riverdelta.core.digests import seed_of
from riverdelta.core.template import IGNORE


@dataclass(frozen=True)
class Row:
    """One entry as token ids, with labels (`IGNORE` where there is no loss)."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learns(self) -> bool:
        """Whether any token of the row has loss; the first one never has, as nothing predicts it."""
        return any(label != IGNORE for label in self.labels[1:])


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


def micro_batches(slots: int, passes: int, size: int, seed: int, position: int) -> Iterator[tuple[int, ...]]:
    """The slots of every micro-batch of an increment, in order; each takes one learning-rate position.

    Every pass visits all `slots` once, in an order drawn from the adapter's seed, the pass's position and the slot.

    >>> [len(batch) for batch in micro_batches(5, passes=2, size=2, seed=1, position=0)]
    [2, 2, 1, 2, 2, 1]
    """
    for _ in range(passes):
        drawn = sorted(range(slots), key=lambda slot: (seed_of(seed, "order", position, slot), slot))
        for first in range(0, slots, size):
            # Within a micro-batch, sums run in index order.
            yield tuple(sorted(drawn[first : first + size]))
        position += -(-slots // size)


def bucket(length: int) -> int:
    """The shape at which a row of `length` tokens is computed: a multiple of 8, at most a quarter longer from 32 on.

    >>> [bucket(n) for n in (1, 8, 20, 33, 100, 512, 513)]
    [8, 8, 24, 40, 112, 512, 640]
    """
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def arrange(groups: Sequence[Sequence[Row]], pad: int) -> Batch:
    """Lay out each adapter's rows, in index order within their buckets; what follows a row in its bucket is `pad`."""
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
                tokens += [*row.tokens, *[pad] * (length - len(row.tokens))]
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
