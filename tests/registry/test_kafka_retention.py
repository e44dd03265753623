"""What a certificate says of how long Kafka keeps what was forgotten is read from Kafka, or not said."""

import pytest

from riverdelta.core.settings import Kafka, Settings
from riverdelta.core.times import later
from riverdelta.registry.evidence import kafka_still_holds
from riverdelta.registry.kafka_admin import admin
from riverdelta.registry.kafka_retention import retention
from riverdelta.registry.ledger import Forget, Stage
from riverdelta.streams.topics import ensure
from tests.brokers import Broker

AT = "2026-05-03T10:00:00.000Z"
HOUR = 3600.0


def held(settings: Settings) -> dict[str, str | None]:
    """Per topic, until when Kafka holds what was forgotten by a message, as the manifest says."""
    asked = {"topic": settings.topics.control, "incarnation": "run", "partition": 0, "offset": 3}
    forget = Forget("r1", "0" * 64, False, {"acme": 1}, 1, Stage.REBUILT, AT, "op", "", {"asked": asked})
    said = kafka_still_holds([("run", 0, 7, AT)], forget, settings)
    return {place["topic"]: place["removable_at"] for place in said}


def configure(settings: Settings, topic: str, **configs: str) -> None:
    """Set a topic as an operator may have."""
    from kafka.admin import ConfigResource, ConfigResourceType

    with admin(settings) as client:
        named = {name.replace("_", "."): value for name, value in configs.items()}
        client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, named)])


@pytest.mark.apache
def test_the_time_is_what_the_topic_says(settings: Settings) -> None:
    """Whatever the settings say, which hold where this project made the topics."""
    ensure(settings)
    topics = settings.topics
    configure(settings, topics.events, retention_ms="7200000")
    assert held(settings)[topics.events] == later(AT, 2 * HOUR)
    assert held(settings)[topics.control] == later(AT, topics.retention_hours * HOUR)


@pytest.mark.apache
def test_no_time_is_said_where_retention_removes_nothing(settings: Settings) -> None:
    ensure(settings)
    topics = settings.topics
    configure(settings, topics.events, retention_ms="-1")
    configure(settings, topics.dead_letters, retention_ms=str(2**63 - 1))
    configure(settings, topics.control, cleanup_policy="compact")
    assert held(settings) == {topics.events: None, topics.dead_letters: None, topics.control: None}
    assert retention(settings, ["there-is-none"]) == {}


def test_a_broker_that_does_not_tell_has_none(settings: Settings, broker_process: Broker) -> None:
    if broker_process.apache:
        pytest.skip("of the embedded broker")
    ensure(settings)
    assert set(held(settings).values()) == {None}


@pytest.mark.parametrize("bootstrap", ["127.0.0.1:1", ""])
def test_a_cluster_that_is_away_keeps_no_purge_waiting(bootstrap: str) -> None:
    assert set(held(Settings(kafka=Kafka(bootstrap=bootstrap))).values()) == {None}
