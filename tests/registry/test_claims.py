"""Claims: a hypothesis machine of trainers with clocks of their own, on the decisions alone and on the real ledger."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from riverdelta.core.errors import Conflict
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Cause, Ledger
from riverdelta.registry.ledger.claiming import Claim, check_token, decide_claim, decide_end, decide_renewal
from tests.postgres import Postgres, fresh
from tests.registry.histories import World

ADAPTERS = ("one", "two", "three")
TRAINERS = ("ada", "bob", "cyd")
SECONDS = 6.0
adapters = st.sampled_from(ADAPTERS)
trainers = st.sampled_from(TRAINERS)


class Decisions:
    """The decisions over a dictionary, with a clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.held: dict[str, Claim] = {}
        self.outcomes: list[tuple[str, int]] = []

    def claim(self, names: list[str], holder: str, most: int) -> dict[str, int]:
        taken: dict[str, int] = {}
        for name in names:
            if len(taken) == most:
                break
            if (claim := decide_claim(self.held.get(name), name, holder, self.now, SECONDS)) is not None:
                self.held[name] = claim
                taken[name] = claim.token
        return taken

    def renew(self, tokens: dict[str, int], holder: str) -> set[str]:
        lost = set()
        for name, token in tokens.items():
            if (claim := decide_renewal(self.held.get(name), holder, token, self.now, SECONDS)) is None:
                lost.add(name)
            else:
                self.held[name] = claim
        return lost

    def end(self, tokens: dict[str, int], holder: str) -> None:
        for name, token in tokens.items():
            if (claim := decide_end(self.held.get(name), holder, token)) is not None:
                self.held[name] = claim

    def outcome(self, name: str, token: int, holder: str) -> None:
        check_token(self.held.get(name), name, token, holder)


class InLedger:
    """The same by a ledger whose clock the test moves."""

    def __init__(self, ledger: Ledger) -> None:
        self.now = 1000.0
        self.world = World(ledger)
        self.ledger = ledger
        ledger._clock = lambda _: self.now  # type: ignore[method-assign]
        for name in ADAPTERS:
            ledger.create(name, Recipe(), "test")

    def claim(self, names: list[str], holder: str, most: int) -> dict[str, int]:
        return self.ledger.claim(names, holder, SECONDS, most)

    def renew(self, tokens: dict[str, int], holder: str) -> set[str]:
        return self.ledger.renew_claims(tokens, holder, SECONDS)

    def end(self, tokens: dict[str, int], holder: str) -> None:
        self.ledger.end_claims(tokens, holder)

    def outcome(self, name: str, token: int, holder: str) -> None:
        segment = self.world.seal(name, [(["ann"], "")])
        assert not isinstance(segment, Exception)
        work = self.ledger.work(name)
        assert work is not None
        head = work.adapter
        self.ledger.set_aside(name, work.segment.number, head.epoch, head.tip, Cause.ERROR, "", holder, {}, token)


