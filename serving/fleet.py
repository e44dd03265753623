"""The versions that this server can answer with: aliases, versions asked for by number, and their weights."""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime

from riverdelta.core import weights
from riverdelta.core.errors import NotFound
from riverdelta.core.names import BASE, ModelRef
from riverdelta.core.store import ObjectStore, weights_key
from riverdelta.registry.ledger import Ledger, VersionRecord

from .engine import AdapterLoadFailed, AdaptersHalted, Engine, QueueFull, VersionRevoked
from .errors import AnswerRevoked, ModelNotFound, VersionGone
from .permit import Permit
from .releases import Plan, Release, plan

log = logging.getLogger(__name__)
_PINNED = 1024  # versions asked for by number that stay registered
_KNOWN = 16_384  # version rows remembered
_RETRY = (1.0, 60.0)  # first and longest pause before weights that failed to load are tried again


@dataclass(frozen=True)
class Bound:
    """What answers a request: chosen once, at its admission. All None for the base."""

    adapter: str | None
    version: int | None
    digest: str | None
    fences: int = 0  # how many had been carried out before it was looked up

    @property
    def name(self) -> str:
        """As users write it, with the version that answers."""
        if self.adapter is None:
            return BASE
        return f"{self.adapter}@{self.version}" if self.version else self.adapter


@dataclass(frozen=True)
class _Failure:
    message: str
    pause: float
    retry_at: float


