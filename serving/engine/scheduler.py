"""Which tokens the next step computes: admission, fairness, chunked prefill, preemption. Decisions only, no tensors.

Iteration-level scheduling after Orca (Yu et al. 2022), chunked prefill after Sarathi (Agrawal et al. 2023),
fairness by virtual token counters (Sheng et al. 2024): each key pays for the tokens it is served, the key that
paid least is admitted first, and a key that was idle starts level with the poorest active one. Keys belong to tenants,
who pay likewise and come first: many keys give nobody more than one share.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count

from .blocks import BlockPool, extend_keys, root_key
from .config import EngineConfig
from .slots import SlotTable

# What a token costs its key: an answer's token takes a step of its own, a prompt's tokens share one.
PROMPT_COST, ANSWER_COST = 1, 2
Key = tuple[str, str]  # tenant and key


@dataclass(frozen=True)
class Limits:
    """The scheduler's part of the engine's configuration."""

    max_batch: int
    block_size: int
    prefill_chunk: int
    max_queue: int = 1024
    prefix_cache: bool = True
    # Chunk boundaries and cached content depend on the sequence alone, so its bits can too.
    fixed_chunks: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> "Limits":
        """The limits that `config` sets."""
        return cls(
            config.max_batch,
            config.block_size,
            config.prefill_chunk,
            config.max_queue,
            config.prefix_cache,
            config.batch_invariant,
        )


@dataclass(eq=False)
class Sequence:
    """One request's tokens and what of them is in the cache. The scheduler owns every field but `tokens`."""

    request_id: str
    tenant: str
    key: str
    digest: str | None
    salt: str
    tokens: list[int]
    prompt_len: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    cached_tokens: int | None = None
    paid: int = 0
    running: bool = False
    holds_slot: bool = False
    arrival: int = 0
    admitted: int = 0
    preemptions: int = 0

    @property
    def owner(self) -> Key:
        """Who pays for it."""
        return self.tenant, self.key

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
        self.waiting: dict[Key, deque[Sequence]] = {}
        self.running: list[Sequence] = []
        self.paid: dict[Key, int] = {}
        self.paid_by_tenant: dict[str, int] = {}
        self.preemptions = 0
        self._clock = count()

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence behind the others of its key."""
        active = self._active_keys()
        tenants = {tenant for tenant, _ in active}
        if seq.tenant not in tenants:
            floor = min((self.paid_by_tenant[t] for t in tenants), default=0)
            self.paid_by_tenant[seq.tenant] = max(self.paid_by_tenant.get(seq.tenant, 0), floor)
        if seq.owner not in active:
            floor = min((self.paid[k] for k in active if k[0] == seq.tenant), default=0)
            self.paid[seq.owner] = max(self.paid.get(seq.owner, 0), floor)
        seq.arrival = next(self._clock)
        self.waiting.setdefault(seq.owner, deque()).append(seq)

    def plan(self) -> list[Work]:
        """The next step's work: one token of every decoding sequence and chunks of prompts, at most one Work
        a sequence. Blocks for all of it are held on return."""
        self._admit()
        work = []
        budget = self.limits.prefill_chunk
        # Whoever comes first may have the whole chunk, another no more than its part: a step that has the prompt of a
        # tenant who asks for little must not be long.
        part = budget // max(1, len({s.tenant for s in self.running}))
        parts: dict[str, int] = {}
        held = Counter(s.tenant for s in self.running)
        for seq in sorted(
            self.running, key=lambda s: (self.paid_by_tenant[s.tenant], held[s.tenant], self.standing(s))
        ):
            if not seq.running:
                continue  # preempted for one before it
            left = len(seq.tokens) - seq.computed
            mine = parts.setdefault(seq.tenant, part if parts else budget) if left > 1 else 0
            size = left if left == 1 else self._chunk(seq, left, min(budget, mine))
            if size == 0 or not self._grow(seq, seq.computed + size):
                continue
            if left > 1:
                budget -= size
                parts[seq.tenant] -= size
            work.append(Work(seq, seq.computed, size, size == left))
        return [w for w in work if w.seq.running]

    def commit(self, work: Seq[Work]) -> None:
        """The step is done: its tokens are in the cache, and full blocks can be shared."""
        for item in work:
            seq = item.seq
            if not seq.running:
                continue  # cut while the step ran
            seq.computed = item.start + item.count
            prompt = min(seq.computed, seq.prompt_len)
            self._pay(seq, PROMPT_COST * max(0, prompt - seq.paid) + ANSWER_COST * item.samples)
            seq.paid = max(seq.paid, prompt)  # what is computed again is not paid for again
            self._publish(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence, wherever it is, and give back what it holds."""
        if seq.running:
            self.running.remove(seq)
            self._give_back(seq)
        elif seq in self.waiting.get(seq.owner, ()):
            self._unqueue(seq)
        self._let_slot_go(seq)
        self._prune()

    def standing(self, seq: Sequence) -> tuple[int, int, int]:
        """Where a sequence stands among those running: who was served least comes first."""
        return self.paid_by_tenant[seq.tenant], self.paid[seq.owner], seq.admitted

    @property
    def queued(self) -> int:
        """Sequences that wait."""
        return sum(map(len, self.waiting.values()))

    def has_room(self, tenant: str, key: str) -> bool:
        """Whether one more sequence may wait. A key may have twice as many in the queue as there are places left, a
        tenant four times as many (dynamic thresholds, Choudhury & Hahne 1998): who floods it leaves room for others."""
        left = self.limits.max_queue - self.queued
        of_tenant = sum(len(q) for (owner, _), q in self.waiting.items() if owner == tenant)
        return len(self.waiting.get((tenant, key), ())) < 2 * left and of_tenant < 4 * left

    # Admission

    def _admit(self) -> None:
        self._prefetch()
        short: set[str] = set()  # tenants whose next found too few blocks
        while True:
            seq, victim = self._next(short)
            if seq is None:
                return
            if short and self._beyond_share_of_blocks(seq):
                short.add(seq.tenant)
                continue
            if victim is not None:
                self._preempt(victim)
            shared = self._match(seq)
            fresh = -(-len(seq.tokens) // self.limits.block_size) - len(shared)
            while (blocks := self.pool.take(shared, fresh, seq.digest)) is None:
                victim = self._over_share(seq, len(shared) + fresh, self.pool.num_blocks, lambda s: len(s.blocks))
                if victim is None:
                    break
                self._preempt(victim)
            if blocks is None:
                short.add(seq.tenant)  # in turn: a short one must not overtake it for ever
            else:
                self._start(seq, blocks, len(shared) * self.limits.block_size)

    def _start(self, seq: Sequence, blocks: list[int], cached: int) -> None:
        self._unqueue(seq)
        seq.blocks, seq.computed, seq.running = blocks, cached, True
        seq.admitted = next(self._clock)
        if seq.cached_tokens is None:
            seq.cached_tokens = seq.paid = cached
        self.running.append(seq)

    def _prefetch(self) -> None:
        """Ask slots for the adapters of those that are next in turn."""
        order = list(self._in_turn())
        for at, seq in enumerate(order[: self.limits.max_batch]):
            if seq.digest is None or seq.holds_slot:
                continue
            behind = (s for s in reversed(order[at + 1 :]) if s.holds_slot)
            while not (held := self.slots.acquire(seq.digest)):
                last = next(behind, None)
                if last is None:
                    break
                self._let_slot_go(last)
            seq.holds_slot = held

    def _in_turn(self) -> Iterator[Sequence]:
        for owner in self._owners_in_turn():
            yield from self.waiting[owner]

    def _owners_in_turn(self) -> list[Key]:
        """Who waits: the tenant, and of a tenant the key, that paid least first. What was admitted counts as paid."""
        by_tenant, by_key = Counter(self.paid_by_tenant), Counter(self.paid)
        for seq in self.running:
            owed = PROMPT_COST * (seq.prompt_len - seq.paid)
            by_tenant[seq.tenant] += owed
            by_key[seq.owner] += owed
        held = Counter(s.tenant for s in self.running)
        return sorted(self.waiting, key=lambda k: (by_tenant[k[0]], held[k[0]], by_key[k], self.waiting[k][0].arrival))

    def _beyond_share_of_blocks(self, seq: Sequence) -> bool:
        """Whether its tenant would hold more blocks than its share with it; within that, it takes from nobody's."""
        held = sum(len(s.blocks) for s in self.running if s.tenant == seq.tenant)
        share = self.pool.num_blocks / len({tenant for tenant, _ in self._active_keys()})
        return held - (-len(seq.tokens) // self.limits.block_size) > share

    def _next(self, short: set[str]) -> tuple[Sequence | None, Sequence | None]:
        """Whom to admit, and whom to preempt for it where the batch is full: the first in turn whose weights are there,
        whose tenant is not `short`, and, of a full batch, whose tenant and key have less than their share."""
        full = len(self.running) >= self.limits.max_batch
        for owner in self._owners_in_turn():
            for seq in () if owner[0] in short else self.waiting[owner]:
                if seq.digest is None or (seq.holds_slot and self.slots.ready(seq.digest)):
                    victim = self._over_share(seq, 1, self.limits.max_batch, lambda _: 1) if full else None
                    if victim is not None or not full:
                        return seq, victim
                    break  # the next of this key have no better claim
        return None, None

    def _over_share(self, seq: Sequence, need: int, total: int, weight: Callable[[Sequence], int]) -> Sequence | None:
        """Whom `seq` may displace to get `need` of a `total` of which each running sequence has its `weight`: the
        youngest of the tenant, or else of the tenant's own key, that has most and more than its share, if `seq`
        stays within its own."""
        active = self._active_keys()
        by_tenant: Counter[str] = Counter()
        by_key: Counter[Key] = Counter()
        for s in self.running:
            by_tenant[s.tenant] += weight(s)
            by_key[s.owner] += weight(s)
        share = total / len({tenant for tenant, _ in active})
        richest = max(by_tenant, key=lambda t: (by_tenant[t], self.paid_by_tenant[t]), default=seq.tenant)
        if by_tenant[seq.tenant] + need > share or by_tenant[richest] <= share:
            richest = seq.tenant
            share = by_tenant[seq.tenant] / len([k for k in active if k[0] == seq.tenant])
            if by_key[seq.owner] + need > share:
                return None
        key = max((k for k in by_key if k[0] == richest), key=lambda k: (by_key[k], self.paid[k]), default=None)
        if key is None or (richest == seq.tenant and by_key[key] <= share):
            return None
        return max((s for s in self.running if s.owner == key), key=lambda s: s.admitted)

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
            victim = max(self.running, key=self.standing)
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
        self.waiting.setdefault(seq.owner, deque()).appendleft(seq)

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

    # Queues and keys

    def _unqueue(self, seq: Sequence) -> None:
        queue = self.waiting[seq.owner]
        queue.remove(seq)
        if not queue:
            del self.waiting[seq.owner]

    def _let_slot_go(self, seq: Sequence) -> None:
        if seq.holds_slot and seq.digest is not None:
            self.slots.release(seq.digest)
            seq.holds_slot = False

    def _pay(self, seq: Sequence, cost: int) -> None:
        self.paid[seq.owner] += cost
        self.paid_by_tenant[seq.tenant] += cost

    def _active_keys(self) -> set[Key]:
        return self.waiting.keys() | {s.owner for s in self.running}

    def _prune(self) -> None:
        """Forget idle keys and tenants whose account no longer sets them back."""
        active = self._active_keys()
        tenants = {tenant for tenant, _ in active}
        least = min((self.paid_by_tenant[t] for t in tenants), default=None)
        for tenant in [t for t, paid in self.paid_by_tenant.items() if t not in tenants]:
            if least is None or self.paid_by_tenant[tenant] <= least:
                del self.paid_by_tenant[tenant]
        floors: dict[str, int] = {}
        for key in active:
            floors[key[0]] = min(self.paid[key], floors.get(key[0], self.paid[key]))
        for key in [k for k in self.paid if k not in active]:
            if self.paid[key] <= floors.get(key[0], self.paid[key]):
                del self.paid[key]