class Machine(RuleBasedStateMachine):
    """Trainers that claim, renew, stall, come back and finish; the clock moves between, sometimes back."""

    def __init__(self) -> None:
        super().__init__()
        self.here = self.make()
        self.known: dict[str, dict[str, int]] = {name: {} for name in TRAINERS}  # what each believes to hold
        self.renewed: dict[tuple[str, str], float] = {}
        self.last: dict[str, int] = dict.fromkeys(ADAPTERS, 0)
        self.free = set(ADAPTERS)  # given up, or never claimed
        self.latest = self.here.now

    def make(self) -> "Decisions | InLedger":
        return Decisions()

    @rule(who=trainers, names=st.lists(adapters, min_size=1, unique=True), most=st.integers(1, 3))
    def claim(self, who: str, names: list[str], most: int) -> None:
        wanted = [name for name in names if name not in self.known[who]]
        before = {name: self.owner(name) for name in wanted}
        free = [name for name in wanted if name in self.free]
        taken = self.here.claim(wanted, who, most) if wanted else {}
        assert len(taken) <= most
        for name, token in taken.items():
            assert token > self.last[name], "a token only grows"
            owner = before[name]
            if owner not in (None, who):  # taken over: only from one that has not renewed for a whole term
                assert self.renewed[owner, name] + SECONDS <= self.latest  # type: ignore[index]
            self.free.discard(name)
            self.last[name] = token
            self.known[who][name] = token
            self.renewed[who, name] = self.here.now
        assert len(taken) == most or taken.keys() >= set(free), "what nobody holds is given"

    def owner(self, name: str) -> str | None:
        """Who believes to hold the last token."""
        return next((who for who in TRAINERS if self.known[who].get(name) == self.last[name] != 0), None)

    @rule(who=trainers)
    def renew(self, who: str) -> None:
        tokens = dict(self.known[who])
        lost = self.here.renew(tokens, who) if tokens else set()
        for name, token in tokens.items():
            assert (name in lost) == (token != self.last[name]), "lost is what another has taken, nothing else"
            if name in lost:
                del self.known[who][name]
            else:
                self.renewed[who, name] = max(self.renewed[who, name], self.here.now)

    @rule(who=trainers, name=adapters)
    def finish(self, who: str, name: str) -> None:
        """An outcome counts under the last token alone, however long its holder has slept."""
        token = self.known[who].pop(name, None)
        if token is None:
            return
        if token == self.last[name]:
            self.free.add(name)
            self.here.outcome(name, token, who)
        else:
            with pytest.raises(Conflict, match="was claimed by"):
                self.here.outcome(name, token, who)
        self.here.end({name: token}, who)

    @rule(who=trainers)
    def die(self, who: str) -> None:
        """All it knew is gone; a new process of that name begins, and must wait or take anew."""
        self.known[who] = {}

    @rule(seconds=st.floats(0.1, 10.0))
    def time_passes(self, seconds: float) -> None:
        self.here.now += seconds
        self.latest = max(self.latest, self.here.now)

    @precondition(lambda self: self.here.now > 1000.0)
    @rule(seconds=st.floats(0.1, 3.0))
    def the_clock_is_set_back(self, seconds: float) -> None:
        self.here.now -= seconds

    @invariant()
    def nobody_holds_what_another_may_finish(self) -> None:
        for name in ADAPTERS:
            assert sum(self.known[who].get(name) == self.last[name] for who in TRAINERS if self.last[name]) <= 1


LIMITS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
TestDecisions = Machine.TestCase
TestDecisions.settings = settings(LIMITS, max_examples=80, stateful_step_count=30)


def test_the_same_in_a_ledger() -> None:
    class OnSqlite(Machine):
        def make(self) -> InLedger:
            self.folder = Path(tempfile.mkdtemp())
            return InLedger(Ledger.open(f"sqlite:///{self.folder}/ledger.db"))

        def teardown(self) -> None:
            self.here.ledger.close()  # type: ignore[union-attr]
            shutil.rmtree(self.folder)

    run_state_machine_as_test(OnSqlite, settings=settings(LIMITS, max_examples=8, stateful_step_count=25))


def test_the_same_on_postgresql() -> None:
    server = Postgres()

    class OnPostgres(Machine):
        def make(self) -> InLedger:
            return InLedger(Ledger.open(fresh(server.url)))

        def teardown(self) -> None:
            self.here.ledger.close()  # type: ignore[union-attr]

    try:
        run_state_machine_as_test(OnPostgres, settings=settings(LIMITS, max_examples=5, stateful_step_count=20))
    finally:
        server.remove()


def test_the_ledgers_own_clock(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    ledger.create("one", Recipe(), "test")
    assert ledger.claim(["one"], "ada", 3600.0, 1) == {"one": 1}
    assert ledger.unclaimed(["one"]) == []
    assert ledger.claim(["one"], "bob", 3600.0, 1) == {}
    ledger.end_claims({"one": 1}, "ada")
    assert ledger.unclaimed(["one"]) == ["one"]
    assert ledger.claim(["one"], "bob", 0.0, 1) == {"one": 2}
    assert ledger.claim(["one"], "ada", 3600.0, 1) == {"one": 3}
    assert ledger.renew_claims({"one": 2}, "bob", 1.0) == {"one"}
    ledger.close()


def test_a_token_that_a_restored_ledger_gives_out_again_is_its_holders_alone() -> None:
    """Who took it before the restore believes to hold the last one."""
    here = Decisions()
    assert here.claim(["one"], "ada", 1) == {"one": 1}
    here.held = {}  # the backup knows of no claim
    assert here.claim(["one"], "bob", 1) == {"one": 1}
    with pytest.raises(Conflict, match="was claimed by bob"):
        here.outcome("one", 1, "ada")
    here.outcome("one", 1, "bob")
