"""The Kubernetes manifest fits Kubernetes' own schemas and this project's settings."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from riverdelta.core.settings import Settings

PATH = Path(__file__).parents[2] / "docker" / "kubernetes.yml"


def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(PATH.read_text()))


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
