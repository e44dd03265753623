"""Forgetting while serving: after the fence is acknowledged, nothing comes from what was revoked."""

import asyncio
import json
import socket
import threading
import time

import openai
import pytest

from riverdelta.core.recipe import Recipe
from riverdelta.registry.operations import Operations
from riverdelta.serving.errors import AnswerRevoked
from riverdelta.serving.permit import Permit, clock
from riverdelta.serving.writing import ReaderGone, Writers

from .conftest import eventually
from .hand import random_lora
from .test_swap import streamed

SERVERS = ("server",)


def forget(hand, subject, adapter="acme"):
    """Fence a subject off and wait, as the command does: the fence."""
    held = hand.ledger.forget(f"forget {subject}", hand.hashed(subject), [adapter], "test")
    lost = hand.ledger.await_fence(held.fence, SERVERS)
    assert lost == []
    return held


def stamp_writes(running):
    """When each message was written, and by which weights."""
    stamps, write = [], running.server.writers.write

    async def stamping(send, message, digest):
        async def sending(message):
            await send(message)
            stamps.append((time.monotonic(), digest))

        await write(sending, message, digest)

    running.server.writers.write = stamping
    return stamps


def test_streams_on_a_revoked_version_are_cut_and_others_go_on(hand, serve):
    hand.adapter("acme")
    clean = hand.release("acme", ["bob"])
    dirty = hand.release("acme", ["ann"])
    other = hand.adapter("other", 1)
    running = serve(hand.settings)
    whole = running.answer("acme", max_tokens=200)["choices"][0]["text"]
    stamps = stamp_writes(running)
    ended, begun = {}, threading.Barrier(6)

    def read(name, model):
        told, events = [], streamed(running, model, max_tokens=200)
        told.append(next(events))
        begun.wait()
        told += list(events)
        ended[name] = told

    models = {"a": "acme", "b": "acme", "c": "acme@2", "d": "acme@1", "e": other}
    threads = [threading.Thread(target=read, args=item) for item in models.items()]
    for thread in threads:
        thread.start()
    begun.wait()
    forget(hand, "ann")
    fenced = time.monotonic()
    for thread in threads:
        thread.join()
    assert [at for at, digest in stamps if digest == dirty and at > fenced] == []
    assert any(digest == clean and at > fenced for at, digest in stamps), "the others went on"
    for name in "abc":
        assert ended[name][-1]["error"]["code"] == "version_revoked"
        text = "".join(chunk["choices"][0]["text"] for chunk in ended[name][:-1])
        assert whole.startswith(text)
        assert len(text) < len(whole)
    for name in "de":
        assert ended[name][-1]["choices"][0]["finish_reason"] == "length"
    # From the moment of the acknowledgement on, the release is the clean version, and the dirty one is gone.
    assert running.answer("acme")["system_fingerprint"] == clean
    gone = running.complete("acme@2")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "version_revoked")
    assert "retry-after" not in gone.headers


def test_a_whole_answer_that_is_cut_says_when_to_retry(hand, serve):
    hand.adapter("acme")
    hand.release("acme", ["bob"])
    hand.release("acme", ["ann"])
    running = serve(hand.settings)
    answers = []
    ask = threading.Thread(target=lambda: answers.append(running.complete("acme", max_tokens=240)))
    ask.start()
    eventually(lambda: running.server.engine.stats()["running"])
    forget(hand, "ann")
    ask.join()
    if answers[0].status_code != 200:  # unless it was done before
        assert answers[0].status_code == 503
        assert answers[0].headers["retry-after"] == "1"
        assert answers[0].json()["error"]["code"] == "version_revoked"


def test_openais_client_retries_by_itself(hand, serve):
    hand.adapter("acme")
    clean = hand.release("acme", ["bob"])
    hand.release("acme", ["ann"])
    running = serve(hand.settings)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=5)
    answers = []

    def ask():
        asked = {"temperature": 0, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
        answers.append(client.completions.create(model="acme", prompt="hello", **asked))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: running.server.engine.stats()["running"])
    forget(hand, "ann")
    ask()
    for thread in threads:
        thread.join()
    assert len(answers) == 5
    assert answers[-1].system_fingerprint == clean or answers[0].system_fingerprint == clean


def test_forgetting_under_load(hand, serve):
    """Many forgets while many ask: nothing fails but by revocation, and nothing leaves after an acknowledgement."""
    hand.adapter("acme", 1)
    running = serve(hand.settings)
    stamps = stamp_writes(running)
    codes, stop, dirty, fenced = [], threading.Event(), [], []

    def ask(n):
        while not stop.is_set():
            for event in streamed(running, "acme", max_tokens=20 + n):
                if "error" in event:
                    codes.append(event["error"]["code"])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for n in range(12):
        dirty.append(hand.release("acme", [f"subject {n}"]))
        eventually(lambda: running.server.fleet.releases()["acme"].digest == dirty[-1])
        forget(hand, f"subject {n}")
        fenced.append(time.monotonic())
        hand.train("acme")  # the rebuild
    stop.set()
    for thread in threads:
        thread.join()
    assert set(codes) <= {"version_revoked"}
    for digest, at in zip(dirty, fenced, strict=True):
        assert [when for when, by in list(stamps) if by == digest and when > at] == []


