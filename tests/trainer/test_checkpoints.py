"""The checkpoint log: killed at any moment, torn or out of space, an increment ends with the uninterrupted digest."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from riverdelta.core.errors import Unavailable
from riverdelta.core.store import ObjectStore
from riverdelta.trainer import checkpoints
from riverdelta.trainer.base import Base
from riverdelta.trainer.checkpoints import CheckpointLog, Shipped, read
from riverdelta.trainer.increment import Candidate, Inputs, Learner, step, train
from tests.trainer.samples import contents, recipe

LIKE = recipe(passes=4, micro_batch=2)
EARLIER = [None, *contents(5, 3)]
SEGMENT = [*contents(3, 1), None, *contents(4, 2)]


def begin(base: Base) -> Learner:
    return Learner(base, Inputs(LIKE, 5, SEGMENT, EARLIER))


def finish(base: Base, learner: Learner, log: CheckpointLog) -> Candidate:
    while not learner.done:
        step(base, [learner])
        log.record(learner)
    log.close()
    return learner.candidate()


@pytest.fixture(scope="module")
def whole(base: Base) -> Candidate:
    return train(base, begin(base))


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_SHARE", 1e9)


def test_an_abandoned_increment_resumes_where_its_state_was(base: Base, whole: Candidate, tmp_path: Path) -> None:
    learner, log = begin(base), CheckpointLog(tmp_path / "acme", "k")
    assert log.resume(learner) == 0
    for _ in range(7):
        step(base, [learner])
        log.record(learner)
    log.close(learner)
    second, log = begin(base), CheckpointLog(tmp_path / "acme", "k")
    assert log.resume(second) == 7
    assert finish(base, second, log) == whole


def test_a_machine_that_goes_away_is_followed_by_another(base: Base, whole: Candidate, tmp_path: Path) -> None:
    """Told to stop, a trainer leaves its state in the store; one with another disk and the same store goes on."""
    store = ObjectStore(f"file://{tmp_path}/store")
    learner, log = begin(base), CheckpointLog(tmp_path / "here" / "acme", "k", Shipped(store, "acme", "k"))
    log.resume(learner)
    for _ in range(5):
        step(base, [learner])
        log.record(learner)
    log.close(learner)
    second, log = begin(base), CheckpointLog(tmp_path / "there" / "acme", "k", Shipped(store, "acme", "k"))
    assert log.resume(second) == 5
    assert finish(base, second, log) == whole
    log.discard()
    assert list(store.keys("checkpoints/")) == []
    other = begin(base)
    log = CheckpointLog(tmp_path / "third" / "acme", "another key", Shipped(store, "acme", "k"))
    assert log.resume(other) == 0
    log.close()


def test_a_step_is_logged_with_what_shaped_it(base: Base, tmp_path: Path) -> None:
    learner, log = begin(base), CheckpointLog(tmp_path / "acme", "k")
    log.resume(learner)
    while not learner.done:
        step(base, [learner])
        log.record(learner)
    log.close()
    first, *records = checkpoints._whole((tmp_path / "acme" / "steps.log").read_bytes())[0]
    assert json.loads(first) == {"key": "k"}
    held = [json.loads(record) for record in records]
    assert [float.fromhex(record["loss"]) for record in held] == learner.losses
    rates = [record["rate"] for record in held]
    assert rates[0] == LIKE.optimiser.learning_rate
    assert rates == sorted(rates, reverse=True)
    assert len({record["slots"] for record in held}) > 1


def test_what_another_increment_wrote_is_not_read(base: Base, whole: Candidate, tmp_path: Path) -> None:
    learner, log = begin(base), CheckpointLog(tmp_path / "acme", "old")
    log.resume(learner)
    step(base, [learner])
    log.record(learner)
    log.close(learner)
    fresh, log = begin(base), CheckpointLog(tmp_path / "acme", "new")
    assert log.resume(fresh) == 0
    assert finish(base, fresh, log) == whole
    log.discard()
    assert not (tmp_path / "acme").exists()


@pytest.mark.parametrize("seed", range(8))
def test_torn_files_cost_steps_and_no_bits(base: Base, whole: Candidate, tmp_path: Path, seed: int) -> None:
    """Cut or overwrite any of the three files anywhere: the rest is enough, or the increment begins anew."""
    draw = random.Random(seed)
    learner, log = begin(base), CheckpointLog(tmp_path / "acme", "k")
    log.resume(learner)
    for _ in range(draw.randrange(1, 14)):
        step(base, [learner])
        log.record(learner)
    log.close(learner)
    for name in draw.sample(["steps.log", "state-0", "state-1"], draw.randrange(1, 3)):
        path = tmp_path / "acme" / name
        if path.exists():
            data = bytearray(path.read_bytes())
            at = draw.randrange(len(data))
            if draw.random() < 0.5:
                data[at] ^= 0xFF
            else:
                del data[at:]
            path.write_bytes(data)
    second, log = begin(base), CheckpointLog(tmp_path / "acme", "k")
    log.resume(second)
    assert finish(base, second, log) == whole


def test_a_full_disk_pauses_training_and_loses_nothing(
    base: Base, whole: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, log = begin(base), CheckpointLog(tmp_path / "acme", "k")
    log.resume(learner)
    full = True

    def sync(descriptor: int) -> None:
        if full:
            raise OSError(28, "No space left on device")
        os.fsync(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    step(base, [learner])
    log.record(learner)
    while log._failure is None:
        time.sleep(0.001)
    step(base, [learner])
    for _ in range(3):
        with pytest.raises(Unavailable, match="No space left"):
            log.record(learner)
    full = False
    log.record(learner)
    log._retry()
    assert finish(base, learner, log) == whole
    assert read(tmp_path / "acme", "k").state is not None


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_at_random_moments(base: Base, whole: Candidate, tmp_path: Path, kills: int) -> None:
    """However often it is killed, an increment ends as if left alone, and keeps every step that it logged."""
    draw = random.Random(kills)
    for number in range(kills):
        folder = tmp_path / str(number)
        for _ in range(draw.randrange(1, 4)):
            _train_until_killed(base, folder, after=draw.randrange(0, 16), delay=draw.random() * 0.01)
        held = read(folder, "k")
        learner, log = begin(base), CheckpointLog(folder, "k")
        spared = log.resume(learner)
        assert spared == (held.state.place if held.state else 0)
        assert all(step > spared for step in held.losses)
        assert finish(base, learner, log) == whole


def _train_until_killed(base: Base, folder: Path, after: int, delay: float) -> None:
    """Fork a process that goes on with the increment, and kill it some time after so many steps."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        learner, log = begin(base), CheckpointLog(folder, "k")
        log.resume(learner)
        while not learner.done:
            step(base, [learner])
            log.record(learner)
            os.write(said, b".")
        os._exit(0)
    os.close(said)
    while after > 0 and (got := os.read(heard, after)):
        after -= len(got)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard)
