"""Requests on the control topic of which one cannot be carried out yet: others are, none is lost, none acts twice."""

import contextlib
import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from riverdelta.core.errors import Corrupt, Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Kafka, Settings
from riverdelta.registry import control as control_module
from riverdelta.registry.control import Control
from riverdelta.registry.heard import Heard
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Forget, Ledger, Stage
from riverdelta.registry.ledger import tables as t
from riverdelta.registry.wakeups import Wakeups
from tests.registry.stack import Stack, two_versions, wait

Message = dict[str, Any]


def asks(number: object, action: str, subject: str, *adapters: str, **more: Any) -> Message:
    """A request; about all adapters where none is named."""
    about: Message = {"adapter": adapters[0]} if adapters else {"all_adapters": True}
    return {"id": f"{number}", "action": action, "subject": subject, **about, **more}


class Reader:
    """A keeper's reading of one partition, of which any number may follow each other on a ledger."""

    def __init__(self, stack: Stack, topic: Sequence[Message | None]) -> None:
        self._topic = topic
        nobody: Any = SimpleNamespace(send=lambda *_: None)
        self.control = Control(stack.ledger, stack.settings, nobody, threading.Event())
        self.heard = Heard(stack.ledger, "run", 0)
        self.at = self.heard.first

    def read(self, until: int | None = None) -> None:
        """Hear what lies on the topic from here on; what Kafka holds no more is None. A message was sent when its
        "sent" says, or just now."""
        for offset in range(self.at, len(self._topic) if until is None else until):
            if (message := self._topic[offset]) is not None:
                record = SimpleNamespace(topic="c", partition=0, offset=offset)
                message = {"sent": time.time() * 1000, **message}
                record.timestamp = message.pop("sent")
                record.value = json.dumps(message).encode()
                self.control._hear(record, self.heard)
            self.at = offset + 1

    def try_again(self) -> None:
        """What waits, in order."""
        for record in list(self.heard.waiting.values()):
            self.control._hear(record, self.heard)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme` with two versions, of which the second saw ann, and `beta`, which saw bob; no broker."""
    made = two_versions(Settings.read(data=tmp_path / "data", kafka=Kafka(bootstrap="127.0.0.1:1")))
    made.ledger.create("beta", Recipe(), "test")
    made.seal("beta", [("bob", "beta's")])
    made.train("beta")
    return made


class Trouble:
    """Whether forgets in acme fail, and Kafka does not say where the log ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.damaged = self.away = False
        forget = Ledger.forget

        def begin(ledger: Ledger, request: str, subject: str, adapters: Sequence[str] | None, *rest: Any) -> Forget:
            if self.damaged and (adapters is None or "acme" in adapters):
                raise Corrupt("A manifest is damaged.", "Restore the ledger from a backup.")
            return forget(ledger, request, subject, adapters, *rest)

        def ends(_: Settings) -> dict[tuple[str, int], int]:
            if self.away:
                raise Unavailable("Kafka does not say.", "Is it running?")
            return {}

        monkeypatch.setattr(Ledger, "forget", begin)
        monkeypatch.setattr("riverdelta.registry.operations.log_ends", ends)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Trouble:
    return Trouble(monkeypatch)


def begun(stack: Stack) -> list[str]:
    """The forgets that there are, in the order of their fences."""
    return [held.id for held in stack.ledger.forgets()]


def position(stack: Stack) -> int:
    """What is recorded of the partition, for whoever reads on."""
    return stack.ledger.positions("run")[0, -1]


def test_a_damaged_adapter_keeps_only_its_own_requests_waiting(
    stack: Stack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = t.segments.c
    here = (s.adapter == "acme") & (s.number == 2)
    whole = stack.ledger.manifest("acme", 2).pack()
    with stack.ledger.db.write() as c:
        c.execute(t.segments.update().where(here).values(manifest=b"garbage"))
    topic = [asks(1, "forget", "ann", "acme"), asks(2, "forget", "bob", "beta")]
    reader = Reader(stack, topic)
    reader.read()
    assert begun(stack) == ["2"]
    assert position(stack) == 0
    for _ in range(3):
        reader.try_again()
    assert [record.levelname for record in caplog.records if "waits" in record.getMessage()] == ["ERROR"]
    monkeypatch.setattr(control_module, "_TELL_SECONDS", -1.0)
    reader.control._told.clear()
    for _ in range(2):
        reader.try_again()
    assert len([record for record in caplog.records if "waits" in record.getMessage()]) == 3, "told now and then"
    with stack.ledger.db.write() as c:
        c.execute(t.segments.update().where(here).values(manifest=whole))
    again = Reader(stack, topic)  # after a crash
    again.read()
    assert begun(stack) == ["2", "1"]
    assert position(stack) == 2


def test_an_allow_that_waits_for_kafka_keeps_only_its_subject_waiting(stack: Stack, trouble: Trouble) -> None:
    stack.ledger.forget("0", stack.key.subject("ann"), ["acme"], "test")
    trouble.away = True
    topic = [
        asks(1, "allow", "ann", "acme"),
        asks(2, "allow", "nobody", "acme"),
        asks(3, "forget", "bob", "acme"),
        asks(4, "forget", "ann", "acme"),
        asks(1, "allow", "nobody", "acme"),  # an id that another request has, which comes first
    ]
    reader = Reader(stack, topic)
    reader.read()
    assert begun(stack) == ["0", "3"]
    assert list(reader.heard.waiting) == [0, 3, 4]
    trouble.away = False
    reader.try_again()
    assert begun(stack) == ["0", "3", "4"]
    assert stack.key.subject("ann") in stack.ledger.suppressed("acme"), "forgotten since it was allowed"
    assert position(stack) == 5


def test_a_request_that_was_refused_behind_one_that_waits_never_acts_later(stack: Stack, trouble: Trouble) -> None:
    topic = [
        asks(1, "forget", "bob", "acme"),
        asks(3, "allow", "eve", "beta"),
        asks(4, "allow", "eve"),
        asks(5, "forget", "eve", "beta"),
    ]
    stack.ledger.forget("2", stack.key.subject("eve"), None, "test")
    trouble.damaged = True
    for _ in range(2):
        Reader(stack, topic).read()
        assert stack.ledger.suppressed_in(stack.key.subject("eve")) == {"beta"}
    trouble.damaged = False
    Reader(stack, topic).read()
    assert stack.ledger.suppressed_in(stack.key.subject("eve")) == {"beta"}
    assert begun(stack) == ["2", "5", "1"]


def test_a_purge_removes_no_request_that_waits(stack: Stack, trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    for module in ("purge", "control"):
        monkeypatch.setattr(
            f"riverdelta.registry.{module}.delete_request", lambda _, asked: removed.append(asked["offset"]) or True
        )
    trouble.damaged = True
    topic = [
        asks(0, "forget", "dan", "beta"),
        asks(1, "forget", "ann", "acme"),
        asks(2, "forget", "bob", "beta"),
        asks(2, "forget", "bob", "beta"),
    ]
    reader = Reader(stack, topic)
    reader.read(3)
    keeper = Keeper(stack.ledger, Settings(data=stack.settings.data), stack.store, orphan_seconds=0.0)
    while keeper.advance_forgets():
        stack.train("beta")
    assert {held.stage for held in stack.ledger.forgets()} == {Stage.PURGED}
    assert removed == [0]
    reader.read()
    assert removed == [0], "asked for again"
    trouble.damaged = False
    reader.try_again()
    assert removed == [0, 2]


@pytest.mark.parametrize("killed", ["", "before", "after"])
def test_a_purged_forget_is_removed_though_what_it_waited_for_was_met_by_an_earlier_process(
    stack: Stack, trouble: Trouble, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    removed: list[int] = []
    for module in ("purge", "control"):
        monkeypatch.setattr(
            f"riverdelta.registry.{module}.delete_request", lambda _, asked: removed.append(asked["offset"]) or True
        )
    trouble.damaged = True
    topic = [asks(0, "forget", "ann", "acme"), asks(1, "forget", "bob", "beta")]
    reader = Reader(stack, topic)
    reader.read()
    keeper = Keeper(stack.ledger, Settings(data=stack.settings.data), stack.store, orphan_seconds=0.0)
    while keeper.advance_forgets():
        stack.train("beta")
    assert removed == []
    trouble.damaged = False
    if killed:
        reader = Reader(stack, topic)
    if killed == "after":  # it was carried out, and the process killed before the removal
        reader.heard.note(SimpleNamespace(offset=0), done=True)
        Control(stack.ledger, stack.settings, reader.control._acts._wakeups, threading.Event())._begin("run", [0])
    else:
        reader.read() if killed else reader.try_again()
    assert removed == [1]


def test_what_waits_of_a_topic_made_again_is_carried_out_by_who_has_it_and_told_of_by_others(
    stack: Stack, trouble: Trouble, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        return [record.message for record in caplog.records if "made again" in record.message]

    trouble.damaged = True
    reader = Reader(stack, [asks(1, "forget", "ann", "acme")])
    reader.control._heard = {0: reader.heard}
    reader.read()
    reader.control._begin("", [])
    reader.control._begin("again", [0])
    assert len(told()) == 1
    assert "[0] wait in this process" in told()[0]
    for _ in range(2):
        Reader(stack, []).control._begin("again", [0])
    assert len(told()) == 2
    assert "[0], which waited, are lost" in told()[1]
    later = asks(2, "allow", "ann", "acme")
    [now] = reader.control._heard.values()
    record = SimpleNamespace(topic="c", partition=0, offset=0, value=json.dumps(later).encode())
    record.timestamp = time.time() * 1000
    assert not reader.control._hear(record, now), "it keeps its place behind what waits"
    trouble.damaged = False
    reader.control._begin("again", [0])
    assert begun(stack) == ["1"]
    assert stack.ledger.waiting_requests() == {("again", 0): [0]}


def test_what_kafka_let_go_while_it_waited_is_told(
    stack: Stack, trouble: Trouble, caplog: pytest.LogCaptureFixture
) -> None:
    trouble.damaged = True
    topic: list[Message | None] = [asks(1, "forget", "ann", "acme"), asks(2, "forget", "bob", "beta")]
    Reader(stack, topic).read()
    Reader(stack, [None, topic[1]]).read()
    assert position(stack) == 0, "nothing came since: it may be a moment's"
    Reader(stack, [None, topic[1], asks(3, "forget", "cy", "beta")]).read()
    assert [record.message for record in caplog.records if "offsets [0]" in record.message]
    assert position(stack) == 3


def test_what_is_done_behind_one_that_waits_is_told_from_it(stack: Stack) -> None:
    heard = Heard(stack.ledger, "run", 0)
    for offset in range(3):
        heard.note(SimpleNamespace(offset=offset), done=offset == 1)
    after = Heard(stack.ledger, "run", 0)
    assert after.first == 0
    assert [after.is_done(offset) for offset in range(4)] == [False, True, False, False]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_waits_and_crashes_all_ends_as_if_nothing_had(
    stack: Stack, trouble: Trouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    """Requests are carried out in an order of their subjects' own, each once."""
    dice = random.Random(seed)
    topic = [
        asks(
            number,
            dice.choice(["forget", "allow"]),
            dice.choice(["ann", "bob", "cy"]),
            *dice.choice([["acme"], ["beta"], ["later"], []]),
        )
        for number in range(14)
    ]

    class Crash(Exception):
        pass

    record = Ledger.record_heard

    def crashing(ledger: Ledger, *given: Any) -> None:
        if dice.random() < 0.15:
            raise Crash
        record(ledger, *given)
        if dice.random() < 0.15:
            raise Crash

    monkeypatch.setattr(Ledger, "record_heard", crashing)
    for _ in range(20):
        trouble.damaged, trouble.away = dice.random() < 0.5, dice.random() < 0.5
        try:
            reader = Reader(stack, topic)
            reader.read(dice.randrange(len(topic)))
            reader.try_again()
        except Crash:
            continue
    monkeypatch.setattr(Ledger, "record_heard", record)
    trouble.damaged = trouble.away = False
    reader = Reader(stack, topic)
    reader.read()
    assert not reader.heard.waiting
    other = two_versions(Settings.read(data=tmp_path / "other", kafka=Kafka(bootstrap="127.0.0.1:1")))
    other.ledger.create("beta", Recipe(), "test")
    Reader(other, topic).read()
    for who in ("ann", "bob", "cy"):
        wanted = other.ledger.suppressed_in(other.key.subject(who))
        assert stack.ledger.suppressed_in(stack.key.subject(who)) == wanted, (who, topic)
    assert sorted(begun(stack)) == sorted(begun(other))


def test_the_topic_is_heard_on_while_a_request_waits(
    settings: Settings, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kafka import KafkaProducer

    from riverdelta.streams.topics import ensure

    ensure(settings)
    stack = two_versions(settings)
    stack.ledger.create("beta", Recipe(), "test")
    trouble.damaged = True
    monkeypatch.setattr(control_module, "_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(control_module, "_MOST_WAITING", 2)
    stop = threading.Event()
    control = Control(stack.ledger, settings, Wakeups(settings), stop)
    hearing = threading.Thread(target=control.run)
    hearing.start()
    try:
        producer = KafkaProducer(**settings.kafka.for_kafka_python())

        def send(*messages: Message) -> None:
            for message in messages:
                producer.send(settings.topics.control, json.dumps(message).encode())
                producer.flush()

        send(asks(1, "forget", "ann", "acme"), asks(2, "forget", "bob", "beta"))
        assert wait(lambda: begun(stack) == ["2"], 30)
        send(asks(3, "forget", "cy", "acme"))
        run, _ = control._look()
        assert wait(lambda: len(stack.ledger.heard(run, 0)[1]) == 2, 30), "as many as may wait"
        send(asks(4, "allow", "bob", "beta"))
        trouble.damaged = False
        send(asks(5, "forget", "dan", "beta"))
        assert wait(lambda: sorted(begun(stack)) == ["1", "2", "3", "5"], 30)
        assert wait(lambda: not stack.ledger.suppressed_in(stack.key.subject("bob")), 30)
        producer.close()
    finally:
        stop.set()
        hearing.join(timeout=20)
    assert not hearing.is_alive()


def test_a_partition_that_was_full_is_heard_again(
    settings: Settings, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

    topic = settings.topics.control
    with contextlib.closing(KafkaAdminClient(**settings.kafka.for_kafka_python())) as admin:
        admin.create_topics({topic: {"num_partitions": 2, "replication_factor": 1}})
    stack = two_versions(settings)
    stack.ledger.create("beta", Recipe(), "test")
    trouble.damaged = True
    monkeypatch.setattr(control_module, "_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(control_module, "_MOST_WAITING", 4)
    monkeypatch.setitem(KafkaConsumer.DEFAULT_CONFIG, "max_poll_records", 2)  # so that some stay fetched and unheard
    with contextlib.closing(KafkaProducer(**settings.kafka.for_kafka_python())) as producer:
        for number in range(12):
            message = asks(number, "forget", f"s{number}", "acme")
            producer.send(topic, json.dumps(message).encode(), partition=0)
        for number in range(12, 16):
            message = asks(number, "forget", f"s{number}", "beta")
            producer.send(topic, json.dumps(message).encode(), partition=1)
        producer.flush()
    stop = threading.Event()
    hearing = threading.Thread(target=Control(stack.ledger, settings, Wakeups(settings), stop).run)
    hearing.start()
    try:
        assert wait(lambda: len(begun(stack)) == 4, 30), "the other partition's"
        trouble.damaged = False
        assert wait(lambda: len(begun(stack)) == 16, 30)
    finally:
        stop.set()
        hearing.join(timeout=20)
    assert not hearing.is_alive()
