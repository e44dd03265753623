"""Plans: the shipped ones are found, anything else gets a plan that fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from riverdelta.kernels import LoraPool, plans
from riverdelta.kernels.plans import Plan, default_plan, plan_for, site_key, write_plans

SHIPPED = sorted(Path(plans.__file__).parent.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_plans_are_used_on_their_architecture(path, monkeypatch):
    monkeypatch.setattr(plans, "architecture", lambda _: path.stem)
    for key, fields in json.loads(path.read_text()).items():
        in_features, _, rest = key.partition("->")
        outs, _, rank = rest.partition(" r")
        parts = tuple(int(n) for n in outs.split("+"))
        pool = LoraPool(1, int(in_features), sum(parts), int(rank), torch.bfloat16, "meta", parts=parts)
        assert plan_for(pool) == Plan(**fields)


@pytest.mark.parametrize("in_features", [8, 100, 640, 4096, 14336])
@pytest.mark.parametrize("parts", [(16,), (4096, 1024, 1024)])
@pytest.mark.parametrize("rank", [1, 16, 64, 256])
def test_a_default_plan_fits_any_site(in_features, parts, rank):
    plan = default_plan(in_features, parts, rank)
    assert plan.chunk % plan.block_k == 0
    for size in (plan.chunk, plan.block_k, plan.shrink_rank, plan.block_n, plan.expand_rank):
        assert size >= 16
        assert size & (size - 1) == 0


def test_written_plans_are_merged(tmp_path):
    plan = default_plan(64, (64,), 8)
    for width in (64, 128):
        path = write_plans("sm00", {site_key(width, (64,), 8): plan}, tmp_path)
    assert set(json.loads(path.read_text())) == {"64->64 r8", "128->64 r8"}
