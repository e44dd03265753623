"""What was sent before a subject was allowed again stays forgotten, however soon after the forget that was."""

import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from riverdelta.core.errors import StaleEpoch
from riverdelta.core.patience import Patience
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Ledger, ManifestEntry, Seal, SegmentRecord
from riverdelta.streams.admission import Admission
from riverdelta.streams.items import EXAMPLE, FEEDBACK, INTERACTION, Item, Parcel, Where
from riverdelta.streams.owner import Owner
from tests.registry.histories import World, keyed

RUN = ("run", 0)
SAID = {
    EXAMPLE: b'{"type":"example","text":"hers"}',
    INTERACTION: b'{"prompt":"2+2=","completion":"5"}',
    FEEDBACK: b'{"correction":"4"}',
}
SUBJECTS = ("ann", "bob")


@dataclass
class Stream:
    """One partition of Kafka, and dataflows that read it into `new`. What `acme` wrote has seen ann."""

    ledger: Ledger
    events: list[Item] = field(default_factory=list)
    forgets: int = 0
    writer: str = ""

    def __post_init__(self) -> None:
        self.ledger.create("new", Recipe(), "test")
        self.ledger.create("acme", Recipe(), "test")
        world = World(self.ledger)
        world.seal("acme", [(["ann"], "")])
        while not self.ledger.versions("acme"):
            assert world.train("acme")
        self.writer = self.ledger.version("acme", 1).digest

    def send(self, who: str, kind: str = EXAMPLE, response: bytes = b"", said: bytes = b"", writer: str = "") -> Item:
        """An event of a subject's, on the log but not read yet."""
        at = len(self.events)
        event = b"%d" % at if kind == FEEDBACK else b""
        made = Item(kind, "new", RUN, at, event, (keyed(who),), said or SAID[kind], None, response, writer)
        self.events.append(made)
        return made

    def read(self, owner: Owner | None = None) -> Owner:
        """What a dataflow has not read, as a worker reads it: it looks for fences first. None: one that starts now."""
        if owner is None:
            owner = Owner(Settings(data="/nowhere"), self.ledger, Patience(threading.Event()))
            owner.start_at(self.ledger.last_fence())
        if (fence := self.ledger.last_fence()) > owner.fence:
            owner.catch_up(fence)
        done = owner.buckets[0].reached.get(RUN, 0) if owner.buckets else 0
        owner.take(Parcel(0, (0, done), {RUN: len(self.events)}, self.events[done:], []), 0.0)
        return owner

    def forget(self, who: str, names: list[str] | None, until: str = "") -> None:
        self.forgets += 1
        self.ledger.forget(f"r{self.forgets}", keyed(who), names, "test", until=until)

    def allow(self, who: str, names: list[str] | None, known: bool = True) -> None:
        """`known`: whether Kafka says where its log ends."""
        self.ledger.allow(keyed(who), names, "test", ends={RUN: len(self.events)} if known else {})

    def seal(self, owner: Owner) -> SegmentRecord | Exception:
        """What is open, as it stands."""
        state = owner.buckets[0].adapters["new"]
        [draft] = state.cut(0.0, owner.buckets[0].reached, "stop")
        asked = Seal(
            "new", draft.epoch, draft.first, draft.manifest(), "stop", f"p{draft.first}", "0" * 64, draft.consumed
        )
        return self.ledger.seal([asked], "test")[0]


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return Stream(Ledger.open(f"sqlite:///{tmp_path}/ledger.db"))


def state_of(owner: Owner) -> Admission:
    return owner.buckets[0].adapters["new"]


def said(owner: Owner) -> list[tuple[Where, int, bytes | None]]:
    """Each open entry's place and content."""
    return [(entry.where, entry.offset, entry.content) for entry in state_of(owner).open]


def live(owner: Owner) -> list[bool]:
    return [content is not None for *_, content in said(owner)]


