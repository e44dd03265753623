"""The ledger as MLflow shows it: a registered model per adapter, a run and a model version per version, alias `live`.

A projection: idempotent, never read back as truth, and repaired from the ledger. Tags carry the mapping, since MLflow
numbers its versions by itself. What others keep in the same MLflow is left alone.
"""

import logging
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from riverdelta.core.digests import canonical_json, digest_of
from riverdelta.core.errors import Conflict, Corrupt, NotFound, Refused, Unavailable
from riverdelta.core.store import ObjectStore, weights_key
from riverdelta.core.times import now

from .ledger import AdapterRecord, Ledger, Outcome, SegmentRecord, VersionRecord
from .mlflow_store import MlflowStore
from .peft_io import write_peft_folder

log = logging.getLogger(__name__)

LIVE = "live"
FOLDER = "adapter"
_VERSION = "riverdelta.version"
_DIGEST = "riverdelta.digest"
_REVOKED = "riverdelta.revoked"
_GATE = "riverdelta.gate"
_MEASURED = (
    "prequential",
    "learned",
    "surprise",
    "surprise_upper",
    "surprise_bound",
    "earlier_before",
    "earlier_after",
    "earlier_worse",
    "drift",
    "questions_before",
    "questions_after",
    "rejected",
)


class Projection:
    """Keeps one MLflow in step with one ledger. Safe to call from several threads; one process at a time."""

    def __init__(self, ledger: Ledger, store: ObjectStore, mlflow: MlflowStore) -> None:
        self._ledger = ledger
        self._store = store
        self._mlflow = mlflow
        self._folder = mlflow.drafts
        self._one_at_a_time = threading.RLock()
        self._empty()  # of what a process that was killed left there

    def catch_up(self) -> list[str]:
        """Project every adapter whose journal has moved on; their names. One that cannot be shown, as its weights are
        damaged, keeps no other waiting."""
        behind = []
        for name, head in self._ledger.heads().items():
            if self._ledger.projected(name)[0] < head:
                try:
                    self.project(name)
                except (Conflict, Corrupt, NotFound) as error:
                    log.warning("MLflow does not show %s as it is: %s", name, error)
                behind.append(name)
        return behind

    def repair(self) -> list[str]:
        """Restore what is missing or wrong of any adapter; the names of the adapters that there are."""
        ask_for_repair(self._ledger)
        return self.catch_up()

    def project(self, adapter: str) -> None:
        """Bring MLflow to the ledger's state of one adapter. What its notes say is shown already is not looked at."""
        with self._one_at_a_time:
            head = self._ledger.adapter(adapter)
            versions = self._ledger.versions(adapter)
            seq, notes = self._ledger.projected(adapter)
            shown = notes.get("versions", {})
            due = [v for v in versions.values() if shown.get(str(v.number)) != _mark(v)]
            aliases = self._mlflow.ensure_model(adapter, _model_tags(head))
            if due:
                self._project_versions(head, due)
                self._erase_versions(adapter, [version.number for version in due if version.purged])
            found = _by_number(self._mlflow.model_versions(adapter), versions)
            live = str(found[head.release].version) if head.release in found else ""
            if aliases.get(LIVE, "") != live:
                self._mlflow.set_alias(adapter, LIVE, live)
            gate = self._project_gate(adapter, notes.get("gate", []), versions)
            body = {"versions": {str(v.number): _mark(v) for v in versions.values()}, "live": live, "gate": gate}
            self._ledger.mark_projected(adapter, head.head, body, was=seq)

    def adopt(self) -> list[str]:
        """Take an alias that somebody moved in MLflow as an operator's act, or put it back where the ledger refuses;
        the adapters concerned."""
        concerned = []
        heads = self._ledger.heads()
        with self._one_at_a_time:
            for name, version in self._mlflow.aliases(LIVE).items():
                if name not in heads:
                    continue
                seq, notes = self._ledger.projected(name)
                # A journal that has moved on since decides by itself where the alias belongs.
                if seq == heads[name] and version != notes.get("live", ""):
                    self._adopt(name, version)
                    concerned.append(name)
        return concerned

    def _adopt(self, adapter: str, version: str) -> None:
        found = _by_number(self._mlflow.model_versions(adapter), self._ledger.versions(adapter))
        number = next((n for n, held in found.items() if str(held.version) == version), None)
        try:
            if number is not None:
                self._ledger.release(adapter, number, "mlflow", f"alias {LIVE} moved in MLflow")
                log.info("adopted MLflow's alias", extra={"adapter": adapter, "version": number})
        except (Conflict, NotFound, Refused) as error:
            log.warning("put MLflow's alias back: %s", error.message, extra={"adapter": adapter})
        self.project(adapter)

    def erase(self, adapter: str, versions: Collection[int]) -> list[str]:
        """Remove versions' rows and artifacts past MLflow's soft deletion; the ids of runs whose rows only the MLflow
        server's own `mlflow gc` can remove."""
        with self._one_at_a_time:
            self._empty()
            experiment = self._mlflow.ensure_experiment(adapter)
            left = self._erase_gate(adapter, experiment) if versions else []
            return left + self._erase_versions(adapter, versions)

    def scrub(self) -> None:
        """Overwrite what erasing left in MLflow's own database, where that is ours to do."""
        self._mlflow.vacuum()

    # -- versions --------------------------------------------------------------------------------------------

    def _project_versions(self, head: AdapterRecord, due: list[VersionRecord]) -> None:
        experiment = self._mlflow.ensure_experiment(head.name)
        runs = self._mlflow.runs(experiment, _VERSION)
        listed = self._mlflow.model_versions(head.name)
        for version in sorted(due, key=lambda version: version.number):
            known = {held.tags.get(_VERSION): held for held in listed if held.tags.get(_DIGEST) == version.digest}
            held = known.get(str(version.number))
            run = runs.get(str(version.number))
            if version.purged or (version.revoked and held is None):
                continue  # nothing of it is shown, or ever was
            run = self._project_run(head, version, experiment, run)
            tags = _tags(version)
            if held is None:
                self._mlflow.create_model_version(head.name, run.info.run_id, FOLDER, tags)
            else:
                self._mlflow.tag_model_version(head.name, held.version, held.tags, tags)

    def _erase_versions(self, adapter: str, versions: Collection[int]) -> list[str]:
        """The ids of those runs that only the server's own `mlflow gc` can remove."""
        if not versions:
            return []
        runs = self._mlflow.runs(self._mlflow.ensure_experiment(adapter), _VERSION)
        for held in self._mlflow.model_versions(adapter) if adapter in self._mlflow.aliases(LIVE) else ():
            if held.tags.get(_VERSION) in map(str, versions):
                self._mlflow.delete_model_version(adapter, held.version, held.tags)
        gone = [runs[str(number)] for number in versions if str(number) in runs]
        return [run.info.run_id for run in gone if not self._mlflow.erase_run(run)]

    def _project_run(self, head: AdapterRecord, version: VersionRecord, experiment: str, run: Any) -> Any:
        at = _milliseconds(version.made_at)
        if run is None:
            run = self._mlflow.create_run(experiment, f"{head.name}@{version.number}", at, _tags(version))
        self._mlflow.restore_run(run)
        self._empty()
        try:
            data = self._store.get(weights_key(version.digest))
            self._folder.mkdir(parents=True, mode=0o700)
            write_peft_folder(self._folder, data, version.digest)
            wanted = {path.name: path.stat().st_size for path in self._folder.iterdir()}
            there = self._mlflow.artifacts(run, FOLDER)
            if any(there.get(name) != size for name, size in wanted.items()):
                self._mlflow.log_folder(run, self._folder, FOLDER)
        finally:
            self._empty()
        self._mlflow.log(run, _flat(head.recipe), _curves(version.metrics), at)
        self._mlflow.end_run(run, at)
        return run

    def _empty(self) -> None:
        """Nothing of a version lies outside the store and MLflow once it is shown, or is to be erased."""
        if self._folder.exists():
            try:
                shutil.rmtree(self._folder)
            except OSError as error:
                raise Unavailable(f"Cannot empty {self._folder}: {error.strerror}.", "Is it read-only?") from error

    # -- the gate --------------------------------------------------------------------------------------------

    def _project_gate(self, adapter: str, shown: list[str], versions: Mapping[int, VersionRecord]) -> list[str]:
        """A run of the adapter's gate, whose curves have a point for each segment judged; made anew where one has been
        judged again since. `shown` and what is returned mark the points."""
        points = list(_judged(self._ledger.segments(adapter), versions))
        marks = [digest_of([number, figures])[:16] for number, figures in points]
        if marks == shown:
            return marks
        experiment = self._mlflow.ensure_experiment(adapter)
        if not shown or marks[: len(shown)] != shown:
            self._erase_gate(adapter, experiment)
            shown = []
        # A server keeps erased runs until its own `mlflow gc`: they are not to come back.
        live = [run for run in self._mlflow.tagged(experiment, _GATE) if run.info.lifecycle_stage != "deleted"]
        run = live[0] if live else None
        if run is None:
            run = self._mlflow.create_run(experiment, f"{adapter} gate", _milliseconds(now()), {_GATE: adapter})
            shown = []
        self._mlflow.log_points(run, points[len(shown) :], _milliseconds(now()))
        return marks

    def _erase_gate(self, adapter: str, experiment: str) -> list[str]:
        """The ids of those runs that only the server's own `mlflow gc` can remove."""
        runs = self._mlflow.tagged(experiment, _GATE)
        left = [run.info.run_id for run in runs if not self._mlflow.erase_run(run)]
        if runs:
            seq, notes = self._ledger.projected(adapter)
            self._ledger.mark_projected(adapter, seq, {**notes, "gate": []})
        return left


