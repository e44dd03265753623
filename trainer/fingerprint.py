"""The environment fingerprint: everything outside base, recipe and log that may move a bit."""

import inspect
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from riverdelta.core import template
from riverdelta.core.digests import digest_of, sha256
from riverdelta.kernels import native

from .base import Base

_PACKAGES = ("torch", "triton", "transformers", "peft", "datasketch", "py3langid", "river", "riverdelta")
_PRODUCTS: dict[native.Products | None, int] = {None: 0, "tiles": 1, "vectors": 2}


def fingerprint(base: Base) -> dict[str, str | int]:
    """Two runs with equal fingerprints give equal bits; between others, a replay is equivalent at best."""
    return {
        "base": base.digest,
        "tokenizer": _tokenizer(base.tokenizer),
        "device": _device(base.device),
        "threads": base.threads,
        "dtype": base.dtype,
        # Tiles, vectors and the library that serves where a compiler is missing sum in other orders.
        "tiles": _PRODUCTS[native.products()] if base.device.type == "cpu" and base.dtype == "bfloat16" else 0,
        **{name: _version(name) for name in _PACKAGES},
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    # Blocking, and so the order of sums, follows the model's caches, not its instruction set alone.
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    held = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = [sha256(held.encode()), tokenizer.chat_template or "", tokenizer.bos_token_id, tokenizer.eos_token_id]
    return digest_of([*parts, inspect.getsource(template)])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
