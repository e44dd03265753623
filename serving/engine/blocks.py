"""Paged KV blocks with prefix sharing: who holds which block, and what a cached block contains. No tensors.

After vLLM's PagedAttention (Kwon et al. 2023) and its hash-chained prefix cache. A full block is named by
SHA-256 over (weights digest, salt, every token up to its end), so a stale or foreign hit cannot exist.
A block that several sequences share is full and never written again, which is what makes sharing safe.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_key(digest: str | None, salt: str) -> bytes:
    """The name of the empty prefix for these weights (None: the base) and this salt."""
    return hashlib.sha256(f"{digest or 'base'}\0{salt}".encode()).digest()


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], block_size: int) -> None:
    """Append to `keys` the names of the full blocks of `tokens` that it lacks."""
    for n in range(len(keys), len(tokens) // block_size):
        content = array("q", tokens[n * block_size : (n + 1) * block_size]).tobytes()
        keys.append(hashlib.sha256((keys[n - 1] if n else root) + content).digest())


class BlockPool:
    """`num_blocks` blocks, each free, cached (free with reusable content) or held by one or more sequences."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._owner: list[str | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._fresh: list[int] = []
        # Blocks nobody holds, the one to be overwritten first in front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def free(self) -> int:
        """Blocks that a sequence could take now, cached ones included."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that a later sequence may share."""
        return len(self._by_key)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `keys`; they are not held yet."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, shared: Sequence[int], fresh: int, owner: str | None) -> list[int] | None:
        """Hold the blocks `shared` (from `match`) and `fresh` new ones for weights `owner`, or nothing."""
        if len(self._free) - sum(self.refs[b] == 0 for b in shared) < fresh:
            return None
        for block in shared:
            if self.refs[block] == 0:
                del self._free[block]
            self.refs[block] += 1
        return [*shared, *(self._take_one(owner) for _ in range(fresh))]

    def drain_fresh(self) -> list[int]:
        """Blocks handed out since the last call, which still contain what they held before."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def publish(self, block: int, key: bytes) -> bool:
        """Offer a full block to sequences with the same prefix; False if its content is on offer already."""
        if key in self._by_key or self._key[block] is not None:
            return False
        self._by_key[key] = block
        self._key[block] = key
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each block. A sequence's last block is overwritten before its first."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            assert self.refs[block] >= 0, f"block {block} released more often than taken"
            if self.refs[block] == 0:
                self._free[block] = None
                if self._key[block] is None:
                    self._free.move_to_end(block, last=False)

    def retire(self, owner: str) -> list[int]:
        """Share no more of what weights `owner` left in any block; returns those blocks, the next to be handed out."""
        left = [b for b in range(self.num_blocks) if self._owner[b] == owner]
        for block in left:
            assert self.refs[block] == 0, f"block {block} of {owner} is still held"
            self._unname(block)
            self._free.move_to_end(block, last=False)
        return left

    def forget(self, owner: str) -> list[int]:
        """Retire weights `owner` for good, and return the blocks that they left, so that they can be zeroed."""
        dropped = self.retire(owner)
        for block in dropped:
            self._owner[block] = None
        return dropped

    def _take_one(self, owner: str | None) -> int:
        block, _ = self._free.popitem(last=False)
        self._unname(block)
        self._owner[block] = owner
        self.refs[block] = 1
        self._fresh.append(block)
        return block

    def _unname(self, block: int) -> None:
        key, self._key[block] = self._key[block], None
        if key is not None:
            del self._by_key[key]
