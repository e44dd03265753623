"""The trainer as a process: without its wake-ups, killed, and told to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from riverdelta.core.settings import Settings
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.verify import verify
from tests.trainer.samples import contents, fact, recipe
from tests.trainer.stack import Stack

_MAIN = "from riverdelta.core.settings import Settings; from riverdelta.trainer.run import run; run(Settings.read())"


@pytest.fixture
def start(tmp_path: Path, bases: dict[str, Path]) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
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

    def begin() -> subprocess.Popen[bytes]:
        begun.append(subprocess.Popen([sys.executable, "-W", "ignore", "-c", _MAIN], env=env))
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_trainer_stopped_in_mid_increment_is_followed_and_goes_on_as_if_nothing_were(
    tmp_path: Path, start: Callable[[], subprocess.Popen[bytes]]
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


def test_a_killed_trainer_is_replaced_and_one_told_to_stop_leaves(
    tmp_path: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
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
