"""Answers in OpenAI's shapes: whole ones, and the chunks of a stream."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .engine import TokenEvent

Decode = Callable[[int], str]


@dataclass
class Choice:
    """One answer as it grows. `logprobs` is None unless they were asked for."""

    index: int
    decode: Decode
    with_logprobs: bool
    text: list[str] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    offset: int = 0
    finish_reason: str | None = None


class Shape(Protocol):
    """What differs between completions and chats."""

    prefix: str
    whole: str
    piece: str

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""

    def delta(self, choice: Choice, event: TokenEvent) -> dict[str, Any]:
        """What one token adds to a choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token."""

    def ending(self, choice: Choice) -> dict[str, Any]:
        """What a stream says of a choice after its last token."""


class CompletionShape:
    """/v1/completions."""

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        return self._choice(choice.index, "".join(choice.text), self._logprobs(choice, choice.events), choice)

    def delta(self, choice: Choice, event: TokenEvent) -> dict[str, Any]:
        """What one token adds."""
        return self._choice(choice.index, event.text, self._logprobs(choice, [event]), None)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Nothing: a completion begins with its text."""
        return None

    def ending(self, choice: Choice) -> dict[str, Any]:
        """The reason."""
        return self._choice(choice.index, "", None, choice)

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any, ended: Choice | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": ended and ended.finish_reason}

    @staticmethod
    def _logprobs(choice: Choice, events: list[TokenEvent]) -> dict[str, Any] | None:
        if not choice.with_logprobs:
            return None
        tokens = [choice.decode(event.token_id) for event in events]
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [{choice.decode(token): value for token, value in event.top_logprobs} for event in events],
            "text_offset": offsets,
        }


class ChatShape:
    """/v1/chat/completions."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice, choice.events),
            "finish_reason": choice.finish_reason,
        }

    def delta(self, choice: Choice, event: TokenEvent) -> dict[str, Any]:
        """What one token adds."""
        return self._delta(choice.index, {"content": event.text}, self._logprobs(choice, [event]))

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def ending(self, choice: Choice) -> dict[str, Any]:
        """The reason."""
        return self._delta(choice.index, {}, None, choice.finish_reason)

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    @staticmethod
    def _logprobs(choice: Choice, events: list[TokenEvent]) -> dict[str, Any] | None:
        if not choice.with_logprobs:
            return None

        def of(token: int, logprob: float | None) -> dict[str, Any]:
            text = choice.decode(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                {
                    **of(event.token_id, event.logprob),
                    "top_logprobs": [of(token, value) for token, value in event.top_logprobs],
                }
                for event in events
            ],
            "refusal": None,
        }
