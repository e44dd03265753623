"""What a forget means by a subject and by a version: copies of weights, names written in two ways, adapters named."""

from pathlib import Path

import pytest

from riverdelta.core.digests import sha256
from riverdelta.core.errors import BadInput, Conflict
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import weights_key
from riverdelta.registry.certificate import check, check_stored
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Ledger
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import PUBLIC_KEY, certificate_key
from riverdelta.registry.signing import key_of, opened
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack, two_versions, wait


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
