"""Answers held to a JSON Schema: before each token, which tokens may come (llguidance does the work)."""

from typing import Any

import torch
from torch import Tensor

from .errors import InvalidRequest


class Constraint:
    """One answer's place in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._size = vocab_size

    def forbid(self, logits: Tensor) -> Tensor:
        """`logits` [vocab] with -inf at every token that cannot come next."""
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = words[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        allowed = bits.flatten()[: self._size].to(logits.device, torch.bool)
        return logits.masked_fill(~allowed, float("-inf"))

    def accept(self, token: int) -> None:
        """`token` comes next."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Makes constraints for one tokenizer; its tables are built on first use."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._size = tokenizer, vocab_size
        self._tables: Any = None

    def json(self, schema: str) -> Constraint:
        """A constraint to documents of a JSON Schema; `InvalidRequest` if it cannot be followed."""
        try:
            import llguidance.hf
        except ImportError as error:
            raise InvalidRequest(
                "This server cannot hold answers to a JSON Schema.", "Install the package llguidance."
            ) from error
        if self._tables is None:
            self._tables = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._size)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise InvalidRequest(f"The JSON Schema cannot be read: {error}.", "Send a JSON object.") from error
        matcher = llguidance.LLMatcher(self._tables, grammar)
        if matcher.is_error():
            reason = str(matcher.get_error()).strip().splitlines()[0]
            raise InvalidRequest(f"The JSON Schema cannot be followed: {reason}", "Simplify the schema.")
        return Constraint(matcher, self._size)
