"""A history lived here and told to a control in another process: where do they differ?"""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from riverdelta.trainer.base import Base

from .live import Lived


class Control:
    """The process of the controls."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.histories.control"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def of(self, path: Path) -> dict[str, Any]:
        """What the control makes of the history told in a file."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the control has ended"
        told: dict[str, Any] = json.loads(answer)
        return told

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def a_control() -> Iterator[Control]:
    """A running one."""
    control = Control()
    try:
        yield control
    finally:
        control.stop()


def differences(lived: Lived, folder: Path, base: Path, control: Control) -> list[str]:
    """What the control does not say as well: the first increment of a line whose bits differ, and what does not fit."""
    path = folder / "told.json"
    path.write_text(json.dumps({**lived.told(os.fspath(base)), "threads": lived.base.threads}))
    answer = control.of(path)
    wrong = list(answer["problems"])
    for name, line in lived.lines().items():
        other = [tuple(each) for each in answer["lines"][name]]
        if line != other:
            at = next((n for n, pair in enumerate(zip(line, other, strict=False)) if pair[0] != pair[1]), None)
            what = f"lengths {len(line)} and {len(other)}" if at is None else f"{line[at]} and {other[at]}"
            wrong.append(f"{name}: {what}")
    return wrong


def is_equal(
    seed: int, base: Base, path: Path, folder: Path, control: Control, **given: Any
) -> tuple[list[str], Lived]:
    """Live a history and compare: the differences, and the history."""
    folder.mkdir(parents=True)
    return compared(Lived(seed, base, folder, **given), path, folder, control)


def compared(lived: Lived, path: Path, folder: Path, control: Control) -> tuple[list[str], Lived]:
    """Live a history that has been made, and compare."""
    try:
        lived.live()
        return differences(lived, folder, path, control), lived
    finally:
        lived.close()


_held: dict[str, Any] = {}


def one(seed: int, base: str, folder: str, threads: int, given: dict[str, Any]) -> tuple[int, list[str], Counter[str]]:
    """One history, in a process that keeps its base and its control from one to the next."""
    if not _held:
        logging.disable(logging.CRITICAL)
        _held.update(base=Base.load(Path(base), threads=threads), control=Control())
    try:
        wrong, lived = is_equal(seed, _held["base"], Path(base), Path(folder) / str(seed), _held["control"], **given)
    except Exception as error:
        return seed, [f"it failed: {error!r}"], Counter()
    return seed, wrong, lived.counts
