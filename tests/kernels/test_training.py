"""grouped_lora: gradients, and bits that do not depend on the other groups."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.kernels import grouped_lora

SCALES = [2.0, 0.5, 1.0, 0.7071]


def _groups(runs, ranks, in_features, out_features, dtype=torch.float32):
    """Each group from a seed of its own, so that a group's data does not depend on the others."""
    groups = []
    for i, (rows, rank) in enumerate(zip(runs, ranks, strict=True)):
        random = torch.Generator().manual_seed(i)
        shapes = [(rows, in_features), (rank, in_features), (out_features, rank), (rows, out_features)]
        groups.append([torch.randn(*shape, generator=random).to(dtype) for shape in shapes])
    return groups


def _digests(groups, which):
    """SHA-256 of every group's output and gradients when the groups `which` are computed in one call, in that order."""
    x = torch.cat([groups[i][0] for i in which]).requires_grad_()
    a = [groups[i][1].clone().requires_grad_() for i in which]
    b = [groups[i][2].clone().requires_grad_() for i in which]
    runs = [groups[i][0].shape[0] for i in which]
    out = grouped_lora(x, a, b, [SCALES[i % 4] for i in which], runs)
    out.backward(torch.cat([groups[i][3] for i in which]))
    rows = zip(torch.split(out.detach(), runs), torch.split(x.grad, runs), strict=True)
    return {
        i: [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in (y, dx, a[at].grad, b[at].grad)]
        for at, (i, (y, dx)) in enumerate(zip(which, rows, strict=True))
    }


def test_gradients_match_autograd_in_float64():
    groups = _groups([3, 1, 5], [2, 4, 1], 6, 5, torch.float64)
    x = torch.cat([g[0] for g in groups]).requires_grad_()
    a, b = ([g[i].requires_grad_() for g in groups] for i in (1, 2))

    def apply(x, *weights):
        return grouped_lora(x, weights[:3], weights[3:], SCALES[:3], [3, 1, 5])

    assert torch.autograd.gradcheck(apply, (x, *a, *b))
    expected = torch.cat([s * (g[0] @ g[1].T) @ g[2].T for s, g in zip(SCALES, groups, strict=False)])
    torch.testing.assert_close(apply(x, *a, *b), expected)


@settings(max_examples=25, deadline=None)
@given(
    runs=st.lists(st.integers(1, 33), min_size=1, max_size=4),
    ranks=st.lists(st.sampled_from([1, 3, 8, 16]), min_size=4, max_size=4),
    widths=st.sampled_from([(64, 48), (100, 36), (640, 1024)]),
)
def test_a_groups_bits_do_not_depend_on_the_others(runs, ranks, widths):
    groups = _groups(runs, ranks[: len(runs)], *widths)
    order = list(range(len(runs)))
    together = _digests(groups, order)
    assert _digests(groups, order[::-1]) == together
    for i in order:
        assert _digests(groups, [i])[i] == together[i]


def test_an_unwanted_gradient_is_not_computed():
    groups = _groups([2, 3], [4, 4], 8, 8)
    a = [g[1].requires_grad_(i == 0) for i, g in enumerate(groups)]
    x = torch.cat([g[0] for g in groups])
    grouped_lora(x, a, [g[2] for g in groups], [1.0, 1.0], [2, 3]).sum().backward()
    assert a[0].grad is not None
    assert a[1].grad is None
    assert x.grad is None


def test_groups_that_do_not_add_up_are_refused():
    (g,) = _groups([2], [4], 8, 8)
    with pytest.raises(ValueError, match="runs sum to 3"):
        grouped_lora(g[0], [g[1]], [g[2]], [1.0], [3])
    with pytest.raises(ValueError, match="one of each"):
        grouped_lora(g[0], [g[1]], [], [1.0], [2])
