"""The Kubernetes manifests fit the schemas of Kubernetes and of KEDA, this project's settings and its metrics."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from prometheus_client import CollectorRegistry

from riverdelta.core.settings import Settings
from riverdelta.serving.metrics import Metrics as Served
from riverdelta.streams.metrics import Metrics as Streamed
from riverdelta.trainer.metrics import Metrics as Trained

FOLDER = Path(__file__).parents[2] / "docker"


def objects(name: str = "kubernetes.yml") -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize("held", objects(), ids=lambda held: f"{held['kind']}-{held['metadata']['name']}")
def test_each_object_fits_its_schema(held: dict[str, Any]) -> None:
    kubernetes_validate.validate(held, kubernetes_validate.latest_version(), strict=True)


def test_each_variable_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for held in objects():
        given = dict(held.get("data", {})) if held["kind"] == "ConfigMap" else {}
        template = held.get("spec", {}).get("template", {}) if held["kind"] in ("Deployment", "StatefulSet") else {}
        for container in template.get("spec", {}).get("containers", ()):
            given |= {each["name"]: each.get("value", "1") for each in container.get("env", ())}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
    settings = Settings.read()
    assert settings.streams.process == 1
    assert settings.kafka.security == "SASL_SSL"


@pytest.mark.parametrize("held", objects("keda.yml"), ids=lambda held: held["metadata"]["name"])
def test_what_keda_scales_fits_its_schema_and_is_there(held: dict[str, Any]) -> None:
    read = ScaledObject.model_validate(held)
    assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == held  # it knows every field
    target = held["spec"]["scaleTargetRef"]
    assert target in [
        {"apiVersion": each["apiVersion"], "kind": each["kind"], "name": each["metadata"]["name"]}
        for each in objects()
        if each["kind"] == "Deployment"
    ]


def test_keda_asks_for_metrics_that_there_are() -> None:
    asked = set(re.findall(r"riverdelta_\w+", (FOLDER / "keda.yml").read_text()))
    assert asked
    assert asked <= {name for each in (Streamed().registry, Trained().registry, served()) for name in names(each)}


def names(registry: CollectorRegistry) -> set[str]:
    return {metric.name for metric in registry.collect()}


def served() -> CollectorRegistry:
    metrics = Served()
    idle = dict.fromkeys(("running", "waiting", "host_bytes", "revoked", "preemptions"), 0)
    totals = {"prompt_tokens": 0, "cached_tokens": 0, "steps": 0}
    metrics.watch(lambda: {**idle, "kv_blocks": {"free": 1, "total": 1}, "totals": totals, "adapters": {}}, dict)
    return metrics.registry
