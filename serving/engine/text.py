"""From token ids to text as it grows: whole characters only, and never past a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

# Enough prompt for a tokenizer to know that the answer continues a text (leading spaces, byte runs).
_CONTEXT = 6


class TextStream:
    """One answer's text. `push` gives what each token adds; `stopped` is set once a stop string is complete."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        """`tokenizer`: a `tokenizers.Tokenizer`, or None for an engine that has no text."""
        self._tokenizer = tokenizer
        context = list(prompt_ids[-_CONTEXT:])
        if tokenizer is not None and tokenizer.decode(context, skip_special_tokens=True).endswith("\ufffd"):
            context = []  # the stream would take the rest of the prompt's last character for part of the answer
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._stop = tuple(stop)
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        if self._tokenizer is None:
            return ""
        self._pending.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token)
        except Exception:  # some byte runs decode to other text as they grow: go on without what came before
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            return ""
        self._pending.clear()
        return self._release(piece)

    def flush(self) -> str:
        """The end came: what was held back, incomplete characters as U+FFFD."""
        if self._tokenizer is None or self.stopped:
            return ""
        tail = self._tokenizer.decode(self._pending, skip_special_tokens=True) if self._pending else ""
        self._pending.clear()
        text = self._release(tail)
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _release(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        first = min((at for s in self._stop if (at := text.find(s)) >= 0), default=-1)
        if first >= 0:
            self.stopped, self._held = True, ""
            return text[:first]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