def _look(owner: Owner, stream: Stream) -> None:
    owner.catch_up(stream.ledger.last_fence())


def _new_lease(owner: Owner, stream: Stream) -> None:
    owner.start_at(stream.ledger.last_fence())


def _refused_as_stale(owner: Owner, stream: Stream) -> None:
    assert isinstance(stream.seal(owner), StaleEpoch)
    owner.refresh(state_of(owner))


def _another_sealed(owner: Owner, stream: Stream) -> None:
    entry = ManifestEntry(0, 0, 0, b"", (keyed("cy"),))
    assert not isinstance(World(stream.ledger).append("new", [entry]), Exception)
    owner.reload(state_of(owner))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("names", [["new"], None])
@pytest.mark.parametrize("meets", [_look, _new_lease, _refused_as_stale, _another_sealed])
def test_who_is_allowed_before_the_dataflow_looks_leaves_nothing_open(
    stream: Stream, meets: Callable[[Owner, Stream], None], names: list[str] | None, known: bool
) -> None:
    """An example, a pair, and an answer that feedback comes on later; other people's stay."""
    stream.send("bob")
    stream.send("ann")
    stream.send("ann", INTERACTION, b"joined")
    stream.send("bob", FEEDBACK, b"joined")
    stream.send("ann", INTERACTION, b"waits")
    owner = stream.read()
    assert live(owner) == [True] * 3
    stream.forget("ann", names)
    stream.allow("ann", names, known)
    meets(owner, stream)
    assert live(owner) == [True, False, False], "what is open may be sealed before the next look"
    stream.send("ann")
    stream.send("bob", FEEDBACK, b"waits")
    assert live(stream.read(owner)) == [True, False, False, True, False]
    if known:
        assert said(stream.read()) == said(owner)
    assert not isinstance(stream.seal(owner), Exception)


def test_what_a_version_wrote_that_saw_who_was_forgotten_is_not_learned_once_that_one_is_allowed(
    stream: Stream,
) -> None:
    """Neither when a crash has it read again, nor in answers that wait; corrections of them stay."""
    for response in (b"open", b"waits", b"corrected"):
        stream.send("bob", INTERACTION, response, writer=stream.writer)
    stream.send("bob", FEEDBACK, b"open", b'{"rating":1}')
    owner = stream.read()
    assert live(owner) == [True]
    stream.forget("ann", ["new"])
    stream.allow("ann", ["new"])
    stream.send("bob", FEEDBACK, b"waits", b'{"rating":1}')
    stream.send("bob", FEEDBACK, b"corrected")
    stream.send("bob", INTERACTION, b"after", writer=stream.writer)
    stream.send("bob", FEEDBACK, b"after", b'{"rating":1}')
    again = stream.read()
    assert isinstance(stream.seal(again), StaleEpoch)
    again.refresh(state_of(again))
    assert said(again) == said(stream.read(owner))
    assert live(again) == [False, False, True, True]
    assert not isinstance(stream.seal(again), Exception)


def test_each_version_is_judged_by_those_that_it_saw_itself(stream: Stream) -> None:
    world, ledger = World(stream.ledger), stream.ledger
    world.seal("acme", [(["cy"], "")])
    while ledger.versions("acme").keys() == {1}:
        assert world.train("acme")
    both = ledger.version("acme", 2).digest
    for who, end in (("ann", 1), ("cy", 5), ("dan", 9)):
        ledger.forget(who, keyed(who), ["new"], "test")
        ledger.allow(keyed(who), ["new"], "test", ends={RUN: end})
    found = ledger.allowed_from("new", {stream.writer: [(RUN, 0)], both: [(RUN, 4)], "0" * 64: [(RUN, 0)]})
    assert {digest: found.get(digest) for digest in (stream.writer, both, "0" * 64)} == {
        stream.writer: {RUN: 1},
        both: {RUN: 5},
        "0" * 64: None,
    }


