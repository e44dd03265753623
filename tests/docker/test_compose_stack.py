"""The whole compose stack, from event to answer to forgetting, where a Docker daemon answers."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from kafka import KafkaProducer

DOCKER = Path(__file__).parents[2] / "docker"
KEY = "a-key-of-this-test-alone"
SERVING = "http://127.0.0.1:8000"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def _daemon_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], check=False, capture_output=True, timeout=30).returncode == 0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[object]:
    """Kafka, PostgreSQL, MinIO, MLflow and the four processes, on the tiny model."""
    if not _daemon_answers():
        pytest.skip("needs a Docker daemon")
    from testcontainers.compose import DockerCompose

    folder = tmp_path_factory.mktemp("compose")
    (folder / "api-keys.toml").write_text(f'[[key]]\nname = "test"\nkey = "{KEY}"\nadapters = "*"\nrole = "admin"\n')
    (folder / "env").write_text(
        f"POSTGRES_PASSWORD=river\nMINIO_PASSWORD=riverriver\nBASE=/tiny\nAPI_KEYS={folder}/api-keys.toml\n"
    )
    mount = {"volumes": [f"{tiny_base}:/tiny:ro"]}
    override = {"services": dict.fromkeys(("stream", "train", "serve", "registry"), mount)}
    (folder / "tiny.json").write_text(json.dumps(override))  # compose files may be JSON, which is YAML
    files = [str(DOCKER / "compose.yml"), str(folder / "tiny.json")]
    with DockerCompose(DOCKER, files, build=True, env_file=str(folder / "env")) as compose:
        yield compose


def _ask(prompt: str) -> dict[str, object]:
    answer = httpx.post(
        f"{SERVING}/v1/completions",
        json={"model": "acme", "prompt": prompt, "max_tokens": 4},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    )
    return answer.raise_for_status().json()  # type: ignore[no-any-return]


def _until_version(stack: object, version: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if int(str(_ask("Q: 1?\n")["model"]).partition("@")[2] or 0) >= version:
            return
        time.sleep(0.5)
    raise AssertionError(f"acme@{version} was not served within {seconds} s")


def test_an_event_becomes_an_answer_and_is_forgotten(stack: object) -> None:
    def command(*arguments: str) -> None:
        stack.exec_in_container(["riverdelta", "registry", *arguments], "registry")  # type: ignore[attr-defined]

    command("create", "acme")
    producer = KafkaProducer(bootstrap_servers="127.0.0.1:29092")
    for number in range(4):
        event = {"adapter": "acme", "subject": "ann", "prompt": f"Q: {number}?\n", "completion": f" {number}"}
        producer.send("riverdelta.events", json.dumps(event).encode())
    producer.flush()
    _until_version(stack, 1)
    command("forget", "--subject", "ann", "--adapter", "acme", "--wait")
    _until_version(stack, 2)
    command("verify", "acme")
