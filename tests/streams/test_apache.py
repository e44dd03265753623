"""What only a broker with durable, trimmable logs can show: topics made again, partitions added, retention, outages."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from riverdelta.app.trace import trace
from riverdelta.core.errors import BadInput, NotFound
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Ledger
from riverdelta.streams import topics
from riverdelta.streams.publish import publish
from tests.brokers import Broker

from .flow import count, entries, flowing, texts, until

pytestmark = pytest.mark.apache


@pytest.fixture
def ledger(settings: Settings) -> Any:
    topics.ensure(settings)
    opened = Ledger.open(settings.ledger_url)
    opened.create("ada", Recipe.from_dict({"seal": {"count": 8, "age": 0.3}}), "test")
    yield opened
    opened.close()


def lines(*texts: str) -> list[bytes]:
    return [json.dumps({"adapter": "ada", "text": text}).encode() for text in texts]


def numbered(word: str, number: int) -> list[bytes]:
    return lines(*(f"{word}-{n}" for n in range(number)))


def test_a_topic_made_again_is_read_from_its_start(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    admin = AdminClient(settings.kafka.for_confluent())
    name = settings.topics.events
    with flowing(settings, tmp_path) as flow:
        publish(settings, numbered("old", 30))
        until(lambda: count(ledger) == 30)
        admin.delete_topics([name])[name].result(timeout=20)
        until(lambda: flow.told("does not exist"))
        topics.ensure(settings)
        publish(settings, numbered("new", 50))  # more than there were: their offsets pass the old ones
        until(lambda: count(ledger) >= 80)
        assert flow.told("made again")
        assert flow.stop() == 0
    assert texts(settings, ledger, "ada") == {
        **{f"old-{n}": 1 for n in range(30)},
        **{f"new-{n}": 1 for n in range(50)},
    }


def test_a_topic_made_again_while_nobody_read_it(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    admin = AdminClient(settings.kafka.for_confluent())
    name = settings.topics.events
    with flowing(settings, tmp_path) as flow:
        publish(settings, numbered("old", 30))
        until(lambda: count(ledger) == 30)
        flow.kill()
        admin.delete_topics([name])[name].result(timeout=20)
        until(lambda: name not in admin.list_topics(timeout=20).topics)
        topics.ensure(settings)
        publish(settings, numbered("new", 20))  # fewer than there were: no old offset exists any more
        flow.start()
        until(lambda: count(ledger) == 50)
        assert flow.stop() == 0
    assert set(texts(settings, ledger, "ada").values()) == {1}


def test_topics_missing_at_the_start_are_made(settings: Settings, tmp_path: Path) -> None:
    ledger = Ledger.open(settings.ledger_url)
    ledger.create("ada", Recipe.from_dict({"seal": {"count": 8, "age": 0.3}}), "test")
    with flowing(settings, tmp_path) as flow:
        until(lambda: flow.told("reading"))
        assert flow.told("topic created")
        publish(settings, numbered("first", 10))
        until(lambda: count(ledger) == 10)
        assert flow.stop() == 0
    ledger.close()


def test_partitions_are_raised_while_events_flow(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    settings.topics.partitions = 4
    admin = AdminClient(settings.kafka.for_confluent())
    name = settings.topics.events
    admin.create_partitions([NewPartitions(name, 4)])[name].result(timeout=20)
    until(lambda: topics.ensure(settings)[name] == 4)
    sent = 0
    with flowing(settings, tmp_path) as flow:
        producer = Producer({**settings.kafka.for_confluent(), "topic.metadata.refresh.interval.ms": 500})
        raised = False
        while sent < 400 or len(producer.list_topics(name, timeout=20).topics[name].partitions) < 8:
            producer.produce(name, lines(f"t-{sent}")[0], key=str(sent))  # keys move to other partitions meanwhile
            producer.poll(0.005)
            sent += 1
            if sent == 150:
                until(lambda: count(ledger) > 0)
                admin.create_partitions([NewPartitions(name, 8)])[name].result(timeout=20)
                raised = True
        for number in range(8):
            producer.produce(name, lines(f"at-{number}")[0], partition=number)
        assert raised
        assert producer.flush(30) == 0
        until(lambda: count(ledger) == sent + 8)
        flow.kill()
        flow.start()
        publish(settings, numbered("again", 16))
        until(lambda: count(ledger) == sent + 24)
        assert flow.stop() == 0
    found = entries(settings, ledger, "ada")
    assert len({place for place, _ in found}) == len(found) == sent + 24
    assert {partition for (partition, _), _ in found} == set(range(8))


def test_one_adapter_on_several_partitions(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    """Its events come on both, unevenly, with copies on the other partition; the owner dies twice."""
    name = settings.topics.events
    producer = Producer(settings.kafka.for_confluent())
    total = 600
    with flowing(settings, tmp_path) as flow:
        for number in range(total):
            event = {"adapter": "ada", "text": f"t-{number}", "id": str(number), "source": "s"}
            value = json.dumps(event).encode()
            producer.produce(name, value, partition=int(number % 7 == 0))
            if number % 5 == 0:
                producer.produce(name, value, partition=1 - int(number % 7 == 0))
            if number in (200, 400):
                assert producer.flush(30) == 0
                until(lambda: count(ledger) > 0)
                flow.kill()
                flow.start()
        assert producer.flush(30) == 0
        until(lambda: count(ledger) >= total)
        assert flow.stop() == 0
    assert texts(settings, ledger, "ada") == {f"t-{number}": 1 for number in range(total)}


def test_what_retention_removed_is_said_and_recorded(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    admin = AdminClient(settings.kafka.for_confluent())
    name = settings.topics.events
    with flowing(settings, tmp_path) as flow:
        publish(settings, numbered("first", 10))
        until(lambda: count(ledger) == 10)
        assert flow.stop() == 0
    publish(settings, numbered("lost", 10))
    with flowing(settings, tmp_path) as flow:
        until(lambda: count(ledger) == 20)
        flow.process.send_signal(signal.SIGSTOP)
        last = publish(settings, numbered("gone", 10)).last
        cut = [TopicPartition(name, part, offset + 1) for part, offset in last.items()]
        for future in admin.delete_records(cut).values():
            future.result(timeout=20)
        flow.kill()
    publish(settings, numbered("kept", 10))
    with flowing(settings, tmp_path) as flow:
        until(lambda: count(ledger) == 30)
        assert flow.told("retention has removed records that were not learned yet")
        assert flow.stop() == 0
    assert set(texts(settings, ledger, "ada")) == {
        f"{word}-{n}" for word in ("first", "lost", "kept") for n in range(10)
    }
    gaps = {gap.partition: gap for gap in ledger.gaps()}
    assert sum(gap.to - gap.first for gap in gaps.values()) >= 10
    assert all(gap.to == last[part] + 1 for part, gap in gaps.items())
    part, gap = max(gaps.items())
    with pytest.raises(NotFound, match="removed by retention before it was read"):
        trace(settings, f"{part}:{gap.to - 1}", "", "", False)


def test_a_compacted_topic_is_refused(settings: Settings) -> None:
    admin = AdminClient(settings.kafka.for_confluent())
    name = settings.topics.events
    made = admin.create_topics([NewTopic(name, 1, 1, config={"cleanup.policy": "compact"})])
    made[name].result(timeout=20)
    with pytest.raises(BadInput, match="is compacted"):
        topics.ensure(settings)


def test_a_broker_that_dies_and_returns_loses_nothing(
    settings: Settings, ledger: Ledger, broker_process: Broker, tmp_path: Path
) -> None:
    _away(settings, ledger, broker_process, tmp_path, 3.0)


@pytest.mark.soak
def test_a_broker_that_is_away_for_a_minute_loses_nothing(
    settings: Settings, ledger: Ledger, broker_process: Broker, tmp_path: Path
) -> None:
    _away(settings, ledger, broker_process, tmp_path, 60.0)


def _away(settings: Settings, ledger: Ledger, broker: Broker, folder: Path, seconds: float) -> None:
    """The broker goes while events flow, and comes back; the dataflow says so, and one that starts waits for it."""
    if not broker.killable:
        pytest.skip("the cluster is not ours to kill")
    with flowing(settings, folder) as flow:
        publish(settings, numbered("before", 20))
        until(lambda: count(ledger) > 0)
        broker.kill()
        time.sleep(seconds)
        until(lambda: flow.told("does not describe"))
        flow.kill()
        flow.start()
        until(lambda: flow.told("looking at the topics: waiting"))
        broker.restart()
        publish(settings, numbered("after", 20))
        until(lambda: count(ledger) >= 40)
        assert flow.stop() == 0
    assert set(texts(settings, ledger, "ada").values()) == {1}
