"""Answers given, published as interaction events: opt-in per adapter, and never in an answer's way.

An event that cannot be delivered is dropped and counted: what was asked is not kept on this machine for later.
"""

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from riverdelta.core.events import ContractError, Interaction, checked
from riverdelta.core.settings import Settings
from riverdelta.core.times import now

from .generation import Answer
from .metrics import Metrics

log = logging.getLogger(__name__)
SOURCE = "riverdelta-serving"
_WAITING = 4096
_LONGEST = 100_000  # characters of a text in an event


@dataclass(frozen=True)
class Asked:
    """What a request said, as far as an event tells it: `prompts` as text, or the chat's `messages`."""

    subject: str
    prompts: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()


class Interactions:
    """Publishes whole answers of the adapters that the settings name."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._adapters = frozenset(settings.serving.interactions) if settings.kafka.bootstrap else frozenset[str]()
        self._queue: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="interactions", daemon=True)

    def start(self) -> None:
        """Start the publishing thread, if any adapter is named."""
        if self._adapters:
            self._thread.start()

    def stop(self) -> None:
        """Publish what waits, within a second."""
        if self._thread.is_alive():
            self._offer(None)
            self._thread.join(timeout=1)

    def wants(self, adapter: str | None) -> bool:
        """Whether an adapter's answers are published."""
        return adapter is not None and ("*" in self._adapters or adapter in self._adapters)

    def publish(self, answer: Answer, asked: Asked) -> None:
        """Queue one event for each choice of a whole answer. A choice's `response` id is the answer's id, followed
        by `:` and its index where there are several."""
        per_prompt = len(answer.choices) // len(answer.prompts)
        for choice in answer.choices:
            text = "".join(choice.text)
            prompt = asked.prompts[choice.index // per_prompt] if asked.prompts else ""
            said: dict[str, Any] = {"prompt": prompt} if asked.prompts else {"messages": list(asked.messages)}
            texts = [text, prompt, *(turn["content"] for turn in asked.messages)]
            if max(map(len, texts)) > _LONGEST:
                continue
            response = answer.id if len(answer.choices) == 1 else f"{answer.id}:{choice.index}"
            event = Interaction(
                adapter=str(answer.bound.adapter),
                subject=asked.subject,
                id=response,
                source=SOURCE,
                time=now(),
                response=response,
                digest=answer.fingerprint,
                completion=text,
                **said,
            )
            try:
                checked(event)
            except ContractError:
                continue  # an empty answer, say
            self._offer((event.adapter.encode(), msgspec.json.encode(event)))

    def _offer(self, item: tuple[bytes, bytes] | None) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._metrics.interaction("dropped")

    def _run(self) -> None:
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        producer: Any = None
        while (item := self._queue.get()) is not None:
            try:
                if producer is None:
                    producer = KafkaProducer(
                        **self._settings.kafka.for_kafka_python(), acks="all", linger_ms=5, max_block_ms=5000
                    )
                sent = producer.send(self._settings.topics.events, key=item[0], value=item[1])
                sent.add_callback(lambda _: self._metrics.interaction("sent"))
                sent.add_errback(self._lost)
            except (KafkaError, OSError) as error:
                self._lost(error)
        if producer is not None:
            producer.flush(timeout=1)
            producer.close(timeout=1)

    def _lost(self, error: Exception) -> None:
        self._metrics.interaction("dropped")
        log.warning("an interaction was not published: %s", type(error).__name__)
