"""Runs ControlNets for some rows of a batch and adds what they say to those rows; the others get zeros."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch.nn.functional import interpolate

from stable_diffusion_server.errors import ModelLoadError
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
class _Group:
    """Rows that one run of a network guides, with the unit of each."""

    network: Any
    rows: tuple[int, ...]
    controls: tuple[ControlNetInput, ...]

    def index(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.rows, device=device)

    def scales(self, like: torch.Tensor) -> torch.Tensor:
        """One factor a row, shaped to multiply tensors of as many dimensions as `like`."""
        scales = torch.tensor([control.scale for control in self.controls], device=like.device, dtype=like.dtype)
        return scales.reshape(-1, *[1] * (like.ndim - 1))

    @property
    def hints(self) -> torch.Tensor:
        return torch.cat([control.hint for control in self.controls])


def check_grid(controlnet: Any, pixels_per_latent: int) -> None:
    """Raise `ModelLoadError` when a ControlNet of a UNet downsamples by another factor than the VAE."""
    shrinks = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if shrinks != pixels_per_latent:
        raise ModelLoadError(
            f"The ControlNet takes {shrinks} pixels for one of the latents, and the model's VAE {pixels_per_latent}."
        )


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


def unet_residuals(inputs: Mapping[str, Any], controls: Sequence[RowControls]) -> dict[str, Any]:
    """The UNet's further arguments for a batch whose row `i` is guided by `controls[i]`; empty when none is.

    `inputs` are the UNet's own arguments, of which `sample`, `timestep`, `encoder_hidden_states` and
    `added_cond_kwargs` have the rows first. A network runs over its rows alone; adding zeros leaves the others exactly
    as they were. Several units of a row are added up.
    """
    added: list[torch.Tensor] | None = None
    for group in _groups(controls, by_kind=True):
        rows = group.index(inputs["sample"].device)
        residuals = _weighted(_run_unet(group, inputs, rows), group)
        spread = [_spread(residual, rows, len(controls)) for residual in residuals]
        added = spread if added is None else [one + other for one, other in zip(added, spread, strict=True)]
    if added is None:
        return {}
    return {"down_block_additional_residuals": added[:-1], "mid_block_additional_residual": added[-1]}


def _run_unet(group: _Group, inputs: Mapping[str, Any], rows: torch.Tensor) -> list[torch.Tensor]:
    arguments: dict[str, Any] = {"controlnet_cond": group.hints}
    scales: Any = group.scales(like=inputs["sample"])
    kind = group.controls[0].kind
    if kind is not None:  # a union
        told = inputs["sample"].new_zeros(len(group.rows), group.network.config.num_control_type)
        told[:, kind] = 1
        arguments = {"controlnet_cond": [group.hints], "control_type": told, "control_type_idx": [kind]}
        scales = [scales]
    down, middle = group.network(
        inputs["sample"][rows],
        inputs["timestep"][rows],
        encoder_hidden_states=inputs["encoder_hidden_states"][rows],
        conditioning_scale=scales,
        added_cond_kwargs={name: value[rows] for name, value in inputs["added_cond_kwargs"].items()},
        return_dict=False,
        **arguments,
    )
    return [*down, middle]


def transformer_residuals(
    inputs: Mapping[str, Any],
    guidance: torch.Tensor,
    controls: Sequence[RowControls],
    sources: Sequence[int] | None = None,
    *,
    blocks: tuple[int, int] = (0, 0),
    grid: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """The Flux transformer's further arguments, as `unet_residuals`.

    `guidance` (one number a row) goes to a ControlNet that was distilled with it, whether or not the model was. Row `i`
    takes what the network says of row `sources[i]`, by default of itself: as in the stock pipeline, a negative prompt
    takes what is said of the prompt. `blocks` are how many double and single blocks the transformer has, which several
    networks need; `grid` are height and width of a picture's patches.
    """
    read = range(len(controls)) if sources is None else sources
    found = [_run_transformer(group, read, inputs, guidance, grid) for group in _groups(controls, by_kind=False)]
    if len(found) <= 1:
        return found[0] if found else {}
    doubles, singles = (
        _added([_per_block(one[name], blocks[place], repeat=one["controlnet_blocks_repeat"]) for one in found])
        for place, name in enumerate(("controlnet_block_samples", "controlnet_single_block_samples"))
    )
    return {
        "controlnet_block_samples": doubles,
        "controlnet_single_block_samples": singles,
        "controlnet_blocks_repeat": False,
    }


def _run_transformer(
    whole: _Group, read: Sequence[int], inputs: Mapping[str, Any], guidance: torch.Tensor, grid: tuple[int, int]
) -> dict[str, Any]:
    """What the network says of the rows that it reads, for all rows of the group."""
    kept = [(row, control) for row, control in zip(whole.rows, whole.controls, strict=True) if read[row] == row]
    group = _Group(whole.network, *zip(*kept, strict=True))
    network, rows = group.network, group.index(guidance.device)
    by_row = ("hidden_states", "timestep", "pooled_projections", "encoder_hidden_states")
    kinds = [[control.kind] for control in group.controls]
    told = {} if kinds[0][0] is None else {"controlnet_mode": torch.tensor(kinds, device=guidance.device)}
    double, single = network(
        **{name: inputs[name][rows] for name in by_row},
        **told,
        guidance=guidance[rows] if network.config.guidance_embeds else None,
        controlnet_cond=group.hints,
        conditioning_scale=group.scales(like=inputs["hidden_states"]),
        txt_ids=inputs["txt_ids"],
        img_ids=inputs["img_ids"],
        return_dict=False,
    )
    places = {row: place for place, row in enumerate(group.rows)}
    taken = [places[read[row]] for row in whole.rows]
    at, which = (torch.tensor([*numbers], device=guidance.device) for numbers in (whole.rows, taken))
    own = taken == [*range(len(group.rows))]

    def spread(residuals: Sequence[torch.Tensor] | None) -> list[torch.Tensor] | None:
        if residuals is None:
            return None
        weighted = _weighted(residuals, group, grid)
        return [_spread(residual if own else residual[which], at, len(read)) for residual in weighted]

    return {
        "controlnet_block_samples": spread(double),
        "controlnet_single_block_samples": spread(single),
        "controlnet_blocks_repeat": network.input_hint_block is not None,
    }


def _per_block(residuals: Sequence[torch.Tensor] | None, blocks: int, *, repeat: bool) -> list[torch.Tensor]:
    """A residual for each block, as the transformer chooses one: repeated in turn, or for blocks side by side."""
    if not residuals:
        return []
    each = math.ceil(blocks / len(residuals))
    return [residuals[number % len(residuals) if repeat else number // each] for number in range(blocks)]


def _added(lists: Iterable[list[torch.Tensor]]) -> list[torch.Tensor] | None:
    """The sums of lists of residuals, of which some may be empty; `None` if all are."""
    whole: list[torch.Tensor] = []
    for residuals in lists:
        whole = (
            [one + other for one, other in zip(whole, residuals, strict=True)]
            if whole and residuals
            else [*(whole or residuals)]
        )
    return whole or None


def layer_residuals(
    pictures: Sequence[torch.Tensor],
    times: torch.Tensor,
    captions: Sequence[torch.Tensor],
    controls: Sequence[RowControls],
) -> dict[str, Any]:
    """The Z-Image transformer's further arguments, as `unet_residuals`.

    `pictures` are channels × 1 × h × w, `captions` tokens × channels, each of its own length; rows of tokens are padded
    to the longest of all.
    """
    added: dict[int, torch.Tensor] = {}
    length = max(
        _padded(picture.shape[-2] // 2 * (picture.shape[-1] // 2)) + _padded(len(caption))
        for picture, caption in zip(pictures, captions, strict=True)
    )
    for group in _groups(controls, by_kind=False):
        rows, hints = group.index(times.device), group.hints
        samples = group.network(
            [pictures[row] for row in group.rows],
            times[rows],
            [captions[row] for row in group.rows],
            hints,
            conditioning_scale=group.scales(like=hints[:, 0, 0]),
        )
        grid = (pictures[0].shape[-2] // 2, pictures[0].shape[-1] // 2)
        weighted = dict(zip(samples, _weighted([*samples.values()], group, grid), strict=True))
        for layer, sample in weighted.items():
            filled = torch.nn.functional.pad(sample, (0, 0, 0, length - sample.shape[1]))
            spread = _spread(filled, rows, len(controls))
            added[layer] = added[layer] + spread if layer in added else spread
    return {"controlnet_block_samples": added} if added else {}


def _padded(tokens: int) -> int:
    """Tokens of a picture or caption with those that fill it up."""
    unit: int = SEQ_MULTI_OF
    return -(-tokens // unit) * unit


def _groups(controls: Sequence[RowControls], *, by_kind: bool) -> list[_Group]:
    """The units of all rows by network (and kind), so that each group has a row once."""
    found: dict[tuple[object, ...], list[tuple[int, ControlNetInput]]] = {}
    for row, units in enumerate(controls):
        turns: dict[tuple[object, ...], int] = {}
        for control in units:
            key = (id(control.network), control.kind if by_kind else None)
            turns[key] = turns.get(key, -1) + 1
            found.setdefault((*key, turns[key]), []).append((row, control))
    return [_Group(members[0][1].network, *zip(*members, strict=True)) for members in found.values()]


def _weighted(
    residuals: Sequence[torch.Tensor], group: _Group, grid: tuple[int, int] | None = None
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


def _mask_like(residual: torch.Tensor, group: _Group, grid: tuple[int, int] | None) -> torch.Tensor:
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


def _spread(residual: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """`residual` at its rows in a tensor of `count` rows; the other rows are zero."""
    if len(rows) == count:
        return residual
    return residual.new_zeros(count, *residual.shape[1:]).index_copy_(0, rows, residual)
