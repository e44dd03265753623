"""Releases move under load: nobody notices but by the fingerprint."""

import json
import threading

from riverdelta.core.store import weights_key
from riverdelta.registry.wakeups import Wakeups
from riverdelta.streams.topics import ensure

from .conftest import eventually
from .hand import random_lora

PROMPTS = ["hello", "a longer prompt that shares nothing", "hello again"]


def text(answer):
    return answer["choices"][0]["text"]


def streamed(running, model, **more):
    """The events of a stream as they come."""
    body = {"model": model, "prompt": "hello", "temperature": 0, "ignore_eos": True, "stream": True, **more}
    with running.client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def test_swaps_and_rollbacks_under_load(hand, serve):
    hand.adapter("acme", 1)
    running = serve(hand.settings)
    answers, failures, stop = [], [], threading.Event()

    def ask(prompt):
        while not stop.is_set():
            response = running.complete("acme", prompt, max_tokens=6)
            if response.status_code == 200:
                answers.append((prompt, response.json()))
            else:
                failures.append(response.text)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for turn in range(24):
        if turn % 4 == 3:
            hand.ledger.rollback("acme", None, "test")
            hand.ledger.resume("acme", "continue", "test")
        else:
            hand.release("acme")
        wanted = hand.digest("acme")
        eventually(lambda wanted=wanted: answers and answers[-1][1]["system_fingerprint"] == wanted)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    by_digest = {version.digest: number for number, version in hand.ledger.versions("acme").items()}
    assert len({answer["system_fingerprint"] for _, answer in answers}) > 12
    solo = {}
    for prompt, answer in answers:
        key = prompt, answer["system_fingerprint"]
        if key not in solo:
            solo[key] = text(running.answer(f"acme@{by_digest[key[1]]}", prompt, max_tokens=6))
        assert text(answer) == solo[key]


def test_an_answer_in_flight_stays_on_its_version(hand, serve):
    hand.adapter("acme", 1)
    running = serve(hand.settings)
    before = hand.digest("acme")
    whole = text(running.answer("acme", max_tokens=200))
    events = streamed(running, "acme", max_tokens=200)
    chunks = [next(events)]
    after = hand.release("acme")
    eventually(lambda: running.answer("acme", max_tokens=1)["system_fingerprint"] == after)
    chunks += list(events)
    assert {chunk["system_fingerprint"] for chunk in chunks} == {before}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    listed = running.client.get("/v1/adapters").json()["data"][0]
    assert [version["version"] for version in listed["versions"]] == [2]


def test_a_new_adapter_and_its_first_version(hand, serve):
    running = serve(hand.settings)
    assert running.complete("acme").status_code == 404
    hand.adapter("acme")
    eventually(lambda: running.complete("acme").status_code == 200)
    base = running.answer("base")
    assert text(running.answer("acme")) == text(base)
    digest = hand.release("acme")
    eventually(lambda: running.answer("acme")["system_fingerprint"] == digest)
    assert running.answer("acme@1")["model"] == "acme@1"


def test_what_cannot_be_served_leaves_the_release_where_it_was(hand, serve):
    hand.adapter("acme", 1)
    good = hand.digest("acme")
    running = serve(hand.settings)
    big = hand.release("acme", data=random_lora(99, rank=16))  # the slots hold 8
    eventually(lambda: running.server.fleet.failure(big))
    assert running.answer("acme")["system_fingerprint"] == good
    refused = running.complete("acme@2")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "adapter_load_failed"
    fine = hand.release("acme")
    eventually(lambda: running.answer("acme")["system_fingerprint"] == fine)


def test_corrupt_weights_are_not_served(hand, serve):
    hand.adapter("acme", 1)
    hand.store.put(weights_key(hand.digest("acme")), b"something else")
    running = serve(hand.settings)
    refused = running.complete("acme")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert hand.settings.store_url not in refused.text
    assert running.answer("base")


def test_more_adapters_than_slots(hand, serve):
    names = [hand.adapter(f"tenant-{i}", 1) for i in range(12)]
    running = serve(hand.settings)
    digests = {name: hand.digest(name) for name in names}
    for _ in range(2):
        for name in names:
            assert running.answer(name, max_tokens=2)["system_fingerprint"] == digests[name]
    listed = running.client.get("/v1/adapters").json()["data"]
    tiers = [item["versions"][0]["tier"] for item in listed]
    assert tiers.count("device") == 4
    assert tiers.count("host") == 8


def test_a_server_started_after_the_releases(hand, serve):
    hand.adapter("acme", 3)
    hand.ledger.rollback("acme", 2, "test")
    first, second = serve(hand.settings), serve(hand.settings)
    for running in (first, second):
        assert running.answer("acme")["model"] == "acme@2"


def test_a_wake_up_is_heard(hand, serve, settings):
    """Without one, this server would look at its ledger again after minutes."""
    ensure(settings)
    hand.settings.kafka, hand.settings.topics = settings.kafka, settings.topics
    hand.settings.serving.poll_seconds, hand.settings.serving.lease_seconds = 100, 500
    hand.adapter("acme", 2)
    running = serve(hand.settings)
    assert running.answer("acme")["model"] == "acme@2"
    hand.ledger.rollback("acme", 1, "test")
    wakeups = Wakeups(hand.settings)

    def told():
        wakeups.send(settings.topics.releases, "acme")
        return running.answer("acme")["model"] == "acme@1"

    eventually(told)
    wakeups.close()
    head = running.client.post("/admin/resume", json={"adapter": "acme", "mode": "tip"})
    assert head.json()["release"] == 2
    eventually(lambda: running.answer("acme")["model"] == "acme@2")
