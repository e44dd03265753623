"""A server on a ledger in PostgreSQL, where no file moves: it looks by itself, and is woken over Kafka."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from riverdelta.core.settings import Kafka, Registry, Settings
from riverdelta.registry.operations import Operations
from riverdelta.registry.wakeups import Wakeups
from riverdelta.streams import topics
from tests.brokers import Broker
from tests.postgres import Postgres, fresh

from .conftest import Running, eventually, small_settings
from .hand import Hand
from .test_swap import streamed


@pytest.fixture
def postgres(tmp_path: Path, tiny_base: Path) -> Iterator[Settings]:
    """Settings of a small server on a PostgreSQL of its own."""
    server = Postgres()
    try:
        settings = small_settings(tmp_path, tiny_base)
        yield settings.model_copy(update={"registry": Registry(ledger=fresh(server.url))})
    finally:
        server.remove()


def released(settings: Settings) -> tuple[str, str]:
    """An adapter with a version from before somebody, and one that saw them."""
    hand = Hand(settings)
    hand.adapter("acme")
    digests = hand.release("acme", ["bob"]), hand.release("acme", ["ann"])
    hand.ledger.close()
    return digests


def test_a_fence_cuts_a_stream_and_the_clean_version_answers(
    postgres: Settings, serve: Callable[[Settings], Running]
) -> None:
    clean, dirty = released(postgres)
    running = serve(postgres)
    told = streamed(running, "acme", max_tokens=200)
    assert next(told)["system_fingerprint"] == dirty
    with closing(Hand(postgres).ledger) as ledger:
        report = Operations(ledger, postgres, "test").forget("ann", ["acme"])
    assert report.lost == []
    assert list(told)[-1]["error"]["code"] == "version_revoked"
    assert running.answer("acme")["system_fingerprint"] == clean
    assert running.complete("acme@2").status_code == 410


def test_a_wake_up_is_enough(postgres: Settings, serve: Callable[[Settings], Running], broker_process: Broker) -> None:
    """Who hardly ever looks by itself follows releases and fences by their wake-ups."""
    rarely = postgres.serving.model_copy(update={"poll_seconds": 100.0, "lease_seconds": 600.0})
    settings = postgres.model_copy(update={"serving": rarely, "kafka": Kafka(bootstrap=broker_process.bootstrap)})
    topics.ensure(settings)
    clean, dirty = released(settings)
    running = serve(settings)
    assert running.answer("acme")["system_fingerprint"] == dirty
    with closing(Hand(settings).ledger) as ledger, closing(Wakeups(settings)) as wakeups:
        acts = Operations(ledger, settings, "test", wakeups)

        def rolled_back() -> bool:
            wakeups.send(settings.topics.releases, "acme")  # the listener may not have been there yet
            return bool(running.answer("acme")["system_fingerprint"] == clean)

        acts.rollback("acme", 1)
        eventually(rolled_back)
        assert acts.forget("ann", ["acme"]).lost == []
    assert running.answer("acme")["system_fingerprint"] == clean
