"""The kill harness as a test: nothing lost and nothing doubled."""

import subprocess
import sys

import pytest

from tests.brokers import Broker

pytestmark = pytest.mark.apache


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_two_hundred_kills(broker_process: Broker) -> None:
    if not broker_process.apache:
        pytest.skip("needs Apache Kafka: set KAFKA_BOOTSTRAP_SERVERS")
    done = subprocess.run([sys.executable, "-m", "tests.soak", "--seed", "1", "--kills", "200"], check=False)
    assert done.returncode == 0
