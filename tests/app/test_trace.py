"""`riverdelta trace`: an event's versions, before and after it is forgotten."""

from pathlib import Path

import pytest

from riverdelta.app.trace import find, trace
from riverdelta.core.settings import Settings
from riverdelta.registry.operations import Operations
from tests.registry.stack import two_versions


def test_versions_are_those_that_hold_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    [anns] = [
        f"{entry.partition}:{entry.offset}"
        for entry in stack.ledger.manifest("acme", 2).entries
        if stack.key.subject("ann") in entry.mentions
    ]
    [found] = find(stack.ledger, stack.settings, anns)
    assert (found.versions, found.revoked, found.live) == ([2], [], True)
    trace(stack.settings, anns, "", "", False)
    assert "live: version 2" in capsys.readouterr().out
    Operations(stack.ledger, stack.settings, "test").forget("ann", ["acme"])
    stack.train("acme")
    [found] = find(stack.ledger, stack.settings, anns)
    assert (found.versions, found.revoked, found.release, found.live) == ([], [2], 3, False)
    trace(stack.settings, anns, "", "", False)
    assert "the release, version 3, is without it" in capsys.readouterr().out
