"""The kill harness as a test: nothing lost and nothing doubled."""

import subprocess
import sys

import pytest

from tests.brokers import Broker

pytestmark = pytest.mark.apache


@pytest.mark.timeout(900)
def test_one_kill_of_each_kind(broker_process: Broker) -> None:
    """By this seed a zombie of the dataflow, then the server, the broker, the dataflow and a trainer."""
    harness(broker_process, seed=39, kills=5)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_two_hundred_kills(broker_process: Broker) -> None:
    harness(broker_process, seed=1, kills=200)


def harness(broker: Broker, seed: int, kills: int) -> None:
    if not broker.apache:
        pytest.skip("needs Apache Kafka: set KAFKA_BOOTSTRAP_SERVERS")
    done = subprocess.run([sys.executable, "-m", "tests.soak", "--seed", str(seed), "--kills", str(kills)], check=False)
    assert done.returncode == 0
