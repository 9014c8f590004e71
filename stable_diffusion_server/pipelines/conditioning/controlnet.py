"""Runs ControlNets for some rows of a batch and adds what they say to those rows; the others get zeros."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.conditioning.control_groups import (
    RowControls,
    RowGroup,
    groups_of,
    spread_rows,
    weigh,
)


def check_grid(controlnet: Any, pixels_per_latent: int) -> None:
    """Raise `ModelLoadError` when a ControlNet of a UNet downsamples by another factor than the VAE."""
    shrinks = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if shrinks != pixels_per_latent:
        raise ModelLoadError(
            f"The ControlNet takes {shrinks} pixels for one of the latents, and the model's VAE {pixels_per_latent}."
        )


def unet_residuals(inputs: Mapping[str, Any], controls: Sequence[RowControls]) -> dict[str, Any]:
    """The UNet's further arguments for a batch whose row `i` is guided by `controls[i]`; empty when none is.

    `inputs` are the UNet's own arguments, of which `sample`, `timestep`, `encoder_hidden_states` and
    `added_cond_kwargs` have the rows first. A network runs over its rows alone; adding zeros leaves the others exactly
    as they were. Several units of a row are added up.
    """
    added: list[torch.Tensor] | None = None
    for group in groups_of(controls, by_kind=True):
        rows = group.index(inputs["sample"].device)
        residuals = weigh(_run_unet(group, inputs, rows), group)
        spread = [spread_rows(residual, rows, len(controls)) for residual in residuals]
        added = spread if added is None else [one + other for one, other in zip(added, spread, strict=True)]
    if added is None:
        return {}
    return {"down_block_additional_residuals": added[:-1], "mid_block_additional_residual": added[-1]}


def _run_unet(group: RowGroup, inputs: Mapping[str, Any], rows: torch.Tensor) -> list[torch.Tensor]:
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
    found = [_run_transformer(group, read, inputs, guidance, grid) for group in groups_of(controls, by_kind=False)]
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
    whole: RowGroup, read: Sequence[int], inputs: Mapping[str, Any], guidance: torch.Tensor, grid: tuple[int, int]
) -> dict[str, Any]:
    """What the network says of the rows that it reads, for all rows of the group."""
    kept = [(row, control) for row, control in zip(whole.rows, whole.controls, strict=True) if read[row] == row]
    group = RowGroup(whole.network, *zip(*kept, strict=True))
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
        weighted = weigh(residuals, group, grid)
        return [spread_rows(residual if own else residual[which], at, len(read)) for residual in weighted]

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


def joint_residuals(
    inputs: Mapping[str, Any], controls: Sequence[RowControls], blocks: int, grid: tuple[int, int]
) -> dict[str, Any]:
    """The SD 3 transformer's further arguments, as `unet_residuals`: a residual for each of its `blocks`.

    `grid` are height and width of a picture's patches. As the stock pipeline does, networks that ask for it get zeros
    as the pooled prompt, and those without a text projection no prompt.
    """
    found = []
    for group in groups_of(controls, by_kind=False):
        rows, config = group.index(inputs["hidden_states"].device), group.network.config
        taken = {name: value[rows] for name, value in inputs.items()}
        if config.force_zeros_for_pooled_projection:
            taken["pooled_projections"] = torch.zeros_like(taken["pooled_projections"])
        if config.joint_attention_dim is None:
            taken["encoder_hidden_states"] = None
        scales = group.scales(like=inputs["encoder_hidden_states"])
        (samples,) = group.network(**taken, controlnet_cond=group.hints, conditioning_scale=scales, return_dict=False)
        spread = [spread_rows(residual, rows, len(controls)) for residual in weigh(samples, group, grid)]
        found.append([spread[int(number / (blocks / len(spread)))] for number in range(blocks)])
    added = _added(found)
    return {"block_controlnet_hidden_states": added} if added else {}


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
    for group in groups_of(controls, by_kind=False):
        rows, hints = group.index(times.device), group.hints
        samples = group.network(
            [pictures[row] for row in group.rows],
            times[rows],
            [captions[row] for row in group.rows],
            hints,
            conditioning_scale=group.scales(like=hints[:, 0, 0]),
        )
        grid = (pictures[0].shape[-2] // 2, pictures[0].shape[-1] // 2)
        weighted = dict(zip(samples, weigh([*samples.values()], group, grid), strict=True))
        for layer, sample in weighted.items():
            filled = torch.nn.functional.pad(sample, (0, 0, 0, length - sample.shape[1]))
            spread = spread_rows(filled, rows, len(controls))
            added[layer] = added[layer] + spread if layer in added else spread
    return {"controlnet_block_samples": added} if added else {}


def _padded(tokens: int) -> int:
    """Tokens of a picture or caption with those that fill it up."""
    unit: int = SEQ_MULTI_OF
    return -(-tokens // unit) * unit
