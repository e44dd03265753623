"""Bring the peers' LoRA kernels: `python -m benchmarks.fetch_peers` unpacks them from their wheels into `.peers/`.

vLLM and SGLang are Apache-2.0; nothing of theirs is kept in this repository. Only the Python files (and SGLang's tuned
plans) that `benchmarks.lora_kernels` imports are unpacked; the wheels are for Linux on x86-64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".peers"
PEERS = {
    "vllm": ("vllm/lora/ops/triton_ops/",),
    "sglang": ("sglang/kernels/ops/lora/common/", "sglang/kernels/ops/lora/dense/", "sglang/srt/lora/dense/configs/"),
}
_PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 28, 31, 34, 35, 39)] + ["manylinux2014_x86_64"]


def fetch(package: str, prefixes: tuple[str, ...], folder: Path) -> str:
    """Download one wheel without its dependencies, unpack what lies under `prefixes`, return its version."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", scratch]
        command += ["--python-version", "3.12", "--implementation", "cp"]
        command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
        subprocess.run([*command, package], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(prefixes) and n.endswith((".py", ".json"))]
            archive.extractall(folder, names)
        return wheel.name.split("-")[1]


def main() -> None:
    """Fetch every peer and note the versions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    versions = {package: fetch(package, prefixes, folder) for package, prefixes in PEERS.items()}
    (folder / "versions.json").write_text(json.dumps(versions))
    print(json.dumps(versions))


if __name__ == "__main__":
    main()
