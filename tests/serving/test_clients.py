"""Clients that go away, that do not read, that never finish asking."""

import concurrent.futures
import json
import socket

import httpx
import pytest

from riverdelta.serving import connections, envelope, writing

from .conftest import eventually

LONG = {"model": "acme", "prompt": "hello", "max_tokens": 240, "ignore_eos": True}


def raw(shared):
    return socket.create_connection(("127.0.0.1", int(shared.url.rsplit(":", 1)[1])), timeout=20)


def head(length, extra=""):
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{extra}"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def idle(shared):
    stats = shared.server.engine.stats()
    return stats["running"] + stats["waiting"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(shared, stream):
    cancelled = shared.server.engine.stats()["totals"].get("requests", 0)
    body = json.dumps({**LONG, "stream": stream, "n": 8}).encode()
    with raw(shared) as client:
        client.sendall(head(len(body)) + body)
        if stream:
            client.recv(100)
        else:
            eventually(lambda: not idle(shared))
    eventually(lambda: idle(shared))
    text = shared.client.get("/metrics").text
    assert 'finished_reason="cancelled"' in text
    assert shared.server.engine.stats()["totals"]["requests"] == cancelled + 8


def test_a_request_head_that_never_ends(shared, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with raw(shared) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nx-a: ")
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    with raw(shared) as silent, pytest.raises(ConnectionResetError):
        silent.recv(10)


def test_a_body_that_never_comes(shared, monkeypatch):
    monkeypatch.setattr(envelope, "_BODY_SECONDS", 0.2)
    with raw(shared) as client:
        client.sendall(head(1000) + b"{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_a_reader_that_does_not_read_is_dropped(shared, monkeypatch):
    """The answer is far larger than what the system buffers for a connection."""
    monkeypatch.setattr(writing, "PATIENCE", 0.3)
    body = json.dumps({**LONG, "stream": True, "n": 40, "max_tokens": 240, "logprobs": 20}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", int(shared.url.rsplit(":", 1)[1])))
    client.sendall(head(len(body)) + body)
    eventually(lambda: not idle(shared))
    eventually(lambda: idle(shared), 60)
    with pytest.raises(ConnectionResetError):
        _ = [1 for _ in iter(lambda: client.recv(1 << 16), b"")]
    client.close()


def test_pipelined_and_kept_connections(shared):
    with httpx.Client(base_url=shared.url, trust_env=False) as client:
        for _ in range(3):
            assert client.get("/livez").text == "ok"
    with raw(shared) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n" * 3)
        got = b""
        while got.count(b"HTTP/1.1 200") < 3:
            got += client.recv(4096)


def test_no_token_waits_for_the_one_before_to_arrive(shared):
    """Nagle's algorithm holds a small packet back until the last is acknowledged."""
    with raw(shared) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert client.recv(4096)
        sockets = [held.transport.get_extra_info("socket") for held in shared.http.server_state.connections]
        assert sockets
        assert all(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in sockets)


def test_more_than_the_queue_holds(shared):
    """Six askers of as many answers as one of them may queue: somebody is told to come back, nobody is left hanging."""
    body = {**LONG, "n": 40, "max_tokens": 4}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda _: shared.client.post("/v1/completions", json=body), range(6)))
    assert {response.status_code for response in done} == {200, 429}
    for response in done:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "queue_full"
    assert idle(shared)


def test_a_fault_of_our_own_says_nothing_of_itself(shared, monkeypatch, caplog):
    def fail():
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(shared.server.fleet, "releases", fail)
    broken = shared.client.get("/v1/models", headers={"x-request-id": "find-me"})
    assert broken.status_code == 500
    assert broken.json()["error"] == {
        "message": "The server failed. Its log names request find-me.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    eventually(lambda: any(getattr(r, "request_id", "") == "find-me" and r.exc_info for r in caplog.records))
