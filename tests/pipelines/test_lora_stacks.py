"""Products of stacked factors: each row has what its own factors give alone, whatever rows are beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from stable_diffusion_server.pipelines.adapters.lora_stacks import FactorStack

pytestmark = pytest.mark.slow

# Sets by place; -1 is a row without one.
ROWS = {
    "one row each": ([0, 1, 2], 1),
    "pairs": ([0, 0, 1, 1, 2, 2], 2),
    "pairs of one set side by side": ([0, 0, 0, 0, 1, 1], 2),
    "threes": ([1, 1, 1, 0, 0, 0], 3),
    "pairs beside single rows": ([0, 0, 1, 2, 2], 1),
    "pairs beside rows without": ([-1, 0, 0, -1, -1, 1, 1], 2),
    "one set beside rows without": ([2, 2, 2, 2, -1], 4),
}
LAYERS: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
    "linear": (torch.nn.Linear(6, 5), (6,)),
    "linear over tokens": (torch.nn.Linear(6, 5), (7, 6)),
    "convolution": (torch.nn.Conv2d(6, 5, 3, padding=1), (6, 8, 4)),
    "with a stride": (torch.nn.Conv2d(6, 5, 3, stride=2, padding=1), (6, 8, 4)),
    "wrapping": (torch.nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), (6, 8, 4)),
    "of one pixel": (torch.nn.Conv2d(6, 5, 1), (6, 8, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", ROWS)
def test_each_row_has_the_product_of_its_own_factors(layer: str, layout: str) -> None:
    """Ranks 1 to 3 padded to one; and the entries are as many as there are runs of equal rows, not rows."""
    module, shape = LAYERS[layer]
    rows, count = ROWS[layout]
    chance = torch.Generator().manual_seed(7)
    kernel = tuple(module.weight.shape[1:])
    factors = {
        place: (torch.randn(place + 1, *kernel, generator=chance), torch.randn(5, place + 1, generator=chance))
        for place in sorted({*rows} - {-1})
    }
    given = torch.randn(len(rows), *shape, generator=chance)
    with torch.no_grad():
        output = module(given)
        stack = FactorStack.of(factors, rows, [])
        made = stack.added_to(output, given, module)
        expected = torch.cat([_alone(module, given[at : at + 1], factors.get(place)) for at, place in enumerate(rows)])
    assert stack.count == count
    assert stack.downs is not None
    assert len(stack.downs) * count == sum(place >= 0 for place in rows)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, module(given))  # the output itself is unchanged


def test_without_factors_the_output_is_itself() -> None:
    """No row has factors of low rank."""
    output = torch.ones(2, 5)
    assert FactorStack.of({}, [0, 0], []).added_to(output, torch.ones(2, 6), torch.nn.Linear(6, 5)) is output


def _alone(module: Any, given: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """The layer with the product merged into its weight."""
    weight = module.weight
    if factors is not None:
        weight = weight + (factors[1] @ factors[0].flatten(1)).reshape(weight.shape)
    if isinstance(module, torch.nn.Linear):
        return functional.linear(given, weight, module.bias)
    made: torch.Tensor = module._conv_forward(given, weight, module.bias)
    return made
