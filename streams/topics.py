"""The topics: created where missing, verified where they exist."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from riverdelta.core.errors import BadInput, Refused, Unavailable
from riverdelta.core.settings import Settings

from .access import check_access

log = logging.getLogger(__name__)

_HOUR_MS = 3_600_000
_ANSWER_MS = 5000  # of silence, and the broker is said to be away; whoever is patient asks again
# An event of the largest size that the contract allows fits into the dead letters with its headers.
_DEAD_LETTER_BYTES = 4 * 1024 * 1024


def wanted(settings: Settings) -> dict[str, tuple[int, dict[str, str]]]:
    """Per topic, its partitions and configuration. Wake-ups are hints: an hour of them is plenty."""
    topics = settings.topics
    kept = {"cleanup.policy": "delete", "retention.ms": str(int(topics.retention_hours * _HOUR_MS))}
    brief = {"cleanup.policy": "delete", "retention.ms": str(_HOUR_MS)}
    return {
        topics.events: (topics.partitions, kept),
        topics.dead_letters: (1, {**kept, "max.message.bytes": str(_DEAD_LETTER_BYTES)}),
        topics.control: (1, kept),
        topics.jobs: (1, brief),
        topics.releases: (1, brief),
    }


def ensure(settings: Settings) -> dict[str, int]:
    """Create what is missing and verify what is there; the number of partitions of each topic.

    `Unavailable` when no broker answers, `Refused` when this client may not, `BadInput` when a topic that exists
    cannot serve: the events topic must not be compacted, which would remove events that were never learned.
    """
    with admin(settings) as client:
        plan = wanted(settings)
        there = _partitions(client, list(plan))
        for name in plan.keys() - there.keys():
            _create(client, name, *plan[name], settings.topics.replication)
        client.wait_for_topics(list(plan), timeout_ms=15_000)
        found = _partitions(client, list(plan))
        if found[settings.topics.events] != settings.topics.partitions:
            log.info(
                "topic left as it is",
                extra={"topic": settings.topics.events, "partitions": found[settings.topics.events]},
            )
        _check_compaction(client, settings)
    return found


@contextlib.contextmanager
def admin(settings: Settings) -> Iterator[Any]:
    """kafka-python's admin client; its errors as ours."""
    from kafka.admin import KafkaAdminClient
    from kafka.errors import (
        AuthorizationError,
        ClusterAuthorizationFailedError,
        KafkaError,
        TopicAuthorizationFailedError,
    )

    where = settings.kafka.bootstrap
    check_access(settings.kafka)
    try:
        with contextlib.closing(
            KafkaAdminClient(**settings.kafka.for_kafka_python(), bootstrap_timeout_ms=_ANSWER_MS)
        ) as client:
            yield client
    except (AuthorizationError, ClusterAuthorizationFailedError, TopicAuthorizationFailedError) as error:
        raise Refused(
            f"{where} does not let this client do that: {error!r}.",
            "Create the topics with another client (docs/operations.md), or grant it more.",
        ) from error
    except (KafkaError, OSError) as error:
        raise Unavailable(f"The broker at {where} does not answer: {error!r}.", "Is it running?") from error


def _partitions(client: Any, names: list[str]) -> dict[str, int]:
    described = client.describe_topics(names)
    return {topic["name"]: len(topic["partitions"]) for topic in described if not topic["error_code"]}


def _create(client: Any, name: str, partitions: int, configs: dict[str, str], replication: int) -> None:
    from kafka.errors import InvalidReplicationFactorError, TopicAlreadyExistsError

    asked = {name: {"num_partitions": partitions, "replication_factor": replication, "configs": configs}}
    try:
        client.create_topics(asked)
        log.info("topic created", extra={"topic": name, "partitions": partitions})
    except TopicAlreadyExistsError:
        pass  # somebody else was faster
    except InvalidReplicationFactorError as error:
        raise BadInput(
            f"The cluster cannot keep {replication} copies of {name}: {error!r}.",
            "Set topics.replication to at most the number of brokers.",
        ) from error


def _check_compaction(client: Any, settings: Settings) -> None:
    from kafka.admin import ConfigResource, ConfigResourceType
    from kafka.errors import KafkaError

    name = settings.topics.events
    try:
        held = client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")
    except KafkaError as error:  # the embedded broker has no such call, and a cluster may not allow it
        log.debug("configuration of %s not read: %r", name, error)
        return
    policy = _config(held, name, "cleanup.policy")
    if "compact" in policy:
        raise BadInput(
            f"The topic {name} is compacted ({policy}): Kafka would remove events that were never learned.",
            "Set its cleanup.policy to delete, or name another topic.",
        )


def _config(held: Any, topic: str, name: str) -> str:
    entry = held.get("topic", {}).get(topic, {}).get(name, {})
    return str(entry.get("value", ""))
