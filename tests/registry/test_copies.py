"""What a forget means by a subject and by a version: copies of weights, names written in two ways, adapters named."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from riverdelta.core.digests import sha256
from riverdelta.core.errors import BadInput, Conflict, NotFound, Refused, Unavailable
from riverdelta.core.recipe import Recipe, Retain
from riverdelta.core.settings import Settings
from riverdelta.core.store import weights_key
from riverdelta.registry import gc
from riverdelta.registry.certificate import check, check_stored
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Ledger
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import PUBLIC_KEY, certificate_key
from riverdelta.registry.signing import key_of, opened
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack, two_versions, wait
from tests.registry.test_purge_is_whole import keeper_of


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme` with two versions, of which the second saw ann; no broker."""
    return two_versions(Settings(data=tmp_path / "data"))


def imported(ledger: Ledger, name: str, digest: str) -> None:
    """An adapter that begins with weights that lie in the store."""
    ledger.import_adapter(name, Recipe(), digest, {"imported": True}, "test")


@pytest.mark.parametrize("adapters", [["acme"], None])
def test_a_copy_that_was_imported_goes_with_what_it_is_a_copy_of(stack: Stack, adapters: list[str] | None) -> None:
    ledger = stack.ledger
    clean, dirty = (ledger.version("acme", number).digest for number in (1, 2))
    imported(ledger, "copy", dirty)
    imported(ledger, "other", clean)
    stack.seal("copy", [("cy", "learned on the copy")])
    stack.train("copy")
    report = Operations(ledger, stack.settings, "test").forget("ann", adapters)
    assert {part["adapter"]: part["versions"] for part in report.forget.body["doomed"]} == {"acme": [2], "copy": [1, 2]}
    [fence] = ledger.fences(report.forget.fence - 1)
    assert dirty in fence.digests
    assert {ledger.adapter(name).release for name in ("copy", "other")} == {0, 1}
    stack.train("acme")
    stack.train("copy")
    assert ledger.adapter("copy").release == 3, "what came since is learned again, from the base"
    assert ledger.version("copy", 3).parent == 0
    keeper = Keeper(ledger, stack.settings, stack.store, orphan_seconds=0.0)
    assert wait(lambda: not keeper.advance_forgets(), 60)
    assert not stack.store.exists(weights_key(dirty))
    assert [verify(ledger, stack.store, stack.keys, name).problems for name in ("acme", "copy", "other")] == [()] * 3
    told = opened(signed := stack.store.get(certificate_key(report.forget.id)), key_of(stack.store.get(PUBLIC_KEY)))
    assert check(told).problems == ()
    assert check_stored(ledger, told, sha256(signed))[0] == []


def purged(stack: Stack, request: str) -> list[str]:
    """What a forget's certificate says is left of weights, once it is purged."""
    keeper = keeper_of(stack)
    assert wait(lambda: all(held.id != request for held in keeper.advance_forgets()), 20)
    told = opened(stack.store.get(certificate_key(request)), key_of(stack.store.get(PUBLIC_KEY)))
    assert check(told).problems == ()
    left = [each for part in told["predicate"]["adapters"] for each in part["residual"]["elsewhere"]]
    return [each for each in left if "weights" in each]


def test_a_copy_of_what_retention_has_let_go_takes_the_weights_with_it(tmp_path: Path) -> None:
    """Nobody uses them any more, though the version that they were learned as is not revoked."""
    stack = Stack(Settings(data=tmp_path / "data"))
    ledger = stack.ledger
    ledger.create("acme", Recipe(retain=Retain(every=100, targets=1)), "test")
    stack.seal("acme", [("bob", "one")])
    stack.seal("acme", [("ann", "secret"), ("bob", "two")])
    stack.train("acme")
    dirty = ledger.version("acme", 2).digest
    imported(ledger, "copy", dirty)
    for number in range(3):
        stack.seal("acme", [("bob", f"more {number}")])
        stack.train("acme")
    gc.collect(ledger, stack.store, stack.keys, 0.0)
    assert stack.store.exists(weights_key(dirty)), "copy answers with them"
    assert [ledger.version("acme", 2).purged, ledger.version("acme", 2).revoked] == [True, False]
    Operations(ledger, stack.settings, "test").forget("ann", ["copy"], request="r")
    assert purged(stack, "r") == []
    assert not stack.store.exists(weights_key(dirty))
    assert verify(ledger, stack.store, stack.keys, "acme").problems == ()


def test_one_name_written_in_two_ways_is_one_subject(stack: Stack) -> None:
    composed, apart = "Jos\u00e9", "Jose\u0301"
    stack.seal("acme", [(composed, "one"), (apart, "two")])
    acts = Operations(stack.ledger, stack.settings, "test")
    report = acts.forget(apart, ["acme"], reason=f"{composed} asked")
    assert sum(part["entries"] for part in report.forget.body["doomed"]) == 2
    assert report.forget.reason == "[subject] asked"
    with pytest.raises(BadInput, match="names the subject"):
        acts.forget(composed, ["acme"], request=f"dsr_{apart}_1")


def test_an_adapter_that_was_only_drawn_in_was_not_asked_for(stack: Stack) -> None:
    ledger, ann = stack.ledger, stack.key.subject("ann")
    imported(ledger, "copy", ledger.version("acme", 2).digest)
    assert set(ledger.forget("r", ann, ["acme"], "test").adapters) == {"acme", "copy"}
    with pytest.raises(Conflict):
        ledger.forget("r", ann, ["copy"], "test")
    assert ledger.forget("r", ann, ["acme"], "test").id == "r"


def test_who_is_forgotten_everywhere_is_allowed_everywhere(stack: Stack) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    acts.forget("ann", None)
    with pytest.raises(Conflict, match="all adapters"):
        acts.allow("ann", ["acme"])
    assert "*" in acts.allow("ann", None)


