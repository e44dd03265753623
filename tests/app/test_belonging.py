"""What looks back refuses the subject key or the base model of another ledger, before it says anything."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from riverdelta.app.audit import audit
from riverdelta.app.counterfactual import run
from riverdelta.app.trace import trace
from riverdelta.core.errors import Corrupt, NotFound, Refused
from riverdelta.core.keys import SubjectKey
from riverdelta.core.settings import Settings
from riverdelta.registry.belonging import check_base, subject_key
from tests.registry.stack import Stack, two_versions


@pytest.fixture
def stack(tmp_path: Path, tiny_base: Path) -> Stack:
    """Two versions, in a ledger that knows its subject key; no Kafka is known."""
    made = two_versions(Settings(data=tmp_path / "data", base=str(tiny_base)))
    subject_key(made.ledger, made.settings)
    return made


def certificate(stack: Stack) -> dict[str, Any]:
    tip = {"version": 2, "digest": stack.ledger.version("acme", 2).digest}
    return {"predicate": {"adapters": [{"adapter": "acme", "tip": tip}]}}


def test_another_subject_key_is_refused(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(stack.settings.keys_dir)  # not mounted, say
    with pytest.raises(Corrupt, match=r"no subjects\.key"):
        trace(stack.settings, "order-1", "", "", False)
    assert not stack.settings.keys_dir.exists(), "nothing is in the way of what is restored"
    SubjectKey.open(stack.settings.keys_dir)
    with pytest.raises(Corrupt, match="subject key"):
        run(stack.settings, "acme", ["ann"])
    assert capsys.readouterr().out == ""
    trace(stack.settings, "0:2", "", "", False)  # a place needs no key
    assert "partition 0, offset 2" in capsys.readouterr().out


def test_another_base_model_is_refused(stack: Stack) -> None:
    check_base(stack.ledger, "0" * 64)
    with pytest.raises(Refused, match="belongs to the base model"):
        run(stack.settings, "acme", ["ann"])
    with pytest.raises(Refused, match="belongs to the base model"):
        audit(stack.settings, stack.ledger, certificate(stack))


def test_what_fits_is_looked_for(stack: Stack) -> None:
    with pytest.raises(NotFound, match="no entry for order-1"):
        trace(stack.settings, "order-1", "", "", False)