def test_everything_that_an_adapter_had(hand, serve):
    hand.adapter("acme")
    hand.release("acme", ["ann"])
    running = serve(hand.settings)
    forget(hand, "ann")
    assert running.answer("acme")["system_fingerprint"] == running.answer("base")["system_fingerprint"]


def test_a_rebuild_that_comes_out_the_same_is_served(hand, serve):
    """What was forgotten had taught nothing: the bytes were revoked, and are clean now."""
    hand.adapter("acme")
    data = random_lora(1)
    digest = hand.release("acme", ["ann"], data=data)
    running = serve(hand.settings)
    assert running.answer("acme")["system_fingerprint"] == digest
    forget(hand, "ann")
    assert running.answer("acme")["system_fingerprint"] != digest
    hand.train("acme", data)
    eventually(lambda: running.answer("acme")["system_fingerprint"] == digest)
    assert running.answer("acme")["model"] == "acme@2"
    assert running.complete("acme@1").status_code == 410


def test_serving_until_rebuilt(hand, serve):
    """Answers go on as before until the rebuild is there; by its number the version is gone at once."""
    hand.adapter("acme")
    hand.release("acme", ["bob"])
    dirty = hand.release("acme", ["ann"])
    running = serve(hand.settings)
    body = {"subject": "ann", "adapter": "acme", "request_id": "r1", "serve_until_rebuilt": 600}
    done = running.client.post("/admin/forget", json=body)
    assert (done.status_code, done.json()["stage"]) == (200, "lending"), done.text
    for _ in range(3):
        assert running.answer("acme")["system_fingerprint"] == dirty
    assert running.complete("acme@2").status_code == 410
    rebuilt = hand.train("acme")
    assert running.answer("acme")["system_fingerprint"] == dirty
    hand.ledger.call_in(["r1"])  # as the keeper does once nothing awaits
    held = hand.ledger.forget_of("r1")
    assert hand.ledger.await_fence(held.fence, SERVERS) == []
    assert running.answer("acme")["system_fingerprint"] == rebuilt


def test_a_deadline_needs_no_keeper(hand, serve):
    hand.adapter("acme")
    clean = hand.release("acme", ["bob"])
    hand.release("acme", ["ann"])
    running = serve(hand.settings)
    body = {"subject": "ann", "adapter": "acme", "serve_until_rebuilt": 1}
    assert running.client.post("/admin/forget", json=body).json()["stage"] == "lending"
    # An answer that the fence meets on its way is cut off, as it should be.
    eventually(lambda: running.complete("acme").json().get("system_fingerprint") == clean)


def test_by_http(hand, serve):
    hand.adapter("acme")
    clean = hand.release("acme", ["bob"])
    hand.release("acme", ["ann"])
    running = serve(hand.settings)
    body = {"subject": "ann", "adapter": "acme", "request_id": "r1", "reason": "asked to"}
    done = running.client.post("/admin/forget", json=body)
    assert done.status_code == 200, done.text
    assert (done.json()["stage"], done.json()["lost_servers"]) == ("acknowledged", [])
    assert done.json()["revoked"] == {"acme": [2]}
    assert "ann" not in done.text
    assert running.answer("acme")["system_fingerprint"] == clean
    again = running.client.post("/admin/forget", json=body).json()
    assert again["at"] == done.json()["at"]
    assert running.client.get("/admin/forgets/r1").json()["request_id"] == "r1"
    assert running.client.get("/admin/forgets/r2").status_code == 404
    allowed = running.client.post("/admin/allow", json={"subject": "ann", "all_adapters": True})
    assert allowed.json() == {"allowed": ["acme"]}


def test_rollback_and_resume_by_http(hand, serve):
    hand.adapter("acme", 3)
    running = serve(hand.settings)
    head = running.client.post("/admin/rollback", json={"adapter": "acme", "version": 1}).json()
    assert (head["release"], head["held"]) == (1, 1)
    eventually(lambda: running.answer("acme")["model"] == "acme@1")
    head = running.client.post("/admin/resume", json={"adapter": "acme", "mode": "tip"}).json()
    assert (head["release"], head["held"]) == (3, None)
    eventually(lambda: running.answer("acme")["model"] == "acme@3")
    assert running.client.post("/admin/resume", json={"adapter": "acme"}).status_code == 409
    assert running.client.post("/admin/rollback", json={"adapter": "none"}).status_code == 404
    for body in ({"subject": "ann"}, {"subject": "ann", "adapter": "acme", "all_adapters": True}, {"adapter": "acme"}):
        assert running.client.post("/admin/forget", json=body).status_code == 400


