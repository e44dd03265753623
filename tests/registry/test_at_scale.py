"""The registry on what it has at scale, each real: PostgreSQL, an MLflow server, an S3-compatible store."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from riverdelta.core.settings import Registry, Settings
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import manifest_key
from riverdelta.registry.verify import verify
from tests.brokers import free_port, wait_for_port
from tests.postgres import fresh
from tests.registry.stack import two_versions, wait
from tests.registry.test_postgres import server  # noqa: F401 a fixture

pytestmark = pytest.mark.soak


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3-compatible server with two buckets, named in the environment as any S3 client takes it."""
    pytest.importorskip("moto.server")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    given = {
        "AWS_ENDPOINT_URL": url,
        "MLFLOW_S3_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_port(f"127.0.0.1:{port}", 60)
            for bucket in ("river", "mlflow"):
                assert httpx.put(f"{url}/{bucket}", trust_env=False).status_code == 200
            yield url
        finally:
            process.terminate()


@pytest.fixture
def scaled(tmp_path: Path, server: str, s3: str) -> Iterator[Settings]:  # noqa: F811
    """Settings on all three; MLflow keeps its rows in PostgreSQL and its artifacts in S3."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", fresh(server), "--artifacts-destination", "s3://mlflow/artifacts"]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(command, env=quiet, stdout=log, stderr=log)
    try:
        wait_for_port(f"127.0.0.1:{port}", 180)
        registry = Registry(ledger=fresh(server), mlflow=f"http://127.0.0.1:{port}", store="s3://river/store")
        yield Settings(data=tmp_path / "data", registry=registry)
    finally:
        process.terminate()
        process.wait(30)


def test_learned_shown_forgotten_and_purged(scaled: Settings) -> None:
    from mlflow.tracking import MlflowClient

    stack = two_versions(scaled)
    keeper = Keeper(stack.ledger, scaled, stack.store, orphan_seconds=0.0)
    assert keeper.projection.catch_up() == ["acme"]
    mlflow = MlflowClient(tracking_uri=scaled.mlflow_uri, registry_uri=scaled.mlflow_uri)
    held = mlflow.get_model_version_by_alias("acme", "live")
    assert held.tags["riverdelta.version"] == "2"
    names = {Path(file.path).name for file in mlflow.list_artifacts(held.run_id, "adapter")}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    doomed = stack.ledger.version("acme", 2).digest
    stack.store.put("weights/left-by-a-crash.safetensors", b"x")
    request = Operations(stack.ledger, scaled, "op").forget("ann", ["acme"]).forget.id
    stack.train("acme")
    assert wait(lambda: not keeper.advance_forgets(), 60)
    keeper.projection.catch_up()
    assert mlflow.get_model_version_by_alias("acme", "live").tags["riverdelta.version"] == "3"
    assert not mlflow.list_artifacts(held.run_id, "adapter")
    assert not stack.store.exists(f"weights/{doomed}.safetensors")
    left = json.loads(stack.store.get(manifest_key(request)))["mlflow_gc_needed"]["acme"]
    assert held.run_id in left
    assert all(mlflow.get_run(run).info.lifecycle_stage == "deleted" for run in left)
    assert not stack.store.exists("weights/left-by-a-crash.safetensors")
    assert verify(stack.ledger, stack.store, KeyStore.open(scaled), "acme").problems == ()
    stack.ledger.close()


def test_keepers_killed_anywhere(scaled: Settings) -> None:
    """SIGKILL at random moments: the ledger opens, and the projection repairs itself."""
    from mlflow.tracking import MlflowClient

    dice = random.Random(5)
    stack = two_versions(scaled)
    Operations(stack.ledger, scaled, "op").forget("ann", ["acme"], request="req")
    stack.train("acme")
    environment = {
        **os.environ,
        "RIVERDELTA_DATA": str(scaled.data),
        "KAFKA_BOOTSTRAP_SERVERS": "",
        "RIVERDELTA_REGISTRY__LEDGER": scaled.ledger_url,
        "RIVERDELTA_REGISTRY__MLFLOW": scaled.mlflow_uri,
        "RIVERDELTA_REGISTRY__STORE": scaled.store_url,
    }
    command = [sys.executable, "-m", "riverdelta.app.main", "registry", "run"]
    for _ in range(5):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as keeper:
            time.sleep(dice.uniform(2.0, 8.0))
            keeper.send_signal(signal.SIGKILL)
    again = Keeper(stack.ledger, scaled, stack.store, orphan_seconds=0.0)
    assert wait(lambda: not again.advance_forgets(), 60)
    again.projection.repair()
    mlflow = MlflowClient(tracking_uri=scaled.mlflow_uri, registry_uri=scaled.mlflow_uri)
    assert mlflow.get_model_version_by_alias("acme", "live").tags["riverdelta.version"] == "3"
    shown = sorted(v.tags["riverdelta.version"] for v in mlflow.search_model_versions("name='acme'"))
    assert shown == ["1", "3"]
    assert verify(stack.ledger, stack.store, KeyStore.open(scaled), "acme").problems == ()
    stack.ledger.close()
