"""What every test may use: a tiny base model, a real broker, settings in a folder of their own."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they give
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from riverdelta.core.settings import Kafka, Settings, Topics
from tests.brokers import Broker, start_broker
from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte tokenizer."""
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def broker_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A real broker, shared by the whole run. Tests that kill one start their own."""
    broker = start_broker(tmp_path_factory.mktemp("broker"))
    yield broker
    if broker.killable:
        broker.stop()


@pytest.fixture
def broker(request: pytest.FixtureRequest, broker_process: Broker) -> str:
    """The shared broker's bootstrap servers; skips tests marked `apache` on a broker that lacks what they need."""
    if request.node.get_closest_marker("apache") and not broker_process.apache:
        pytest.skip("needs Apache Kafka: set KAFKA_BOOTSTRAP_SERVERS")
    return broker_process.bootstrap


@pytest.fixture
def settings(tmp_path: Path, broker: str, tiny_base: Path) -> Settings:
    """Settings with a data folder, topics and (tiny) base of their own on the shared broker."""
    return make_settings(tmp_path, broker, tiny_base)


def make_settings(folder: Path, bootstrap: str, base: Path) -> Settings:
    """Settings for one stack of its own."""
    run = uuid.uuid4().hex[:8]
    topics = Topics(
        events=f"events-{run}", control=f"control-{run}", jobs=f"jobs-{run}", releases=f"releases-{run}", partitions=2
    )
    return Settings.read(data=folder / "data", base=str(base), kafka=Kafka(bootstrap=bootstrap), topics=topics)
