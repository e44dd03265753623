"""The engine: a step loop of its own around scheduler, model and adapters, safe to call from any thread."""

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .adapters import Source
from .blocks import BlockPool
from .config import EngineConfig
from .errors import (
    AdapterLoadFailed,
    AdaptersHalted,
    DuplicateRequest,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    VersionRevoked,
)
from .grammar import Grammars
from .invariance import check_invariance
from .live import Live
from .model import PagedModel
from .request import Bell, FinishReason, GenerationRequest, RequestHandle
from .sampling import Choice, RowSampler, choose
from .scheduler import Limits, Scheduler, Sequence, Work
from .step import Step, build_step
from .text import TextStream
from .weights import Weights

logger = logging.getLogger(__name__)

# A step that fails this often in a row will not heal: better to be restarted.
_MAX_FAILURES = 3

# Ordinary text, for the model's start-up check.
_SAMPLE = (
    "The river rises in the hills, runs past three towns and a mill, and meets the sea in a wide delta. "
    "In spring it carries more water than the old bridge was built for; last year, 14 houses were flooded."
)


class Engine:
    """Serves one base model and any number of LoRA versions, each known by its weights' digest."""

    def __init__(self, model: PagedModel, tokenizer: Any, config: EngineConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.max_model_len = min(config.max_model_len, model.max_positions)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._grammars = Grammars(tokenizer, model.vocab_size)
        self._pool = BlockPool(config.blocks)
        # Guards everything below. A step itself runs outside it, and so does the loading of weights.
        self._changed = threading.Condition()
        self._weights = Weights(model, config, self._pool, self._changed)
        self._scheduler = Scheduler(Limits.of(config), self._pool, self._weights.slots)
        self._live: dict[str, Live] = {}
        self._bell = Bell()
        self._halted = False
        self._in_step = False
        self._paused_until = 0.0
        self._threads: list[threading.Thread] = []
        self._running = False
        self._failures = 0
        self._totals: Counter[str] = Counter()

    @classmethod
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None) -> "Engine":
        """An engine over a Hugging Face decoder folder; `Unsupported` if it would not compute what the model does.
        Progress goes to `logging`."""
        config = config or EngineConfig()
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        model = PagedModel.from_pretrained(str(path), config, tokenizer(_SAMPLE).input_ids)
        if config.batch_invariant:
            check_invariance(model, config)
        return cls(model, tokenizer, config)

    def start(self) -> None:
        """Start the step loop and the adapter loader."""
        with self._changed:
            if self._running:
                return
            self._running = True
            self._failures = 0
            self._threads = [
                threading.Thread(target=self._step_loop, name="engine-steps", daemon=True),
                threading.Thread(target=self._load_loop, name="engine-loads", daemon=True),
            ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End every request with `engine_stopped` and join the threads."""
        self._break("the server is stopping")
        for thread in self._threads:
            thread.join()

    @property
    def healthy(self) -> bool:
        """Whether the step loop runs."""
        return self._running

    # Weights

    def load(self, digest: str, source: Source) -> None:
        """Register a version: reads it now into host memory, and again whenever memory no longer has it.

        Raises `VersionRevoked`, `Unsupported` with the reason, or what `source` raises.
        """
        with self._changed:
            if self._weights.known(digest):
                return
        adapter = self._weights.read(source)
        with self._changed:
            self._weights.register(digest, source, adapter)

    def unload(self, digest: str) -> None:
        """Take no new requests for a version; its weights go when its last sequence ends."""
        with self._changed:
            self._weights.drain(digest)

    def revoke(self, digests: Collection[str]) -> None:
        """Fence versions off until `reinstate`. On return no step can produce a token from them, what their answers
        had not delivered is dropped, and their weights, KV blocks and cached prefixes are erased from memory."""
        with self._changed:
            self._weights.revoked.update(digests)
            for live in [x for x in self._live.values() if x.request.digest in self._weights.revoked]:
                message = "The version that wrote this answer was revoked."
                self._cut(live, "version_revoked", VersionRevoked.code, message)
            # The step loop erases between two steps, when nothing reads what it erases.
            self._weights.erase(digests)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._weights.erased(digests) or self._idle)
            if self._idle:
                self._weights.erase_due()

    @contextmanager
    def pause(self, seconds: float) -> Iterator[None]:
        """Begin no step meanwhile, for so long at most: what a fence has to do then waits for none."""
        with self._changed:
            self._paused_until = time.monotonic() + seconds
        try:
            yield
        finally:
            with self._changed:
                self._paused_until = 0.0
                self._changed.notify_all()

    def reinstate(self, digests: Collection[str]) -> None:
        """Let revoked weights be loaded again: a rebuild without what was forgotten came out at the same bytes."""
        with self._changed:
            self._weights.revoked.difference_update(digests)

    def halt_adapters(self, on: bool) -> None:
        """Cut and refuse every request but the base's until lifted: for a server that lost its lease."""
        with self._changed:
            self._halted = on
            if on:
                for live in [x for x in self._live.values() if x.request.digest is not None]:
                    self._cut(live, "error", AdaptersHalted.code, "This server may not serve adapters for now.")

    # Requests

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Queue a request. Raises an error of `errors` when it cannot be served, which its message explains."""
        request.check(self.model.vocab_size, self.max_model_len)
        seed, schema = request.sampling.seed, request.sampling.json_schema
        sampler = RowSampler(
            request.sampling,
            secrets.randbits(63) if seed is None else seed,
            request.prompt_ids,
            self.model.vocab_size,
            self.config.device,
            None if schema is None else self._grammars.json(schema, request.cache_salt),
        )
        seq = Sequence(
            request_id=request.request_id,
            tenant=request.tenant,
            key=request.fairness_key,
            digest=request.digest,
            salt=request.cache_salt,
            tokens=list(request.prompt_ids),
            prompt_len=len(request.prompt_ids),
        )
        handle = RequestHandle(request.request_id, lambda: self._cancel(request.request_id), self._bell)
        text = TextStream(self._backend, request.prompt_ids, request.sampling.stop)
        with self._changed:
            self._admit(request)
            self._live[request.request_id] = Live(request, seq, handle, sampler, text)
            if request.digest is not None:
                self._weights.users[request.digest] += 1
            self._scheduler.add(seq)
            self._totals["requests"] += 1
            self._changed.notify_all()
        return handle

    def compile(self, schema: str, salt: str) -> None:
        """Make ready for requests of this `cache_salt` with this `json_schema`, so that `submit` need not: large ones
        take a fraction of a second. `InvalidRequest` says why a schema cannot be followed."""
        self._grammars.json(schema, salt)

    def stats(self) -> dict[str, Any]:
        """A snapshot for metrics and for `/v1/adapters`: queue, blocks, tokens, and each version's tier and holds."""
        with self._changed:
            return {
                "healthy": self._running,
                "halted": self._halted,
                "running": len(self._scheduler.running),
                "waiting": self._scheduler.queued,
                "preemptions": self._scheduler.preemptions,
                "kv_blocks": {
                    "total": self._pool.num_blocks,
                    "free": self._pool.free,
                    "cached": self._pool.cached,
                },
                "totals": {name: self._totals[name] for name in _TOTALS},
                "adapters": self._weights.stats(),
                "host_bytes": self._weights.host.nbytes,
                "revoked": len(self._weights.revoked),
            }

    # Inside: requests

    def _admit(self, request: GenerationRequest) -> None:
        if not self._running:
            raise EngineStopped("The engine is not running.", "Try again shortly.")
        if request.request_id in self._live:
            raise DuplicateRequest(f"Request {request.request_id} is already running.", "Use a new id.")
        if request.digest is not None:
            self._weights.refuse_revoked(request.digest)
            if self._halted:
                raise AdaptersHalted("This server may not serve adapters for now.", "Try again, or ask for base.")
            self._weights.check_servable(request.digest)
        if not self._scheduler.has_room(request.tenant, request.fairness_key):
            raise QueueFull("Too many requests are waiting.", "Try again later.")

    def _cancel(self, request_id: str) -> None:
        with self._changed:
            live = self._live.get(request_id)
            if live is not None:
                self._end(live, "cancelled")

    def _end(self, live: Live, reason: FinishReason, code: str | None = None, message: str | None = None) -> None:
        self._retire(live, reason)
        live.handle.push(live.finished(reason, code, message))

    def _cut(self, live: Live, reason: FinishReason, code: str, message: str) -> None:
        self._retire(live, reason)
        live.handle.cut(live.finished(reason, code, message))

    def _retire(self, live: Live, reason: FinishReason) -> None:
        self._scheduler.finish(live.seq)
        digest = live.request.digest
        del self._live[live.request.request_id]
        if digest is not None:
            self._weights.users[digest] -= 1
            self._weights.drop_drained(digest)
        self._totals["prompt_tokens"] += live.seq.prompt_len
        self._totals["cached_tokens"] += live.seq.cached_tokens or 0
        self._totals[f"finished_{reason}"] += 1

    # Inside: steps

    @property
    def _idle(self) -> bool:
        return not (self._running or self._in_step or self._weights.loading)

    def _load_loop(self) -> None:
        self._weights.load_loop(lambda: self._running, self._loading_failed)

    def _loading_failed(self, digest: str, error: Exception) -> None:
        for live in [x for x in self._live.values() if x.request.digest == digest]:
            self._end(live, "error", AdapterLoadFailed.code, f"The version could not be loaded: {error}")

    def _step_loop(self) -> None:
        try:
            self._steps()
        except Exception:
            logger.exception("The step loop failed")
        finally:
            self._in_step = False
            self._break("the engine stopped")

    def _steps(self) -> None:
        while True:
            with self._changed:
                step = None
                while self._running and step is None:
                    self._weights.erase_due()
                    if (pause := self._paused_until - time.monotonic()) > 0:
                        self._changed.wait(pause)
                        continue
                    work = self._scheduler.plan()
                    if self._weights.slots.to_load:
                        self._changed.notify_all()
                    if work:
                        step = self._build(work)
                    else:
                        self._changed.wait()
                if step is None:
                    return
                self._in_step = True
                samplers = [self._live[w.seq.request_id].sampler for w in step.sampled]
            choices: list[Choice] | None = None
            try:
                choices = self._run(step, samplers)
            except Exception:
                logger.exception("A step of %d sequences failed", len(step.work))
            with self._bell.held(), self._changed:
                self._in_step = False
                if choices is None:
                    self._fail(step)
                else:
                    self._failures = 0
                    self._scheduler.commit(step.work)
                    self._totals["steps"] += 1
                    self._emit(step, choices)
                self._changed.notify_all()
                if self._failures >= _MAX_FAILURES:
                    logger.error("%d steps failed in a row: the engine stops", self._failures)
                    return

    def _build(self, work: list[Work]) -> Step:
        self.model.cache.zero(self._pool.drain_fresh())
        return build_step(work, self._weights.slots, self.model.cache, self.config.batch_invariant)

    def _run(self, step: Step, samplers: list[RowSampler]) -> list[Choice]:
        scores = self.model.step(step.tokens, step.positions, step.context, step.segments, step.keep)
        with torch.inference_mode():
            return choose(scores, samplers, [w.seq.answer_len for w in step.sampled])

    def _emit(self, step: Step, choices: list[Choice]) -> None:
        now = time.monotonic()
        told = []
        for item, choice in zip(step.sampled, choices, strict=True):
            live = self._live.get(item.seq.request_id)
            if live is not None and live.seq is item.seq:  # else cut while the step ran
                told.append((live, choice))
        # Who was served least hears first: an event loop would tell a flood's tokens before another's.
        for live, choice in sorted(told, key=lambda pair: self._scheduler.standing(pair[0].seq)):
            self._totals["answer_tokens"] += 1
            try:
                reason = live.advance(choice, self.model.eos, now)
            except InvalidRequest as error:
                self._end(live, "error", error.code, str(error))
                continue
            except Exception:
                logger.exception("Request %s failed", live.request.request_id)
                self._end(live, "error", "internal_error", "This answer could not be continued.")
                continue
            if reason is not None:
                self._end(live, reason)

    def _fail(self, step: Step) -> None:
        self._failures += 1
        for item in step.work:
            live = self._live.get(item.seq.request_id)
            if live is not None and live.seq is item.seq:
                self._end(live, "error", "internal_error", "The step that computed this answer failed.")

    def _break(self, why: str) -> None:
        with self._changed:
            self._running = False
            for live in list(self._live.values()):
                self._end(live, "error", EngineStopped.code, f"The answer was cut off: {why}.")
            self._changed.notify_all()


_TOTALS = ("requests", "steps", "prompt_tokens", "cached_tokens", "answer_tokens")
