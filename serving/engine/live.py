"""One admitted request until its FinishEvent: its sequence, and what each chosen token means for its answer."""

from collections.abc import Collection
from dataclasses import dataclass

from .request import FinishEvent, FinishReason, GenerationRequest, RequestHandle, TokenEvent, Usage
from .sampling import Choice, RowSampler
from .scheduler import Sequence
from .text import TextStream


@dataclass(eq=False, slots=True)
class Live:
    """The engine's side of a request."""

    request: GenerationRequest
    seq: Sequence
    handle: RequestHandle
    sampler: RowSampler
    text: TextStream

    def advance(self, choice: Choice, eos: Collection[int], now: float) -> FinishReason | None:
        """The answer's next token: deliver it, and say whether the answer ends with it."""
        sampling, constraint = self.request.sampling, self.sampler.constraint
        self.seq.tokens.append(choice.token)
        self.sampler.accept(choice.token)
        reason: FinishReason | None = None
        text = ""
        if choice.token in eos and (constraint is not None or not sampling.ignore_eos):
            reason = "stop"
        else:
            text = self.text.push(choice.token)
            if self.text.stopped or (constraint is not None and constraint.complete):
                reason = "stop"
            elif self.seq.answer_len >= sampling.max_tokens:
                reason = "length"
        if reason is not None:
            text += self.text.flush()
        self.handle.push(TokenEvent(choice.token, text, choice.logprob, choice.top, self.request.digest, now))
        return reason

    def finished(self, reason: FinishReason, code: str | None = None, message: str | None = None) -> FinishEvent:
        """The event that ends the answer."""
        usage = Usage(self.seq.prompt_len, self.seq.answer_len, self.seq.cached_tokens or 0)
        return FinishEvent(reason, usage, self.request.digest, code, message)
