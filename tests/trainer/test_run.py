"""The trainer as a process: without its wake-ups, killed, and told to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Outcome
from riverdelta.registry.verify import verify
from riverdelta.trainer.base import Base
from tests.postgres import Postgres, fresh
from tests.trainer.samples import contents, fact, recipe
from tests.trainer.stack import Stack

_MAIN = "from riverdelta.core.settings import Settings; from riverdelta.trainer.run import run; run(Settings.read())"


class Start(Protocol):
    """Starts a trainer; what it says is added to a log, where one is named."""

    def __call__(self, log: Path | None = None, **settings: str) -> subprocess.Popen[bytes]: ...


@pytest.fixture
def start(tmp_path: Path, bases: dict[str, Path]) -> Iterator[Start]:
    """Start trainers on the stack in the test's folder, with a broker that does not answer."""
    env = {
        **os.environ,
        "RIVERDELTA_DATA": str(tmp_path),
        "RIVERDELTA_BASE": str(bases["llama"]),
        "RIVERDELTA_TRAINER__THREADS": "1",
        "RIVERDELTA_TRAINER__POLL_SECONDS": "0.05",
        "RIVERDELTA_KAFKA__BOOTSTRAP": "127.0.0.1:9",
    }
    begun: list[subprocess.Popen[bytes]] = []

    def begin(log: Path | None = None, **settings: str) -> subprocess.Popen[bytes]:
        sink = None if log is None else log.open("ab")
        command = [sys.executable, "-W", "ignore", "-c", _MAIN]
        begun.append(subprocess.Popen(command, env={**env, **settings}, stdout=sink, stderr=sink))
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_trainer_stopped_in_mid_increment_is_followed_and_goes_on_as_if_nothing_were(
    tmp_path: Path, start: Start
) -> None:
    """Its claim runs out, another takes the adapter; the first comes back into a world that has moved on."""
    stack = Stack(tmp_path)
    stack.keys = KeyStore.open(Settings.read(data=tmp_path))
    who = ["ann", "bob", "cy", "di", "eve", "flo"]
    names = ["acme", "bob", "cyd"]
    for name in names:
        stack.create(name, recipe(passes=15 if name == "acme" else 1, micro_batch=1))
        stack.seal(name, contents(6), who)
    trainers = [start(), start()]

    def held(name: str) -> subprocess.Popen[bytes] | None:
        """Whoever has it, while it is not learned."""
        claims = {claim.adapter: claim.holder for claim in stack.ledger.claims()}
        return next((each for each in trainers if f"trainer-{each.pid}-" in claims.get(name, "")), None)

    until(lambda: held("acme") is not None)
    sleeper = held("acme")
    assert sleeper is not None
    sleeper.send_signal(signal.SIGSTOP)
    (other,) = [each for each in trainers if each is not sleeper]
    until(lambda: all(stack.ledger.adapter(name).release == 1 for name in names))
    sleeper.send_signal(signal.SIGCONT)
    for name in names:
        stack.seal(name, [fact(7)], ["ann"])
    until(lambda: all(stack.ledger.adapter(name).release == 2 for name in names))
    other.send_signal(signal.SIGTERM)
    assert other.wait(timeout=30) == 0
    stack.seal("acme", [fact(8)], ["ann"])
    until(lambda: stack.ledger.adapter("acme").release == 3)
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.wait(timeout=30) == 0
    for name in names:
        learned = [version.segment for version in stack.ledger.versions(name).values()]
        assert learned == [1, 2, 3][: 3 if name == "acme" else 2], "each segment once"
        assert verify(stack.ledger, stack.store, stack.keys, name).problems == ()
    assert [claim.holder for claim in stack.ledger.claims()] == [""] * 3
    assert stack.ledger.leases() == []


def until(check: Callable[[], bool]) -> None:
    while not check():
        time.sleep(0.02)


def test_a_killed_trainer_is_replaced_and_one_told_to_stop_leaves(tmp_path: Path, start: Start) -> None:
    stack = Stack(tmp_path)
    stack.keys = KeyStore.open(Settings.read(data=tmp_path))
    stack.create("acme", recipe(passes=20, micro_batch=1))
    stack.create("bob", recipe())
    stack.seal("acme", contents(6), ["ann", "bob", "cy", "di", "eve", "flo"])
    stack.seal("bob", [fact(1)], ["ann"])
    first = start()
    until(lambda: stack.ledger.leases() != [])
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start()
    until(lambda: stack.ledger.adapter("bob").release == 1)
    stack.seal("bob", [fact(2)], ["ann"])  # no wake-up comes
    until(lambda: stack.ledger.adapter("bob").release == 2)
    stack.seal("acme", contents(6), ["ann", "bob", "cy", "di", "eve", "flo"])
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=30) == 0
    # The killed one's lease is still there: nobody has needed it to run out.
    assert len(stack.ledger.leases()) == 1


def test_a_postgresql_that_goes_away_is_waited_for(tmp_path: Path, start: Start, base: Base) -> None:
    """In mid-increment, and before a trainer has begun: no step is lost, and every bit is what it would have been."""
    who = ["ann", "bob", "cy", "di", "eve", "flo"]
    calm = Stack(tmp_path / "calm")
    server = Postgres()
    try:
        url, log, later = fresh(server.url), tmp_path / "first.log", tmp_path / "later.log"
        stack = Stack(tmp_path, url)
        stack.keys = KeyStore.open(Settings.read(data=tmp_path))
        for each in (stack, calm):
            each.create("acme", recipe(passes=20, micro_batch=1))
            each.create("bob", recipe())
            for number in range(2):
                each.seal("acme", contents(6, number), who)
                each.seal("bob", contents(6, number), who)
        first = start(log, RIVERDELTA_REGISTRY__LEDGER=url)
        until(lambda: stack.ledger.adapter("bob").release >= 1)
        server.stop()
        until(lambda: "Waiting: The ledger" in log.read_text())
        second = start(later, RIVERDELTA_REGISTRY__LEDGER=url)
        until(lambda: "Opening the ledger: waiting. The ledger" in later.read_text())
        server.start()
        until(lambda: releases(stack) == [2, 2])
        for trainer in (first, second):
            trainer.send_signal(signal.SIGTERM)
            assert trainer.wait(timeout=30) == 0
        worker = calm.worker(base)
        while worker.turn():
            pass
        for name in ("acme", "bob"):
            assert [segment.outcome for segment in stack.ledger.segments(name)] == [Outcome.TRAINED] * 2
            found, wanted = (
                [(version.segment, version.digest, version.state) for version in each.ledger.versions(name).values()]
                for each in (stack, calm)
            )
            assert found == wanted
            assert verify(stack.ledger, stack.store, stack.keys, name).problems == ()
        stack.ledger.close()
    finally:
        server.remove()


def releases(stack: Stack) -> list[int]:
    try:
        return [stack.ledger.adapter(name).release for name in ("acme", "bob")]
    except Unavailable:
        return []
