"""The dataflow on a real broker: producers of every kind, crashes, feedback, forgetting."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from kafka import KafkaProducer

from riverdelta.core.errors import BadInput
from riverdelta.core.events import MAX_EVENT_BYTES
from riverdelta.core.keys import SubjectKey
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Cause, Increment, Ledger
from riverdelta.streams import topics
from riverdelta.streams.cluster import free_ports, run
from riverdelta.streams.dead_letters import list_dead_letters, replay_dead_letters
from riverdelta.streams.publish import publish
from tests.brokers import TansuBroker
from tests.conftest import make_settings

from .flow import count, entries, flowing, texts, until


def line(**event: Any) -> bytes:
    return json.dumps(event).encode()


def recipe(count: int = 8, age: float = 0.3) -> Recipe:
    return Recipe.from_dict({"seal": {"count": count, "age": age, "linger": age}})


@pytest.fixture
def ledger(settings: Settings) -> Any:
    topics.ensure(settings)
    opened = Ledger.open(settings.ledger_url)
    yield opened
    opened.close()


def send(settings: Settings, *records: tuple[bytes | None, bytes]) -> None:
    """With kafka-python, which hashes keys with murmur2."""
    producer = KafkaProducer(**settings.kafka.for_kafka_python())
    for key, value in records:
        producer.send(settings.topics.events, key=key, value=value).get(timeout=20)
    producer.close()


def test_events_of_every_client_become_entries_once(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    ledger.create("ada", recipe(), "test")
    publish(settings, [line(adapter="ada", text=f"cli-{n}") for n in range(20)])
    send(settings, *((f"k{n}".encode(), line(adapter="ada", text=f"murmur-{n}")) for n in range(10)))
    send(settings, *((None, line(adapter="ada", text=f"keyless-{n}")) for n in range(10)))
    librdkafka = Producer(settings.kafka.for_confluent())  # hashes keys with CRC32
    for n in range(10):
        librdkafka.produce(settings.topics.events, key=f"k{n}", value=line(adapter="ada", text=f"crc-{n}"))
    assert librdkafka.flush(20) == 0
    expected = 50
    twice = line(adapter="ada", id="7", source="crm", text="twice")
    big = line(adapter="ada", text="x" * MAX_EVENT_BYTES)
    send(settings, (b"a", twice), (b"b", b"junk"), (b"c", twice), (b"d", big), (b"e", line(adapter="nobody", text="a")))
    with flowing(settings, tmp_path) as flow:
        until(lambda: count(ledger) >= expected + 1)
        until(lambda: len(list_dead_letters(settings)) == 3)
        learned = texts(settings, ledger, "ada")
        assert len(learned) == expected + 1
        assert set(learned.values()) == {1}
        letters = {letter.reason: letter for letter in list_dead_letters(settings)}
        assert letters.keys() == {"malformed", "too_large", "unknown_adapter"}
        assert (letters["malformed"].key, letters["malformed"].value) == (b"b", b"junk")
        assert letters["too_large"].value == big
        assert letters["too_large"].topic == settings.topics.events

        ledger.create("nobody", recipe(), "test")
        assert replay_dead_letters(settings, lambda letter: letter.reason == "unknown_adapter") == (1, 0)
        until(lambda: texts(settings, ledger, "nobody") == {"a": 1})
        assert flow.stop() == 0
    assert ledger.leases() == []


def test_a_little_is_sealed_at_once_while_nothing_waits_to_be_learned(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.create("ada", Recipe.from_dict({"seal": {"count": 4, "age": 60.0, "linger": 0.1}}), "test")
    with flowing(settings, tmp_path) as flow:
        publish(settings, [line(adapter="ada", text="first")])
        until(lambda: count(ledger) == 1)
        publish(settings, [line(adapter="ada", text="second")])
        publish(settings, [line(adapter="ada", text=f"full-{n}") for n in range(4)])
        until(lambda: count(ledger) == 5)
        for number in (1, 2):
            assert count(ledger) == 5, "what is left waits for what is sealed to be learned"
            ledger.set_aside("ada", number, 0, 0, Cause.ERROR, "", "test")
        until(lambda: count(ledger) == 6)
        assert flow.stop() == 0
    assert [segment.trigger for segment in ledger.segments("ada")] == ["linger", "count", "linger"]


def test_a_drift_asks_for_one_segment_early(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    ledger.create("ada", Recipe.from_dict({"seal": {"count": 4, "age": 60.0, "linger": 0.1}}), "test")
    with flowing(settings, tmp_path) as flow:
        publish(settings, [line(adapter="ada", text="first")])
        until(lambda: count(ledger) == 1)
        ledger.commit(Increment("ada", 1, 0, 0, "d" * 64, "", (1,), {}, {"drift": 1}), "test")
        publish(settings, [line(adapter="ada", text=f"full-{n}") for n in range(4)])
        until(lambda: count(ledger) == 5)
        publish(settings, [line(adapter="ada", text="early")])
        until(lambda: count(ledger) == 6)
        publish(settings, [line(adapter="ada", text="later")])
        for number in (2, 3):
            assert count(ledger) == 6, "one that was asked for waits already"
            ledger.set_aside("ada", number, 0, 1, Cause.ERROR, "", "test")
        until(lambda: count(ledger) == 7)
        assert flow.stop() == 0
    assert [segment.trigger for segment in ledger.segments("ada")] == ["linger", "count", "drift", "linger"]


@pytest.mark.apache
@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed")
def test_events_of_kcat(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    ledger.create("ada", recipe(), "test")
    values = b"\n".join(b"k%d:" % n + line(adapter="ada", text=f"crc-{n}") for n in range(10))
    command = ["kcat", "-P", "-b", settings.kafka.bootstrap, "-t", settings.topics.events, "-K", ":"]
    subprocess.run(command, input=values, check=True, timeout=60)
    with flowing(settings, tmp_path) as flow:
        until(lambda: count(ledger) == 10)
        assert flow.stop() == 0


def test_a_line_that_is_no_event_is_named(settings: Settings, ledger: Ledger) -> None:
    with pytest.raises(BadInput, match=r"Line 3 is not an event \(malformed\).*from line 3 on: the 2 events before"):
        publish(settings, [line(adapter="ada", text="a"), line(adapter="ada", text="b"), b"junk"])


def test_killed_in_mid_stream_every_event_is_one_entry(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    settings.streams.unknown_adapters = "create"
    total, names = 3000, [f"a{n}" for n in range(7)]
    events = [line(adapter=names[n % 7], text=f"t{n}", id=str(n), source="s") for n in range(total)]
    publish(settings, events[:1000])
    with flowing(settings, tmp_path) as flow:
        for start in (1000, 2000):
            until(lambda: count(ledger) > start - 900)  # noqa: B023 - called now
            publish(settings, events[start : start + 500])
            flow.kill()
            publish(settings, events[start + 500 : start + 1000] + events[start : start + 20])
            flow.start()
        until(lambda: count(ledger) >= total)
        assert flow.stop() == 0
    learned = {name: entries(settings, ledger, name) for name in names}
    assert sum(map(len, learned.values())) == total
    for number, name in enumerate(names):
        assert sorted(said["text"] for _, said in learned[name] if said) == sorted(
            f"t{n}" for n in range(number, total, 7)
        )
    assert list_dead_letters(settings) == []


def test_feedback_and_its_answer_meet_in_either_order(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    ledger.create("ada", recipe(), "test")

    def asked(response: str) -> bytes:
        return line(type="interaction", adapter="ada", response=response, digest="d" * 64, prompt="q", completion="a")

    def told(response: str, **said: Any) -> bytes:
        return line(type="feedback", adapter="ada", response=response, **said)

    send(settings, (b"1", asked("r1")), (b"2", told("r2", correction="c")), (b"3", asked("r3")))
    with flowing(settings, tmp_path) as flow:
        until(lambda: flow.told("reading"))
        send(settings, (b"4", told("r1", rating=1)), (b"5", told("r3", rating=-1)), (b"6", told("r9", rating=1)))
        until(lambda: count(ledger) == 1)
        flow.kill()  # what waits is collected again from Kafka
        flow.start()
        send(settings, (b"7", asked("r2")), (b"8", told("r1", rating=1)))
        until(lambda: count(ledger) == 2)
        assert flow.stop() == 0
    written = [entry.written_by for _, held in ledger.manifests("ada") for entry in held.entries]
    assert written == ["d" * 64, ""]
    assert [said for _, said in entries(settings, ledger, "ada")] == [
        {"type": "example", "prompt": "q", "completion": "a"},
        {"type": "example", "prompt": "q", "completion": "c"},
    ]


def test_what_is_open_is_forgotten_before_the_fence_is_acknowledged(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.create("ada", recipe(count=4, age=60.0), "test")
    ann = SubjectKey.open(settings.keys_dir).subject("ann")
    send(settings, (None, line(adapter="ada", subject="ann", text="a1")), (None, line(adapter="ada", text="b")))
    run = _incarnation(settings)
    with flowing(settings, tmp_path) as flow:
        until(lambda: bool(ledger.positions(run)))  # they have been read
        fence = ledger.forget("request", ann, ["ada"], "test").fence
        until(lambda: not ledger.unacknowledged(fence, ["stream"]), 10)
        send(settings, (None, line(adapter="ada", subject="ann", text="a2")))
        ledger.allow(ann, ["ada"], "test")
        send(settings, (None, line(adapter="ada", subject="ann", text="a3")))
        until(lambda: count(ledger) == 4)
        assert flow.stop() == 0
    said = [held and held["text"] for _, held in entries(settings, ledger, "ada")]
    assert said.count(None) >= 1  # a2 came before or after `allow`, as the threads fell
    assert {"b", "a3"} <= set(said)
    assert "a1" not in said


def _incarnation(settings: Settings) -> str:
    from confluent_kafka import TopicCollection
    from confluent_kafka.admin import AdminClient

    name = settings.topics.events
    admin = AdminClient(settings.kafka.for_confluent())
    return str(admin.describe_topics(TopicCollection([name]))[name].result(timeout=20).topic_id)


def test_several_workers_share_the_partitions(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    settings.streams.unknown_adapters = "create"
    settings.streams.workers = 2
    events = [line(adapter=f"a{n % 10}", text=f"t{n}") for n in range(500)]
    publish(settings, events)
    with flowing(settings, tmp_path) as flow:
        until(lambda: count(ledger) >= 500)
        assert flow.stop() == 0
    assert sum(sum(texts(settings, ledger, f"a{n}").values()) for n in range(10)) == 500


def test_a_memory_only_broker_that_restarts_is_another_log(tmp_path: Path, tiny_base: Path) -> None:
    broker = TansuBroker()
    try:
        settings = make_settings(tmp_path, broker.bootstrap, tiny_base)
        topics.ensure(settings)
        ledger = Ledger.open(settings.ledger_url)
        ledger.create("ada", recipe(), "test")
        with flowing(settings, tmp_path) as flow:
            publish(settings, [line(adapter="ada", text=f"before-{n}") for n in range(3)])
            until(lambda: count(ledger) == 3)
            broker.kill()
            broker.restart()
            topics.ensure(settings)
            publish(settings, [line(adapter="ada", text=f"after-{n}") for n in range(5)])
            until(lambda: count(ledger) == 8)
            assert flow.told("made again")
            assert flow.stop() == 0
        assert set(texts(settings, ledger, "ada").values()) == {1}
        ledger.close()
    finally:
        broker.stop()


def test_processes_of_several_machines_are_one_dataflow(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    ledger.create("ada", recipe(count=4), "test")
    settings.streams.cluster = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    machines = []
    for index in range(2):
        (folder := tmp_path / str(index)).mkdir()
        own = settings.model_copy(deep=True)
        own.streams.process = index
        machines.append((own, folder))
    for begin in (0, 20):
        publish(settings, [line(adapter="ada", text=f"n-{n}") for n in range(begin, begin + 20)])
        with flowing(*machines[0]) as first, flowing(*machines[1]) as second:
            until(lambda wanted=begin + 20: count(ledger) == wanted)  # type: ignore[misc]
            first.kill()
            assert second.process.wait(30) != 0
    assert texts(settings, ledger, "ada") == {f"n-{n}": 1 for n in range(40)}


def test_a_process_that_the_cluster_does_not_name_is_refused(settings: Settings) -> None:
    settings.streams.cluster, settings.streams.process = "127.0.0.1:1,127.0.0.1:2", 2
    with pytest.raises(BadInput, match="names 2 addresses"):
        run(settings)
