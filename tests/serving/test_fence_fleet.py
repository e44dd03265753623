"""Forgets under load on several servers, one of them stopped by a signal for a while, one joining in the middle: every
message is stamped with its weights and time, and none is later than the fence that revoked them."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from riverdelta.registry.operations import Operations

from .asking import Load
from .conftest import eventually, small_settings
from .hand import Hand, random_lora
from .stamped import Stamped, fleet_of, one_more

MODELS = ("acme", "bolt", "coil")


def answers(server: Stamped, model: str, digest: str) -> bool:
    """Whether a server answers with these weights."""
    asked = {"model": model, "prompt": "x", "max_tokens": 1}
    said = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=30, trust_env=False)
    return said.status_code == 200 and said.json()["system_fingerprint"] == digest


@pytest.mark.parametrize(
    ("count", "forgets", "requests"),
    [
        (2, 4, 20),
        pytest.param(1, 100, 50_000, marks=pytest.mark.soak),
        pytest.param(4, 100, 50_000, marks=pytest.mark.soak),
    ],
)
def test_no_token_is_later_than_its_fence(
    tmp_path: Path, tiny_base: Path, count: int, forgets: int, requests: int
) -> None:
    settings = small_settings(tmp_path, tiny_base, lease_seconds=2.0, poll_seconds=0.1, threads=1)
    hand = Hand(settings)
    for model in MODELS:
        hand.adapter(model, 1)
    fenced: dict[str, float] = {}
    stop_at, go_on_at, join_at = forgets // 4, forgets // 4 + 2, forgets // 2
    paused: Stamped | None = None
    with fleet_of(settings, count, tmp_path) as servers:
        load = Load([server.url for server in servers], MODELS, 3 * count, 12, tmp_path / "answered")
        try:
            for number in range(forgets):
                while load.answered < requests * number // forgets:
                    time.sleep(0.01)
                adapter, subject = MODELS[number % 2], f"subject {number}"
                dirty = hand.release(adapter, [subject], random_lora(number))
                running = [server for server in servers if server is not paused]
                eventually(lambda running=running, a=adapter, d=dirty: all(answers(s, a, d) for s in running), 60)
                if number == stop_at and count > 1:
                    paused = servers[0]
                    os.kill(paused.process.pid, signal.SIGSTOP)
                report = Operations(hand.ledger, settings, "test").forget(subject, [adapter])
                fenced[dirty] = time.monotonic()
                assert len(report.lost) == (number == stop_at and count > 1)
                if number == go_on_at and paused is not None:
                    os.kill(paused.process.pid, signal.SIGCONT)
                    paused = None
                    eventually(lambda: answers(servers[0], "coil", hand.digest("coil")))
                hand.train(adapter, random_lora(10**6 + number))
                if number == join_at:
                    servers.append(one_more(settings, tmp_path))
                    servers[-1].await_ready()
            while load.answered < requests:
                time.sleep(0.01)
        finally:
            load.stop()
        written = [(server is servers[0], *stamp) for server in servers for stamp in server.written()]
    assert fenced.keys() <= {digest for *_, digest in written}, "each of them had answered"
    late = [
        (digest, left - fenced[digest])
        for was_paused, checked, left, digest in written
        if digest in fenced and (checked if was_paused else left) > fenced[digest]
    ]
    assert late == []
