"""What has learned from a subject goes where the subject is forgotten, by whichever adapter the subject came in."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from riverdelta.core.digests import sha256
from riverdelta.core.errors import Refused, StaleEpoch
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import weights_key
from riverdelta.registry.certificate import check, check_stored
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Ledger, ManifestEntry, Stage, VersionRecord
from riverdelta.registry.ledger import tables as t
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import PUBLIC_KEY, certificate_key
from riverdelta.registry.signing import key_of, opened
from riverdelta.registry.verify import verify
from tests.registry import histories
from tests.registry.histories import World, check_adapter, keyed
from tests.registry.stack import Stack, two_versions, wait

SUBJECTS = ("ann", "bob", "cy")


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme` with two versions, of which the second saw ann; `copy` begins with that one's weights."""
    made = two_versions(Settings(data=tmp_path / "data"))
    made.ledger.import_adapter("copy", Recipe(), made.ledger.version("acme", 2).digest, {"imported": True}, "test")
    return made


def test_a_forget_in_a_copy_revokes_what_is_known_to_have_seen_the_subject(stack: Stack) -> None:
    ledger, dirty = stack.ledger, stack.ledger.version("acme", 2).digest
    ledger.import_adapter("sister", Recipe(), dirty, {"imported": True}, "test")
    stack.seal("copy", [("cy", "learned on the copy")])
    stack.train("copy")
    ledger.import_adapter("daughter", Recipe(), ledger.version("copy", 2).digest, {"imported": True}, "test")
    report = Operations(ledger, stack.settings, "test").forget("ann", ["copy"])
    assert {part["adapter"]: part["versions"] for part in report.forget.body["doomed"]} == {
        "copy": [1, 2],
        "daughter": [1],
    }
    assert dirty in ledger.fences(report.forget.fence - 1)[0].digests, "an answer under way on the copy is cut off"
    assert ledger.releases()["copy"] == (0, "")
    assert ledger.releases()["acme"] == (2, dirty), "in acme nobody asked to be forgotten"
    assert ledger.releases()["sister"] == (1, dirty)
    assert stack.train("copy") == 1
    keeper = Keeper(ledger, stack.settings, stack.store, orphan_seconds=0.0)
    assert wait(lambda: not keeper.advance_forgets(), 60)
    assert stack.store.exists(weights_key(dirty)), "acme answers with them"
    assert [verify(ledger, stack.store, stack.keys, name).problems for name in ("acme", "copy", "sister")] == [()] * 3
    told = opened(signed := stack.store.get(certificate_key(report.forget.id)), key_of(stack.store.get(PUBLIC_KEY)))
    assert check(told).problems == ()
    elsewhere = [each["residual"]["elsewhere"][1:] for each in told["predicate"]["adapters"]]
    assert [len(each) for each in elsewhere] == [1, 0], "copy@1 is in use in acme; copy@2 nowhere"
    assert "copy@1" in elsewhere[0][0]
    assert check_stored(ledger, told, sha256(signed))[0] == []
    Operations(ledger, stack.settings, "test").forget("ann", ["acme"])
    assert ledger.releases()["sister"] == (0, "")
    assert wait(lambda: stack.train("acme") >= 0 and not keeper.advance_forgets(), 60)
    assert not stack.store.exists(weights_key(dirty))


def test_what_is_lent_of_a_copy_is_fenced_when_the_loan_ends(stack: Stack) -> None:
    ledger, dirty = stack.ledger, stack.ledger.version("acme", 2).digest
    acts = Operations(ledger, stack.settings, "test")
    stack.seal("copy", [("cy", "learned on the copy")])
    held = acts.forget("ann", ["copy"], serve_until_rebuilt=600.0).forget
    assert held.stage is Stage.LENDING
    assert ledger.releases()["copy"] == (1, dirty)
    ledger.call_in([held.id])
    assert ledger.releases()["copy"] == (0, "")
    assert dirty in ledger.fences(0)[-1].digests


def wrote(world: World, adapter: str, writer: str) -> ManifestEntry:
    return ManifestEntry(0, 0, world.ledger.adapter(adapter).next_index, b"", (keyed("cy"),), False, writer)


