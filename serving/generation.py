"""From a request to the engine's events: prompts to tokens, a version bound, sequences queued, answers collected."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jinja2 import TemplateError

from riverdelta.core.names import ModelRef
from riverdelta.core.template import chat_ids, prompt_ids

from .answers import Choice, Shape
from .api_keys import Caller
from .engine import (
    AdapterLoadFailed,
    AdapterNotLoaded,
    AdaptersHalted,
    Engine,
    EngineStopped,
    Event,
    FinishEvent,
    GenerationRequest,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    RequestHandle,
    SamplingParams,
    SchemaTooHard,
    TokenEvent,
    VersionRevoked,
)
from .errors import AnswerRevoked, RequestError
from .fleet import Bound, Fleet
from .requests import ChatRequest, CompletionRequest
from .writing import ReaderGone, frame

_PATIENCE = 3.0  # seconds in which an alias that was fenced off must have moved

# One thread: a tokenizer must not be used by two at once, and long prompts must not hold up the event loop.
_tokenizing = ThreadPoolExecutor(1, "tokenizer")
_SHRINKS = 4  # Unicode's composed forms make at most so many characters one
_compiling = ThreadPoolExecutor(1, "schemas")
_MOST_SCHEMAS = 4  # of one caller in the making


@dataclass
class Answer:
    """One request being answered."""

    id: str
    shape: Shape
    bound: Bound
    fingerprint: str
    prompts: list[list[int]]
    choices: list[Choice]
    handles: list[RequestHandle]
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.monotonic)
    usage: dict[int, FinishEvent] = field(default_factory=dict)
    on_event: Callable[[Event, float | None], None] = lambda event, since: None
    check: Callable[[], None] = lambda: None  # raises once no more of it may be told

    def cancel(self) -> None:
        """Stop generating what is not finished."""
        for handle in self.handles:
            handle.cancel()

    def head(self, kind: str) -> dict[str, Any]:
        """What a whole answer and each chunk begin with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.bound.name,
            "system_fingerprint": self.fingerprint,
        }

    def counted(self) -> dict[str, Any]:
        """OpenAI's usage object. A prompt counts once, however many answers it gets."""
        per_prompt = max(1, len(self.choices) // len(self.prompts))
        firsts = [self.usage[i].usage for i in range(0, len(self.choices), per_prompt) if i in self.usage]
        prompt = sum(len(ids) for ids in self.prompts)
        completion = sum(end.usage.completion_tokens for end in self.usage.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
        }

    async def events(self) -> AsyncGenerator[tuple[Choice, Event]]:
        """The events of every choice as they come; what must not be told to a client is raised. Ends the generation
        however it is left."""
        last: dict[int, float] = {}
        try:
            async with aclosing(_merged(self.handles)) as merged:
                async for index, event in merged:
                    choice = self.choices[index]
                    if isinstance(event, FinishEvent):
                        self.on_event(event, None)
                        self.usage[index] = event
                        choice.finish_reason = _reason(event)
                    else:
                        self.on_event(event, last.get(index))
                        last[index] = event.emitted_at
                        choice.text.append(event.text)
                    self.check()
                    yield choice, event
        finally:
            self.cancel()

    async def collect(self) -> dict[str, Any]:
        """The whole answer."""
        async with aclosing(self.events()) as events:
            async for choice, event in events:
                if choice.with_logprobs and isinstance(event, TokenEvent):
                    choice.events.append(event)
        return {
            **self.head(self.shape.whole),
            "choices": [self.shape.choice(choice) for choice in self.choices],
            "usage": self.counted(),
        }

    async def frames(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        head = self.head(self.shape.piece)
        tail = {"usage": None} if include_usage else {}
        opened: set[int] = set()
        async with aclosing(self.events()) as events:
            async for choice, event in events:
                if choice.index not in opened:
                    opened.add(choice.index)
                    if (opening := self.shape.opening(choice.index)) is not None:
                        yield frame({**head, "choices": [opening], **tail})
                if isinstance(event, FinishEvent):
                    yield frame({**head, "choices": [self.shape.ending(choice)], **tail})
                elif event.text or choice.with_logprobs:
                    yield frame({**head, "choices": [self.shape.delta(choice, event)], **tail})
        if include_usage:
            yield frame({**head, "choices": [], "usage": self.counted()})
        yield b"data: [DONE]\n\n"


class Generator:
    """Binds requests to versions and queues them with the engine."""

    def __init__(self, engine: Engine, fleet: Fleet, base_digest: str) -> None:
        self.engine, self.fleet, self.base_digest = engine, fleet, base_digest
        self._compiling: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Lock] = {}
        longest = max(map(len, engine.tokenizer.get_vocab()))
        self._most_characters = engine.max_model_len * longest * _SHRINKS

    async def completion_prompts(self, request: CompletionRequest, caller: Caller) -> list[list[int]]:
        """Token ids of each prompt."""
        found = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                ids = await self._tokens(caller, len(prompt), partial(prompt_ids, self.engine.tokenizer, prompt))
                self.room(ids)  # of many that do not fit, one has been looked at
            else:
                ids = list(prompt)
            found.append(ids)
        return found

    async def chat_prompt(self, request: ChatRequest, caller: Caller) -> list[int]:
        """Token ids of a chat, up to where the assistant's turn begins."""
        turns = [message.turn() for message in request.messages]
        longest = max(len(turn["content"]) for turn in turns)
        return await self._tokens(caller, longest, partial(chat_ids, self.engine.tokenizer, turns))

    async def _tokens(self, caller: Caller, longest: int, work: Callable[[], list[int]]) -> list[int]:
        # A megabyte takes the tokenizer seconds: what cannot fit is not begun.
        if longest > self._most_characters:
            raise PromptTooLong(
                f"{longest} characters leave no room in the {self.engine.max_model_len} tokens of this server.",
                "Shorten the prompt.",
            )
        try:
            # One text of a caller's at a time: a flood of long ones does not stand before everybody else's.
            async with self._turns.setdefault(caller.name, asyncio.Lock()):
                return await asyncio.get_running_loop().run_in_executor(_tokenizing, work)
        except TemplateError as error:
            raise InvalidRequest(f"The model's chat template does not take these messages: {error}.") from error
        except (UnicodeError, TypeError) as error:  # a lone surrogate
            raise InvalidRequest("The text is not valid Unicode.", "Send whole characters.") from error

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens that an answer to this prompt may have."""
        left = self.engine.max_model_len - len(prompt)
        if left < 1:
            raise PromptTooLong(
                f"The prompt's {len(prompt)} tokens leave no room in the {self.engine.max_model_len} of this server.",
                "Shorten the prompt.",
            )
        return left

    async def begin(
        self,
        answer_id: str,
        shape: Shape,
        ref: ModelRef,
        caller: Caller,
        prompts: list[list[int]],
        sampling: SamplingParams,
        n: int,
    ) -> Answer:
        """Bind the model's name to a version and queue every sequence on it, all or none."""
        if sampling.json_schema is not None:
            await self._compile(sampling.json_schema, caller)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                bound = await self.fleet.acquire(ref)
                return self._submit(answer_id, shape, bound, caller, prompts, sampling, n)
            except (AdapterNotLoaded, VersionRevoked, AnswerRevoked) as error:
                # The alias has moved, or is about to, since it was looked up.
                if time.monotonic() > deadline:
                    raise AnswerRevoked() from error
            await asyncio.sleep(0.01)

    async def _compile(self, schema: str, caller: Caller) -> None:
        if self._compiling[caller.name] >= _MOST_SCHEMAS:
            raise QueueFull("Too many JSON Schemas are being compiled for this key.", "Try again later.")
        self._compiling[caller.name] += 1
        try:
            await asyncio.get_running_loop().run_in_executor(_compiling, self.engine.compile, schema, caller.name)
        finally:
            self._compiling[caller.name] -= 1

    def _submit(
        self,
        answer_id: str,
        shape: Shape,
        bound: Bound,
        caller: Caller,
        prompts: list[list[int]],
        sampling: SamplingParams,
        n: int,
    ) -> Answer:
        digest = bound.digest
        check = partial(self.fleet.check, bound)
        answer = Answer(answer_id, shape, bound, digest or self.base_digest, prompts, [], [], check=check)
        decode = self.engine.tokenizer.decode
        try:
            for prompt in prompts:
                for i in range(n):
                    # Each of n answers draws on its own; the first as if it were alone.
                    seed = None if sampling.seed is None else sampling.seed + i
                    request = GenerationRequest(
                        request_id=f"{answer_id}-{len(answer.handles)}",
                        prompt_ids=prompt,
                        digest=digest,
                        sampling=replace(sampling, seed=seed),
                        cache_salt=caller.name,
                        tenant=caller.name,
                        fairness_key=bound.adapter or "",
                    )
                    answer.handles.append(self.engine.submit(request))
                    answer.choices.append(
                        Choice(len(answer.choices), lambda token: decode([token]), sampling.logprobs is not None)
                    )
            check()  # a fence ends what it finds queued; this came after it
        except BaseException as error:
            answer.cancel()
            if isinstance(error, AdapterNotLoaded) and digest is not None:
                self.fleet.missing(digest)
            raise
        return answer


async def _merged(handles: Sequence[RequestHandle]) -> AsyncGenerator[tuple[int, Event]]:
    """The events of several handles as they come."""
    if len(handles) == 1:
        async for event in handles[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pump(index: int, handle: RequestHandle) -> None:
        async for event in handle:
            queue.put_nowait((index, event))

    pumps = [asyncio.create_task(pump(index, handle)) for index, handle in enumerate(handles)]
    left = len(pumps)
    try:
        while left:
            index, event = await queue.get()
            left -= isinstance(event, FinishEvent)
            yield index, event
    finally:
        for task in pumps:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*pumps, return_exceptions=True)


def _reason(event: FinishEvent) -> str:
    """`stop` or `length`; anything else is raised as what a client should read."""
    if event.finish_reason in ("stop", "length"):
        return event.finish_reason
    if event.finish_reason == "version_revoked":
        raise AnswerRevoked()
    if event.finish_reason == "cancelled":
        raise ReaderGone
    if event.error_code == SchemaTooHard.code:
        raise SchemaTooHard(event.message or "")
    code = event.error_code or "internal_error"
    known = {kind.code: kind for kind in (AdaptersHalted, AdapterLoadFailed, EngineStopped)}
    if code in known:
        raise known[code]("The answer was cut off.", "Try again.")
    raise RequestError(500, code, "The answer could not be computed.", "Try again; the server's log says why.")
