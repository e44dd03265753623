"""What only a broker with durable, trimmable logs can show: topics made again, partitions added, retention, outages."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from riverdelta.core.errors import BadInput
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Ledger
from riverdelta.streams import topics
from riverdelta.streams.publish import publish
from tests.brokers import Broker

from .flow import count, flowing, texts, until

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


def test_partitions_added_while_running_are_read(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    admin = AdminClient(settings.kafka.for_confluent())
    name = settings.topics.events
    with flowing(settings, tmp_path) as flow:
        publish(settings, numbered("two", 10))
        until(lambda: count(ledger) == 10)
        admin.create_partitions([NewPartitions(name, 6)])[name].result(timeout=20)
        until(lambda: topics.ensure(settings)[name] == 6)
        from kafka import KafkaProducer

        producer = KafkaProducer(**settings.kafka.for_kafka_python())
        for number, value in enumerate(numbered("six", 12)):
            producer.send(name, partition=number % 6, value=value).get(timeout=20)
        producer.close()
        until(lambda: count(ledger) == 22)
        assert flow.stop() == 0
    assert set(texts(settings, ledger, "ada").values()) == {1}


def test_what_retention_removed_is_said(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    admin = AdminClient(settings.kafka.for_confluent())
    name = settings.topics.events
    with flowing(settings, tmp_path) as flow:
        publish(settings, numbered("first", 10))
        until(lambda: count(ledger) == 10)
        assert flow.stop() == 0
    last = publish(settings, numbered("lost", 10)).last
    cut = [TopicPartition(name, part, offset + 1) for part, offset in last.items()]
    for future in admin.delete_records(cut).values():
        future.result(timeout=20)
    publish(settings, numbered("kept", 10))
    with flowing(settings, tmp_path) as flow:
        until(lambda: count(ledger) == 20)
        assert flow.told("retention has removed records that were not learned yet")
        assert flow.stop() == 0
    assert set(texts(settings, ledger, "ada")) == {f"{word}-{n}" for word in ("first", "kept") for n in range(10)}


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
    if not broker_process.killable:
        pytest.skip("the cluster is not ours to kill")
    with flowing(settings, tmp_path) as flow:
        publish(settings, [*numbered("before", 20)])
        until(lambda: count(ledger) > 0)
        broker_process.kill()
        time.sleep(3)
        broker_process.restart()
        publish(settings, numbered("after", 20))
        until(lambda: count(ledger) >= 40)
        assert flow.stop() == 0
    assert set(texts(settings, ledger, "ada").values()) == {1}
