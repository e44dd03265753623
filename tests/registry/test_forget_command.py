"""`registry forget`: what it leaves where it is refused, repeated, interrupted or waits for nobody."""

import json
from pathlib import Path
from unittest import mock

import pytest

from riverdelta.core.errors import BadInput
from riverdelta.core.settings import Settings
from riverdelta.registry.operations import KEEPER, Operations
from tests.registry.stack import Stack, two_versions
from tests.registry.test_cli import run

ASKED = ("forget", "--adapter", "acme", "--subject")


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return two_versions(Settings(data=tmp_path / "data"))


def said(stack: Stack, *arguments: str, code: int = 0) -> str:
    done = run(stack.settings.data, *arguments)
    assert done.returncode == code, done.stderr
    return " ".join(f"{done.stdout} {done.stderr}".split())


def test_a_refused_forget_leaves_no_receipt(stack: Stack, tmp_path: Path) -> None:
    """And nothing that is in the way of the corrected one."""
    receipt = tmp_path / "ann.json"
    kept = ("--receipt", str(receipt), "--request")
    said(stack, *ASKED, "bob", "--request", "r1")
    said(stack, *ASKED, "ann", *kept, "r1", code=4)  # was about something else
    said(stack, *ASKED, "ann", *kept, "ann-1", code=2)
    said(stack, *ASKED, "ann", *kept, "r2", "--adapter", "nowhere", code=3)
    said(stack, *ASKED, "ann", *kept, "r2", "--serve-until-rebuilt", "1e12", code=2)
    assert not receipt.exists()
    assert "The receipt holds what 1 entry said." in said(stack, *ASKED, "ann", *kept, "r2")
    assert len(json.loads(receipt.read_bytes())["entries"]) == 1


def test_a_receipt_that_cannot_be_written_stops_the_forget(stack: Stack, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    for path in (there, tmp_path / "nowhere" / "ann.json"):
        assert "Name a new file" in said(stack, *ASKED, "ann", "--receipt", str(path), code=2)
    full = tmp_path / "full.json"
    with mock.patch("riverdelta.registry.operations.os.fsync", side_effect=OSError(28, "No space left on device")):
        assert "No space left on device" in said(stack, *ASKED, "ann", "--receipt", str(full), code=2)
    assert (there.read_text(), full.exists()) == ("mine", False)
    assert stack.ledger.forgets() == []


def test_a_repeated_forget_says_so(stack: Stack, tmp_path: Path) -> None:
    first, late = tmp_path / "first.json", tmp_path / "late.json"
    assert "already" not in said(stack, *ASKED, "ann", "--request", "r1", "--receipt", str(first))
    again = said(stack, *ASKED, "ann", "--request", "r2")
    assert "The subject is forgotten here already." in again
    assert "spelling" not in again
    assert "already" not in said(stack, "forget", "--all-adapters", "--subject", "ann", "--request", "r3")
    assert "too late for more" in said(stack, *ASKED, "ann", "--request", "r4", "--receipt", str(late))
    assert json.loads(late.read_bytes())["entries"] == []
    repeated = said(stack, *ASKED, "ann", "--request", "r1", "--receipt", str(tmp_path / "never.json"), code=4)
    assert "it is too late for a receipt" in repeated
    assert not (tmp_path / "never.json").exists()
    assert first.exists()


def test_without_a_keeper_the_fence_is_told_of_first(stack: Stack) -> None:
    told = said(stack, *ASKED, "ann", "--request", "r1", "--wait", code=8)
    assert told.index("1 entry erased") < told.index("shows request r1") < told.index("No keeper is at work")
    done = run(stack.settings.data, *ASKED, "ann", "--request", "r1", "--wait", "--json")
    assert done.returncode == 8
    held = json.loads(done.stdout)
    assert (held["request_id"], held["done"], held["stage"]) == ("r1", False, "acknowledged")


def test_an_interrupted_wait_says_that_it_goes_on(stack: Stack) -> None:
    with (
        stack.ledger.db.exclusive(KEEPER),
        mock.patch("riverdelta.registry.operations.time.sleep", side_effect=KeyboardInterrupt),
    ):
        told = said(stack, *ASKED, "ann", "--request", "r1", "--wait", code=130)
        assert told.index("1 entry erased") < told.index("Interrupted; the forget goes on by itself")
        assert told.endswith("shows request r1.")
        done = run(stack.settings.data, *ASKED, "bob", "--wait", "--json")
    held = json.loads(done.stdout)
    assert (done.returncode, held["done"], held["entries"]) == (130, False, 3)
    assert held["request_id"] in done.stderr


def test_who_interrupts_the_fence_is_told_what_has_begun(stack: Stack) -> None:
    stack.ledger.take_lease("server-a", "server", 60.0)
    with mock.patch("riverdelta.registry.ledger.leases.time.sleep", side_effect=KeyboardInterrupt):
        assert "the forget goes on by itself" in said(stack, *ASKED, "ann", "--request", "r1", code=130)
        done = run(stack.settings.data, *ASKED, "bob", "--request", "r2", "--json")
    assert (done.returncode, json.loads(done.stdout)["stage"]) == (130, "fenced")
    with mock.patch("riverdelta.registry.operations.Operations._begin", side_effect=KeyboardInterrupt):
        assert "before anything was forgotten" in said(stack, *ASKED, "bob", "--request", "r3", code=130)


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ("Ann Lee", "asked for by Ann\nLee"),
        ("Ann Lee", "asked for by ann \t lee"),
        ("Ann Lee", "asked for by Ann\u00a0Lee"),
        ("Ann  Lee", "asked for by Ann Lee"),
        ("Ann Lee", "asked for by An\u200bn Lee"),
        ("stra\u00dfe 5", "asked for by STRASSE 5"),
        ("STRASSE 5", "asked for by stra\u00dfe 5"),
        ("\u0130pek", "asked for by i\u0307pek"),
        ("\ufb01n", "asked for by Fin"),
    ],
)
def test_a_name_that_is_written_otherwise_is_struck_out_too(stack: Stack, subject: str, reason: str) -> None:
    """What stands in the journal stays for good, and readers see the same name."""
    acts = Operations(stack.ledger, stack.settings, "test")
    assert acts.forget(subject, ["acme"], reason=f"{reason}, of 3 May").forget.reason == (
        "asked for by [subject], of 3 May"
    )
    with pytest.raises(BadInput):
        acts.forget(subject, ["acme"], request=reason.replace("\n", " ").replace("\t", " "))


def test_a_name_of_spaces_strikes_out_nothing(stack: Stack) -> None:
    assert (
        Operations(stack.ledger, stack.settings, "test").forget(" ", ["acme"], "as asked").forget.reason == "as asked"
    )


def test_an_argument_that_is_not_utf_8_is_bad_input(stack: Stack) -> None:
    for asked in (
        ("\udcff",),
        ("zoe", "--reason", "\udcff"),
        ("zoe", "--actor", "\udcff"),
        ("zoe", "--request", "\udcff"),
    ):
        said(stack, *ASKED, *asked, code=2)
        if "--request" not in asked:
            said(stack, "allow", *ASKED[1:], *asked, code=2)
    said(stack, *ASKED, "zoe", "--adapter", "\udcff", code=2)
    assert stack.ledger.forgets() == []
