"""Answers published as interaction events: only where asked for, whole ones only, as the contract says."""

import pytest
from kafka import KafkaConsumer, TopicPartition

from riverdelta.core.events import decode
from riverdelta.streams.topics import ensure

from .conftest import eventually
from .test_swap import streamed, text


def read_all(settings, count):
    """The events of the topic, once there are so many."""
    topic = settings.topics.events
    with KafkaConsumer(**settings.kafka.for_kafka_python(), auto_offset_reset="earliest") as consumer:
        consumer.assign([TopicPartition(topic, n) for n in range(settings.topics.partitions)])
        held = []

        def enough():
            held.extend(r for records in consumer.poll(timeout_ms=200).values() for r in records)
            return len(held) >= count

        eventually(enough)
        held.extend(r for records in consumer.poll(timeout_ms=500).values() for r in records)
    return {event.record.response: event for event in (decode(r.value, r.headers) for r in held)}


def test_what_is_published(hand, serve, settings):
    ensure(settings)
    hand.settings.kafka, hand.settings.topics = settings.kafka, settings.topics
    hand.settings.serving.interactions = ["acme", "empty"]
    hand.adapter("acme", 1)
    hand.adapter("empty")
    hand.adapter("private", 1)
    running = serve(hand.settings)
    one = running.answer("acme", "hello", user="ann")
    many = running.answer("acme", ["one", "two"], n=2, temperature=1.0, safety_identifier="bob", user="x")
    events = list(streamed(running, "acme@1", max_tokens=8))
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    chat = {"model": "empty", "messages": turns, "max_tokens": 24, "seed": 1, "ignore_eos": True}
    chatted = running.client.post("/v1/chat/completions", json=chat).json()
    running.answer("private")
    running.answer("base")
    running.answer("acme", [104, 105])
    held = read_all(settings, 7)
    assert len(held) == 7
    told = held[one["id"]]
    assert (told.kind, told.adapter, told.subjects) == ("interaction", "acme", ("ann",))
    assert (told.record.prompt, told.record.completion) == ("hello", text(one))
    assert told.record.digest == hand.digest("acme")
    for index, prompt in enumerate(["one", "one", "two", "two"]):
        told = held[f"{many['id']}:{index}"]
        assert (told.record.prompt, told.subjects) == (prompt, ("bob",))
        assert told.record.completion == many["choices"][index]["text"]
    assert held[events[0]["id"]].record.completion == "".join(event["choices"][0]["text"] for event in events)
    told = held[chatted["id"]].record
    assert [(turn.role, turn.content) for turn in told.messages] == [("system", "Be brief."), ("user", "hello")]
    assert told.digest == chatted["system_fingerprint"]


@pytest.mark.parametrize("bootstrap", ["127.0.0.1:1", ""])
def test_a_broker_that_is_away_holds_up_nobody(hand, serve, bootstrap):
    hand.settings.kafka.bootstrap = bootstrap
    hand.settings.serving.interactions = ["*"]
    hand.adapter("acme", 1)
    running = serve(hand.settings)
    assert text(running.answer("acme"))
    running.stop()
