"""The checkpoint log of an increment: every step on disk, by a thread of its own, so that a lost process loses nothing.

`steps.log` begins with the increment's key and holds one framed record a step (loss, rate, digest of the slots taken),
appended and synced in groups. `state-0` and `state-1` take turns to hold the weights and moments themselves, as often
as writing them costs less than a hundredth of the time; each file begins with its SHA-256. Whatever moment a machine
stops at, one of them is whole: an increment resumes from the newest, and takes the steps after it again. What a torn
write leaves behind is not read.
"""

import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from riverdelta.core.digests import canonical_json, digest_of
from riverdelta.core.errors import Corrupt, NotFound, Unavailable
from riverdelta.core.store import ObjectStore
from riverdelta.core.weights import decode, encode

from .increment import Learner, Snapshot
from .optimiser import rate_at

log = logging.getLogger(__name__)

_LOG = "steps.log"
_STATES = ("state-0", "state-1")
_FRAME = struct.Struct("<II")
_SHARE = 0.01
"""The part of the time that writing states may take."""
_BYTES_A_SECOND = 200e6
"""How fast a state is taken to be hashed and written before one has been."""
SHIP_SECONDS = 30.0
SHIPPED = "checkpoints/"
"""Where the object store holds copies: below it, the adapter and the increment's key."""


@dataclass(frozen=True)
class Held:
    """What a folder holds of an increment: the newest whole state, if any, and the loss of every logged step."""

    state: Snapshot | None
    losses: dict[int, float]


