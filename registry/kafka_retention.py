"""How long Kafka keeps records, as each topic is set now: a certificate names no time that was not read there."""

import logging
from collections.abc import Collection

from riverdelta.core.settings import Settings

from .kafka_admin import admin

log = logging.getLogger(__name__)
_FOREVER_MS = 100 * 365 * 86_400_000  # whoever says more means: for ever


def retention(settings: Settings, topics: Collection[str]) -> dict[str, float]:
    """Per topic, the seconds after which retention removes a record.

    Left out are topics that keep records for ever or are compacted, and all that a cluster does not tell: one that is
    away, does not let this client ask, or has no such call, as the embedded broker.
    """
    if not settings.kafka.bootstrap or settings.running().get("embedded") == "true":
        return {}
    from kafka.admin import ConfigResource, ConfigResourceType
    from kafka.errors import KafkaError

    wanted = {"cleanup.policy": None, "retention.ms": None}
    try:
        with admin(settings) as client:
            asked = [ConfigResource(ConfigResourceType.TOPIC, topic, wanted) for topic in sorted(topics)]
            held = client.describe_configs(asked, config_filter="all").get("topic", {})
        configs = {topic: {name: each["value"] for name, each in held.get(topic, {}).items()} for topic in topics}
        kept = {
            topic: int(config["retention.ms"])
            for topic, config in configs.items()
            if config.get("cleanup.policy") == "delete" and config.get("retention.ms")
        }
    except (KafkaError, OSError, ValueError, KeyError) as error:
        log.warning("How long Kafka keeps %s is not known: it does not say (%r)", ", ".join(sorted(topics)), error)
        return {}
    return {topic: ms / 1000 for topic, ms in kept.items() if 0 <= ms < _FOREVER_MS}
