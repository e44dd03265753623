"""Tiny bases, contents of segments, and a ledger with a store, for the trainer's tests."""

from pathlib import Path

import pytest

from riverdelta.trainer.base import Base
from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by kind."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: make_tiny(kind, folder / kind) for kind in ("llama", "qwen3", "gemma3")}


@pytest.fixture(scope="session")
def base(bases: dict[str, Path]) -> Base:
    """The tiny Llama, loaded."""
    return Base.load(bases["llama"], threads=1)
