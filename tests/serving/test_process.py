"""The process: what it refuses to start with, how it ends, and what it does after having been stopped for a while."""

import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading

import httpx
import pytest

from riverdelta.core.errors import BadInput, Conflict, Refused
from riverdelta.core.settings import Settings
from riverdelta.serving.listening import bind, is_loopback
from riverdelta.serving.run import run

from .conftest import eventually, small_settings

SCRIPT = """
import sys
from riverdelta.core.settings import Settings
from riverdelta.serving.run import run
run(Settings.model_validate_json(sys.stdin.read()))
"""
# Imports once, then forks: starting Python with torch takes longer than all the rest.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["riverdelta.serving.run"])


def serve_in_child(settings, log):
    """What the command does, in a process of its own."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    run(Settings.model_validate_json(settings))


def on_a_free_port(settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings.serving.port = probe.getsockname()[1]
    return settings


class Process:
    """A server in a process."""

    def __init__(self, settings, log):
        self.url = on_a_free_port(settings).serving_url
        self.log = log
        self.process = forks.Process(target=serve_in_child, args=(settings.model_dump_json(), str(log)))
        self.process.start()

    def ready(self):
        def answers():
            assert self.process.is_alive(), self.log.read_text()
            try:
                return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        eventually(answers, 120)


@pytest.fixture
def start(tmp_path):
    made = []

    def starting(settings):
        made.append(Process(settings, tmp_path / "log"))
        return made[-1]

    yield starting
    for process in made:
        process.process.kill()
        process.process.join()


def stream(process, **more):
    body = {"model": "acme", "prompt": "hello", "max_tokens": 240, "ignore_eos": True, "stream": True, **more}
    with httpx.stream("POST", f"{process.url}/v1/completions", json=body, trust_env=False, timeout=30) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def stop_between_writes(hand, pid):
    """SIGSTOP, but not while it holds SQLite's write lock: that would stop the whole ledger, not one server."""
    probe = sqlite3.connect(hand.settings.data / "ledger.db", isolation_level=None, timeout=0.1)
    while True:
        os.kill(pid, signal.SIGSTOP)
        try:
            probe.execute("BEGIN IMMEDIATE")
            probe.execute("ROLLBACK")
            probe.close()
            return
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_end(hand, start, number):
    hand.adapter("acme", 1)
    process = start(hand.settings)
    process.ready()
    begun, ended = threading.Event(), []

    def keep_asking():
        while not ended:
            for event in stream(process):
                begun.set()
                if "error" in event:
                    ended.append(event["error"]["code"])

    asking = threading.Thread(target=keep_asking)
    asking.start()
    begun.wait(30)
    os.kill(process.process.pid, number)
    process.process.join(20)
    asking.join(30)
    assert process.process.exitcode == 0, process.log.read_text()
    assert ended == ["engine_stopped"]
    assert hand.ledger.leases(["server"]) == []
    assert "Traceback" not in process.log.read_text()


def test_an_end_before_it_is_ready(hand):
    command = [sys.executable, "-c", SCRIPT]
    settings = on_a_free_port(hand.settings).model_dump_json().encode()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(settings)
        process.stdin.close()
        said = []
        while b"listening on" not in (line := process.stderr.readline()):
            assert line, said
            said.append(line)
        process.terminate()
        assert process.wait(timeout=60) == 0, said


def test_stopped_and_woken_up_after_the_fence(hand, start):
    """SIGSTOP in mid-answer, a forget that gives the server up for lost, SIGCONT: it sends nothing more of it."""
    hand.adapter("acme")
    hand.release("acme", ["ann"])
    hand.settings.serving.lease_seconds = 1.0
    process = start(hand.settings)
    process.ready()
    events = [event for _ in range(3) for event in stream(process, max_tokens=3)]
    assert "error" not in events[-1]
    asked = stream(process, n=8)
    told = [next(asked) for _ in range(8)]
    stop_between_writes(hand, process.process.pid)
    held = hand.ledger.forget("f1", hand.hashed("ann"), ["acme"], "test")
    assert len(hand.ledger.await_fence(held.fence, ["server"])) == 1
    os.kill(process.process.pid, signal.SIGCONT)
    told += list(asked)
    assert told[-1]["error"]["code"] in ("adapters_halted", "version_revoked")
    process.ready()
    after = httpx.post(f"{process.url}/v1/completions", json={"model": "acme@1", "prompt": "x"}, trust_env=False)
    assert after.status_code == 410


def test_what_a_server_does_not_start_with(tmp_path, tiny_base, hand):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"127.0.0.1:{port}"):
            run(small_settings(tmp_path, tiny_base, port=port))
    with pytest.raises(BadInput, match="API keys"):
        run(small_settings(tmp_path, tiny_base, host="0.0.0.0"))
    with pytest.raises(BadInput):
        run(small_settings(tmp_path, tiny_base, host="no such host"))
    with pytest.raises(Exception, match="no folder"):
        run(small_settings(tmp_path, tmp_path / "absent"))
    hand.ledger.remember("base", "another")
    with pytest.raises(Refused, match="belongs to the base model with digest another"):
        run(hand.settings)


def test_loopback():
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "example.com", "10.0.0.1", "")] == [False] * 5