@pytest.mark.parametrize("purged", [False, True])
def test_a_hold_on_a_copy_that_is_revoked_ends_at_the_base(stack: Stack, purged: bool) -> None:
    ledger, acts = stack.ledger, Operations(stack.ledger, stack.settings, "test")
    imported(ledger, "copy", ledger.version("acme", 2).digest)
    stack.seal("copy", [("cy", "learned on the copy")])
    stack.train("copy")
    acts.rollback("copy", 0)
    acts.forget("ann", ["acme"])
    if purged:
        stack.train("acme")
        keeper = Keeper(ledger, stack.settings, stack.store, orphan_seconds=0.0)
        assert wait(lambda: not keeper.advance_forgets(), 60)
    head = acts.resume("copy", "tip")
    assert (head.release, head.tip, head.held) == (0, 0, None)
    assert ledger.releases()["copy"] == (0, "")
    assert stack.train("copy") == 1, "what came since is learned again"
    assert (ledger.version("copy", 3).parent, ledger.adapter("copy").release) == (0, 3)
    assert not verify(ledger, stack.store, stack.keys, "copy").problems


def test_a_resumed_line_that_lost_its_beginning_goes_on_where_the_base_took_the_same_way(stack: Stack) -> None:
    ledger, acts = stack.ledger, Operations(stack.ledger, stack.settings, "test")
    imported(ledger, "copy", ledger.version("acme", 2).digest)
    acts.rollback("copy", 0)
    stack.seal("copy", [("cy", "learned on the base, then on the copy")])
    acts.resume("copy", "replay")
    stack.train("copy")
    acts.rollback("copy", 1)
    acts.resume("copy", "replay")
    stack.train("copy")
    assert {n: v.parent for n, v in ledger.versions("copy").items()} == {1: 0, 2: 0, 3: 1}
    acts.rollback("copy", 2)
    acts.forget("ann", ["acme"])
    head = acts.resume("copy", "tip")
    assert (head.release, head.tip) == (2, 2)
    assert stack.train("copy") == 0


def test_a_head_that_names_a_revoked_version_frees_no_weights(stack: Stack) -> None:
    """Servers take what is released for clean, and lift their own fence from it."""
    ledger = stack.ledger
    ledger.forget("r", stack.key.subject("ann"), ["acme"], "test")
    with ledger.db.write() as c:
        c.execute(sa.text("UPDATE adapters SET release = 2"))
    assert ledger.releases()["acme"] == (0, "")


def test_an_id_that_allowed_one_subject_allows_no_other(stack: Stack) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    for who in ("ann", "bob"):
        acts.forget(who, ["acme"])
    assert acts.allow("ann", ["acme"], request="x") == ["acme"]
    assert acts.allow("ann", ["acme"], request="x") == [], "repeated"
    with pytest.raises(Conflict, match="somebody else"):
        acts.allow("bob", ["acme"], request="x")
    assert acts.allow("bob", ["acme"], request="y") == ["acme"]


@pytest.mark.parametrize("through", ["acme", "copy"])
def test_a_forget_ahead_of_an_adapter_holds_for_an_import_of_that_name(stack: Stack, through: str) -> None:
    """What saw the subject is in use where nobody was forgotten: there it stays, and here it does not come."""
    ledger, key = stack.ledger, stack.key
    clean, dirty = (ledger.version("acme", number).digest for number in (1, 2))
    if through == "copy":
        imported(ledger, "copy", dirty)
        stack.seal("copy", [("cy", "learned on the copy")])
        stack.train("copy")
        dirty = ledger.version("copy", 2).digest
    ledger.forget("ahead", key.subject("ann"), ["ghost"], "control", ahead=True)
    ledger.forget("other", key.subject("dan"), ["elsewhere"], "control", ahead=True)
    with pytest.raises(Refused, match="forgotten in ghost"):
        ledger.check_import("ghost", dirty)
    with pytest.raises(Refused, match="forgotten in ghost"):
        imported(ledger, "ghost", dirty)
    assert "ghost" not in ledger.heads()
    ledger.check_import("elsewhere", dirty)
    imported(ledger, "ghost", clean)
    assert ledger.releases()["ghost"] == (1, clean)
    assert ledger.releases()["acme"][0] == 2


def test_who_is_allowed_again_keeps_no_import_away(stack: Stack) -> None:
    ledger, ann = stack.ledger, stack.key.subject("ann")
    ledger.forget("ahead", ann, ["ghost"], "control", ahead=True)
    ledger.allow(ann, ["ghost"], "test")
    imported(ledger, "ghost", ledger.version("acme", 2).digest)


def test_an_allow_asks_kafka_only_where_something_ends(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Settings) -> dict[tuple[str, int], int]:
        raise Unavailable("Kafka does not say.", "Is it running?")

    monkeypatch.setattr("riverdelta.registry.operations.log_ends", away)
    acts = Operations(stack.ledger, stack.settings, "test")
    acts.forget("ann", ["acme"])
    acts.forget("eve", None)
    for who, where in (("ann", ["other"]), ("bob", ["acme"]), ("bob", None)):
        assert acts.allow(who, where, request=f"{who}/{where}") == []
        with pytest.raises(NotFound):
            acts.allow(who, where)
    with pytest.raises(Conflict, match="all adapters"):
        acts.allow("eve", ["acme"], request="eve")
    with pytest.raises(Unavailable):
        acts.allow("ann", ["acme"], request="ann")
    monkeypatch.setattr("riverdelta.registry.operations.log_ends", lambda _: {})
    acts.forget("bob", ["acme"])
    assert acts.allow("bob", ["acme"], request="bob/['acme']") == [], "an id acts once"
