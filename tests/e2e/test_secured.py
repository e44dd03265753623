"""A whole stack on a broker that wants SASL and TLS: what the settings file says of it once, every part uses."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaProducer

from tests.secured import SecuredBroker, start

from .river import River, eventually, facts, question

pytestmark = pytest.mark.apache


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    broker = start(tmp_path_factory.mktemp("secured"))
    yield broker
    broker.stop()


def test_one_settings_block_is_enough(secured: SecuredBroker, tmp_path: Path, tiny_base: Path) -> None:
    kafka = secured.kafka("SCRAM-SHA-512")
    config = tmp_path / "riverdelta.toml"
    names = ("bootstrap", "security", "sasl_mechanism", "username", "ca_file")
    config.write_text("\n".join(["[kafka]", *(f"{name} = {json.dumps(getattr(kafka, name))}" for name in names)]))
    river = River(
        tmp_path,
        tiny_base,
        RIVERDELTA_CONFIG=str(config),
        RIVERDELTA_KAFKA__PASSWORD=kafka.password,
        RIVERDELTA_SERVING__INTERACTIONS='["safe"]',
    )
    try:
        river.start()
        river.create("safe")
        events = [*facts("safe", ["a1"]), *facts("safe", ["b2"], subject="ann")]
        (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
        river.tell("publish", str(tmp_path / "events.jsonl"))
        river.served("safe", river.released("safe", 1))
        said = river.openai.completions.create(model="safe", prompt=question("a1"), max_tokens=8, temperature=0)
        assert said.choices[0].text == " a1"
        river.publish([{"adapter": "safe", "type": "feedback", "response": said.id, "rating": 1.0}])
        eventually(lambda: river.entries("safe") == 3)
        river.released("safe", 2)
        message = {"id": "by-message", "action": "forget", "subject": "ann", "adapter": "safe"}
        producer = KafkaProducer(**river.settings.kafka.for_kafka_python())
        producer.send(river.settings.topics.control, value=json.dumps(message).encode()).get(timeout=20)
        producer.close()
        river.released("safe", 4)
        proof = river.read("counterfactual", "safe", "--without", "ann")
        assert (proof["equal"], proof["tombstones"]) == (True, 2)  # ann's, and what weights that saw it wrote
        assert kafka.password not in river.output()
        river.stop()
        environment = {"RIVERDELTA_KAFKA__PASSWORD": "another"}
        assert "kafka.password" in river.tell("up", code=5, **environment)
        assert "kafka.password" in river.tell("publish", str(tmp_path / "events.jsonl"), code=5, **environment)
    finally:
        river.end()
