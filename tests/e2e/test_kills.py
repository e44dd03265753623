"""Every child of `up` killed in turn: it still answers, and still learns."""

import json

import pytest
from kafka import KafkaProducer

from .river import River, eventually, facts, question


@pytest.mark.parametrize("name", ["serve", "train", "stream", "registry", "broker"])
def test_a_killed_child_comes_back(river: River, name: str, bootstrap: str) -> None:
    if name == "broker" and bootstrap:
        pytest.skip("this broker is not a child of `up`")
    adapter = river.create(f"kill-{name}")
    river.publish(facts(adapter, ["a1", "b2"]))
    first = river.released(adapter, 1)
    if name == "train":  # in the middle of an increment
        river.publish(facts(adapter, ["c3", "d4"]))
        eventually(lambda: river.said(f"Training {adapter} segment 2"))
    child = river.child(name)
    child.kill()
    child.wait(10)
    if name in ("stream", "registry"):  # what happens while it is away is not lost
        river.publish(facts(adapter, ["c3", "d4"]))
    eventually(lambda: _runs(river, name, child.pid), 60)
    if name == "broker":
        river.publish_patiently(facts(adapter, ["c3", "d4"]))
    elif name == "serve":
        eventually(lambda: _answers(river, adapter), 60)
        assert river.ask(adapter, question("a1")) == (" a1", first)
        river.publish(facts(adapter, ["c3", "d4"]))
    second = river.released(adapter, 2, 120)
    river.served(adapter, second, 60)
    assert [river.ask(adapter, question(answer))[0] for answer in ("a1", "c3")] == [" a1", " c3"]
    if name == "registry":
        producer = KafkaProducer(**river.settings.kafka.for_kafka_python())
        message = {"id": "after the kill", "action": "forget", "subject": "ann", "adapter": adapter}
        producer.send(river.settings.topics.control, value=json.dumps(message).encode()).get(timeout=20)
        producer.close()
        log = lambda: river.read("registry", "log", adapter)  # noqa: E731
        eventually(lambda: any(fact["kind"] == "forget" for fact in log()), 60, every=1)


def _runs(river: River, name: str, before: int) -> bool:
    try:
        return river.child(name).pid != before
    except AssertionError:
        return False


def _answers(river: River, adapter: str) -> bool:
    from openai import OpenAIError

    try:
        return bool(river.ask(adapter, "x", 1))
    except OpenAIError:
        return False