def test_a_slow_reader_does_not_hold_back_a_fence():
    """What passed the check and waits for its reader is cut off, and never written."""

    async def scenario():
        permit = Permit()
        permit.resume(clock() + 60)
        writers = Writers(permit)
        writers.loop = asyncio.get_running_loop()
        reader, written, ends = asyncio.Event(), [], []

        async def send(message):
            await reader.wait()
            written.append(message["digest"])

        async def answer(digest):
            try:
                await writers.write(send, {"digest": digest}, digest)
            except ReaderGone:
                ends.append(digest)

        tasks = [asyncio.create_task(answer(digest)) for digest in ("dirty", "clean", None)]
        await asyncio.sleep(0)
        permit.revoke({"dirty"})
        await asyncio.to_thread(writers.flush, {"dirty"})
        reader.set()
        await asyncio.gather(*tasks)
        assert (ends, written) == (["dirty"], ["clean", None])
        with pytest.raises(AnswerRevoked):
            await writers.write(send, {"digest": "dirty"}, "dirty")

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["fence", "lease"])
def test_what_a_slow_reader_has_not_taken_is_dropped(hand, serve, end):
    """The whole answer was sent before, and most of it waits in the server's memory for its reader."""
    hand.adapter("acme")
    hand.release("acme", ["ann"])
    running = serve(hand.settings)
    running.http.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # its connections inherit it
    asked = {"model": "acme", "prompt": "hello", "max_tokens": 100, "n": 8, "ignore_eos": True, "logprobs": 20}
    body = json.dumps(asked).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(1000, socket.MSG_WAITALL).startswith(b"HTTP/1.1 200")
        if end == "fence":
            forget(hand, "ann")
        else:
            running.server.permit.halt()
        with pytest.raises(ConnectionResetError):
            _ = [1 for _ in iter(lambda: client.recv(1 << 16), b"")]


def test_nothing_about_a_prompt_is_logged(hand, serve, caplog):
    hand.adapter("acme", 1)
    running = serve(hand.settings)
    with caplog.at_level("DEBUG"):
        running.answer("acme", "a secret sentence")
        list(streamed(running, "acme", prompt="a secret sentence", user="ann"))
        body = {"subject": "ann the subject", "adapter": "acme"}
        running.client.post("/admin/forget", json=body)
    logged = json.dumps([{k: repr(v) for k, v in vars(record).items()} for record in caplog.records])
    assert "secret" not in logged
    assert "ann the subject" not in logged


def copied(hand) -> str:
    """The digest of acme's release, which saw ann, and of the adapter that was imported from it."""
    hand.adapter("acme")
    hand.release("acme", ["bob"])
    digest = hand.release("acme", ["ann"])
    hand.ledger.import_adapter("copy", Recipe(), digest, {"imported": True}, "op")
    return digest


def test_a_hold_that_ends_frees_no_revoked_weights(hand, serve):
    """The line that a rollback left began with a copy of what a forget has revoked since."""
    dirty = copied(hand)
    running = serve(hand.settings)
    acts = Operations(hand.ledger, hand.settings, "op")
    acts.rollback("copy", 0)
    assert running.answer("acme")["system_fingerprint"] == dirty
    assert acts.forget("ann", ["acme"]).lost == []
    resumed = running.client.post("/admin/resume", json={"adapter": "copy", "mode": "tip"})
    assert resumed.status_code == 200, resumed.text
    for _ in range(40):
        assert running.answer("copy", max_tokens=1)["system_fingerprint"] != dirty
    assert running.complete("copy@1").status_code == 410


def test_a_forget_in_a_copy_cuts_off_the_copy_and_leaves_what_it_is_a_copy_of(hand, serve):
    """Both are the same weights: an engine cannot tell their answers apart, so for a moment both end."""
    dirty = copied(hand)
    running = serve(hand.settings)
    events = streamed(running, "copy", max_tokens=200)
    assert next(events)["system_fingerprint"] == dirty
    assert forget(hand, "ann", "copy").stage == "fenced"
    answers = [running.complete("copy"), running.complete("copy@1")]
    assert all(dirty not in answer.text for answer in answers)
    assert list(events)[-1]["error"]["code"] == "version_revoked"
    eventually(lambda: running.complete("acme").status_code == 200)
    assert running.answer("acme")["system_fingerprint"] == dirty
    assert running.answer("acme@2")["system_fingerprint"] == dirty
    assert running.complete("copy@1").status_code == 410
    assert running.answer("copy")["system_fingerprint"] != dirty
