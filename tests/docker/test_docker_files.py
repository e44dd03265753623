"""The images and the compose file, checked without a daemon: by hadolint, by compose, against the settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from riverdelta.core.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILLED = {"POSTGRES_PASSWORD": "p", "MINIO_PASSWORD": "m"}


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def compose(*files: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    package = pytest.importorskip("compose")
    binary = Path(package.__file__).with_name("docker-compose")  # its own command hides the exit code
    given = [part for file in files for part in ("-f", str(DOCKER / file))]
    return subprocess.run(
        [str(binary), *given, "config", "--format", "json"],
        env={**os.environ, **(FILLED if env is None else env)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = compose("compose.yml")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_holds_every_package() -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", (DOCKER / "Dockerfile").read_text(), re.M))
    packages = {link.name for link in (ROOT / "src" / "riverdelta").iterdir() if link.is_symlink()}
    assert packages <= copied
    kept = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert packages | {"src", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == kept


def test_services_are_all_there(services: dict[str, Any]) -> None:
    assert {"kafka", "postgres", "minio", "mlflow", "stream", "train", "serve", "registry"} <= set(services)


def test_nothing_is_reachable_from_outside(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name


@pytest.mark.parametrize("name", ["stream", "train", "serve", "registry"])
def test_processes_get_settings_that_fit(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    image = dict(re.findall(r"\b(RIVERDELTA_\w+)=(\S+)", (DOCKER / "Dockerfile").read_text()))
    for key, value in {**image, **services[name]["environment"]}.items():
        monkeypatch.setenv(key, value)
    settings = Settings.read()
    assert settings.kafka.bootstrap == "kafka:9092"
    assert settings.ledger_url.startswith("postgresql+psycopg://")
    assert settings.store_url == "s3://riverdelta/store"
    assert settings.mlflow_uri == "http://mlflow:5000"
    assert settings.keys_dir == Path("/keys")
    help_ = subprocess.run(
        [sys.executable, "-m", "riverdelta.app.main", *services[name]["command"], "--help"],
        capture_output=True,
        check=False,
    )
    assert help_.returncode == 0


def test_cuda_asks_for_a_gpu() -> None:
    done = compose("compose.yml", "compose.cuda.yml", env={**FILLED, "TARGET": "cuda"})
    assert done.returncode == 0, done.stderr
    for name in ("train", "serve"):
        service = json.loads(done.stdout)["services"][name]
        assert service["image"] == "riverdelta:cuda"
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_a_missing_password_is_said() -> None:
    done = compose("compose.yml", env={"MINIO_PASSWORD": "m"})
    assert done.returncode != 0
    assert "POSTGRES_PASSWORD" in done.stderr
    assert "set it in docker/.env" in done.stderr


def test_every_variable_is_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yml").read_text()))
    offered = set(re.findall(r"^(\w+)=", (DOCKER / "env.example").read_text(), re.M))
    assert used == offered