def ask_for_repair(ledger: Ledger) -> None:
    """Let every adapter be looked at anew by whoever projects next."""
    for name in ledger.heads():
        ledger.mark_projected(name, 0, {})


def _mark(version: VersionRecord) -> str:
    """What of a version's state MLflow shows, as a word."""
    return "purged" if version.purged else "revoked" if version.revoked else "shown"


def _by_number(listed: list[Any], versions: Mapping[int, VersionRecord]) -> dict[int, Any]:
    """MLflow's versions by our number: those whose tags say so, and whose digest is that version's."""
    found = {}
    for held in sorted(listed, key=lambda held: int(held.version), reverse=True):
        tag = held.tags.get(_VERSION, "")
        number = int(tag) if tag.isascii() and tag.isdigit() else 0
        if number in versions and held.tags.get(_DIGEST) == versions[number].digest:
            found[number] = held
    return found


def _judged(
    segments: Iterable[SegmentRecord], versions: Mapping[int, VersionRecord]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Per segment that was learned or that the gate set aside, what the gate measured; as far as the versions go."""
    for segment in segments:
        learned = segment.outcome is Outcome.TRAINED and segment.version is not None
        if learned and segment.version not in versions:
            return  # committed since the versions were read: the next look shows it
        figures = versions[segment.version].metrics if learned and segment.version else segment.metrics
        if "rejected" in figures:
            yield segment.number, {key: figures[key] for key in _MEASURED if key in figures}


def _milliseconds(at: str) -> int:
    return int(datetime.fromisoformat(at).timestamp() * 1000)


def _model_tags(head: AdapterRecord) -> dict[str, str]:
    return {"riverdelta.recipe": head.recipe_digest, "riverdelta.created": head.created_at}


def _tags(version: VersionRecord) -> dict[str, str]:
    return {
        _VERSION: str(version.number),
        _DIGEST: version.digest,
        _REVOKED: str(version.revoked).lower(),
        "riverdelta.parent": str(version.parent),
        "riverdelta.segment": "" if version.segment is None else str(version.segment),
        "riverdelta.epoch": str(version.epoch),
        "riverdelta.fingerprint": canonical_json(version.fingerprint).decode()[:5000],
    }


def _curves(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics under MLflow's names: `losses` is the curve `loss`. What each entry's loss was is for the gate alone."""
    return {("loss" if key == "losses" else key): value for key, value in metrics.items() if key != "new"}


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's fields as MLflow's parameters, e.g. `lora.rank`; of questions, how many there are."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = len(value) if key == "questions" else value
    return flat
