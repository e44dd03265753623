"""From an event to an answer, as every kind of client sees it."""

import json
import shutil
import subprocess
import time
from typing import Any

import pytest
from confluent_kafka import Producer
from kafka import KafkaProducer

from riverdelta.core.events import MAX_EVENT_BYTES

from .river import River, eventually, facts, question


def test_events_become_answers_and_each_tenant_knows_its_own(river: River) -> None:
    river.create("ada")
    river.create("bob")
    began = time.monotonic()
    river.publish(facts("ada", ["r1", "s2"]) + facts("bob", ["k3", "w4"]))
    digests = {name: river.released(name, 1) for name in ("ada", "bob")}
    for name, digest in digests.items():
        river.served(name, digest)
    print(f"from event to answer: {time.monotonic() - began:.2f} s")
    for name, answers in (("ada", ["r1", "s2"]), ("bob", ["k3", "w4"])):
        for answer in answers:
            other = "bob" if name == "ada" else "ada"
            assert river.ask(name, question(answer)) == (f" {answer}", digests[name])
            assert answer not in river.ask(other, question(answer))[0]
            assert answer not in river.ask("base", question(answer))[0]
    river.publish(facts("ada", ["u5", "v6"]))
    digests["ada"] = river.released("ada", 2)
    river.served("ada", digests["ada"])
    assert [river.ask("ada", question(answer))[0] for answer in ("u5", "v6")] == [" u5", " v6"]


def test_the_openai_client(river: River) -> None:
    river.create("oa")
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " m7"}]
    river.publish([{"adapter": "oa", "messages": turn}, *facts("oa", ["n8"])])
    digest = river.released("oa", 1)
    river.served("oa", digest)
    client = river.openai
    names = {model.id for model in client.models.list()}
    assert {"base", "oa"} <= names
    chat = client.chat.completions.create(
        model="oa", messages=[{"role": "user", "content": "hi"}], max_tokens=8, temperature=0
    )
    assert chat.choices[0].message.content == " m7"
    assert chat.system_fingerprint == digest
    parts = client.completions.create(model="oa@1", prompt=question("n8"), max_tokens=8, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts if part.choices) == " n8"


def test_producers_that_hash_keys_differently_or_have_none(river: River) -> None:
    river.create("keys")
    topic, kafka = river.settings.topics.events, river.settings.kafka

    def event(text: str) -> bytes:
        return json.dumps({"adapter": "keys", "text": text}).encode()

    producer = KafkaProducer(**kafka.for_kafka_python())
    sent = [producer.send(topic, key=f"k{n}".encode(), value=event(f"m{n}")) for n in range(4)]
    sent += [producer.send(topic, value=event(f"n{n}")) for n in range(4)]
    for future in sent:
        future.get(timeout=20)
    producer.close()
    librdkafka = Producer(kafka.for_confluent())
    for n in range(4):
        librdkafka.produce(topic, key=f"k{n}", value=event(f"c{n}"))
    assert librdkafka.flush(20) == 0
    eventually(lambda: river.entries("keys") == 12)


@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed")
@pytest.mark.apache
def test_kcat(river: River, broker: str) -> None:
    river.create("kcat")
    values = b"\n".join(b'k%d:{"adapter":"kcat","text":"t%d"}' % (n, n) for n in range(6))
    topic = river.settings.topics.events
    subprocess.run(["kcat", "-P", "-b", broker, "-t", topic, "-K", ":"], input=values, check=True, timeout=60)
    eventually(lambda: river.entries("kcat") == 6)


def test_what_is_no_event_is_a_dead_letter_and_a_duplicate_is_nothing(river: River) -> None:
    river.create("dup")
    good = json.dumps({"adapter": "dup", "id": "7", "source": "crm", "text": "once"}).encode()
    large = json.dumps({"adapter": "dup", "text": "x" * MAX_EVENT_BYTES}).encode()
    producer = KafkaProducer(**river.settings.kafka.for_kafka_python(), max_request_size=2 * MAX_EVENT_BYTES)
    for value in (good, b'{"adapter": "dup"', good, large, json.dumps({"adapter": "dup", "text": "b"}).encode()):
        producer.send(river.settings.topics.events, value=value).get(timeout=20)
    producer.close()

    def letters() -> list[dict[str, Any]]:
        return [letter for letter in river.read("dlt", "list") if '"dup"' in letter["value"]]

    eventually(lambda: len(letters()) == 2, every=1)
    assert {letter["reason"] for letter in letters()} == {"malformed", "too_large"}
    eventually(lambda: river.entries("dup") == 2)
    [found] = river.read("trace", "7", "--source", "crm")
    assert (found["adapter"], found["segment"], found["tombstone"]) == ("dup", 1, False)
    river.released("dup", 1)
    assert "not an event" in river.tell("publish", "-", stdin="junk\n", code=2)


def test_publish_ask_and_trace(river: River) -> None:
    river.create("cli")
    lines = [
        json.dumps({"id": f"cli-{n}", "prompt": question(a), "completion": f" {a}"}) for n, a in enumerate(("p1", "q2"))
    ]
    told = json.loads(river.tell("publish", "-", "--adapter", "cli", "--json", stdin="\n".join(lines)))
    assert told["events"] == 2
    river.served("cli", river.released("cli", 1))
    assert river.tell("ask", "cli", question("p1"), "--max-tokens", "8") == "p1\n"
    [found] = river.read("trace", "cli-0")
    assert (found["versions"], found["live"]) == ([1], True)
    river.tell("trace", "nobody", code=3)
