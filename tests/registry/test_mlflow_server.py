"""The projection through a real MLflow server: artifacts by its proxy, and what only its own `mlflow gc` removes."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from riverdelta.core.settings import Registry, Settings
from riverdelta.registry.keeper import Keeper, run
from riverdelta.registry.ledger import Stage
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import manifest_key
from tests.brokers import free_port, wait_for_port
from tests.registry.stack import two_versions, wait


class Server:
    """A tracking server of its own, on SQLite and a folder; it can go away and come back."""

    def __init__(self, folder: Path) -> None:
        self._address, self._folder = f"127.0.0.1:{free_port()}", folder
        self.url = f"http://{self._address}"
        self.start()

    def start(self) -> None:
        host, port = self._address.split(":")
        command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", port, "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", f"{self._folder}/kept"]
        quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_for_port(self._address, 120)

    def kill(self) -> None:
        """SIGKILL, workers included."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    held = Server(tmp_path)
    yield held
    held.kill()


@pytest.mark.soak
def test_a_server_shows_the_ledger_and_is_purged(tmp_path: Path, server: Server) -> None:
    from mlflow.tracking import MlflowClient

    settings = Settings(data=tmp_path / "data", registry=Registry(mlflow=server.url))
    stack = two_versions(settings)
    keeper = Keeper(stack.ledger, settings, stack.store, orphan_seconds=0.0)
    assert keeper.projection.catch_up() == ["acme"]
    mlflow = MlflowClient(tracking_uri=server.url, registry_uri=server.url)
    held = mlflow.get_model_version_by_alias("acme", "live")
    assert held.tags["riverdelta.version"] == "2"
    digest = stack.ledger.version("acme", 2).digest
    [kept] = (tmp_path / "kept").rglob(f"{held.run_id}/**/*.safetensors")
    assert kept.read_bytes() == stack.store.get(f"weights/{digest}.safetensors")

    request = Operations(stack.ledger, settings, "op").forget("ann", ["acme"]).forget.id
    stack.train("acme")
    assert wait(lambda: not keeper.advance_forgets(), 30)
    keeper.projection.catch_up()
    assert mlflow.get_model_version_by_alias("acme", "live").tags["riverdelta.version"] == "3"
    assert not kept.exists()
    assert mlflow.get_run(held.run_id).info.lifecycle_stage == "deleted"
    manifest = json.loads(stack.store.get(manifest_key(request)))
    assert held.run_id in manifest["mlflow_gc_needed"]["acme"]
    shown = {version.tags.get("riverdelta.version") for version in mlflow.search_model_versions("name='acme'")}
    assert shown == {"1", "3"}


@pytest.mark.soak
def test_a_server_that_goes_away_is_caught_up_with(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are made and a subject is fenced meanwhile; the keeper says that MLflow is behind, and ends what it
    began when it is back."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # MLflow's own patience is minutes long
    settings = Settings(data=tmp_path / "data", registry=Registry(mlflow=server.url))
    stack = two_versions(settings)
    mlflow = MlflowClient(tracking_uri=server.url, registry_uri=server.url)

    def live() -> str:
        return str(mlflow.get_model_version_by_alias("acme", "live").tags["riverdelta.version"])

    stop = threading.Event()
    keeper = threading.Thread(target=run, args=(settings, stop))
    keeper.start()
    try:
        assert wait(lambda: stack.ledger.projected("acme")[0] == stack.ledger.heads()["acme"], 60)
        assert live() == "2"
        server.kill()
        stack.seal("acme", [("bob", "another")])
        stack.train("acme")
        assert wait(lambda: "MLflow is behind" in capfd.readouterr().err, 60)
        forget = Operations(stack.ledger, settings, "op").forget("ann", ["acme"]).forget
        stack.train("acme")
        assert wait(lambda: stack.ledger.forget_of(forget.id).stage is Stage.REBUILT, 60)
        server.start()
        assert wait(lambda: stack.ledger.forget_of(forget.id).stage is Stage.PURGED, 120)
        assert wait(lambda: stack.ledger.projected("acme")[0] == stack.ledger.heads()["acme"], 60)
        assert live() == str(stack.ledger.adapter("acme").release)
        shown = {version.tags.get("riverdelta.version") for version in mlflow.search_model_versions("name='acme'")}
        assert not shown & {"2", "3"}
    finally:
        stop.set()
        keeper.join(30)
        stack.ledger.close()