def test_answers_that_wait_are_erased_though_nobody_says_where_the_log_ends(stream: Stream) -> None:
    stream.send("bob", INTERACTION, b"waits", writer=stream.writer)
    stream.send("bob", INTERACTION, b"corrected", writer=stream.writer)
    owner = stream.read()
    stream.forget("ann", ["new"])
    stream.allow("ann", ["new"], known=False)
    stream.send("bob", FEEDBACK, b"waits", b'{"rating":1}')
    stream.send("bob", FEEDBACK, b"corrected")
    assert live(stream.read(owner)) == [False, True]


def test_a_loan_that_ends_erases_nothing_that_came_since_its_subject_was_allowed(stream: Stream) -> None:
    """The fence that is made then is of what was forgotten when the loan was made."""
    stream.send("ann")
    owner = stream.read()
    stream.forget("ann", None, until="2099-01-01T00:00:00Z")
    assert live(stream.read(owner)) == [False]
    stream.allow("ann", None)
    stream.send("ann")
    assert live(stream.read(owner)) == [False, True]
    before = stream.ledger.last_fence()
    stream.ledger.call_in(["r1"])
    assert stream.ledger.last_fence() > before
    assert live(stream.read(owner)) == [False, True] == live(stream.read())


acts = st.lists(
    st.one_of(
        st.tuples(st.just(EXAMPLE), st.sampled_from(SUBJECTS), st.just(0)),
        st.tuples(st.just(INTERACTION), st.sampled_from(SUBJECTS), st.integers(0, 5)),
        st.tuples(st.just(FEEDBACK), st.sampled_from(SUBJECTS), st.integers(0, 5)),
        st.tuples(st.sampled_from(["forget", "forget and allow", "allow"]), st.sampled_from(SUBJECTS), st.booleans()),
        st.tuples(st.sampled_from(["read", "read", "refresh"]), st.just(""), st.just(0)),
    ),
    min_size=4,
    max_size=24,
)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(acts)
def test_a_dataflow_that_starts_anew_decides_as_the_one_that_was_there(done: list[tuple[str, str, int]]) -> None:
    """And neither learns what was sent before its subject was forgotten or allowed."""
    with tempfile.TemporaryDirectory() as folder, closing(Ledger.open(f"sqlite:///{folder}/ledger.db")) as ledger:
        stream, gone = Stream(ledger), set[int]()
        owner = stream.read()
        for act, who, which in done:
            names = ["new"] if which else None
            if act in (INTERACTION, FEEDBACK):
                answer, writer = b"%d" % (which // 2), stream.writer if act == INTERACTION and which % 2 else ""
                known = {item.response for item in stream.events if item.kind == INTERACTION}
                if act == FEEDBACK or answer not in known:  # of one sent again the one that is met first counts
                    said_ = b'{"rating":1}' if act == FEEDBACK and which % 2 else b""
                    stream.send(who, act, answer, said_, writer)
            elif act == EXAMPLE:
                stream.send(who)
            elif act == "read":
                stream.read(owner)
            elif act == "refresh":
                owner.refresh(*owner.states())
            if act.startswith("forget"):
                stream.forget(who, names)
            if act.endswith("allow"):
                held = ledger.suppressed_in(keyed(who))
                gone |= {item.offset for item in stream.events if held and item.subjects == (keyed(who),)}
                stream.allow(who, None if "*" in held else ["new"])
        stream.send("cy")
        again = stream.read(owner), stream.read()
        for each in again:
            each.refresh(*each.states())  # as where sealing finds what a version wrote that it may not learn
        assert said(again[0]) == said(again[1])
        assert not isinstance(stream.seal(again[0]), Exception)
        [(_, manifest)] = ledger.manifests("new")
        for index, entry in enumerate(manifest.entries):
            places = {entry.offset, manifest.partners.get(index, (0, 0, entry.offset))[2]}
            assert entry.tombstone or not places & gone
