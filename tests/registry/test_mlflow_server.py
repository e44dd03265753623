"""The projection through a real MLflow server: artifacts by its proxy, and what only its own `mlflow gc` removes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from riverdelta.core.settings import Kafka, Registry, Settings
from riverdelta.registry import operations
from riverdelta.registry.keeper import Keeper
from tests.brokers import free_port, wait_for_port
from tests.registry.stack import two_versions, wait


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A tracking server of its own, on SQLite and a folder."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/kept"]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_port(f"127.0.0.1:{port}", 120)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.soak
def test_a_server_shows_the_ledger_and_is_purged(tmp_path: Path, server: str) -> None:
    from mlflow.tracking import MlflowClient

    settings = Settings.read(
        data=tmp_path / "data", kafka=Kafka(bootstrap="127.0.0.1:1"), registry=Registry(mlflow=server)
    )
    stack = two_versions(settings)
    keeper = Keeper(stack.ledger, settings, stack.store, orphan_seconds=0.0)
    assert keeper.projection.catch_up() == ["acme"]
    mlflow = MlflowClient(tracking_uri=server, registry_uri=server)
    held = mlflow.get_model_version_by_alias("acme", "live")
    assert held.tags["riverdelta.version"] == "2"
    digest = stack.ledger.version("acme", 2).digest
    [kept] = (tmp_path / "kept").rglob(f"{held.run_id}/**/*.safetensors")
    assert kept.read_bytes() == stack.store.get(f"weights/{digest}.safetensors")

    request = operations.forget(stack.ledger, settings, "ann", ["acme"], actor="op").forget.id
    stack.train("acme")
    assert wait(lambda: not keeper.advance_forgets(), 30)
    keeper.projection.catch_up()
    assert mlflow.get_model_version_by_alias("acme", "live").tags["riverdelta.version"] == "3"
    assert not kept.exists()
    assert mlflow.get_run(held.run_id).info.lifecycle_stage == "deleted"
    manifest = json.loads(stack.store.get(f"forgets/{request}.json"))
    assert held.run_id in manifest["mlflow_gc_needed"]["acme"]
    shown = {version.tags.get("riverdelta.version") for version in mlflow.search_model_versions("name='acme'")}
    assert shown == {"1", "3"}
