"""Muon: updates of equal strength in every direction of a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training import loop
from training.muon import Muon, orthogonalised

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    """Singular values that are not tiny end between a third and four thirds, however unequal they were."""
    torch.manual_seed(0)
    made = torch.linalg.svdvals(orthogonalised(torch.randn(shape), rounds=5))
    assert 0.3 < float(made.min()) < float(made.max()) < 1.35


def test_an_update_is_as_large_as_its_rate_says_whatever_the_gradient() -> None:
    """A gradient a thousand times larger moves a convolution's weights no further."""
    moved = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.zeros(16, 8, 3, 3))
        weight.grad = scale * torch.randn(16, 8, 3, 3)
        Muon([weight], 0.01).step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=0.05, atol=1e-4)
    assert float(moved[0].square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.3)


def test_only_matrices_of_hidden_blocks_are_stepped_by_it() -> None:
    """Input, output and norm layers use AdamW, and so does every parameter not planned for Muon."""
    model = nn.ModuleDict({"block": nn.Linear(4, 4), "out": nn.Linear(4, 2)})
    adam, muon = loop.optimizers(loop.Plan("x", 1, 0.1, muon=3.0), {"model": model})
    assert muon.param_groups[0]["params"] == [model["block"].weight]
    assert len(adam.param_groups[0]["params"]) == 3
    assert len(loop.optimizers(loop.Plan("x", 1, 0.1), {"model": model})) == 1
