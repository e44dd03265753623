"""What a kept result says of where it was measured."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The CPU's model name and what it can do in bf16."""
    import torch

    can = [
        name
        for name, has in (
            ("avx512_bf16", torch.cpu._is_avx512_bf16_supported()),
            ("amx", torch.cpu._is_amx_tile_supported()),
        )
        if has
    ]
    what = torch.backends.cpu.get_cpu_capability()
    return f"{cpu()} ({', '.join([what, *can])}), {os.cpu_count()} cores"


def cpu() -> str:
    """The CPU's model name."""
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def here() -> dict[str, str | int | None]:
    """The machine, for results of whole stacks."""
    import torch

    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The installed ones' versions."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_result(name: str, command: str, figures: dict[str, Any]) -> None:
    """Keep figures as `results/NAME.json`, with the machine, the versions and the date."""
    report = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": {"device": processor(), "load_1m": round(os.getloadavg()[0], 1)},
        "versions": versions("torch", "transformers", "peft", "triton", "bytewax", "mlflow"),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
