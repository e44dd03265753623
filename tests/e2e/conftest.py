"""One stack for all tests of this folder, on the best broker to be had."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import Broker

from .river import River


@pytest.fixture(scope="session")
def bootstrap(broker_process: Broker) -> str:
    """A cluster, or nothing: then each stack runs the embedded broker itself."""
    return broker_process.bootstrap if broker_process.apache else ""


@pytest.fixture(scope="session")
def river(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, bootstrap: str) -> Iterator[River]:
    """The stack that tests share: each has adapters of its own."""
    made = River(tmp_path_factory.mktemp("river"), tiny_base, bootstrap)
    try:
        yield made.start()
    finally:
        made.end()
