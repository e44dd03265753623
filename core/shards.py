"""Which shard of its adapter an entry belongs to: a function of whom it is about, so that it survives erasure."""

from collections.abc import Sequence

from .digests import seed_of


def shard_of(subjects: Sequence[str], index: int, count: int) -> int:
    """The shard, from 0, of an entry about these subjects, given as their keyed hashes.

    One about several belongs to the shard of the one whose hash comes first; one about nobody has its index drawn.

    >>> shard_of(["ab", "cd"], 7, 4) == shard_of(["cd", "ab"], 8, 4) == shard_of(["ab"], 9, 4)
    True
    """
    if count == 1:
        return 0
    return seed_of("shard", min(subjects) if subjects else index) % count
