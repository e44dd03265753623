"""Which tokens the next step computes: admission, fairness, chunked prefill, preemption. Decisions only, no tensors.

Iteration-level scheduling after Orca (Yu et al. 2022), chunked prefill after Sarathi (Agrawal et al. 2023),
fairness by virtual token counters (Sheng et al. 2024): each key pays for the tokens it is served, the key that
paid least is admitted first, and a key that was idle starts level with the poorest active one.
"""

from collections import Counter, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count

from .blocks import BlockPool, extend_keys, root_key
from .config import EngineConfig
from .slots import SlotTable

# What a token costs its key: an answer's token takes a step of its own, a prompt's tokens share one.
PROMPT_COST, ANSWER_COST = 1, 2


@dataclass(frozen=True)
class Limits:
    """The scheduler's part of the engine's configuration."""

    max_batch: int
    block_size: int
    prefill_chunk: int
    prefix_cache: bool = True
    # Chunk boundaries and cached content depend on the sequence alone, so its bits can too.
    fixed_chunks: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> "Limits":
        """The limits that `config` sets."""
        return cls(
            config.max_batch, config.block_size, config.prefill_chunk, config.prefix_cache, config.batch_invariant
        )


@dataclass(eq=False)
class Sequence:
    """One request's tokens and what of them is in the cache. The scheduler owns every field but `tokens`."""

    request_id: str
    key: str
    digest: str | None
    salt: str
    tokens: list[int]
    prompt_len: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    cached_tokens: int | None = None
    running: bool = False
    holds_slot: bool = False
    arrival: int = 0
    admitted: int = 0
    preemptions: int = 0

    @property
    def answer_len(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len


@dataclass(frozen=True)
class Work:
    """Compute positions `start` to `start + count` of `seq`; `samples` when that reaches its last token."""

    seq: Sequence
    start: int
    count: int
    samples: bool


class Scheduler:
    """The state machine that the step loop drives: `add`, then `plan` and `commit` in turn, and `finish`."""

    def __init__(self, limits: Limits, pool: BlockPool, slots: SlotTable) -> None:
        self.limits = limits
        self.pool = pool
        self.slots = slots
        self.waiting: dict[str, deque[Sequence]] = {}
        self.running: list[Sequence] = []
        self.paid: dict[str, int] = {}
        self.preemptions = 0
        self._clock = count()

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence behind the others of its key."""
        if not self._active(seq.key):
            floor = min((self.paid[k] for k in self._active_keys()), default=0)
            self.paid[seq.key] = max(self.paid.get(seq.key, 0), floor)
        seq.arrival = next(self._clock)
        self.waiting.setdefault(seq.key, deque()).append(seq)

    def plan(self) -> list[Work]:
        """The next step's work: one token of every decoding sequence and chunks of prompts, at most one Work
        a sequence. Blocks for all of it are held on return."""
        self._admit()
        work = []
        budget = self.limits.prefill_chunk
        for seq in sorted(self.running, key=lambda s: (self.paid[s.key], s.admitted)):
            if not seq.running:
                continue  # preempted for one before it
            left = len(seq.tokens) - seq.computed
            size = left if left == 1 else self._chunk(seq, left, budget)
            if size == 0 or not self._grow(seq, seq.computed + size):
                continue
            budget -= size if left > 1 else 0
            work.append(Work(seq, seq.computed, size, size == left))
        return [w for w in work if w.seq.running]

    def commit(self, work: Seq[Work]) -> None:
        """The step is done: its tokens are in the cache, and full blocks can be shared."""
        for item in work:
            seq = item.seq
            if not seq.running:
                continue  # cut while the step ran
            seq.computed = item.start + item.count
            if item.samples:
                self.paid[seq.key] += ANSWER_COST
            self._publish(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence, wherever it is, and give back what it holds."""
        if seq.running:
            self.running.remove(seq)
            self._give_back(seq)
        elif seq in self.waiting.get(seq.key, ()):
            self.waiting[seq.key].remove(seq)
        if seq.holds_slot and seq.digest is not None:
            self.slots.release(seq.digest)
            seq.holds_slot = False
        if not self.waiting.get(seq.key, True):
            del self.waiting[seq.key]
        self._prune()

    def queued(self, key: str | None = None) -> int:
        """Sequences that wait, of one key or of all."""
        if key is not None:
            return len(self.waiting.get(key, ()))
        return sum(len(q) for q in self.waiting.values())

    # Admission

    def _admit(self) -> None:
        self._prefetch()
        while True:
            victim = self._over_share() if len(self.running) >= self.limits.max_batch else None
            if victim is None and len(self.running) >= self.limits.max_batch:
                return
            seq = self._next(below_share=victim is not None)
            if seq is None:
                return
            shared = self._match(seq)
            fresh = -(-len(seq.tokens) // self.limits.block_size) - len(shared)
            if victim is not None:
                self._preempt(victim)
            blocks = self.pool.take(shared, fresh, seq.digest)
            if blocks is None:
                return  # in turn: a short one must not overtake it for ever
            self._start(seq, blocks, len(shared) * self.limits.block_size)

    def _start(self, seq: Sequence, blocks: list[int], cached: int) -> None:
        self.waiting[seq.key].remove(seq)
        if not self.waiting[seq.key]:
            del self.waiting[seq.key]
        seq.blocks, seq.computed, seq.running = blocks, cached, True
        seq.admitted = next(self._clock)
        if seq.cached_tokens is None:
            seq.cached_tokens = cached
            self.paid[seq.key] += PROMPT_COST * (seq.prompt_len - cached)
        self.running.append(seq)

    def _prefetch(self) -> None:
        """Ask slots for the adapters of those that are next in turn."""
        wanted = self.limits.max_batch
        for key in sorted(self.waiting, key=self._turn):
            for seq in self.waiting[key]:
                if wanted == 0:
                    return
                wanted -= 1
                if seq.digest is not None and not seq.holds_slot:
                    seq.holds_slot = self.slots.acquire(seq.digest)

    def _next(self, below_share: bool) -> Sequence | None:
        """The first sequence whose weights are there, of the key that paid least (and has less than its share)."""
        held, share = self._held(), self._share() if below_share else float("inf")
        for key in sorted(self.waiting, key=self._turn):
            if held[key] + 1 > share:
                continue
            for seq in self.waiting[key]:
                if seq.digest is None or (seq.holds_slot and self.slots.ready(seq.digest)):
                    return seq
        return None

    def _turn(self, key: str) -> tuple[int, int]:
        return self.paid[key], self.waiting[key][0].arrival

    def _over_share(self) -> Sequence | None:
        """Whom a key below its share may displace: the youngest of the key that is furthest above its own."""
        held = self._held()
        richest = max(held, key=lambda k: (held[k], self.paid[k]))
        if held[richest] - 1 < self._share():
            return None
        return max((s for s in self.running if s.key == richest), key=lambda s: s.admitted)

    def _held(self) -> Counter[str]:
        return Counter(s.key for s in self.running)

    def _share(self) -> float:
        return self.limits.max_batch / max(1, len(self._active_keys()))

    # Blocks

    def _chunk(self, seq: Sequence, left: int, budget: int) -> int:
        if not self.limits.fixed_chunks:
            return min(left, budget)
        if seq.computed >= seq.prompt_len:
            return 1  # an answer's tokens are recomputed as they were computed: one by one
        size = min(self.limits.prefill_chunk, seq.prompt_len - seq.computed)
        return size if size <= budget else 0

    def _grow(self, seq: Sequence, length: int) -> bool:
        """Hold blocks for `length` tokens of `seq`, displacing others for it; False if it had to go itself."""
        while (missing := -(-length // self.limits.block_size) - len(seq.blocks)) > 0:
            taken = self.pool.take((), missing, seq.digest)
            if taken is not None:
                seq.blocks += taken
                continue
            victim = max(self.running, key=lambda s: (self.paid[s.key], s.admitted))
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of its queue; it is computed again later, from the cache where that still has it."""
        self.running.remove(seq)
        self._give_back(seq)
        seq.preemptions += 1
        self.preemptions += 1
        self.waiting.setdefault(seq.key, deque()).appendleft(seq)

    def _give_back(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        seq.blocks, seq.computed, seq.running = [], 0, False

    def _match(self, seq: Sequence) -> list[int]:
        """Cached blocks that `seq` can start from. At least its last token is left to compute."""
        if not self.limits.prefix_cache:
            return []
        self._name_blocks(seq)
        size = self.limits.block_size
        usable = (len(seq.tokens) - 1) // size
        if self.limits.fixed_chunks:
            per_chunk = self.limits.prefill_chunk // size
            usable = (seq.prompt_len - 1) // size // per_chunk * per_chunk
        found = self.pool.match(seq.block_keys[:usable])
        if self.limits.fixed_chunks:
            del found[len(found) // per_chunk * per_chunk :]
        return found

    def _publish(self, seq: Sequence) -> None:
        if not self.limits.prefix_cache:
            return
        last = len(seq.tokens)
        if self.limits.fixed_chunks:  # a part of a chunk, or a token of an answer, may have other bits
            last = seq.prompt_len // self.limits.prefill_chunk * self.limits.prefill_chunk
        done = min(seq.computed, last) // self.limits.block_size
        self._name_blocks(seq)
        for n in range(done - 1, -1, -1):
            if not self.pool.publish(seq.blocks[n], seq.block_keys[n]):
                break

    def _name_blocks(self, seq: Sequence) -> None:
        extend_keys(seq.block_keys, root_key(seq.digest, seq.salt), seq.tokens, self.limits.block_size)

    # Keys

    def _active(self, key: str) -> bool:
        return key in self.waiting or any(s.key == key for s in self.running)

    def _active_keys(self) -> set[str]:
        return self.waiting.keys() | {s.key for s in self.running}

    def _prune(self) -> None:
        """Forget idle keys whose account no longer sets them back."""
        active = self._active_keys()
        floor = min((self.paid[k] for k in active), default=None)
        for key in [k for k in self.paid if k not in active and (floor is None or self.paid[k] <= floor)]:
            del self.paid[key]
