"""Requests on the control topic: what may be asked for, and that it is carried out as by any other way."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from riverdelta.core.errors import BadInput, Corrupt
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Kafka, Settings
from riverdelta.registry.belonging import key_store
from riverdelta.registry.control import Control, Message
from riverdelta.registry.heard import Heard
from riverdelta.registry.keeper import Keeper, run
from riverdelta.registry.ledger import Stage
from riverdelta.registry.operations import Operations
from riverdelta.registry.verify import verify
from riverdelta.registry.wakeups import Wakeups
from tests.registry.stack import Stack, two_versions, wait

ASKED: dict[str, Any] = {"id": "1", "action": "forget", "subject": "ann", "adapter": "acme"}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme` with two versions, of which the second saw ann; no broker."""
    return two_versions(Settings.read(data=tmp_path / "data", kafka=Kafka(bootstrap="127.0.0.1:1")))


def say(control: Control, message: dict[str, Any], offset: int = 0) -> None:
    """One record of the topic."""
    value = json.dumps(message).encode()
    control._act(
        SimpleNamespace(topic="control", partition=0, offset=offset, value=value, timestamp=time.time() * 1000), "run"
    )


def test_what_does_not_fit_is_named_without_a_quote() -> None:
    for wrong, where in (
        ({"serve_until_rebuilt": -1}, "serve_until_rebuilt"),
        ({"serve_until_rebuilt": "ann"}, "serve_until_rebuilt"),
        ({"action": "allow", "serve_until_rebuilt": 5}, "Only a forget"),
        ({"subject": ""}, "subject"),
        ({"all_adapters": True}, "one of them"),
        ({"id": "1\0ann"}, "printable"),
        ({"adapter": "ann\0"}, "no adapter's name"),
        ({"adapter": "base"}, "no adapter's name"),
    ):
        with pytest.raises(BadInput, match=where) as refused:
            Message.read(json.dumps({**ASKED, **wrong}).encode())
        assert "ann" not in str(refused.value)


def test_servers_may_go_on_until_rebuilt(stack: Stack) -> None:
    control = Control(stack.ledger, stack.settings, Wakeups(stack.settings), threading.Event())
    say(control, {**ASKED, "serve_until_rebuilt": 600})
    say(control, {**ASKED, "serve_until_rebuilt": 600}, offset=1)
    [held] = stack.ledger.forgets()
    assert held.stage is Stage.LENDING
    assert held.body["asked"]["offset"] == 1, "with which the first goes too"
    assert stack.ledger.releases()["acme"][0] == 2
    say(control, {**ASKED, "id": "2", "subject": "bob"}, offset=2)
    assert {each.stage for each in stack.ledger.forgets()} == {Stage.FENCED}
    assert stack.ledger.releases()["acme"] == (0, "")


def test_the_key_store_is_opened_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    from riverdelta.registry import keystore

    opened: list[int] = []
    begin = keystore.KeyStore.__init__

    def init(self: Any, *given: Any) -> None:
        opened.append(1)
        begin(self, *given)

    monkeypatch.setattr(keystore.KeyStore, "__init__", init)
    control = Control(stack.ledger, stack.settings, Wakeups(stack.settings), threading.Event())
    for number, subject in enumerate(("ann", "bob", "cy")):
        say(control, {**ASKED, "id": f"{number}", "subject": subject}, offset=number)
    assert len(stack.ledger.forgets()) == 3
    assert opened == [1]


def test_an_id_that_another_forget_has_keeps_nobody_from_being_forgotten(stack: Stack) -> None:
    control = Control(stack.ledger, stack.settings, Wakeups(stack.settings), threading.Event())
    say(control, ASKED)
    for _ in range(2):  # the second as after a crash
        say(control, {**ASKED, "subject": "bob"}, offset=1)
    assert [(each.id, each.subject) for each in stack.ledger.forgets()] == [
        ("1", stack.key.subject("ann")),
        ("run/0/1", stack.key.subject("bob")),
    ]


