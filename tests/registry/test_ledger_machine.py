"""A hypothesis state machine over the decisions and the real ledger, ended by the comparison with a control ledger."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from riverdelta.core.errors import Conflict, NotFound, Refused, StaleEpoch
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Forget, Hand, Lease, Ledger, Outcome, Stage, Work
from riverdelta.registry.verify import check_chain
from tests.registry.histories import Act, World, check_adapter, control, keyed

ADAPTERS = ("one", "two")
SUBJECTS = ("ann", "bob", "cleo")
# Few clean states stay, so that forgets and people's words often have to go back further than they would.
SPARSE = Recipe.from_dict({"retain": {"every": 3, "targets": 1}})
adapters = st.sampled_from(ADAPTERS)
subjects = st.sampled_from(SUBJECTS)
_MEMORY = Path("/dev/shm")


class LedgerMachine(RuleBasedStateMachine):
    """What dataflow, trainers, servers and operators may do to two adapters, in any order."""

    works = Bundle("works")
    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=_MEMORY if _MEMORY.is_dir() else None))
        self.world = World(Ledger.open(self.url()))
        self.acts: dict[str, list[Act]] = {name: [] for name in ADAPTERS}
        self.requests: dict[str, Forget] = {}
        self.acked: dict[str, int] = {}
        self.clock = self.started = 0

    def url(self) -> str:
        return f"sqlite:///{self.folder}/ledger.db"

    @property
    def ledger(self) -> Ledger:
        return self.world.ledger

    @initialize()
    def create(self) -> None:
        for name in ADAPTERS:
            self.ledger.create(name, SPARSE, "test")
        with pytest.raises(Conflict):
            self.ledger.create(ADAPTERS[0], Recipe(), "test")

    # -- dataflow --

    @rule(
        name=adapters,
        entries=st.lists(st.tuples(st.sets(subjects, max_size=2), st.integers(0, 6)), min_size=1, max_size=3),
    )
    def seal(self, name: str, entries: list[tuple[set[str], int]]) -> None:
        written = [*self.ledger.versions("one").values(), *self.ledger.versions("two").values()]
        listed = [(sorted(who), written[by].digest if by < len(written) else "") for who, by in entries]
        assert not isinstance(self.world.seal(name, listed), Exception)

    @rule(name=adapters)
    def seal_under_an_old_epoch(self, name: str) -> None:
        epoch = self.ledger.adapter(name).epoch
        if epoch:
            assert isinstance(self.world.seal(name, [(["ann"], "")], epoch - 1), StaleEpoch)

    # -- trainers --

    @rule(name=adapters)
    def train(self, name: str) -> None:
        self.world.train(name)

    @rule(name=adapters)
    def train_all(self, name: str) -> None:
        while self.world.train(name):
            pass

    @rule(target=works, name=adapters)
    def take_work(self, name: str) -> Any:
        work = self.ledger.work(name)
        return multiple() if work is None else (work, self.world.live(name, work.segment.number))

    @rule(taken=consumes(works))
    def finish_late(self, taken: tuple[Work, list[str | None]]) -> None:
        """A trainer that comes late is refused when anything that it built on has moved."""
        work, contents = taken
        name = work.adapter.name
        head, now = self.ledger.adapter(name), self.ledger.work(name)
        if head.epoch != work.adapter.epoch:
            with pytest.raises(StaleEpoch):
                self.world.finish(work, contents)
        elif head.tip != work.adapter.tip or now is None or now.segment.number != work.segment.number:
            with pytest.raises(Conflict):
                self.world.finish(work, contents)
        else:
            self.world.finish(work, contents)

    # -- operators --

    @rule(name=adapters, back=st.integers(0, 5))
    def rollback(self, name: str, back: int) -> None:
        versions = self.ledger.versions(name)
        number = max(0, len(versions) - back)
        if number and not versions[number].usable:
            with pytest.raises(Refused):
                self.ledger.rollback(name, number, "test")
        else:
            self.ledger.rollback(name, number, "test")
            self._acted(name, "rollback", self.world.line(name, number))
        with pytest.raises(NotFound):
            self.ledger.rollback(name, len(versions) + 1, "test")

    @rule(name=adapters)
    def rollback_by_default(self, name: str) -> None:
        try:
            number = self.ledger.rollback(name, None, "test").release
        except Refused:
            return
        self._acted(name, "rollback", self.world.line(name, number))

    @rule(name=adapters, mode=st.sampled_from(["continue", "replay", "tip"]))
    def resume(self, name: str, mode: Any) -> None:
        if self.ledger.adapter(name).held is None:
            with pytest.raises(Conflict):
                self.ledger.resume(name, mode, "test")
        else:
            assert self.ledger.resume(name, mode, "test").held is None
            self._acted(name, mode)

    @rule(name=adapters, back=st.integers(0, 3))
    def release(self, name: str, back: int) -> None:
        versions = self.ledger.versions(name)
        number = max(0, len(versions) - back)
        try:
            assert self.ledger.release(name, number, "test").release == number
        except Refused:
            assert not versions[number].usable
        except Conflict:
            assert self.ledger.adapter(name).held is not None

    @rule(name=adapters, back=st.integers(0, 4), hand=st.sampled_from([Hand.ACCEPT, Hand.DISCARD]))
    def decide_by_hand(self, name: str, back: int, hand: Hand) -> None:
        number = len(self.ledger.segments(name)) - back
        try:
            self.ledger.decide_by_hand(name, number, hand, "test")
        except NotFound:
            assert number < 1
            return
        except Conflict:
            return
        self._acted(name, str(hand), segment=number)
        while self.ledger.segment(name, number).outcome is Outcome.AWAITING and self.ledger.work(name) is not None:
            self.world.train(name)
        decided = Outcome.TRAINED if hand is Hand.ACCEPT else Outcome.SET_ASIDE
        assert self.ledger.segment(name, number).outcome is decided

    def _acted(self, name: str, kind: str, line: frozenset[int] = frozenset(), segment: int = 0) -> None:
        self.acts[name].append(Act(len(self.ledger.segments(name)), kind, line, segment))

    # -- forgetting --

    @rule(name=adapters)
    def retain(self, name: str) -> None:
        """Nothing goes that the head stands on, nor while a procedure or a hold may need it."""
        before = self.ledger.adapter(name)
        change = self.ledger.retain(name, "gc")
        versions = self.ledger.versions(name)
        assert all(versions[number].usable for number in (before.release, before.tip) if number)
        if change is not None:
            assert before.held is None
            assert not any(name in held.adapters for held in self.ledger.forgets(unfinished=True))
            assert self.ledger.retain(name, "gc") is None

    @rule(pick=st.integers(0, 10))
    def finish_a_forget(self, pick: int) -> None:
        """Its rebuild done, a forget is purged in the end."""
        some = list(self.requests)[pick : pick + 1]
        for request in some:
            held = self.ledger.forget_of(request)
            if self.ledger.is_rebuilt(held) and held.stage is not Stage.LENDING:
                self.ledger.advance(request, Stage.PURGED, {"purged_at": "now"}, "test")
                for part in held.body["doomed"]:
                    self.ledger.mark_purged(part["adapter"], part["versions"])

    @rule(
        who=st.sampled_from([*SUBJECTS, "nobody"]),
        names=st.sampled_from([None, ("one",), ("two",), ADAPTERS]),
        until=st.sampled_from(["", "", "1970-01-01T00:00:00.000Z", "2999-01-01T00:00:00.000Z"]),
    )
    def forget(self, who: str, names: tuple[str, ...] | None, until: str) -> None:
        before = {name: self.ledger.adapter(name) for name in ADAPTERS}
        request = f"r{len(self.requests)}"
        forget = self.ledger.forget(request, keyed(who), names, "test", until=until)
        self.requests[request] = forget
        assert set(names or ADAPTERS) <= forget.adapters.keys()
        for name in ADAPTERS:
            after = self.ledger.adapter(name)
            assert after.epoch == before[name].epoch + (name in forget.adapters)
            assert (after.held is None) == (before[name].held is None)
            if name in (names or ADAPTERS):
                assert keyed(who) in self.ledger.suppressed(name)
        doomed = {digest for part in forget.body["doomed"] for digest in part["digests"]}
        assert self.ledger.fences(forget.fence - 1)[0].digests <= doomed

    @rule(pick=st.integers(0, 10))
    def repeat_a_forget(self, pick: int) -> None:
        if self.requests:
            held = list(self.requests.values())[pick % len(self.requests)]
            heads = self.ledger.heads()
            names = None if held.everywhere else sorted(held.adapters)
            assert self.ledger.forget(held.id, held.subject, names, "test") == self.ledger.forget_of(held.id)
            with pytest.raises(Conflict):
                self.ledger.forget(held.id, keyed("somebody else"), names, "test")
            if not held.everywhere:
                with pytest.raises(Conflict):
                    self.ledger.forget(held.id, held.subject, None, "test")
            assert self.ledger.heads() == heads

    @rule(pick=st.integers(0, 10))
    def call_in(self, pick: int) -> None:
        """Deadlines pass, and a rebuild may end a loan."""
        self.ledger.call_in(list(self.requests)[pick : pick + 1])
        assert all(held.body["until"] > "2026" for held in self.ledger.forgets() if held.stage is Stage.LENDING)

    @rule(who=subjects, names=st.sampled_from([None, ("one",)]))
    def allow(self, who: str, names: tuple[str, ...] | None) -> None:
        try:
            lifted = self.ledger.allow(keyed(who), names, "test")
        except Conflict:  # who was forgotten everywhere is not allowed in one adapter
            assert names is not None
            assert all(keyed(who) in self.ledger.suppressed(name) for name in ADAPTERS)
            return
        if names is None:
            assert all(keyed(who) not in self.ledger.suppressed(name) for name in ADAPTERS)
        assert self.ledger.allow(keyed(who), names, "test") == [] or not lifted

    # -- servers --

    @rule(target=holders)
    def take_lease(self) -> str:
        self.started += 1
        holder = f"server-{self.started}"
        self.acked[holder] = self.ledger.take_lease(holder, "server", 3.0)
        assert self.acked[holder] == self.ledger.last_fence()
        return holder

    @rule(holder=holders)
    def renew(self, holder: str) -> None:
        last = self.ledger.renew_lease(holder, self.acked[holder])
        todo = self.ledger.fences(self.acked[holder])
        assert [fence.number for fence in todo] == list(range(self.acked[holder] + 1, last + 1))
        if todo:
            assert holder in {lease.holder for lease in self.ledger.unacknowledged(last, ["server"])}
        self.acked[holder] = last
        assert self.ledger.renew_lease(holder, last) == last
        assert holder not in {lease.holder for lease in self.ledger.unacknowledged(last, ["server"])}

    @rule(holder=consumes(holders))
    def stop(self, holder: str) -> None:
        self.ledger.drop_lease(holder)
        del self.acked[holder]
        with pytest.raises(NotFound):
            self.ledger.renew_lease(holder, 0)

    # -- what always holds --

    @invariant()
    def holds(self) -> None:
        for record in self.ledger.adapters():
            check_adapter(self.world, record.name)
            check_chain(self.ledger.facts(record.name))
            assert len(self.ledger.facts(record.name)) == record.head
        fenced = {digest for fence in self.ledger.fences(0) for digest in fence.digests}
        lending = [held.body["lent"] for held in self.ledger.forgets() if held.stage is Stage.LENDING]
        loans = {name: loan for lent in lending for name, loan in lent.items()}
        assert self.ledger.revoked_digests() <= fenced | {digest for _, digest in loans.values()}
        for name, (version, digest) in self.ledger.releases().items():
            record = self.ledger.version(name, version) if version else None
            assert record is None or (record.digest == digest and (not record.revoked or name in loans))
        clock = self.ledger.pulse()[1]
        assert clock >= self.clock
        self.clock = clock
        leases: list[Lease] = self.ledger.leases()
        assert {lease.holder for lease in leases} == set(self.acked)

    def teardown(self) -> None:
        """Forget equals suppressed: once rebuilt, the adapters are where a run without the forgotten entries is."""
        try:
            for name in self.ledger.heads():
                while self.world.train(name):
                    pass
                check_adapter(self.world, name)
                other = control(self.folder, self.world, name, self.acts[name])
                assert self._tip(self.world, name) == self._tip(other, name)
                other.ledger.close()
            assert all(self.ledger.is_rebuilt(forget) for forget in self.requests.values())
        finally:
            self.ledger.close()
            shutil.rmtree(self.folder)

    @staticmethod
    def _tip(world: World, name: str) -> tuple[str, bool]:
        head, versions = world.ledger.adapter(name), world.ledger.versions(name)
        return versions[head.tip].digest if head.tip else "", head.held is not None


LedgerMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestLedger = LedgerMachine.TestCase
