"""The control units of the rows of a batch, grouped by network, and what modes and masks make of their residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import interpolate

from stable_diffusion_server.types import ControlMode

# Where prompt or control counts more: factor from a residual to the one before it, and the number of a UNet's last one.
# As in AUTOMATIC1111's extension, SDXL's ten have the factors of the first ten of SD 1.5's thirteen.
_SOFT, _LAST = 0.825, 12


@dataclass(frozen=True, slots=True, eq=False)
class ControlNetInput:
    """One unit of a request: `hint` is what `network` takes, `scale` multiplies its residuals.

    UNets take pixels in 0..1, 1 × 3 × height × width; Flux packed latents, 1 × patches × channels, or pixels in
    -1..1 where the network has a hint block of its own. `kind` is the number that a union is told. The unit acts in
    steps from the share `start` to `end`, with its residuals multiplied by `mask` (1 × 1 × h × w of latents, 0..1).
    """

    network: Any
    hint: torch.Tensor
    scale: float
    kind: int | None = None
    start: float = 0.0
    end: float = 1.0
    mask: torch.Tensor | None = None
    mode: ControlMode = ControlMode.BALANCED

    def acts_in(self, step: int, steps: int) -> bool:
        """Whether it acts in a step of so many, by the rule of diffusers' pipelines."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)


# The active units of one row.
RowControls = Sequence[ControlNetInput]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that one run of a network guides, with the unit of each."""

    network: Any
    rows: tuple[int, ...]
    controls: tuple[ControlNetInput, ...]

    def index(self, device: torch.device) -> torch.Tensor:
        """The numbers of the rows."""
        return torch.tensor(self.rows, device=device)

    def scales(self, like: torch.Tensor) -> torch.Tensor:
        """One factor a row, shaped to multiply tensors of as many dimensions as `like`."""
        scales = torch.tensor([control.scale for control in self.controls], device=like.device, dtype=like.dtype)
        return scales.reshape(-1, *[1] * (like.ndim - 1))

    @property
    def hints(self) -> torch.Tensor:
        """What the network takes of the control images, one a row."""
        return torch.cat([control.hint for control in self.controls])


def row_controls(state: Any, rows: int, positive: int) -> list[RowControls]:
    """The units that act on each of a state's rows in its next pass; `positive` is the row of the prompt.

    Units whose control counts more act on the prompt's row alone.
    """
    if not state.controls:
        return [()] * rows
    passes = len(state.segments[0].timesteps)
    controls = [control for control in state.controls if control.acts_in(state.passes, passes)]
    rest = [control for control in controls if control.mode is not ControlMode.CONTROL]
    return [controls if row == positive else rest for row in range(rows)]


def groups_of(controls: Sequence[RowControls], *, by_kind: bool) -> list[RowGroup]:
    """The units of all rows by network (and kind), so that each group has a row once."""
    found: dict[tuple[object, ...], list[tuple[int, ControlNetInput]]] = {}
    for row, units in enumerate(controls):
        turns: dict[tuple[object, ...], int] = {}
        for control in units:
            key = (id(control.network), control.kind if by_kind else None)
            turns[key] = turns.get(key, -1) + 1
            found.setdefault((*key, turns[key]), []).append((row, control))
    return [RowGroup(members[0][1].network, *zip(*members, strict=True)) for members in found.values()]


def weigh(
    residuals: Sequence[torch.Tensor], group: RowGroup, grid: tuple[int, int] | None = None
) -> list[torch.Tensor]:
    """Residuals times what modes and masks of their rows say; as they are where all are balanced and whole.

    Where prompt or control counts more, residuals near the picture count less: 0.825 to the power of how many come
    after, of thirteen in a UNet.

    Residuals of pictures have rows × channels × h × w, those of tokens rows × tokens × channels, of which the first
    are the patches of a picture of height × width `grid`.
    """
    if any(control.mode is not ControlMode.BALANCED for control in group.controls):
        soft = [control.mode is not ControlMode.BALANCED for control in group.controls]
        last = _LAST if grid is None else len(residuals) - 1
        residuals = [
            residual
            * residual.new_tensor([_SOFT ** (last - place) if is_soft else 1.0 for is_soft in soft]).reshape(
                -1, *[1] * (residual.ndim - 1)
            )
            for place, residual in enumerate(residuals)
        ]
    if all(control.mask is None for control in group.controls):
        return [*residuals]
    return [residual * _mask_like(residual, group, grid) for residual in residuals]


def _mask_like(residual: torch.Tensor, group: RowGroup, grid: tuple[int, int] | None) -> torch.Tensor:
    """Masks of a group's rows, shaped to multiply a residual; tokens that are no patches take the mean of a mask."""
    size = grid if grid is not None else tuple(residual.shape[-2:])
    masks = []
    for control in group.controls:
        mask = residual.new_ones(1, 1, *size)
        if control.mask is not None:
            mask = interpolate(control.mask.float(), size=size, mode="area").to(residual.dtype)
        masks.append(mask)
    mask = torch.cat(masks)
    if grid is None:
        return mask
    tokens = mask.flatten(1)
    others = tokens.mean(1, keepdim=True).expand(-1, residual.shape[1] - tokens.shape[1])
    return torch.cat([tokens, others], dim=1).unsqueeze(-1)


def spread_rows(residual: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """`residual` at its rows in a tensor of `count` rows; the other rows are zero."""
    if len(rows) == count:
        return residual
    return residual.new_zeros(count, *residual.shape[1:]).index_copy_(0, rows, residual)
