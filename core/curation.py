"""Curation: what of an admitted event is worth learning, by rules of the adapter's recipe; no I/O.

Each decision is a function of the recipe and of that one event, so that nobody's data decides whether another's is
learned, and whoever replays the log decides the same.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from .languages import language_of
from .recipe import PERSONAL, Curate

# Why an event is dropped, as counted and logged.
SHORT, LONG, UNWANTED, DENIED, LANGUAGE = "short", "long", "unwanted", "denied", "language"


class Curation:
    """The rules of one recipe, ready to be applied."""

    def __init__(self, rules: Curate) -> None:
        self._rules = rules
        self._require = [re.compile(pattern) for pattern in rules.require]
        self._deny = [re.compile(pattern) for pattern in rules.deny]
        patterns = rules.replace | {name: PERSONAL[name] for name in PERSONAL if name in rules.redact}
        self._redact = [(re.compile(pattern), f"[{name}]") for name, pattern in patterns.items()]
        self._languages = {"", *rules.languages} if rules.languages else set()
        self._reads = bool(self._require or self._deny or self._redact or self._languages or rules.min_chars > 1)

    def __call__(self, content: bytes) -> tuple[bytes | None, str]:
        """An entry's content with what is personal replaced; or None, and why it is not to be learned.

        >>> Curation(Curate(redact=("email",)))(b'{"text":"ask ann@acme.org"}')
        (b'{"text":"ask [email]"}', '')
        >>> Curation(Curate(deny=("(?i)confidential",)))(b'{"text":"Confidential."}')
        (None, 'denied')
        """
        if not self._reads and len(content) <= self._rules.max_chars:  # a character takes at least a byte
            return content, ""
        said = msgspec.json.decode(content)
        if self._redact:
            said = _changed(said, self._redacted)
            content = msgspec.json.encode(said)
        text = "\n".join(_texts(said))
        if len(text) < self._rules.min_chars:
            return None, SHORT
        if len(text) > self._rules.max_chars:
            return None, LONG
        if not all(pattern.search(text) for pattern in self._require):
            return None, UNWANTED
        if any(pattern.search(text) for pattern in self._deny):
            return None, DENIED
        if self._languages and language_of(text) not in self._languages:
            return None, LANGUAGE
        return content, ""

    def _redacted(self, text: str) -> str:
        for pattern, word in self._redact:
            text = pattern.sub(lambda _, word=word: word, text)  # type: ignore[misc]
        return text


def text_of(content: bytes) -> str:
    """Everything that an entry says, one text a line."""
    return "\n".join(_texts(msgspec.json.decode(content)))


def _texts(said: dict[str, Any]) -> Iterator[str]:
    for name in ("prompt", "completion", "text"):
        if name in said:
            yield said[name]
    for turn in said.get("messages", ()):
        yield turn["content"]


def _changed(said: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    changed: dict[str, Any] = {name: change(said[name]) for name in ("prompt", "completion", "text") if name in said}
    if "messages" in said:
        changed["messages"] = [{**turn, "content": change(turn["content"])} for turn in said["messages"]]
    return {**said, **changed}
