"""Retention: what `gc` lets go is needed by nothing, and what a forget does where it is."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from riverdelta.core.errors import Conflict, NotFound, Refused
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import state_key, weights_key
from riverdelta.registry import contents
from riverdelta.registry.gc import collect
from riverdelta.registry.ledger import Outcome, Stage
from riverdelta.registry.ledger.decisions import dirty_versions, lineage, newest_clean
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack
from tests.registry.test_cli import run

SUBJECTS = ["ann", "bob", "cy", "di", "ed"]


def stack_of(folder: Path, **retain: Any) -> Stack:
    stack = Stack(Settings(data=folder / "data"))
    stack.ledger.create("acme", Recipe.from_dict({"retain": retain}), "test")
    return stack


def seal(stack: Stack, who: str) -> int:
    return stack.seal("acme", [(who, f"{who} said something")]).number


def readable(stack: Stack, number: int) -> bool:
    try:
        contents.read(stack.ledger, stack.store, stack.keys, stack.ledger.segment("acme", number))
    except NotFound:
        return False
    return True


def there(stack: Stack) -> set[str]:
    return {key for folder in ("weights/", "states/", "segments/") for key in stack.store.keys(folder)}


def check(stack: Stack, horizon: int) -> None:
    """Every release, target and clean state has its files, and whatever a forget within the horizon would make
    anew, or that awaits, can be read with what it rehearses."""
    ledger, held = stack.ledger, there(stack)
    head, versions, segments = ledger.adapter("acme"), ledger.versions("acme"), ledger.segments("acme")
    for number in {head.release, head.tip, head.held or 0, head.held_tip or 0} - {0}:
        assert versions[number].usable or number == head.held_tip
    for version in versions.values():
        if version.usable:
            assert {weights_key(version.digest), state_key(version.state)} <= held
    within = range(head.next_segment - horizon if horizon else 1, head.next_segment)
    for first in within:
        dirty = dirty_versions(versions, [first])
        clean = newest_clean(versions, head.tip, dirty) if dirty else head.tip
        again = [versions[n].segment for n in set(lineage(versions, head.tip)) - set(lineage(versions, clean))]
        for number in [n for n in again if n is not None]:
            since = max(1, number - horizon) if horizon else 1
            assert all(readable(stack, each) for each in range(since, number + 1))
    assert all(readable(stack, each.number) for each in segments if each.outcome is Outcome.AWAITING)


acts = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.sampled_from(SUBJECTS)),
        st.tuples(st.just("learn"), st.sampled_from(SUBJECTS)),
        st.tuples(st.just("seal"), st.sampled_from(SUBJECTS)),
        st.tuples(st.just("train"), st.just("")),
        st.tuples(st.just("gc"), st.just("")),
        st.tuples(st.sampled_from(["forget", "purge", "rollback", "resume"]), st.sampled_from(SUBJECTS)),
    ),
    min_size=8,
    max_size=24,
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(acts, st.integers(0, 3), st.integers(1, 3), st.integers(1, 2))
def test_gc_never_touches_what_is_needed(done: list[tuple[str, str]], horizon: int, every: int, targets: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stack = stack_of(Path(folder), horizon=horizon, every=every, targets=targets)
        for number, (act, who) in enumerate([("seal", "ann"), ("train", ""), *done, ("gc", "")]):
            ledger = stack.ledger
            if act in ("seal", "learn"):
                seal(stack, who)
            if act in ("train", "learn"):
                stack.train("acme")
            if act == "gc":
                pending = bool(ledger.forgets(unfinished=True))
                before = there(stack)
                found = collect(ledger, stack.store, stack.keys, 0.0)
                assert not (pending and found.dropped)
                assert not pending or there(stack) == before
            elif act == "forget":
                ledger.forget(f"r{number}", stack.key.subject(who), ["acme"], "test")
            elif act == "purge":
                for held in ledger.forgets(unfinished=True):
                    if ledger.is_rebuilt(held):
                        ledger.advance(held.id, Stage.PURGED, {}, "test")
                        for part in held.body["doomed"]:
                            ledger.mark_purged("acme", part["versions"])
            elif act == "rollback":
                try:
                    ledger.rollback("acme", None, "test")
                except Refused:
                    continue
            elif act == "resume":
                try:
                    ledger.resume("acme", "tip" if len(who) == 2 else "continue", "test")
                except Conflict:
                    continue
            check(stack, horizon)
        stack.ledger.close()


def test_a_forget_within_the_horizon_needs_nothing_that_went(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, horizon=3, every=2, targets=1)
    whole = stack_of(tmp_path / "whole")
    for who in ["ann", "bob", "ann", "bob", "ann", "cy", "bob", "di"]:
        for each in (stack, whole):
            seal(each, who)
            each.train("acme")
        collect(stack.ledger, stack.store, stack.keys, 0.0)
    assert sum(each.usable for each in stack.ledger.versions("acme").values()) < 5
    assert [each.number for each in stack.ledger.segments("acme") if each.dropped] == [1, 2]
    assert not verify(stack.ledger, stack.store, stack.keys, "acme").problems
    for each in (stack, whole):
        each.ledger.forget("r", each.key.subject("cy"), ["acme"], "test")
        each.train("acme")
    tips = [each.ledger.version("acme", each.ledger.adapter("acme").tip).state for each in (stack, whole)]
    assert tips[0] == tips[1]
    with pytest.raises(Refused, match="retain"):
        stack.ledger.rollback("acme", 2, "test")


@pytest.mark.parametrize("beyond", ["rebuild", "retire"])
def test_a_forget_beyond_the_horizon(tmp_path: Path, beyond: str) -> None:
    stack = stack_of(tmp_path, horizon=2, every=1, targets=1, beyond=beyond)
    for who in ["ann", "bob", "cy", "di", "bob", "di"]:
        seal(stack, who)
        stack.train("acme")
    collect(stack.ledger, stack.store, stack.keys, 0.0)
    gone = [each.number for each in stack.ledger.segments("acme") if each.dropped]
    assert gone
    assert not any(readable(stack, number) for number in gone)
    forget = stack.ledger.forget("r", stack.key.subject("ann"), ["acme"], "test")
    head = stack.ledger.adapter("acme")
    assert head.release == 0
    if beyond == "retire":
        assert head.held == 0
        assert stack.ledger.is_rebuilt(forget)
        assert stack.train("acme") == 0
        return
    stack.train("acme")
    head = stack.ledger.adapter("acme")
    learned = [
        stack.ledger.version("acme", number).segment for number in lineage(stack.ledger.versions("acme"), head.tip)
    ]
    assert learned[::-1] == [number for number in range(1, 7) if number not in gone]
    assert stack.ledger.is_rebuilt(forget)


def test_a_forget_that_comes_while_gc_begins_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way is read where nothing can come in between."""
    stack = stack_of(tmp_path, every=4, targets=1)
    for who in SUBJECTS:
        seal(stack, who)
        stack.train("acme")
    assert stack.ledger.retain("acme", "gc", dry=True) is not None
    write = stack.ledger.db.write

    def after_a_forget() -> Any:
        monkeypatch.setattr(stack.ledger.db, "write", write)
        stack.ledger.forget("late", stack.key.subject("nobody"), ["acme"], "op")
        return write()

    monkeypatch.setattr(stack.ledger.db, "write", after_a_forget)
    assert stack.ledger.retain("acme", "gc") is None


def test_a_dry_run_says_what_the_real_one_does(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, horizon=2, every=2, targets=1)
    for who in ["ann", "bob", "cy", "di", "ed", "ann", "bob"]:
        seal(stack, who)
        stack.train("acme")
    stack.store.put("weights/orphan", b"a crash left it")
    before = there(stack)
    would, young = (collect(stack.ledger, stack.store, stack.keys, grace, dry=True) for grace in (0.0, 3600.0))
    assert there(stack) == before
    did = collect(stack.ledger, stack.store, stack.keys, 0.0)
    assert would == did
    assert did.dropped["acme"]["versions"]
    assert did.dropped["acme"]["segments"]
    assert (young.deleted, young.young) == ([], did.deleted)
    assert before - there(stack) == {key for key in did.deleted if not key.startswith("keys/")}


def test_the_command_words_a_dry_run_as_one(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, every=4, targets=1)
    for who in SUBJECTS:
        seal(stack, who)
        stack.train("acme")
    would, did = (run(stack.settings.data, "gc", "--grace", "0", *more).stdout for more in (["--dry-run"], []))
    assert "would be kept no longer" in would
    assert " are kept no longer" in did
    assert would.replace("would be kept", "are kept").replace("would go", "deleted") == did
