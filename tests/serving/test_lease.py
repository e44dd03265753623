"""Leases: a server that cannot renew its own stops adapters by its own clock, and comes back when it can."""

import sqlite3

import pytest

from riverdelta.registry.operations import Operations
from riverdelta.serving.permit import Permit, clock

from .conftest import eventually
from .test_swap import streamed


def test_a_ledger_that_cannot_be_written(hand, serve):
    """Whoever keeps the ledger's write lock keeps every server from renewing."""
    hand.adapter("acme", 1)
    hand.settings.serving.lease_seconds = 0.6
    hand.settings.serving.max_model_len = 1024  # an answer that outlasts the lease
    running = serve(hand.settings)
    digest = hand.digest("acme")
    with sqlite3.connect(hand.settings.data / "ledger.db", isolation_level=None) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        last = list(streamed(running, "acme", max_tokens=1000))[-1]
        assert last["error"]["code"] == "adapters_halted"
        refused = running.complete("acme")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapters_halted")
        assert refused.headers["retry-after"] == "1"
        assert running.client.get("/readyz").text == "waiting for: lease"
        assert running.client.get("/livez").status_code == 200
        assert running.answer("base")
        blocker.execute("ROLLBACK")
    blocker.close()
    eventually(lambda: running.complete("acme").status_code == 200)
    assert running.answer("acme")["system_fingerprint"] == digest


def test_a_lease_given_up_for_lost(hand, serve):
    """A forget went on without this server: it drops what it had before it serves again."""
    hand.adapter("acme")
    clean = hand.release("acme", ["bob"])
    dirty = hand.release("acme", ["ann"])
    running = serve(hand.settings)
    assert running.answer("acme")["system_fingerprint"] == dirty
    running.answer("acme@2")
    lost = hand.ledger.leases(["server"])[0].holder
    hand.ledger.drop_lease(lost)  # what whoever waits for a fence does when a server does not answer
    held = hand.ledger.forget("f1", hand.hashed("ann"), ["acme"], "test")
    assert hand.ledger.await_fence(held.fence, ["server"]) == []
    eventually(lambda: hand.ledger.leases(["server"]) and running.server.permit.valid)
    assert hand.ledger.leases(["server"])[0].holder == lost
    assert running.answer("acme")["system_fingerprint"] == clean
    assert running.complete("acme@2").status_code == 410


def copy(source, target):
    """What `.backup` does, into a database that others may have open too."""
    with sqlite3.connect(source, timeout=30) as held, sqlite3.connect(target, timeout=30) as made:
        held.backup(made)
    held.close()
    made.close()


@pytest.mark.parametrize("again", [0, 2], ids=["fewer fences", "as many fences"])
def test_a_ledger_restored_under_a_server_counts_its_fences_anew(hand, serve, tmp_path, again):
    """The numbers that the server has acknowledged come again, and mean others now."""
    hand.adapter("acme")
    clean = hand.release("acme", ["bob"])
    dirty = hand.release("acme", ["ann"])
    hand.adapter("other", 1)
    hand.settings.serving.max_model_len = 1024
    running, ledger = serve(hand.settings), hand.settings.data / "ledger.db"
    copy(ledger, tmp_path / "backup")
    for who in range(3):
        held = hand.ledger.forget(f"f{who}", hand.hashed(f"u{who}"), ["other"], "test")
        assert hand.ledger.await_fence(held.fence, ["server"]) == []
    assert running.answer("acme@2")["system_fingerprint"] == dirty
    events = streamed(running, "acme", max_tokens=1000)
    next(events)
    copy(tmp_path / "backup", ledger)
    for who in range(again):  # as an operator repeats what came since
        hand.ledger.forget(f"f{who}", hand.hashed(f"u{who}"), ["other"], "test")
    report = Operations(hand.ledger, hand.settings, "op").forget("ann", ["acme"], request="late")
    assert report.forget.fence == again + 1
    answers = [running.complete("acme@2"), running.complete("acme")]
    assert all(dirty not in answer.text for answer in answers), "nobody answers with it once that is said"
    assert "error" in list(events)[-1]
    eventually(lambda: running.complete("acme").status_code == 200)
    assert running.answer("acme")["system_fingerprint"] == clean
    assert running.complete("acme@2").status_code == 410


def test_a_stopped_server_gives_its_lease_up(hand, serve):
    running = serve(hand.settings)
    assert len(hand.ledger.leases(["server"])) == 1
    running.stop()
    assert hand.ledger.leases(["server"]) == []


def test_a_permit_halts_by_itself_and_stays_so():
    halts = []
    permit = Permit()
    permit.start(halts.append)
    assert not permit.valid
    permit.extend(clock() + 60)
    assert not permit.valid, "a first term needs everything to be read"
    permit.resume(clock() + 60)
    assert permit.valid
    permit.extend(clock() - 1)
    assert not permit.valid
    eventually(lambda: permit.halted)
    permit.extend(clock() + 60)
    assert not permit.valid
    permit.resume(clock() + 60)
    assert permit.valid
    permit.stop()
    permit.resume(clock() + 60)
    assert not permit.valid
    assert halts == [True, False, True, False]
