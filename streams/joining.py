"""Joining: interactions and the feedback on them wait for each other, whichever comes first. No I/O.

A table of each, keyed by response (as a stream-table join in Kafka Streams). Both are rebuilt by reading Kafka again:
an item that an earlier run has decided comes back as not `fresh`, so that it can be met but decides nothing again.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from riverdelta.core.recipe import FeedbackPolicy

from .items import INTERACTION, Item, Where


class Waiting(Struct):
    """An item in a table, since when (on the clock of arrivals), and whether this run is the first to decide it.

    `copies` are the places of the same interaction sent again: of two workers each may have met another one first.
    """

    item: Item
    fresh: bool
    since: float
    copies: list[tuple[Where, int]] = field(default_factory=list)


class Meeting(NamedTuple):
    """An interaction and its feedback. `decided_by` is the one of them that the entry takes its identity from, `copies`
    are the places of the interaction sent again."""

    decided_by: Item
    interaction: Item
    feedback: Item
    copies: list[tuple[Where, int]]


class Joins:
    """The waiting interactions and feedback of one adapter: at most `limit` of each, for at most `seconds`."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._interactions: dict[bytes, Waiting] = {}
        self._feedback: dict[bytes, list[Waiting]] = {}
        self._offsets: dict[Where, dict[int, None]] = {}  # of everything waiting, ascending

    def __len__(self) -> int:
        return len(self._interactions) + sum(map(len, self._feedback.values()))

    def meet(self, item: Item, fresh: bool, at: float, age: float) -> list[Meeting]:
        """Bring an item, `age` seconds old on arrival; what it meets. One of a pair must be fresh to be decided now."""
        arrived = Waiting(item, fresh, at - age)
        if item.kind == INTERACTION:
            self._hold(item.where, item.offset)
            if known := self._interactions.get(item.response):
                known.copies.append((item.where, item.offset))
                return []
            self._interactions[item.response] = arrived
            pairs = [(arrived, found) for found in self._feedback.pop(item.response, ())]
            for _, feedback in pairs:
                self._release(feedback)
        elif interaction := self._interactions.get(item.response):
            pairs = [(interaction, arrived)]
        else:
            self._feedback.setdefault(item.response, []).append(arrived)
            self._hold(item.where, item.offset)
            pairs = []
        return [
            Meeting(_decider(item, interaction, feedback), interaction.item, feedback.item, interaction.copies)
            for interaction, feedback in pairs
            if interaction.fresh or feedback.fresh
        ]

    def known(self, response: bytes) -> tuple[Where, int] | None:
        """The place of the interaction that waits with this response."""
        waiting = self._interactions.get(response)
        return (waiting.item.where, waiting.item.offset) if waiting else None

    def expire(self, at: float) -> list[Waiting]:
        """Remove and return what has waited too long, or is beyond the limit."""
        gone = []
        for waiting in self._overdue(at):
            if waiting.item.kind == INTERACTION:
                del self._interactions[waiting.item.response]
            else:
                held = self._feedback[waiting.item.response]
                held.remove(waiting)
                if not held:
                    del self._feedback[waiting.item.response]
            self._release(waiting)
            gone.append(waiting)
        return gone

    def texts(self) -> Iterator[tuple[str, tuple[Where, int]]]:
        """Of each waiting interaction, which version wrote the answer, and its place."""
        for waiting in self._interactions.values():
            yield waiting.item.digest, (waiting.item.where, waiting.item.offset)

    def erase(self, gone: frozenset[str]) -> None:
        """Drop what waiting items say about such subjects, and answers that such versions wrote; the items stay, to
        become tombstones, or to be corrected."""
        for waiting in self._all():
            item = waiting.item
            if not gone.isdisjoint(item.subjects):
                waiting.item = replace(item, content=None, raw=None)
            elif item.digest in gone and item.content is not None:
                waiting.item = replace(item, content=_question(item.content), raw=None)

    def outdate(self, consumed: Mapping[Where, int]) -> None:
        """What another worker has decided meanwhile is no longer fresh."""
        for waiting in self._all():
            if waiting.item.offset < consumed.get(waiting.item.where, 0):
                waiting.fresh = False

    def floor(self, where: Where) -> int | None:
        """The lowest offset of a partition that something still waits from."""
        return next(iter(self._offsets.get(where, ())), None)

    def _all(self) -> Iterator[Waiting]:
        yield from self._interactions.values()
        for held in self._feedback.values():
            yield from held

    def _overdue(self, at: float) -> list[Waiting]:
        interactions = list(self._interactions.values())
        feedback = [waiting for held in self._feedback.values() for waiting in held]
        late = interactions[: max(0, len(interactions) - self._limit)] + feedback[: max(0, len(feedback) - self._limit)]
        known = {id(waiting) for waiting in late}
        return late + [w for w in (*interactions, *feedback) if at - w.since > self._seconds and id(w) not in known]

    def _hold(self, where: Where, offset: int) -> None:
        self._offsets.setdefault(where, {})[offset] = None

    def _release(self, waiting: Waiting) -> None:
        for where, offset in [(waiting.item.where, waiting.item.offset), *waiting.copies]:
            self._offsets[where].pop(offset, None)


def _decider(arriving: Item, interaction: Waiting, feedback: Waiting) -> Item:
    current, other = (interaction, feedback) if arriving is interaction.item else (feedback, interaction)
    return current.item if current.fresh else other.item


def teaches(feedback: bytes, policy: FeedbackPolicy) -> bool:
    """Whether an adapter of this policy learns from such feedback.

    >>> teaches(b'{"rating":0.5}', FeedbackPolicy()), teaches(b'{"rating":0.5}', FeedbackPolicy(approval=0.5))
    (True, False)
    >>> teaches(b'{"correction":"4"}', FeedbackPolicy(corrections=False))
    False
    """
    said = msgspec.json.decode(feedback)
    return policy.corrections if "correction" in said else float(said["rating"]) > policy.approval


def _question(interaction: bytes) -> bytes:
    said: dict[str, Any] = msgspec.json.decode(interaction)
    return msgspec.json.encode({key: value for key, value in said.items() if key != "completion"})


def compose(interaction: bytes, feedback: bytes) -> tuple[bytes, bool]:
    """What is learned from an answer and the feedback on it, and whether the model wrote it.

    A correction is learned in place of the answer, else the answer itself; nothing where that is erased.

    >>> compose(b'{"prompt":"2+2=","completion":"5"}', b'{"correction":"4"}')
    (b'{"type":"example","prompt":"2+2=","completion":"4"}', False)
    >>> compose(b'{"prompt":"2+2=","completion":"4"}', b'{"rating":1}')
    (b'{"type":"example","prompt":"2+2=","completion":"4"}', True)
    >>> compose(b'{"prompt":"2+2="}', b'{"rating":1}')
    (b'', True)
    """
    asked: dict[str, Any] = msgspec.json.decode(interaction)
    correction = msgspec.json.decode(feedback).get("correction")
    answer = asked.get("completion") if correction is None else correction
    if answer is None:
        return b"", True
    learned: dict[str, Any] = {"type": "example"}
    if "messages" in asked:
        learned["messages"] = [*asked["messages"], {"role": "assistant", "content": answer}]
    else:
        learned |= {"prompt": asked["prompt"], "completion": answer}
    return msgspec.json.encode(learned), correction is None
