"""Receipts: a commitment is opened by exactly what the entry said, once; what is gone keeps no forget waiting."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from riverdelta.core import merkle
from riverdelta.core.errors import Conflict
from riverdelta.core.payload import SALT_BYTES
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry import cli, operations
from riverdelta.registry.certificate import open_receipt, read_receipt
from riverdelta.registry.gc import collect
from riverdelta.registry.operations import Operations
from tests.registry.stack import Stack, two_versions

SALT, CONTENT = bytes(range(SALT_BYTES)), b'{"type":"example","text":"I was never there"}'


def told() -> dict[str, Any]:
    commitment = merkle.leaf(SALT + CONTENT).hex()
    return {"predicate": {"erased": [{"adapter": "acme", "index": 2, "commitment": commitment}]}}


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def opened(*entries: tuple[str, str]) -> tuple[int, list[str]]:
    held = [{"adapter": "acme", "index": 2, "salt": salt, "content": content} for salt, content in entries]
    return open_receipt(told(), read_receipt(json.dumps({"entries": held}).encode()))


def test_an_honest_receipt_opens_its_entry() -> None:
    assert opened((coded(SALT), coded(CONTENT))) == (1, [])


@pytest.mark.parametrize("cut", [0, 1, SALT_BYTES - 1, SALT_BYTES + 1, SALT_BYTES + 20])
def test_a_byte_moved_between_salt_and_content_is_found(cut: int) -> None:
    both = SALT + CONTENT
    count, [problem] = opened((coded(both[:cut]), coded(both[cut:])))
    assert count == 0
    assert problem == "Entry 2 of acme has no salt of 16 bytes in the receipt."


def test_an_entry_counts_once() -> None:
    count, problems = opened(*[(coded(SALT), coded(CONTENT))] * 3)
    assert count == 1
    assert problems == ["Entry 2 of acme is in the receipt more than once."]


@pytest.mark.parametrize(
    "written",
    [
        coded(CONTENT) + "!!!!",  # letters that are none of base64's
        coded(CONTENT)[:-4] + "\n" + coded(CONTENT)[-4:],
        coded(CONTENT).rstrip("=") + "=" * 4,
        coded(CONTENT + b"\0")[:-2] + "B=",  # bits that no byte takes
        "é",
    ],
)
def test_what_is_not_base64_to_the_letter_is_found(written: str) -> None:
    count, [problem] = opened((coded(SALT), written))
    assert count == 0
    assert problem == "Entry 2 of acme is not written in base64 in the receipt."


def test_what_lies_beyond_the_horizon_is_counted_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(Settings(data=tmp_path / "data"))
    stack.ledger.create("acme", Recipe.from_dict({"retain": {"horizon": 2, "targets": 1}}), "test")
    stack.seal("acme", [("ann", "old"), ("ann", "older"), ("bob", "old too")])
    for number in range(6):
        stack.seal("acme", [("bob", f"b{number}")])
    stack.seal("acme", [("ann", "new")])
    stack.train("acme")
    collect(stack.ledger, stack.store, stack.keys, 0.0)
    assert stack.ledger.segment("acme", 1).dropped
    path = tmp_path / "ann.receipt"
    made = operations.write_receipt(stack.ledger, stack.settings, "ann", ["acme"], path)
    assert (len(made.entries), made.gone) == (1, 2)
    assert json.loads(path.read_bytes())["gone"] == 2
    monkeypatch.setenv("RIVERDELTA_DATA", str(stack.settings.data))
    asked = ["forget", "--subject", "ann", "--adapter", "acme", "--request", "r1", "--receipt"]
    done = CliRunner().invoke(cli.app, [*asked, str(tmp_path / "again.receipt")])
    assert done.exit_code == 0
    said = " ".join(done.output.split())
    assert (
        "The receipt holds what 1 entry said; 2 more lie beyond the forget horizon, and their contents are gone."
        in said
    )
    assert stack.ledger.forget_of("r1").body["doomed"][0]["entries"] == 3


def test_an_adapter_that_is_named_twice_is_told_of_once(tmp_path: Path) -> None:
    stack, path = two_versions(Settings(data=tmp_path / "data")), tmp_path / "ann.receipt"
    report = Operations(stack.ledger, stack.settings, "op").forget("ann", ["acme", "acme"], request="r1", receipt=path)
    assert report.receipt is not None
    assert len(report.receipt.entries) == report.forget.body["doomed"][0]["entries"] == 1
    assert len(json.loads(path.read_bytes())["entries"]) == 1


@pytest.mark.parametrize("sooner", [True, False])
def test_a_receipt_is_of_the_forget_that_it_was_written_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sooner: bool
) -> None:
    """Two operators under one id: the one who comes second has nothing that is true of what the other began."""
    stack, path = two_versions(Settings(data=tmp_path / "data")), tmp_path / "ann.receipt"
    write = operations.write_receipt

    def another() -> None:
        Operations(stack.ledger, stack.settings, "other").forget("ann", ["acme"], request="r1")

    def written(*given: Any) -> Any:
        if sooner:
            another()
        made = write(*given)
        if not sooner:
            another()
        return made

    monkeypatch.setattr(operations, "write_receipt", written)
    with pytest.raises(Conflict, match="too late for a receipt"):
        Operations(stack.ledger, stack.settings, "op").forget("ann", ["acme"], request="r1", receipt=path)
    assert not path.exists()
    assert stack.ledger.forget_of("r1").actor == "other"
