"""These tests want a GPU, or Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/kernels/triton`."""

from __future__ import annotations

import os

import pytest
import torch

RUNNABLE = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
