"""A request that has been carried out is removed from Kafka, and nothing after it."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import TopicAuthorizationFailedError, UnknownTopicOrPartitionError

from riverdelta.core.settings import Kafka, Settings
from riverdelta.registry import kafka_delete
from riverdelta.registry.kafka_delete import delete_request
from riverdelta.streams.topics import ensure


@pytest.mark.apache
def test_the_request_goes_and_what_follows_stays(settings: Settings) -> None:
    ensure(settings)
    topic = settings.topics.control
    producer = KafkaProducer(**settings.kafka.for_kafka_python())
    asked = producer.send(topic, b"ann", partition=0).get(20)
    producer.send(topic, b"bob", partition=0).get(20)
    producer.close()
    admin = KafkaAdminClient(**settings.kafka.for_kafka_python())
    [held] = admin.describe_topics([topic])
    admin.close()
    place = {"topic": topic, "incarnation": f"{held['topic_id']}", "partition": 0, "offset": asked.offset}
    assert delete_request(settings, place)
    assert delete_request(settings, place)
    consumer = KafkaConsumer(**settings.kafka.for_kafka_python(), auto_offset_reset="earliest")
    part = TopicPartition(topic, 0)
    consumer.assign([part])
    consumer.seek_to_beginning(part)
    assert [record.value for record in consumer.poll(timeout_ms=20_000).get(part, [])] == [b"bob"]
    consumer.close()


def test_a_cluster_that_is_away_leaves_it_to_retention(tmp_path: object) -> None:
    away = Settings.read(data=tmp_path, kafka=Kafka(bootstrap="127.0.0.1:1"))
    assert not delete_request(away, {"topic": "t", "incarnation": "x", "partition": 0, "offset": 3})


@pytest.mark.parametrize(
    ("error", "run", "gone"),
    [
        (UnknownTopicOrPartitionError.errno, "0", True),
        (0, "another", True),
        (TopicAuthorizationFailedError.errno, "0", False),  # it shows no incarnation either
    ],
)
def test_only_a_topic_that_is_gone_has_taken_the_request_with_it(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, error: int, run: str, gone: bool
) -> None:
    told: dict[str, Any] = {"error_code": error, "topic_id": run, "partitions": []}
    cluster = SimpleNamespace(describe_topics=lambda _: [told])  # a cluster's refusal cannot be had on demand
    monkeypatch.setattr(kafka_delete, "admin", lambda _: contextlib.nullcontext(cluster))
    asked = {"topic": "t", "incarnation": "run", "partition": 0, "offset": 3}
    assert delete_request(Settings.read(data=tmp_path), asked) is gone