class Fleet:
    """Aliases and weights. The follower moves them, requests look them up; every method may be called by both."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        store: ObjectStore,
        permit: Permit,
        flush: Callable[[Collection[str]], Callable[[], object]],
        max_waiting: int,
    ) -> None:
        """`flush` begins to make sure that nothing of fenced digests is still on its way to a client; what it returns
        waits for that."""
        self._engine, self._ledger, self._store, self._permit = engine, ledger, store, permit
        self._flush = flush
        self._max_waiting = max_waiting
        self._served: dict[str, Release | None] = {}  # None: fenced off, and not read anew since
        self._created: dict[str, int] = {}
        self._loaded: set[str] = set()
        self._loading: dict[str, Future[None]] = {}
        self._failures: dict[str, _Failure] = {}
        self._versions: OrderedDict[tuple[str, int], VersionRecord] = OrderedDict()
        self._pinned: OrderedDict[str, None] = OrderedDict()
        self._waiting = 0
        self._fences = 0
        self._fenced_at: dict[str, int] = {}
        self._lock = threading.Lock()
        # Held from reading fences to having carried them out, and while a version is looked up: what a request
        # has read is then either older than the fence, and revoked by it, or newer, and true.
        self._fencing = threading.Lock()
        self._loader = ThreadPoolExecutor(2, "adapter-loads")
        self.on_loaded: Callable[[], None] = lambda: None
        self.flips = 0

    def close(self) -> None:
        """Start no more loads."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    # -- for requests ----------------------------------------------------------------------------------------

    async def acquire(self, ref: ModelRef) -> Bound:
        """The version that a model name stands for now, its weights registered with the engine."""
        if ref.adapter is None:
            return Bound(None, None, None)
        if not self._permit.valid:
            raise AdaptersHalted("This server may not serve adapters for now.", "Try again, or ask for base.")
        fences = self._fences  # before what they may change is read
        if ref.adapter not in self._served:
            raise ModelNotFound(str(ref))
        if ref.version is None:
            release = self._served.get(ref.adapter)
            if release is None:
                raise AnswerRevoked()
            bound = Bound(ref.adapter, release.version, release.digest or None, fences)
        else:
            record = self._versions.get((ref.adapter, ref.version))
            if record is None:
                record = await asyncio.to_thread(self._find, ref.adapter, ref.version)
            self._pin(record.digest)
            bound = Bound(ref.adapter, ref.version, record.digest, fences)
        if bound.digest is not None and bound.digest not in self._loaded:
            await self._load(bound.digest)
        return bound

    def check(self, bound: Bound) -> None:
        """Raise `AnswerRevoked` if its weights were fenced off since it was looked up, even if they are free again:
        they may be for another adapter alone. Holds for what was queued or generated before the call."""
        if bound.digest is not None and self._fenced_at.get(bound.digest, 0) > bound.fences:
            raise AnswerRevoked()

    def missing(self, digest: str) -> None:
        """The engine has let these weights go meanwhile."""
        with self._lock:
            self._loaded.discard(digest)

    def _find(self, adapter: str, number: int) -> VersionRecord:
        with self._fencing:
            try:
                record = self._ledger.version(adapter, number)
            except NotFound as error:
                raise ModelNotFound(f"{adapter}@{number}") from error
            if not record.usable:
                why = "is revoked: it saw what was since forgotten" if record.revoked else "is kept no longer"
                raise VersionGone(f"{adapter}@{number} {why}.", f"Ask for {adapter}, its release.")
            self._reinstate({record.digest})
            with self._lock:
                self._versions[adapter, number] = record
                while len(self._versions) > _KNOWN:
                    self._versions.popitem(last=False)
        return record

    def _pin(self, digest: str) -> None:
        with self._lock:
            self._pinned[digest] = None
            self._pinned.move_to_end(digest)
            while len(self._pinned) > _PINNED:
                self._pinned.popitem(last=False)

    async def _load(self, digest: str) -> None:
        failure = self._failures.get(digest)
        if failure is not None and failure.retry_at > time.monotonic():
            raise AdapterLoadFailed("Its weights could not be loaded.", "Try again later; the server's log says why.")
        if self._waiting >= self._max_waiting:
            raise QueueFull("Too many requests wait for weights.", "Try again later.")
        self._waiting += 1
        try:
            await asyncio.shield(asyncio.wrap_future(self.begin_load(digest)))
        except VersionRevoked as error:
            raise AnswerRevoked() from error
        except Exception as error:  # whatever it was, the loader has logged it
            raise AdapterLoadFailed(
                "Its weights could not be loaded.", "Try again later; the server's log says why."
            ) from error
        finally:
            self._waiting -= 1

    # -- for the follower ------------------------------------------------------------------------------------

    def follow(self, wanted: Mapping[str, Release]) -> Plan:
        """Take the next steps towards these releases, read from the ledger after its last fence was carried out."""
        self._reinstate({release.digest for release in wanted.values()})
        now = time.monotonic()
        with self._lock:
            failing = {digest for digest, failure in self._failures.items() if failure.retry_at > now}
            steps = plan(
                self._served,
                wanted,
                self._loaded,
                loading=self._loading,
                failing=failing,
                pinned=self._pinned,
            )
            first = not self._served
            for name, release in steps.flips.items():
                if release is None:
                    del self._served[name]
                else:
                    self._served[name] = release
            self._loaded.difference_update(steps.unloads)
        for digest in steps.unloads:
            self._engine.unload(digest)
        for digest in steps.loads:
            self.begin_load(digest)
        if not first:
            self.flips += len(steps.flips)
        if unknown := wanted.keys() - self._created.keys():
            made = {record.name: record.created_at for record in self._ledger.adapters()}
            self._created.update({name: _seconds(made[name]) for name in unknown & made.keys()})
        return steps

    def carry_out(self, acked: int) -> tuple[int, frozenset[str]]:
        """Carry out the fences after a number: the last one's number, and the digests fenced off. On return no step
        can produce a token from them, and none is on its way to a client."""
        flushed: Callable[[], object] | None = None
        with self._fencing:
            fences = self._ledger.fences(acked)
            digests = frozenset[str]().union(*(fence.digests for fence in fences))
            self._permit.revoke(digests)
            self._forget_names(digests)
            if digests:
                flushed = self._flush(digests)  # goes on while the engine ends its step
                self._engine.revoke(digests)
        if flushed is not None:
            flushed()
        return (fences[-1].number if fences else acked), digests

    def _forget_names(self, digests: frozenset[str]) -> None:
        """No name stands for these weights until it is read anew: freed for one, they are not for all. To be called
        before the engine revokes, which ends what was queued until then; `check` finds what is queued later."""
        with self._lock:
            self._loaded -= digests
            for digest in digests:
                self._pinned.pop(digest, None)
            for name, release in self._served.items():
                if release is not None and release.digest in digests:
                    self._served[name] = None
            self._versions.clear()
            self._fenced_at.update(dict.fromkeys(digests, self._fences + 1))
            self._fences += 1  # last: who reads this number finds no older name

    def pause(self, seconds: float) -> AbstractContextManager[None]:
        """Let no step begin meanwhile, for so long at most."""
        return self._engine.pause(seconds)

    def preload(self, bound: int) -> None:
        """Read the weights of the first `bound` releases, so that their first requests need not wait."""
        held = self.releases()
        digests = dict.fromkeys(held[name].digest for name in sorted(held))
        for digest in [d for d in digests if d][:bound]:
            self.begin_load(digest)

    def begin_load(self, digest: str) -> "Future[None]":
        """Register weights with the engine, from a thread of the loader; one read however many ask."""
        with self._lock:
            if digest in self._loading:
                return self._loading[digest]
            if digest in self._loaded:
                done: Future[None] = Future()
                done.set_result(None)
                return done
            future = self._loading[digest] = self._loader.submit(self._read, digest)
            return future

    def _read(self, digest: str) -> None:
        error: Exception | None = None
        try:
            key = weights_key(digest)
            self._engine.load(digest, lambda: weights.decode(self._store.get(key), digest))
        except Exception as failed:
            error = failed
            raise
        finally:
            with self._lock:
                del self._loading[digest]
                if error is None and not self._permit.revoked(digest):
                    self._loaded.add(digest)
                    self._failures.pop(digest, None)
                elif error is not None and not isinstance(error, VersionRevoked):
                    self._failed(digest, error)
            self.on_loaded()

    def _failed(self, digest: str, error: Exception) -> None:
        before = self._failures.get(digest)
        pause = _RETRY[0] if before is None else min(2 * before.pause, _RETRY[1])
        self._failures[digest] = _Failure(str(error), pause, time.monotonic() + pause)
        log.error("weights not loaded: %s", error, extra={"digest": digest, "retry_in": pause})

    def _reinstate(self, digests: Collection[str]) -> None:
        """A rebuild can come out at the very bytes of a revoked version (what was forgotten had taught nothing)."""
        again = [digest for digest in digests if self._permit.revoked(digest)]
        if again:
            self._engine.reinstate(again)
            self._permit.reinstate(again)

    # -- for the catalogue -----------------------------------------------------------------------------------

    def releases(self) -> dict[str, Release]:
        """Per adapter, what answers for it now; the base where that is being read anew."""
        with self._lock:
            return {name: release or Release(0, "") for name, release in self._served.items()}

    def created(self, adapter: str) -> int:
        """When an adapter was created, in seconds since 1970."""
        return self._created.get(adapter, 0)

    def version(self, adapter: str, number: int) -> VersionRecord:
        """A version that may be served; `ModelNotFound` or `VersionGone` otherwise. Reads the ledger."""
        return self._versions.get((adapter, number)) or self._find(adapter, number)

    def asked_by_number(self, adapter: str) -> dict[int, str]:
        """The versions of an adapter that were asked for by number lately, and their digests."""
        with self._lock:
            return {
                number: record.digest
                for (name, number), record in self._versions.items()
                if name == adapter and record.digest in self._pinned
            }

    def failure(self, digest: str) -> str | None:
        """Why weights could not be loaded, if that is so."""
        failure = self._failures.get(digest)
        return None if failure is None else failure.message


def _seconds(at: str) -> int:
    return int(datetime.fromisoformat(at).timestamp())
