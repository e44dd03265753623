"""What a caller asks of the engine and what it gets back: requests, sampling parameters, events and handles."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from .errors import InvalidRequest, PromptTooLong

FinishReason = Literal["stop", "length", "cancelled", "version_revoked", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. The names and meanings are those of OpenAI's API and of vLLM.

    `temperature=0` is greedy. With a `seed`, an answer depends on its prompt, weights and seed alone; without one
    the engine draws a seed. `logprobs` is the number of alternatives to report beside each token (0: the token's own).
    `json_schema`, a JSON Schema as text, holds the answer to documents of that schema.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    json_schema: str | None = None

    def check(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` naming the first parameter outside its range."""
        ranges: list[tuple[str, bool, str]] = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "0 to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 (off), or the number of tokens to keep"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "0 to 1"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "-2 to 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "-2 to 2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, at most 100"),
            ("stop", len(self.stop) <= 16 and all(0 < len(s) <= 1024 for s in self.stop), "up to 16 strings"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "64 bits"),
        ]
        for name, good, wanted in ranges:
            if not good:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} is out of range.", f"It must be {wanted}.")
        for token, bias in self.logit_bias.items():
            if not (0 <= token < vocab_size and -100.0 <= bias <= 100.0):
                raise InvalidRequest(
                    f"logit_bias has token {token} with bias {bias}.",
                    f"Tokens are 0 to {vocab_size - 1}, biases -100 to 100.",
                )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt for one version's weights (`digest`; None is the base). Tenants share the engine, and a
    tenant's `fairness_key`s its share; `cache_salt` keeps prefixes from being shared with requests of another salt."""

    request_id: str
    prompt_ids: tuple[int, ...] | list[int]
    digest: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""
    tenant: str = ""
    fairness_key: str = ""

    def check(self, vocab_size: int, max_model_len: int) -> None:
        """Raise `InvalidRequest` if no engine of this vocabulary and length could serve it."""
        self.sampling.check(vocab_size)
        length = len(self.prompt_ids)
        if length == 0:
            raise InvalidRequest("The prompt is empty.", "Send at least one token.")
        if length + self.sampling.max_tokens > max_model_len:
            raise PromptTooLong(
                f"The prompt's {length} tokens and {self.sampling.max_tokens} of answer exceed {max_model_len}.",
                "Shorten the prompt or lower max_tokens.",
            )
        if not all(0 <= token < vocab_size for token in self.prompt_ids):
            raise InvalidRequest("The prompt has token ids outside the vocabulary.", "Use this model's tokenizer.")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of the answer. `text` is what it adds to the answer: empty while a character or a possible stop
    string is incomplete. `digest` produced it; `emitted_at` is on `time.monotonic`'s clock."""

    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    digest: str | None
    emitted_at: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of an answer. `error_code` and `message` say why when `finish_reason` is not "stop" or "length"."""

    finish_reason: FinishReason
    usage: Usage
    digest: str | None
    error_code: str | None = None
    message: str | None = None


Event = TokenEvent | FinishEvent


class Bell:
    """Wakes the readers on event loops, all of a step at once: each call into a loop lets its thread take Python away
    from the caller's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sleepers: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wake nobody before the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._ring()

    def wake(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
        """Set the event, in the order of these calls."""
        with self._lock:
            self._sleepers.setdefault(loop, []).append(ready)
        if not self._held:
            self._ring()

    def _ring(self) -> None:
        with self._lock:
            sleepers, self._sleepers = self._sleepers, {}
        for loop, events in sleepers.items():
            with suppress(RuntimeError):  # the readers' loop is closed: nobody waits
                loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


class RequestHandle:
    """The answer as it comes: iterate it (or `async for`) for TokenEvents and, last, one FinishEvent."""

    def __init__(self, request_id: str, cancel: Callable[[], None], bell: Bell) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._bell = bell
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._ended = False

    def cancel(self) -> None:
        """Stop generating; the FinishEvent says "cancelled". Harmless after the end."""
        self._cancel()

    def __iter__(self) -> Iterator[Event]:
        """Block for each event in turn."""
        while True:
            with self._changed:
                while not self._events:
                    self._changed.wait()
                event = self._events.popleft()
            yield event
            if isinstance(event, FinishEvent):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events in turn, without blocking the running loop. One consumer at a time."""
        ready = asyncio.Event()
        with self._changed:
            self._waiter = (asyncio.get_running_loop(), ready)
        while True:
            with self._changed:
                event = self._events.popleft() if self._events else None
                if event is None:
                    ready.clear()
            if event is None:
                await ready.wait()
                continue
            yield event
            if isinstance(event, FinishEvent):
                return

    def push(self, event: Event) -> None:
        """The engine's end: append an event; nothing follows a FinishEvent."""
        with self._changed:
            if self._ended:
                return
            self._ended = isinstance(event, FinishEvent)
            self._events.append(event)
            self._wake()

    def cut(self, event: FinishEvent) -> None:
        """The engine's end: drop what was not read yet, and end with `event`."""
        with self._changed:
            if not self._ended or any(isinstance(e, FinishEvent) for e in self._events):
                self._events.clear()
                self._events.append(event)
            self._ended = True
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            self._bell.wake(*self._waiter)
