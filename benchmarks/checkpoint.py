"""What logging every training step costs, beside no logging, `torch.save` and torch.distributed.checkpoint.

    python -m benchmarks.checkpoint [--base gemma|tiny|FOLDER] [--rounds 7] [--passes 4]

One increment is trained to its end again and again, the four ways in turns, each time with its start and its last
write waited for. A way's cost is the median over the rounds of its time over the bare one's of the same round. All
write to the same disk: ours a record a step, and the state as often as a hundredth of the time allows; the peers
weights and moments each step, as that is how they lose no step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.machine import write_result
from riverdelta.app.gemma import gemma_folder
from riverdelta.core.recipe import Recipe
from riverdelta.trainer.base import Base
from riverdelta.trainer.checkpoints import CheckpointLog
from riverdelta.trainer.increment import Inputs, Learner, step
from tests.tiny import make_tiny
from tests.trainer.samples import contents


class Bare:
    """Nothing is written."""

    def __init__(self, folder: Path, learner: Learner) -> None:
        self._folder = folder

    def record(self, learner: Learner) -> None:
        """After a step."""

    def close(self) -> None:
        """After the last."""


class Ours(Bare):
    """The checkpoint log."""

    def __init__(self, folder: Path, learner: Learner) -> None:
        self._log = CheckpointLog(folder, "bench")
        self._log.resume(learner)

    def record(self, learner: Learner) -> None:
        self._log.record(learner)

    def close(self) -> None:
        self._log.close()


class TorchSave(Bare):
    """The state through `torch.save` each step, synced, two files by turns."""

    def record(self, learner: Learner) -> None:
        with (self._folder / f"{learner.place % 2}.pt").open("wb") as file:
            torch.save(_state(learner), file)
            file.flush()
            os.fsync(file.fileno())


class Dcp(Bare):
    """The state through `async_save` each step; a step waits for the save before it."""

    _last: Future[Any] | None = None

    def record(self, learner: Learner) -> None:
        self.close()
        place = self._folder / str(learner.place % 2)
        shutil.rmtree(place, ignore_errors=True)
        self._last = dcp.async_save(_state(learner), checkpoint_id=place, no_dist=True)

    def close(self) -> None:
        if self._last is not None:
            self._last.result()


WAYS: dict[str, Callable[[Path, Learner], Bare]] = {"bare": Bare, "ours": Ours, "torch_save": TorchSave, "dcp": Dcp}


def _state(learner: Learner) -> dict[str, Any]:
    o = learner.optimiser
    return {"weights": learner.weights.flat.detach(), "m": o.m, "v": o.v, "place": torch.tensor(learner.place)}


def run(base: Base, recipe: Recipe, entries: list[bytes | None], way: str, root: Path) -> tuple[float, int]:
    """Seconds of a whole increment, its set-up apart, and its steps."""
    learner = Learner(base, Inputs(recipe, 1, entries))
    with tempfile.TemporaryDirectory(dir=root) as folder:
        began = time.perf_counter()
        log = WAYS[way](Path(folder), learner)
        while not learner.done:
            step(base, [learner])
            log.record(learner)
        log.close()
        return time.perf_counter() - began, len(learner.losses)


def main() -> None:
    """Measure."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", default="gemma")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--passes", type=int, default=4)
    options.add_argument("--entries", type=int, default=32)
    options.add_argument("--folder", default=".", help="on the disk to write to")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        tiny = given.base == "tiny"
        folder = make_tiny("llama", Path(root) / "tiny") if tiny else Path(given.base)
        base = Base.load(gemma_folder(print) if given.base == "gemma" else folder)
        recipe = Recipe.from_dict({"training": {"passes": given.passes, "steps": 1}})
        entries = contents(given.entries)
        run(base, recipe, entries, "bare", Path(root))
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(given.rounds):
            for way in (list(WAYS), list(reversed(WAYS)))[number % 2]:
                took, steps = run(base, recipe, entries, way, Path(root))
                seconds[way].append(took)
            print(number + 1, {way: round(times[-1], 3) for way, times in seconds.items()}, flush=True)
        size = sum(tensor.nbytes for tensor in _state(Learner(base, Inputs(recipe, 1, entries))).values())
    over = {
        way: round(100 * (median(a / b for a, b in zip(times, seconds["bare"], strict=True)) - 1), 2)
        for way, times in seconds.items()
        if way != "bare"
    }
    figures = {
        "base": given.base,
        "steps": steps,
        "step_ms": round(1000 * median(seconds["bare"]) / steps, 1),
        "state_mb": round(size / 1e6, 1),
        "rounds": given.rounds,
        "overhead_pct": over["ours"],
        "torch_save_pct": over["torch_save"],
        "dcp_async_pct": over["dcp"],
    }
    name = f"checkpoint_{given.base}" if given.base in ("gemma", "tiny") else "checkpoint"
    write_result(name, "python -m benchmarks.checkpoint", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
