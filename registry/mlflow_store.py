"""MLflow as the projection uses it: a tracking store and a model registry, on a database or behind a server."""

import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings

_METRICS_A_CALL = 1000


class MlflowStore:
    """The few things asked of MLflow, each idempotent. Importing MLflow takes seconds: make one in the keeper only."""

    def __init__(self, settings: Settings) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from mlflow.tracking import MlflowClient

        self.uri = settings.mlflow_uri
        self._own = not settings.registry.mlflow
        self._artifacts = settings.data.absolute() / "mlflow-artifacts"
        self.drafts = settings.data.absolute() / "mlflow-drafts"  # where files lie that are on their way to MLflow
        with self._told():
            if self._own:
                _ensure_database(settings.data.absolute() / "mlflow.db")
            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    # -- registered models -----------------------------------------------------------------------------------

    def aliases(self, alias: str) -> dict[str, str]:
        """Every registered model, with the MLflow version that the alias names, empty where it names none."""
        with self._told():
            models: list[Any] = []
            token = None
            while True:
                page = self._client.search_registered_models(max_results=1000, page_token=token)
                models += page
                token = page.token
                if not token:
                    return {model.name: str(model.aliases.get(alias, "")) for model in models}

    def ensure_model(self, name: str, tags: Mapping[str, str]) -> dict[str, str]:
        """A registered model with these tags; its other tags are left alone. Its aliases are returned."""
        from mlflow.exceptions import MlflowException

        with self._told():
            try:
                held = self._client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                held = self._client.create_registered_model(name)
            for key, value in tags.items():
                if held.tags.get(key) != value:
                    self._client.set_registered_model_tag(name, key, value)
            return {alias: str(version) for alias, version in held.aliases.items()}

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point an alias at an MLflow version; at none where it is empty."""
        with self._told():
            if version:
                self._client.set_registered_model_alias(name, alias, version)
            else:
                self._client.delete_registered_model_alias(name, alias)

    # -- model versions --------------------------------------------------------------------------------------

    def model_versions(self, name: str) -> list[Any]:
        """Every MLflow version of a registered model, with its tags."""
        with self._told():
            found: list[Any] = []
            token = None
            while True:
                page = self._client.search_model_versions(f"name='{name}'", max_results=1000, page_token=token)
                found += page
                token = page.token
                if not token:
                    return found

    def create_model_version(self, name: str, run: str, folder: str, tags: Mapping[str, str]) -> str:
        """An MLflow version whose source is a folder of a run's artifacts; its number."""
        with self._told():
            source = f"{self._client.get_run(run).info.artifact_uri}/{folder}"
            return str(self._client.create_model_version(name, source, run_id=run, tags=dict(tags)).version)

    def tag_model_version(self, name: str, version: str, held: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Set those tags that differ from what is held."""
        with self._told():
            for key, value in tags.items():
                if held.get(key) != value:
                    self._client.set_model_version_tag(name, version, key, value)

    def delete_model_version(self, name: str, version: str, tags: Iterable[str]) -> None:
        """Delete an MLflow version with its tags (MLflow keeps a row that says only that there was one)."""
        with self._told():
            for key in tags:
                self._client.delete_model_version_tag(name, version, key)
            self._client.delete_model_version(name, version)

    # -- runs ------------------------------------------------------------------------------------------------

    def ensure_experiment(self, name: str) -> str:
        """The id of an experiment, made or restored as needed."""
        with self._told():
            held = self._client.get_experiment_by_name(f"riverdelta/{name}")
            if held is None:
                location = (self._artifacts / name).as_uri() if self._own else None
                return str(self._client.create_experiment(f"riverdelta/{name}", artifact_location=location))
            if held.lifecycle_stage == "deleted":
                self._client.restore_experiment(held.experiment_id)
            return str(held.experiment_id)

    def runs(self, experiment: str, tag: str) -> dict[str, Any]:
        """An experiment's runs that bear a tag, by the tag's value: deleted ones too, the oldest of equals."""
        return {run.data.tags[tag]: run for run in reversed(self.tagged(experiment, tag))}

    def tagged(self, experiment: str, tag: str) -> list[Any]:
        """Every run of an experiment that bears a tag, deleted ones too, oldest first."""
        from mlflow.entities import ViewType

        with self._told():
            found: list[Any] = []
            token = None
            while True:
                page = self._client.search_runs(
                    [experiment], run_view_type=ViewType.ALL, max_results=1000, page_token=token
                )
                found += [run for run in page if tag in run.data.tags]
                token = page.token
                if not token:
                    return sorted(found, key=lambda run: run.info.start_time)

    def create_run(self, experiment: str, name: str, start: int, tags: Mapping[str, str]) -> Any:
        """A run that began at `start` (milliseconds since 1970)."""
        with self._told():
            return self._client.create_run(experiment, start_time=start, tags=dict(tags), run_name=name)

    def restore_run(self, run: Any) -> None:
        """Undo a soft deletion."""
        if run.info.lifecycle_stage == "deleted":
            with self._told():
                self._client.restore_run(run.info.run_id)

    def log(self, run: Any, params: Mapping[str, Any], metrics: Mapping[str, Any], at: int) -> None:
        """Parameters, and metrics: a list of numbers becomes a curve. What a finished run has is left."""
        from mlflow.entities import Metric, Param

        held = run.data.metrics if run.info.status == "FINISHED" else ()  # a crash may have left part of a curve
        points = [
            Metric(key, float(value), at, step)
            for key, values in metrics.items()
            if key not in held
            for step, value in enumerate(values if isinstance(values, list | tuple) else [values])
            if _is_number(value)
        ]
        given = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        with self._told():
            self._client.log_batch(run.info.run_id, params=given)
            for first in range(0, len(points), _METRICS_A_CALL):
                self._client.log_batch(run.info.run_id, metrics=points[first : first + _METRICS_A_CALL])

    def log_points(self, run: Any, points: Iterable[tuple[int, Mapping[str, float]]], at: int) -> None:
        """Points of curves, each a step with its figures."""
        from mlflow.entities import Metric

        listed = [
            Metric(key, float(value), at, step)
            for step, figures in points
            for key, value in figures.items()
            if _is_number(value)
        ]
        with self._told():
            for first in range(0, len(listed), _METRICS_A_CALL):
                self._client.log_batch(run.info.run_id, metrics=listed[first : first + _METRICS_A_CALL])

    def end_run(self, run: Any, at: int) -> None:
        """Mark a run finished."""
        if run.info.status != "FINISHED":
            with self._told():
                self._client.set_terminated(run.info.run_id, "FINISHED", at)

    def artifacts(self, run: Any, folder: str) -> dict[str, int]:
        """The files of a run's artifact folder, with their sizes in bytes."""
        with self._told():
            listed = self._client.list_artifacts(run.info.run_id, folder)
            return {Path(item.path).name: int(item.file_size or 0) for item in listed if not item.is_dir}

    def log_folder(self, run: Any, files: Path, folder: str) -> None:
        """Write a local folder's files as a run's artifacts."""
        with self._told():
            self._client.log_artifacts(run.info.run_id, str(files), folder)

    def erase_run(self, run: Any) -> bool:
        """Delete a run's artifacts, then the run itself past MLflow's soft deletion, as `mlflow gc` does. False where
        only the server's own `mlflow gc` can do the latter."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.tracking._tracking_service.utils import _get_store

        with self._told():
            get_artifact_repository(run.info.artifact_uri, tracking_uri=self.uri).delete_artifacts()
            if run.info.lifecycle_stage != "deleted":
                self._client.delete_run(run.info.run_id)
            store = _get_store(self.uri)
            if not hasattr(store, "_hard_delete_run"):
                return False
            store._hard_delete_run(run.info.run_id)
            return True

    def vacuum(self) -> None:
        """Overwrite what deletion left in the database's free pages and its log (SQLite only)."""
        if self.uri.startswith("sqlite"):
            import sqlite3

            import sqlalchemy as sa

            with self._told():
                connection = sqlite3.connect(sa.make_url(self.uri).database or "", timeout=30, isolation_level=None)
                try:
                    for statement in ("PRAGMA secure_delete=ON", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                        connection.execute(statement)
                finally:
                    connection.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            shown = self.uri.rsplit("@", 1)[-1]  # without a password
            raise Unavailable(
                f"MLflow at {shown} did not do as asked: {error}.", "Is it reachable? `registry repair` tries again."
            ) from error


def _ensure_database(path: Path) -> None:
    """MLflow's SQLite database, made whole or not at all: MLflow cannot go on with one that was half made."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.new*"):
        left.unlink(missing_ok=True)
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    engine = create_sqlalchemy_engine(f"sqlite:///{draft}")
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()
    draft.rename(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