def test_a_message_that_asks_again_for_what_is_done_is_removed(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    monkeypatch.setattr(
        "riverdelta.registry.control.delete_request", lambda _, asked: removed.append(asked["offset"]) or True
    )
    control = Control(stack.ledger, stack.settings, Wakeups(stack.settings), threading.Event())
    say(control, ASKED)
    stack.ledger.advance("1", Stage.PURGED, {}, "keeper")
    say(control, ASKED, offset=3)
    assert removed == [3]


def test_a_forget_ahead_of_its_adapter_is_kept(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject's events may be in Kafka already, and the dataflow a moment behind."""
    monkeypatch.setattr("riverdelta.registry.purge.delete_request", lambda *_: True)
    control, ledger = Control(stack.ledger, stack.settings, Wakeups(stack.settings), threading.Event()), stack.ledger
    say(control, {**ASKED, "adapter": "later"})
    say(control, {**ASKED, "adapter": "later"}, offset=1)
    [held] = ledger.forgets()
    assert held.adapters == {"later": 0}
    assert not ledger.suppressed("acme")
    keeper = Keeper(ledger, Settings(data=stack.settings.data), stack.store, orphan_seconds=0.0)
    while keeper.advance_forgets():
        pass
    ledger.create("later", Recipe(), "stream")
    stack.seal("later", [("ann", "canary"), ("bob", "kept")])
    assert [entry.tombstone for entry in ledger.manifest("later", 1).entries] == [True, False]
    assert verify(ledger, stack.store, stack.keys, "later").problems == ()

    monkeypatch.setattr("riverdelta.registry.operations.log_ends", lambda _: {})
    say(control, {**ASKED, "id": "2", "adapter": "even-later"}, offset=2)
    say(control, {**ASKED, "id": "3", "action": "allow", "adapter": "even-later"}, offset=3)
    assert not ledger.suppressed("even-later")


def test_a_request_waits_while_the_subject_key_is_not_there(stack: Stack) -> None:
    control = Control(stack.ledger, stack.settings, Wakeups(stack.settings), threading.Event())
    say(control, {**ASKED, "subject": "bob"})
    key, away = stack.settings.keys_dir / "subjects.key", stack.settings.keys_dir / "away"
    key.rename(away)
    with pytest.raises(Corrupt):
        say(control, {**ASKED, "id": "2"}, offset=1)
    away.replace(key)
    say(control, {**ASKED, "id": "2"}, offset=1)
    assert [each.id for each in stack.ledger.forgets()] == ["1", "2"]


def test_a_damaged_key_of_one_subject_keeps_no_other_request_waiting(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def erase(*_: Any) -> None:
        raise Corrupt("The key store's row is not what was written.", "Restore it.")

    monkeypatch.setattr("riverdelta.registry.contents.erase", erase)
    control = Control(stack.ledger, stack.settings, Wakeups(stack.settings), threading.Event())
    say(control, ASKED)
    assert [each.stage for each in stack.ledger.forgets()] == [Stage.FENCED]


def test_what_is_wrong_with_the_keys_is_told_and_tried_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    followed: list[int] = []

    def follow(_: Control) -> None:
        followed.append(1)
        if len(followed) == 3:
            stop.set()
        raise Corrupt("The subject key is another one.", "Restore the key file.")

    monkeypatch.setattr(Control, "_follow", follow)
    monkeypatch.setattr("riverdelta.registry.control._RETRY_SECONDS", 0.01)
    Control(stack.ledger, stack.settings, Wakeups(stack.settings), stop).run()
    assert len(followed) == 3
    assert [record.levelname for record in caplog.records if "subject key" in record.getMessage()] == ["ERROR"]


def test_no_keeper_hears_requests_with_another_root_key(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    monkeypatch.setattr(Control, "run", lambda _: heard.append(1))
    key_store(stack.ledger, stack.settings).close()
    (stack.settings.keys_dir / "contents.key").write_bytes(bytes(32))
    with pytest.raises(Corrupt):
        run(stack.settings, threading.Event())
    assert not heard


@pytest.mark.parametrize("lost", [False, True])
def test_without_its_subject_key_a_keeper_ends_what_is_under_way_and_lets_requests_wait(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lost: bool
) -> None:
    Operations(stack.ledger, stack.settings, "test").forget("ann", ["acme"], request="r1")
    stack.train("acme")
    key = stack.settings.keys_dir / "subjects.key"
    if lost:
        key.unlink()
    else:
        key.write_bytes(bytes(32))
    stop, heard = threading.Event(), Heard(stack.ledger, "run", 0)

    def hear(control: Control) -> None:
        value = json.dumps({**ASKED, "id": "r2", "subject": "bob"}).encode()
        record = SimpleNamespace(topic="control", partition=0, offset=0, value=value, timestamp=time.time() * 1000)
        assert not control._hear(record, heard)

    monkeypatch.setattr(Control, "run", hear)
    monkeypatch.setattr("riverdelta.registry.keeper.set_up_logs", lambda: None)  # it would take the log away
    keeping = threading.Thread(target=run, args=(stack.settings, stop))
    keeping.start()
    try:
        assert wait(lambda: stack.ledger.forget_of("r1").stage is Stage.PURGED, 120)
        assert wait(lambda: heard.waiting, 10)
    finally:
        stop.set()
        keeping.join(timeout=20)
    assert [each.id for each in stack.ledger.forgets()] == ["r1"]
    assert [record for record in caplog.records if "No request can be" in record.message]
