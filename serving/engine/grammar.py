"""Answers held to a JSON Schema: before each token, which tokens may come (llguidance does the work)."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidRequest, SchemaTooHard

# Whoever sends a schema must not slow others down: 32 KiB compile in well under a second, and a token's mask, which is
# computed inside the step, takes milliseconds at most.
MAX_SCHEMA = 32 << 10
_LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
}
_KEPT = 16
# As most of the JSON that models have read is written; free white space would let an answer never end.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
        """`token` comes next. `SchemaTooHard` if what may follow, or could have come, costs too much to say."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise SchemaTooHard("The JSON Schema became too hard to follow.", "Simplify the schema.")

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Makes constraints for one tokenizer; its tables are built on first use. Safe to call from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._size = tokenizer, vocab_size
        self._tables: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def json(self, schema: str, salt: str) -> Constraint:
        """A constraint to documents of a JSON Schema; `InvalidRequest` if it cannot be followed. A compiled schema is
        kept for requests of the same `salt`, so that time tells nobody of another's."""
        key = salt, schema
        with self._lock:
            matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compile(schema)
        with self._lock:
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return Constraint(matcher.deep_copy(), self._size)

    def _compile(self, schema: str) -> Any:
        if len(schema.encode()) > MAX_SCHEMA:
            raise InvalidRequest(
                f"The JSON Schema has {len(schema.encode())} bytes.", f"At most {MAX_SCHEMA} can be followed."
            )
        try:
            import llguidance.hf
        except ImportError as error:
            raise InvalidRequest(
                "This server cannot hold answers to a JSON Schema.", "Install the package llguidance."
            ) from error
        if self._tables is None:
            self._tables = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._size)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_SPACING)
        except ValueError as error:
            raise InvalidRequest(f"The JSON Schema cannot be read: {error}.", "Send a JSON object.") from error
        limits = llguidance.LLParserLimits(**_LIMITS, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tables, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            reason = str(matcher.get_error()).strip().splitlines()[0]
            raise InvalidRequest(f"The JSON Schema cannot be followed: {reason}", "Simplify the schema.")
        return matcher
