"""Which adapter sits in which device slot: least recently used out, never one that a sequence holds. No tensors."""

from collections import OrderedDict, deque
from enum import Enum


class SlotState(Enum):
    """Where a slot's weights are."""

    LOADING = "loading"
    READY = "ready"


class SlotTable:
    """`count` device slots. A digest gets one with `acquire`, and keeps it at least until as many `release`s."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slot: dict[str, int] = {}
        self._state: dict[str, SlotState] = {}
        self._refs: dict[str, int] = {}
        self._empty = list(range(count - 1, -1, -1))
        # Resident digests that nobody holds, the first to go in front.
        self._idle: OrderedDict[str, None] = OrderedDict()
        # Digests given a slot whose weights nobody is bringing yet.
        self.to_load: deque[str] = deque()
        # Slots not wiped since: the digests that had them before.
        self._remains: dict[int, set[str]] = {}

    def acquire(self, digest: str) -> bool:
        """Hold a slot for `digest`; False when every slot is held by others. A new slot starts LOADING."""
        if digest not in self._slot:
            if not self._empty and not self._evict():
                return False
            self._slot[digest] = self._empty.pop()
            self._state[digest] = SlotState.LOADING
            self._refs[digest] = 0
            self.to_load.append(digest)
        self._idle.pop(digest, None)
        self._refs[digest] += 1
        return True

    def release(self, digest: str) -> None:
        """Give up one hold. Weights stay resident until their slot is wanted."""
        self._refs[digest] -= 1
        assert self._refs[digest] >= 0, f"slot of {digest} released more often than acquired"
        if self._refs[digest] == 0:
            self._idle[digest] = None

    def loaded(self, digest: str) -> None:
        """The weights of `digest` are in their slot."""
        self._state[digest] = SlotState.READY
        self.wiped(self._slot[digest])

    def ready(self, digest: str) -> bool:
        """Whether a step may use `digest` now."""
        return self._state.get(digest) is SlotState.READY

    def slot(self, digest: str) -> int | None:
        """The slot of `digest`, or None when it has none."""
        return self._slot.get(digest)

    def refs(self, digest: str) -> int:
        """Holds on `digest`."""
        return self._refs.get(digest, 0)

    def remains(self, digest: str) -> list[int]:
        """Slots that are no longer its own and may still contain its weights."""
        return [slot for slot, left in self._remains.items() if digest in left]

    def empty(self, slot: int) -> bool:
        """Whether the slot is nobody's."""
        return slot in self._empty

    def wiped(self, slot: int) -> None:
        """Nothing of those who had the slot before is in it."""
        self._remains.pop(slot, None)

    def drop(self, digest: str) -> None:
        """Take away the slot of a digest that nobody holds, if it has one; its weights stay there until it is wiped."""
        if digest not in self._slot:
            return
        assert self._refs[digest] == 0, f"slot of {digest} dropped while held"
        self._idle.pop(digest, None)
        del self._refs[digest], self._state[digest]
        if digest in self.to_load:
            self.to_load.remove(digest)
        slot = self._slot.pop(digest)
        self._empty.append(slot)
        self._remains.setdefault(slot, set()).add(digest)

    def _evict(self) -> bool:
        for digest in self._idle:
            # A slot being written to belongs to its loader until that is done.
            if self._state[digest] is SlotState.READY:
                self.drop(digest)
                return True
        return False