def test_what_a_version_wrote_that_saw_the_subject_is_not_learned_where_the_subject_is_forgotten(
    tmp_path: Path,
) -> None:
    world = World(Ledger.open(f"sqlite:///{tmp_path}/ledger.db"))
    ledger = world.ledger
    for name in ("acme", "other", "third"):
        ledger.create(name, Recipe(), "test")
    world.seal("acme", [(["ann"], "")])
    while not ledger.versions("acme"):
        assert world.train("acme"), "the gate takes it"
    writer = ledger.version("acme", 1).digest
    for name in ("other", "third"):
        world.contents[name, 0] = world.contents[name, 1] = name
        world.append(name, [wrote(world, name, writer)])
    forget = ledger.forget("r", keyed("ann"), ["other"], "test")
    assert [(part["adapter"], part["entries"]) for part in forget.body["doomed"]] == [("other", 1)]
    assert isinstance(world.append("other", [wrote(world, "other", writer)]), StaleEpoch)
    assert ledger.tainted("other", {writer, "0" * 64}) == {writer}
    assert ledger.tainted("third", {writer}) == frozenset()
    assert not isinstance(world.append("third", [wrote(world, "third", writer)]), Exception)
    ledger.allow(keyed("ann"), ["other"], "test")
    assert not isinstance(world.append("other", [wrote(world, "other", writer)]), Exception)
    ledger.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_writer_saw_is_asked_of_its_own_past_however_many_know_the_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Of what its adapter, that adapter's writers and their copies saw; unless a manifest there is damaged."""
    monkeypatch.setattr(histories, "rejected", lambda *_: False)
    world = World(Ledger.open(f"sqlite:///{tmp_path}/ledger.db"))
    ledger, first = world.ledger, "f" * 64
    for name in ("one", "two"):
        ledger.import_adapter(name, Recipe(), first, {"imported": True}, "test")
    for name in ("three", "four", *(f"many-{number}" for number in range(9))):
        ledger.create(name, Recipe(), "test")
        world.seal(name, [(["ann"], "")])
        world.train(name)
    known = ledger.version("three", 1).digest
    ledger.import_adapter("copy", Recipe(), known, {"imported": True}, "test")
    world.seal("copy", [(["bob"], "")])
    world.train("copy")
    world.seal("four", [(["bob"], ledger.version("copy", 2).digest)])
    world.train("four")
    last = ledger.version("four", 2).digest
    ledger.forget("r", keyed("ann"), ["two"], "test")
    if damaged:
        with ledger.db.write() as c:
            c.execute(t.segments.update().where(t.segments.c.adapter == "four").values(manifest=b"?"))
    asked, real = set[str](), Ledger._look_into

    def noted(self: Ledger, c: Any, reaches: Any, names: Any) -> None:
        asked.update(names)
        real(self, c, reaches, names)

    monkeypatch.setattr(Ledger, "_look_into", noted)
    assert ledger.tainted("two", {first}) == set()
    assert asked == {"one", "two"}
    assert ledger.tainted("two", {first, known, last}) == {known, last}
    assert damaged or asked == {"one", "two", "three", "four", "copy"}
    assert isinstance(world.append("two", [wrote(world, "two", last)]), StaleEpoch)
    assert not isinstance(world.append("two", [wrote(world, "two", first)]), Exception)
    ledger.close()


_NOTHING_LEARNED = [
    ("alone", 0, 0, "ann"),
    ("import", 0, 0, ""),
    ("forget", 0, 1, "cy"),
    ("alone", 0, 0, "cy"),
]
acts = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.integers(0, 9), st.integers(0, 9), st.sampled_from(SUBJECTS)),
        st.tuples(st.just("learn"), st.integers(0, 9), st.integers(0, 9), st.sampled_from(SUBJECTS)),
        st.tuples(st.sampled_from(["late", "alone"]), st.integers(0, 9), st.integers(0, 9), st.sampled_from(SUBJECTS)),
        st.tuples(st.just("import"), st.integers(0, 9), st.integers(0, 9), st.just("")),
        st.tuples(st.just("forget"), st.integers(0, 9), st.integers(0, 2), st.sampled_from(SUBJECTS)),
        st.tuples(st.sampled_from(["back", "on"]), st.integers(0, 9), st.integers(0, 9), st.just("")),
    ),
    min_size=6,
    max_size=20,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(acts)
