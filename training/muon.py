"""Muon: an optimizer that orthogonalises the momentum of matrices.

An update of equal strength in every direction of a matrix needed half the steps of AdamW on these images. Convolutions
count as matrices, output channels × everything else; torch's own class refuses them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that pulls singular values towards 1 (Jordan et al., Muon, 2024)."""


def orthogonalised(matrices: Tensor, rounds: int = 3) -> Tensor:
    """Return matrices, n × rows × columns, with singular values near 1, by Newton–Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = (found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(rounds):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return (found.mT if tall else found).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum.

    Its updates are scaled to AdamW's size (arXiv 2502.16982), so both share learning rates.

    Takes parameters of two or more dimensions; those of equal shape are orthogonalised together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows = len(parameter)
                    alike.setdefault((rows, parameter.numel() // rows), []).append(parameter)
            for shape, parameters in alike.items():
                self.move(parameters, shape, group["lr"], group["momentum"])

    def move(self, parameters: list[nn.Parameter], shape: tuple[int, int], rate: float, keep: float) -> None:
        """Update parameters of one matrix shape (rows, columns)."""
        wanted = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - keep)
            wanted.append(parameter.grad.lerp(momentum, keep).reshape(shape))
        updates = orthogonalised(torch.stack(wanted))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.sub_(update.reshape(parameter.shape), alpha=rate * 0.2 * max(shape) ** 0.5)
