"""A forget in a copy, while the adapter that it is a copy of goes on answering with the very same weights: whatever a
request for the copy was at when the fence came, it gets nothing from them once the forget has returned."""

import asyncio
import threading
import time

import pytest

from riverdelta.core.names import ModelRef
from riverdelta.core.recipe import Recipe
from riverdelta.serving.answers import CompletionShape
from riverdelta.serving.api_keys import Caller
from riverdelta.serving.engine import SamplingParams
from riverdelta.serving.errors import AnswerRevoked

from .conftest import eventually
from .test_fence import forget


@pytest.fixture
def dirty(hand):
    """The weights of `acme@2`, which saw ann; `copy` begins with them."""
    hand.adapter("acme")
    hand.release("acme", ["bob"])
    digest = hand.release("acme", ["ann"])
    hand.ledger.import_adapter("copy", Recipe(), digest, {"imported": True}, "op")
    return digest


def asked(running, model):
    """Ask in a thread: it, and where the answer will be."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(running.complete(model)))
    thread.start()
    return thread, answers


def forget_in_the_copy(hand, running, dirty):
    """Forget, and wait until the other adapter's weights are free again."""
    assert forget(hand, "ann", "copy").stage == "fenced"
    eventually(lambda: not running.server.permit.revoked(dirty))


def test_a_request_that_waits_for_the_weights(hand, serve, dirty, monkeypatch):
    running = serve(hand.settings)
    running.answer("copy")
    fleet = running.server.fleet
    asking, go = threading.Event(), threading.Event()

    class Slow:
        def get(self, key):
            asking.set()
            assert go.wait(20)
            return hand.store.get(key)

    monkeypatch.setattr(fleet, "_store", Slow())
    running.server.engine.unload(dirty)
    fleet.missing(dirty)
    thread, answers = asked(running, "copy")
    assert asking.wait(10)
    forget_in_the_copy(hand, running, dirty)
    go.set()
    thread.join()
    assert dirty not in answers[0].text
    assert running.answer("acme")["system_fingerprint"] == dirty


def test_the_other_adapter_is_asked_by_number_before_releases_are_read_anew(hand, serve, dirty, monkeypatch):
    running = serve(hand.settings)
    running.answer("acme")
    follower = running.server._follower
    read, go = follower._read, threading.Event()

    def late():
        go.wait(20)
        read()

    monkeypatch.setattr(follower, "_read", late)
    forget(hand, "ann", "copy")
    assert running.answer("acme@2")["system_fingerprint"] == dirty
    thread, answers = asked(running, "copy")
    time.sleep(0.2)
    assert answers == [], "it waits for what the release is now"
    assert {"copy", "acme"} <= {model["id"] for model in running.client.get("/v1/models").json()["data"]}
    go.set()
    thread.join()
    assert answers[0].status_code == 200
    assert dirty not in answers[0].text


def test_a_request_that_is_not_queued_yet(hand, serve, dirty, monkeypatch):
    running = serve(hand.settings)
    running.answer("copy")
    fleet, bound, go = running.server.fleet, threading.Event(), threading.Event()
    acquire = fleet.acquire

    async def late(ref):
        held = await acquire(ref)
        if ref.adapter == "copy":
            bound.set()
            await asyncio.to_thread(go.wait, 20)
        return held

    monkeypatch.setattr(fleet, "acquire", late)
    thread, answers = asked(running, "copy")
    assert bound.wait(10)
    forget_in_the_copy(hand, running, dirty)
    eventually(lambda: fleet.releases()["copy"].digest != dirty)
    assert running.answer("acme")["system_fingerprint"] == dirty
    go.set()
    thread.join()
    assert answers[0].status_code == 200
    assert dirty not in answers[0].text


def test_an_answer_that_is_not_written_yet(hand, serve, dirty):
    running = serve(hand.settings)

    async def answer():
        asked = (CompletionShape(), ModelRef("copy", None), Caller("test", None, True, False), [[1, 2, 3]])
        held = await running.server.generator.begin("a1", *asked, SamplingParams(max_tokens=4, ignore_eos=True), 1)
        eventually(lambda: not {running.server.engine.stats()[it] for it in ("waiting", "running")} - {0})
        await asyncio.to_thread(forget_in_the_copy, hand, running, dirty)
        return await held.collect()

    with pytest.raises(AnswerRevoked):
        asyncio.run(answer())
