"""Norms of a packed step: those of the base, with bits that no other row decides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from riverdelta.trainer.norms import RowNorm, row_norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_a_row_norm_is_the_norm_that_it_stands_for(kind: type[nn.Module], width: int) -> None:
    norm = kind(width)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(width))
    ours = row_norm(norm)
    assert ours is not None
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    slope = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(2))
    made = []
    for module in (norm, ours):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.backward(slope)
        made.append((out.detach(), leaf.grad))
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-5)


def test_another_norm_is_left_as_it_is() -> None:
    class Centred(nn.LayerNorm):
        """Has weight and eps, and is no RMS norm."""

    assert row_norm(Centred(8)) is None
    assert row_norm(nn.GroupNorm(2, 8)) is None


@given(
    rows=st.integers(1, 70), first=st.integers(0, 40), width=st.sampled_from([5, 16, 64, 640]), heads=st.integers(1, 3)
)
def test_a_rows_bits_depend_on_that_row_alone(rows: int, first: int, width: int, heads: int) -> None:
    norm = RowNorm(torch.linspace(0.5, 2, width), 1e-6)
    x, slope = torch.randn(2, first + rows + 3, heads, width, generator=torch.Generator().manual_seed(rows))
    results = []
    for part in (slice(None), slice(first, first + rows)):
        # Heads come transposed, as a layer hands them over.
        leaf = x[part].clone().transpose(0, 1).requires_grad_()
        out = norm(leaf)
        out.backward(slope[part].clone().transpose(0, 1))
        assert leaf.grad is not None
        results.append((out.detach().transpose(0, 1), leaf.grad.transpose(0, 1)))
    (whole, whole_grad), (alone, alone_grad) = results
    assert torch.equal(whole[first : first + rows], alone)
    assert torch.equal(whole_grad[first : first + rows], alone_grad)
