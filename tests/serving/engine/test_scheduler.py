"""The scheduler under random traffic: no block or slot leaks, every request ends, no key is starved."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.serving.engine.blocks import BlockPool, extend_keys, root_key
from riverdelta.serving.engine.scheduler import Limits, Scheduler, Sequence
from riverdelta.serving.engine.slots import SlotTable

BLOCK = 4


class World:
    """A scheduler and the part of the engine that drives it, with a model that writes its own names into blocks."""

    def __init__(self, limits: Limits, blocks: int, slots: int) -> None:
        self.pool = BlockPool(blocks)
        self.slots = SlotTable(slots)
        self.scheduler = Scheduler(limits, self.pool, self.slots)
        self.wanted: dict[str, int] = {}
        self.live: dict[str, Sequence] = {}
        # What each cache place holds: the whole prefix up to its token.
        self.memory: dict[int, tuple] = {}
        self.served: Counter[str] = Counter()

    def add(self, name: str, key: str, digest: str | None, prompt: list[int], answer: int) -> None:
        seq = Sequence(name, key.partition("/")[0], key, digest, "", list(prompt), len(prompt))
        self.wanted[name] = answer
        self.live[name] = seq
        self.scheduler.add(seq)

    def load_adapters(self) -> None:
        while self.slots.to_load:
            self.slots.loaded(self.slots.to_load.popleft())

    def step(self, load: bool = True) -> bool:
        work = self.scheduler.plan()
        if load:
            self.load_adapters()
        self.check(work)
        for w in work:
            for p in range(w.start, w.start + w.count):
                self.memory[self.place(w.seq, p)] = (w.seq.digest, *w.seq.tokens[: p + 1])
        for w in work:
            for p in range(w.start + w.count):
                held = self.memory[self.place(w.seq, p)]
                assert held == (w.seq.digest, *w.seq.tokens[: p + 1]), "attends to another's or a stale token"
        self.scheduler.commit(work)
        for w in work:
            if w.samples:
                w.seq.tokens.append(sum(w.seq.tokens) % 3)
                self.served[w.seq.tenant] += 1
                if w.seq.answer_len == self.wanted[w.seq.request_id]:
                    self.end(w.seq.request_id)
        return bool(work)

    def end(self, name: str) -> None:
        self.scheduler.finish(self.live.pop(name))

    def place(self, seq: Sequence, position: int) -> int:
        return seq.blocks[position // BLOCK] * BLOCK + position % BLOCK

    def check(self, work: list) -> None:
        s = self.scheduler
        assert len(s.running) <= s.limits.max_batch
        assert len({w.seq.request_id for w in work}) == len(work)
        holds = Counter(b for seq in s.running for b in seq.blocks)
        assert all(holds[b] == self.pool.refs[b] for b in range(self.pool.num_blocks))
        assert sum(r == 0 for r in self.pool.refs) == self.pool.free
        assert sum(w.count for w in work if w.count > 1) <= s.limits.prefill_chunk
        for w in work:
            written = {w.seq.blocks[p // BLOCK] for p in range(w.start, w.start + w.count)}
            assert all(self.pool.refs[b] == 1 for b in written), "writes to a shared block"
            assert w.seq.digest is None or self.slots.ready(w.seq.digest)
        slot_holds = Counter(seq.digest for seq in self.live.values() if seq.holds_slot)
        assert all(self.slots.refs(d) == n for d, n in slot_holds.items())

    def idle(self) -> None:
        assert self.pool.free == self.pool.num_blocks
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert not self.scheduler.paid
        assert not self.scheduler.paid_by_tenant


requests = st.lists(
    st.tuples(
        st.sampled_from(["x", "y/1", "y/2"]),
        st.sampled_from([None, "a", "b", "c"]),
        st.integers(0, 2).flatmap(lambda t: st.lists(st.integers(t, 2), min_size=1, max_size=24)),
        st.integers(1, 12),
        st.integers(0, 3),
        st.sampled_from([None, None, None, 1, 4]),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    requests,
    st.integers(1, 5),
    st.integers(9, 30),
    st.integers(1, 4),
    st.sampled_from([4, 8, 12]),
    st.booleans(),
    st.booleans(),
)
def test_every_request_ends_and_nothing_leaks(traffic, batch, blocks, slots, chunk, cache, fixed):
    world = World(Limits(batch, BLOCK, chunk, prefix_cache=cache, fixed_chunks=fixed), blocks, slots)
    for n, (key, digest, prompt, answer, steps, cancel) in enumerate(traffic):
        world.add(str(n), key, digest, prompt, answer)
        for _ in range(steps):
            world.step(load=n % 3 != 0)
        if cancel is not None and str(n - cancel) in world.live:
            world.end(str(n - cancel))
    for _ in range(3000):
        if not world.live:
            break
        world.step()
    assert not world.live, "a request never ended"
    world.step()
    world.idle()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 12), st.integers(1, 12))
def test_a_flooding_key_takes_no_more_than_its_share(batch, flood, long, short):
    world = World(Limits(batch * 2, BLOCK, 16), 400, 1)
    for n in range(flood * batch):
        world.add(f"f{n}", "flood", None, [1] * 8, long)
    for _ in range(5):
        world.step()
    for n in range(batch):
        world.add(f"v{n}", "victim", None, [2] * 8, short)
    # Two keys, a batch with a place for each victim in its half, a prompt chunk for two prompts a step.
    for _ in range(short + batch):
        world.step()
    assert not any(name.startswith("v") for name in world.live)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(2, 60),
    st.booleans(),
)
def test_a_flood_does_not_delay_anothers_first_token(half, flood, adapters, prompt, answer, warm, weights):
    """Whatever a tenant who is being served asks for, requests, adapters, tokens: another's few start at once."""
    batch, chunk, longest = 2 * half, 16, 80
    # Blocks for half a batch of the longest: the flood alone would hold them all.
    world = World(Limits(batch, BLOCK, chunk), half * longest // BLOCK, batch + half)
    for n in range(flood):
        digest = f"d{n % adapters}" if weights else None
        world.add(f"f{n}", f"flood/{n % adapters}", digest, [n % 3] * prompt, answer)
    for _ in range(warm):
        world.step()
    for n in range(min(2, half // 2)):
        world.add(f"v{n}", "victim", "v" if weights else None, [1, 2] * 4, 1)
    for _ in range(4):  # its weights are asked for, brought, and places made; then its prompts are computed
        world.step()
    assert not any(name.startswith("v") for name in world.live), (half, flood, adapters, prompt, answer, warm, weights)


def test_many_keys_give_a_tenant_one_share():
    world = World(Limits(8, BLOCK, 64), 400, 1)
    for n in range(64):
        world.add(f"f{n}", f"flood/{n}", None, [n % 3] * 4, 400)
        world.add(f"v{n}", "victim", None, [n % 3] * 4, 400)
    for _ in range(200):
        world.step()
    assert world.served["victim"] == pytest.approx(world.served["flood"], rel=0.1)


def test_a_flooded_queue_has_room_for_others():
    world = World(Limits(2, BLOCK, 64, max_queue=90), 400, 1)

    def fill(key):
        tenant = key.partition("/")[0]
        for n in range(90):
            if not world.scheduler.has_room(tenant, key):
                return n
            world.add(f"{key}{n}", key, None, [1], 1)
        raise AssertionError("nothing is left")

    assert fill("flood/1") == 60
    assert 5 <= fill("flood/2") < 60
    assert fill("victim/1") >= 5


def test_a_preempted_sequence_resumes_from_the_cache():
    world = World(Limits(4, BLOCK, 64), 9, 1)
    for n in range(3):
        world.add(str(n), "k", None, [n] * 10, 20)
    while world.live:
        world.step()
    assert world.scheduler.preemptions > 0
    world.idle()


def test_a_prefix_is_shared_within_weights_and_salt_only():
    world = World(Limits(4, BLOCK, 64), 40, 2)
    cached = {}
    for name, digest in (("1", None), ("2", None), ("3", "a"), ("4", "a"), ("5", "b")):
        world.add(name, "k", digest, [1] * 13, 1)
        seq = world.live[name]
        while world.live:
            world.step()
        cached[name] = seq.cached_tokens
    assert cached == {"1": 0, "2": 12, "3": 0, "4": 12, "5": 0}
    assert root_key(None, "x") != root_key(None, "y")


def test_forgetting_weights_drops_their_blocks_only():
    world = World(Limits(4, BLOCK, 64), 40, 2)
    for name, digest in (("1", "a"), ("2", "b")):
        world.add(name, "k", digest, [1] * 13, 6)
    while world.live:
        world.step()
    cached = world.pool.cached
    assert len(world.pool.forget("a")) == 5
    assert world.pool.cached == cached - 4
    keys: list[bytes] = []
    extend_keys(keys, root_key("a", ""), [1] * 12, BLOCK)
    assert world.pool.match(keys) == []
    assert world.pool.forget("a") == []


def test_slots_evict_the_least_recently_used_that_nobody_holds():
    table = SlotTable(2)
    for digest in "ab":
        assert table.acquire(digest)
        table.loaded(digest)
    assert not table.acquire("c")
    table.release("b")
    table.release("a")
    assert table.acquire("c")
    assert table.slot("b") is None
    assert table.slot("a") is not None
    assert not table.ready("c")
