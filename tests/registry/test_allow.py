"""What `allow` ends, and what it leaves: nobody is learned from again that was not to be."""

from pathlib import Path

import pytest

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings
from riverdelta.registry.operations import Operations
from tests.registry.stack import Stack, two_versions


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme`, of which the second version saw ann; no broker."""
    return two_versions(Settings(data=tmp_path / "data"))


def is_suppressed(stack: Stack, who: str) -> bool:
    """Whether `acme` learns nothing of a subject."""
    return stack.key.subject(who) in stack.ledger.suppressed("acme")


def test_where_events_were_read_nobody_is_allowed_without_a_word_of_where_they_end(stack: Stack) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    acts.forget("ann", ["acme"])
    stack.ledger.move_positions({("run", 0, 5): 0})
    for request in ("", "again", "again"):
        with pytest.raises(Unavailable, match=r"kafka\.bootstrap"):
            acts.allow("ann", ["acme"], request=request)
    assert is_suppressed(stack, "ann")
    assert acts.allow("bob", ["acme"], request="nothing to allow") == []


def test_where_no_event_was_ever_read_no_broker_is_needed(stack: Stack) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    acts.forget("ann", ["acme"])
    stack.ledger.record_heard("run", 0, 7, [])  # of the control topic
    assert acts.allow("ann", ["acme"]) == ["acme"]
