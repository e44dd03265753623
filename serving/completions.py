"""/v1/completions and /v1/chat/completions."""

import secrets
import time
from asyncio import create_task
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from riverdelta.core.errors import BadInput
from riverdelta.core.names import ModelRef

from .answers import ChatShape, CompletionShape, Shape
from .api_keys import Caller
from .engine import Event, FinishEvent, SamplingParams, TokenEvent
from .errors import ModelNotFound
from .generation import Answer
from .interactions import Asked
from .requests import ChatRequest, CompletionRequest
from .server import Server
from .writing import gone, send_json, send_stream

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}}
}


class AnswerResponse(Response):
    """Sends an answer, and ends its generation when the client goes away."""

    def __init__(self, server: Server, answer: Answer, body: CompletionRequest | ChatRequest) -> None:
        self._server, self._answer, self._body = server, answer, body
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        answer, writers, said = self._answer, self._server.writers, scope["state"]["said"]
        digest = answer.bound.digest
        said.update(model=answer.bound.name, digest=answer.fingerprint[:12])

        async def cancel_when_gone() -> None:
            await gone(receive)
            answer.cancel()

        watch = create_task(cancel_when_gone())
        try:
            if self._body.stream:
                frames = answer.frames(self._body.include_usage)
                said["end"] = await send_stream(writers, send, frames, {}, digest)
            else:
                await send_json(writers, send, 200, await answer.collect(), {}, digest)
                said["end"] = "ok"
            self._server.metrics.answer(time.monotonic() - answer.started)
            if said["end"] == "ok" and self._server.interactions.wants(answer.bound.adapter):
                self._publish()
        finally:
            watch.cancel()
            answer.cancel()
            usage = answer.counted()
            said.update({name: usage[name] for name in ("prompt_tokens", "completion_tokens")})

    def _publish(self) -> None:
        body = self._body
        subject = body.safety_identifier or body.user or ""
        if isinstance(body, ChatRequest):
            turns = tuple(message.turn() for message in body.messages)
            self._server.interactions.publish(self._answer, Asked(subject, messages=turns))
        elif isinstance(body.prompts[0], str):  # token ids tell nobody anything
            self._server.interactions.publish(self._answer, Asked(subject, tuple(str(text) for text in body.prompts)))


def visible(text: str, caller: Caller) -> ModelRef:
    """The model that a name means; `ModelNotFound` also for what this caller may not know of."""
    try:
        ref = ModelRef.parse(text)
    except BadInput as error:
        raise ModelNotFound(text) from error
    if not caller.sees(ref.adapter):
        raise ModelNotFound(text)
    return ref


def routes(server: Server) -> APIRouter:
    """The two endpoints that generate."""
    router = APIRouter(tags=["generate"])

    async def begin(
        request: Request,
        said: CompletionRequest | ChatRequest,
        shape: Shape,
        prompts: list[list[int]],
        sampling: SamplingParams,
        ref: ModelRef,
    ) -> Answer:
        caller = request.state.caller
        answer_id = shape.prefix + secrets.token_hex(12)
        answer = await server.generator.begin(answer_id, shape, ref, caller, prompts, sampling, said.choices)
        labels = (answer.bound.adapter or "base", str(answer.bound.version or 0))

        def count(event: Event, before: float | None) -> None:
            if isinstance(event, TokenEvent):
                since = answer.started if before is None else before
                server.metrics.token(labels, event.emitted_at - since, before is None)
            elif isinstance(event, FinishEvent):
                server.metrics.sequence(labels, event.finish_reason, event.usage.prompt_tokens)

        answer.on_event = count
        return answer

    @router.post("/v1/completions", responses=ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        ref = visible(body.model, request.state.caller)
        prompts = await server.generator.completion_prompts(body, request.state.caller)
        sampling = body.sampling(16 if body.max_tokens is None else body.max_tokens, body.logprobs)
        answer = await begin(request, body, CompletionShape(), prompts, sampling, ref)
        return AnswerResponse(server, answer, body)

    @router.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        ref = visible(body.model, request.state.caller)
        prompt = await server.generator.chat_prompt(body, request.state.caller)
        limit = body.max_completion_tokens or body.max_tokens or server.generator.room(prompt)
        sampling = body.sampling(limit, (body.top_logprobs or 0) if body.logprobs else None)
        answer = await begin(request, body, ChatShape(), [prompt], sampling, ref)
        return AnswerResponse(server, answer, body)

    return router