@example([*_NOTHING_LEARNED, ("forget", 0, 1, "ann")])
@example([*_NOTHING_LEARNED, ("forget", 1, 1, "ann")])
def test_no_version_knows_who_was_forgotten_where_it_stands(done: list[tuple[str, int, int, str]]) -> None:
    """`knows` says of weights whose entries they were made of, through copies and text, in a book of the test's own."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    world, knows = World(Ledger.open(f"sqlite:///{folder}/ledger.db")), dict[str, set[str]]()
    ledger, forgotten = world.ledger, set[tuple[str, str]]()
    for name in ("one", "two"):
        ledger.create(name, Recipe(), "test")
    try:
        for step, (act, first, second, who) in enumerate(done):
            names = sorted(ledger.heads())
            name = names[first % len(names)]
            made = sorted(knows)
            if act == "learn":
                writer = made[second % len(made)] if made and second % 3 else ""
                world.seal(name, [([who], writer), ([SUBJECTS[second % 3]], "")])
            elif act == "alone":  # a tombstone where they are forgotten
                world.seal(name, [([who], "")])
            elif act == "late":  # it teaches nothing: in a copy, where there is one
                name = ([each for each in names if each.startswith("copy")] or names)[-1]
                at = ledger.adapter(name).next_index
                world.append(name, [ManifestEntry(0, 0, at, b"", (keyed(who),), tombstone=True)])
            elif act == "import" and made:
                with_digest: Any = made[second % len(made)]
                try:
                    ledger.import_adapter(f"copy-{step}", Recipe(), with_digest, {}, "test")
                except Refused:
                    continue
            elif act == "forget":
                named = [name] if second else names[:2]
                ledger.forget(f"r{step}", keyed(who), named, "test")
                forgotten |= {(each, keyed(who)) for each in named}
            elif act == "back":
                ledger.rollback(name, 0, "test")
            elif act == "on" and ledger.adapter(name).held is not None:
                ledger.resume(name, ("tip", "replay", "continue")[second % 3], "test")  # type: ignore[arg-type]
            held = dict[str, list[VersionRecord]]()
            for each in ledger.heads():
                _learn(world, each, knows)
                check_adapter(world, each)
                assert ledger.tainted(each, knows) == forwards(ledger, each, set(knows)), each
                for version in ledger.versions(each).values():
                    held.setdefault(version.digest, []).append(version)
                    gone = {subject for adapter, subject in forgotten if adapter == each}
                    assert version.revoked or gone.isdisjoint(knows[version.digest]), f"{each}@{version.number}"
            for versions in held.values():
                clean = [version for version in versions if not version.revoked]
                copied = len(clean) < len(versions) and not any(learned(ledger, version) for version in clean)
                assert not (clean and copied), "a copy is clean as long as what it is a copy of"
    finally:
        ledger.close()
        shutil.rmtree(folder)


def learned(ledger: Ledger, version: VersionRecord) -> bool:
    """Whether an adapter came to a version's weights by itself: it had others before."""
    parent = ledger.version(version.adapter, version.parent).digest if version.parent else ""
    return version.segment is not None and parent != version.digest


def forwards(ledger: Ledger, adapter: str, digests: set[str]) -> set[str]:
    """What is `tainted`, looked for from what is suppressed instead of from the weights."""
    v, s = t.versions.c, t.suppressions.c
    with ledger.db.read() as c:
        foreign = set(c.execute(sa.select(v.digest).where(v.adapter != adapter)).scalars())
        suppressed = list(c.execute(sa.select(s.subject).where(s.adapter == adapter)).scalars())
        return digests & foreign & ledger._reach(c, ledger._mentioning(c, suppressed))[1]


def _learn(world: World, name: str, knows: dict[str, set[str]]) -> None:
    while work := world.ledger.work(name):
        before = len(world.ledger.versions(name))
        world.train(name)
        versions = world.ledger.versions(name)
        if len(versions) > before:
            live = [e for e in world.ledger.manifest(name, work.segment.number).entries if not e.tombstone]
            known = set(knows[work.parent.digest]) if work.parent else set[str]()
            for entry in live:
                known |= {*entry.subjects, *knows.get(entry.written_by, ())}
            knows.setdefault(versions[len(versions)].digest, known)
