"""The dataflow and everything beside it on a broker that wants SASL, TLS or both, by the one `[kafka]` block."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from riverdelta.core.errors import Refused
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Ledger
from riverdelta.registry.wakeups import Wakeups
from riverdelta.streams import topics
from riverdelta.streams.dead_letters import list_dead_letters, replay_dead_letters
from riverdelta.streams.publish import publish
from tests.conftest import make_settings
from tests.secured import STRANGER, SecuredBroker, start

from .flow import count, flowing, texts, until

pytestmark = pytest.mark.apache

MECHANISMS = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", ""]  # the last: certificates of both sides


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    broker = start(tmp_path_factory.mktemp("secured"))
    yield broker
    broker.stop()


def settings_of(secured: SecuredBroker, folder: Path, mechanism: str, **client: str) -> Settings:
    settings = make_settings(folder, "", Path())
    settings.kafka = secured.kafka(mechanism, **client)
    return settings


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_events_become_entries(secured: SecuredBroker, tmp_path: Path, mechanism: str) -> None:
    settings = settings_of(secured, tmp_path, mechanism)
    topics.ensure(settings)
    ledger = Ledger.open(settings.ledger_url)
    ledger.create("ada", Recipe.from_dict({"seal": {"count": 2, "age": 0.3}}), "test")
    heard = threading.Event()
    wakeups = Wakeups(settings)
    wakeups.listen(settings.topics.jobs, heard)
    with flowing(settings, tmp_path) as flow:
        publish(settings, [json.dumps({"adapter": "ada", "text": f"t{n}"}).encode() for n in range(2)])
        publish(settings, [json.dumps({"adapter": "bob", "text": "unknown"}).encode()])
        until(lambda: count(ledger) == 2)
        until(lambda: bool(list_dead_letters(settings)))
        ledger.create("bob", Recipe.from_dict({"seal": {"count": 1, "age": 0.3}}), "test")
        assert replay_dead_letters(settings, lambda letter: letter.reason == "unknown_adapter") == (1, 0)
        until(lambda: count(ledger) == 3)
        assert heard.wait(20)
        assert flow.stop() == 0
    wakeups.close()
    assert texts(settings, ledger, "ada") == {"t0": 1, "t1": 1}
    ledger.close()


@pytest.mark.parametrize("mechanism", MECHANISMS[:3])
def test_a_wrong_password_is_said_at_once(secured: SecuredBroker, tmp_path: Path, mechanism: str) -> None:
    settings = settings_of(secured, tmp_path, mechanism, password="another")
    with pytest.raises(Refused, match="password"):
        topics.ensure(settings)
    with flowing(settings, tmp_path) as flow:
        until(lambda: flow.process.poll() is not None)
        assert flow.process.poll() != 0
        assert flow.told("kafka.password")


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", ""])
def test_a_client_without_rights_is_told(secured: SecuredBroker, tmp_path: Path, mechanism: str) -> None:
    settings = settings_of(secured, tmp_path, mechanism)
    topics.ensure(settings)
    settings.kafka = secured.kafka(mechanism, user=STRANGER)
    with pytest.raises(Refused, match="does not let"):
        topics.ensure(settings)
    with pytest.raises(Refused, match="does not let"):
        publish(settings, [b'{"adapter":"ada","text":"t"}'])


def test_another_authority_is_not_trusted(secured: SecuredBroker, tmp_path: Path) -> None:
    settings = settings_of(secured, tmp_path, "PLAIN")
    settings.kafka.ca_file = str(secured.folder / "stranger.pem")
    with pytest.raises(Refused, match="certificate"):
        topics.ensure(settings)