class CheckpointLog:
    """The log of one increment. `record` is called after each step and returns at once; `close` waits for the disk."""

    def __init__(self, folder: Path, key: str, shipped: "Shipped | None" = None) -> None:
        """`key` names the increment and everything that shapes it: what another key has written is not read.

        With `shipped`, a copy of the state lies in the object store too, `SHIP_SECONDS` old at most: that much work
        is lost with the machine.
        """
        self._folder, self._key, self._shipped = folder, key, shipped
        self._ship_at = time.monotonic() + SHIP_SECONDS
        self._records: list[bytes] = []
        self._snapshot: Snapshot | None = None
        self._turn = 0
        self._due = 0.0
        self._writing = False
        self._closing = False
        self._failure: OSError | None = None
        self._changed = threading.Condition()
        self._file: int | None = None
        self._thread: threading.Thread | None = None
        self._known: dict[int, float] = {}

    def resume(self, learner: Learner) -> int:
        """Bring a fresh learner to the newest state that the folder holds; the number of steps it is spared."""
        try:
            held = read(self._folder, self._key)
            self._open(keep=bool(held.losses or held.state))
        except OSError as error:
            raise _unavailable(self._folder, error) from error
        self._known = held.losses
        state = held.state
        if self._shipped is not None and state is None and not held.losses:
            state = _parsed(self._shipped.get(), self._key)
        if state is not None:
            learner.restore(state)
        o = learner.optimiser
        size = sum(vector.nbytes for vector in (learner.weights.flat, o.m, o.v))
        # Until a first state has been timed: one written at once would be the dearest, and spare the fewest steps.
        self._due = time.monotonic() + size / _BYTES_A_SECOND / _SHARE
        self._thread = threading.Thread(target=self._write, name=f"checkpoints {self._folder.name}", daemon=True)
        self._thread.start()
        return learner.place

    def record(self, learner: Learner) -> None:
        """Log the step that `learner` has just taken. `Unavailable` while the disk takes no write: call again with the
        same step, until it does."""
        self._retry()
        place, loss = learner.place, learner.losses[-1]
        if place in self._known:
            if self._known.pop(place) != loss:
                raise Corrupt(
                    f"Step {place} of {self._folder.name} has the loss {loss!r} and had another before.",
                    "This machine does not compute the same twice: look at its memory and its load.",
                )
            return
        line = canonical_json({"step": place, "loss": loss.hex(), **_shaped_by(learner)})
        due = self._snapshot is None and time.monotonic() >= self._due
        snapshot = learner.snapshot() if due else None
        with self._changed:
            self._records.append(_framed(line))
            self._snapshot = snapshot or self._snapshot
            self._changed.notify_all()

    def _retry(self) -> None:
        with self._changed:
            if self._failure is None:
                return
            self._failure = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure is not None or not (self._records or self._writing))
            if self._failure is not None:
                raise _unavailable(self._folder, self._failure) from self._failure

    def close(self, learner: Learner | None = None) -> None:
        """Write what is left, and with `learner` its state, in the store too, then stop."""
        with self._changed:
            if learner is not None and learner.losses:
                self._snapshot, self._ship_at = learner.snapshot(), 0.0
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def discard(self) -> None:
        """Stop, and delete what was written; `Unavailable` when something stays: call again."""
        with self._changed:
            self._records, self._snapshot = [], None
        self.close()
        delete(self._folder)
        if self._shipped is not None:
            self._shipped.delete()

    # -- the writer's thread ---------------------------------------------------------------------------------

    def _write(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(self._has_work)
                records, self._records = self._records, []
                snapshot, self._snapshot = self._snapshot, None
                closing, self._writing = self._closing, True
            try:
                if records:
                    self._append(b"".join(records))
                if snapshot is not None:
                    began = time.monotonic()
                    self._store(snapshot)
                    self._due = time.monotonic() + (time.monotonic() - began) / _SHARE
            except OSError as error:
                with self._changed:
                    self._records[:0] = records
                    self._failure = error
            if closing:
                return

    def _has_work(self) -> bool:
        return self._closing or (self._failure is None and bool(self._records or self._snapshot))

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            _write_all(self._file, data)
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, end)
            raise

    def _store(self, snapshot: Snapshot) -> None:
        data = _encode(self._key, snapshot)
        path = self._folder / _STATES[self._turn]
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            _write_all(descriptor, hashlib.sha256(data).digest())
            _write_all(descriptor, data)
            os.ftruncate(descriptor, len(data) + 32)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        self._turn = 1 - self._turn
        if self._shipped is not None and time.monotonic() >= self._ship_at:
            self._shipped.put(hashlib.sha256(data).digest() + data)
            self._ship_at = time.monotonic() + SHIP_SECONDS

    def _open(self, keep: bool) -> None:
        if not keep:
            delete(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / _LOG
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if keep:
            os.ftruncate(self._file, _whole(path.read_bytes())[1])
            newest = _newest(self._folder, self._key)
            self._turn = 0 if newest is None else 1 - newest[0]  # the newest state is the last to be overwritten
        else:
            self._append(_framed(canonical_json({"key": self._key})))
            _sync_folder(self._folder)


class Shipped:
    """The copy of one increment's state in the object store. A store that is away costs the copy, nothing else."""

    def __init__(self, store: ObjectStore, adapter: str, key: str) -> None:
        self._store, self._name = store, f"{SHIPPED}{adapter}/{key}"
        self._there = False

    def put(self, data: bytes) -> None:
        """Replace the copy."""
        try:
            self._store.put(self._name, data)
            self._there = True
        except Unavailable as error:
            log.warning("The checkpoint is on this machine alone: %s", error)

    def get(self) -> bytes:
        """The copy, empty when there is none."""
        try:
            data = self._store.get(self._name)
        except (NotFound, Unavailable):
            return b""
        self._there = True
        return data

    def delete(self) -> None:
        """Remove the copy, if this process has made or read it; `Unavailable` when it may still be there."""
        if self._there:
            self._store.delete(self._name)
            self._there = False


def read(folder: Path, key: str) -> Held:
    """What a folder holds of the increment `key`; nothing of another, and nothing that is torn."""
    try:
        lines, _ = _whole((folder / _LOG).read_bytes())
    except FileNotFoundError:
        return Held(None, {})
    if not lines or json.loads(lines[0]).get("key") != key:
        return Held(None, {})
    newest = _newest(folder, key)
    state = newest[1] if newest else None
    taken = state.place if state else 0
    records = [json.loads(line) for line in lines[1:]]
    return Held(state, {r["step"]: float.fromhex(r["loss"]) for r in records if r["step"] > taken})


def key_in(folder: Path) -> str | None:
    """The key of the increment that a folder holds a log of."""
    try:
        lines, _ = _whole((folder / _LOG).read_bytes())
    except OSError:
        return None
    return json.loads(lines[0]).get("key") if lines else None


def delete(folder: Path) -> None:
    """Remove a log and everything in it; `Unavailable` when something stays."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Unavailable(
            f"Cannot delete the checkpoints in {folder}: {error.strerror}.", "Is the disk read-only?"
        ) from error


def _shaped_by(learner: Learner) -> dict[str, Any]:
    """Of the step taken last: its learning-rate position and rate, and the SHA-256 of the slots it took."""
    place, optimiser = learner.place - 1, learner.optimiser
    batch = learner.plan[place]
    return {
        "position": optimiser.position,
        "rate": rate_at(optimiser.recipe, optimiser.position - 1, place / len(learner.plan)),
        "slots": digest_of([batch.slots, batch.earlier]),
    }


def _newest(folder: Path, key: str) -> tuple[int, Snapshot] | None:
    found = [
        (number, snapshot)
        for number, name in enumerate(_STATES)
        if (snapshot := _decode(folder / name, key)) is not None
    ]
    return max(found, key=lambda pair: pair[1].place, default=None)


def _encode(key: str, snapshot: Snapshot) -> bytes:
    config: dict[str, Any] = {
        "key": key,
        "place": snapshot.place,
        "position": snapshot.position,
        "taken": snapshot.taken,
        "averaged": snapshot.averaged,
        "tokens": snapshot.tokens,
        "losses": [loss.hex() for loss in snapshot.losses],
    }
    vectors = {"weights": snapshot.weights, "m": snapshot.m, "v": snapshot.v, "mean": snapshot.mean}
    return encode(config, vectors)[0]


def _decode(path: Path, key: str) -> Snapshot | None:
    try:
        return _parsed(path.read_bytes(), key)
    except FileNotFoundError:
        return None


def _parsed(raw: bytes, key: str) -> Snapshot | None:
    if len(raw) < 32 or hashlib.sha256(raw[32:]).digest() != raw[:32]:
        return None
    config, tensors = decode(raw[32:])
    if config["key"] != key:
        return None
    return Snapshot(
        tensors["weights"],
        tensors["m"],
        tensors["v"],
        tensors["mean"],
        config["place"],
        config["position"],
        config["taken"],
        config["averaged"],
        config["tokens"],
        tuple(float.fromhex(loss) for loss in config["losses"]),
    )


def _framed(line: bytes) -> bytes:
    return _FRAME.pack(len(line), zlib.crc32(line)) + line


def _whole(data: bytes) -> tuple[list[bytes], int]:
    """The records before the first torn one, and where they end."""
    lines, at = [], 0
    while at + _FRAME.size <= len(data):
        size, check = _FRAME.unpack_from(data, at)
        line = data[at + _FRAME.size : at + _FRAME.size + size]
        if len(line) < size or zlib.crc32(line) != check:
            break
        lines.append(line)
        at += _FRAME.size + size
    return lines, at


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unavailable(folder: Path, error: OSError) -> Unavailable:
    return Unavailable(f"Cannot write checkpoints to {folder}: {error.strerror}.", "Is the disk full, or read-only?")
