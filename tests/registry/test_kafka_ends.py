"""Where the log ends is what the dataflow will call its places by, and is never beyond what was sent."""

import pytest
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient
from kafka import KafkaProducer
from kafka.errors import TopicAuthorizationFailedError

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Kafka, Settings
from riverdelta.registry import kafka_ends
from riverdelta.registry.kafka_ends import log_ends
from riverdelta.streams.topics import ensure
from tests.brokers import Broker


def test_the_log_ends_after_what_was_sent(settings: Settings, broker_process: Broker) -> None:
    assert log_ends(settings) == {}
    ensure(settings)
    name = settings.topics.events
    producer = KafkaProducer(**settings.kafka.for_kafka_python())
    for _ in range(3):
        producer.send(name, b"{}", partition=0).get(20)
    producer.close()
    admin = AdminClient(settings.kafka.for_confluent())
    run = str(admin.describe_topics(TopicCollection([name]))[name].result(timeout=20).topic_id)
    ends = log_ends(settings)
    assert 0 <= ends[run, 0] <= 3, ends
    if broker_process.apache:
        assert (ends[run, 0], ends[run, 1]) == (3, 0)


def test_a_cluster_that_is_away_does_not_say(tmp_path: object) -> None:
    with pytest.raises(Unavailable):
        log_ends(Settings.read(data=tmp_path, kafka=Kafka(bootstrap="127.0.0.1:1")))


def test_a_topic_that_cannot_be_looked_at_has_no_known_end(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Admin:  # a cluster's refusal cannot be had on demand
        def __enter__(self) -> "Admin":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing to close."""

        def describe_topics(self, _: list[str]) -> list[dict[str, object]]:
            return [{"error_code": TopicAuthorizationFailedError.errno, "partitions": []}]

    monkeypatch.setattr(kafka_ends, "admin", lambda _: Admin())
    with pytest.raises(Unavailable):
        log_ends(Settings.read(data=tmp_path, kafka=Kafka(bootstrap="127.0.0.1:1")))


def test_where_no_kafka_is_known_nothing_was_sent(tmp_path: object) -> None:
    assert log_ends(Settings.read(data=tmp_path, kafka=Kafka(bootstrap=""))) == {}
