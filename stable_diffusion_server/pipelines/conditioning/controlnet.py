"""Runs a ControlNet for some rows of a batch and gives zeros to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from stable_diffusion_server.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class ControlNetInput:
    """ControlNet conditioning of one request: `hint` holds the edges, `scale` multiplies the residuals.

    UNets take pixels in 0..1, 1 × 3 × height × width; Flux packed latents, 1 × patches × channels, or pixels in
    -1..1 where the network has a hint block of its own.
    """

    hint: torch.Tensor
    scale: float


def check_grid(controlnet: Any, pixels_per_latent: int) -> None:
    """Raise `ModelLoadError` when a ControlNet of a UNet downsamples by another factor than the VAE."""
    shrinks = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if shrinks != pixels_per_latent:
        raise ModelLoadError(
            f"The ControlNet takes {shrinks} pixels for one of the latents, and the model's VAE {pixels_per_latent}."
        )


def unet_residuals(
    controlnet: Any, inputs: Mapping[str, Any], controls: Sequence[ControlNetInput | None]
) -> dict[str, Any]:
    """The UNet's further arguments for a batch whose row `i` is guided by `controls[i]`; empty when none is.

    `inputs` are the UNet's own arguments, of which `sample`, `timestep`, `encoder_hidden_states` and
    `added_cond_kwargs` have the rows first. The network runs over the guided rows alone; adding zeros leaves the
    others exactly as they were.
    """
    guided = _guided(controls)
    if not guided:
        return {}
    rows = torch.tensor([row for row, _ in guided], device=inputs["sample"].device)
    down, middle = controlnet(
        inputs["sample"][rows],
        inputs["timestep"][rows],
        encoder_hidden_states=inputs["encoder_hidden_states"][rows],
        controlnet_cond=torch.cat([control.hint for _, control in guided]),
        conditioning_scale=_scales(guided, like=inputs["sample"]),
        added_cond_kwargs={name: value[rows] for name, value in inputs["added_cond_kwargs"].items()},
        return_dict=False,
    )
    return {
        "down_block_additional_residuals": [_spread(residual, rows, len(controls)) for residual in down],
        "mid_block_additional_residual": _spread(middle, rows, len(controls)),
    }


def transformer_residuals(
    controlnet: Any,
    inputs: Mapping[str, Any],
    guidance: torch.Tensor,
    controls: Sequence[ControlNetInput | None],
    sources: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The Flux transformer's further arguments, as `unet_residuals`.

    `guidance` (one number a row) goes to a ControlNet that was distilled with it, whether or not the model was. Row `i`
    takes what the network says of row `sources[i]`, by default of itself: as in the stock pipeline, a negative prompt
    takes what is said of the prompt.
    """
    read = range(len(controls)) if sources is None else sources
    guided = [(row, control) for row, control in _guided(controls) if read[row] == row]
    if not guided:
        return {}
    rows = torch.tensor([row for row, _ in guided], device=guidance.device)
    by_row = ("hidden_states", "timestep", "pooled_projections", "encoder_hidden_states")
    double, single = controlnet(
        **{name: inputs[name][rows] for name in by_row},
        guidance=guidance[rows] if controlnet.config.guidance_embeds else None,
        controlnet_cond=torch.cat([control.hint for _, control in guided]),
        conditioning_scale=_scales(guided, like=inputs["hidden_states"]),
        txt_ids=inputs["txt_ids"],
        img_ids=inputs["img_ids"],
        return_dict=False,
    )

    places = {row: place for place, (row, _) in enumerate(guided)}
    taking = [row for row, _ in _guided(controls)]
    taken = [places[read[row]] for row in taking]
    at, which = (torch.tensor(places, device=guidance.device) for places in (taking, taken))
    own = taken == [*range(len(guided))]

    def spread(residuals: Sequence[torch.Tensor] | None) -> list[torch.Tensor] | None:
        if residuals is None:
            return None
        return [_spread(residual if own else residual[which], at, len(controls)) for residual in residuals]

    return {
        "controlnet_block_samples": spread(double),
        "controlnet_single_block_samples": spread(single),
        "controlnet_blocks_repeat": controlnet.input_hint_block is not None,
    }


def layer_residuals(
    controlnet: Any,
    pictures: Sequence[torch.Tensor],
    times: torch.Tensor,
    captions: Sequence[torch.Tensor],
    controls: Sequence[ControlNetInput | None],
) -> dict[str, Any]:
    """The Z-Image transformer's further arguments, as `unet_residuals`.

    `pictures` are channels × 1 × h × w, `captions` tokens × channels, each of its own length; rows of tokens are padded
    to the longest of all.
    """
    guided = _guided(controls)
    if not guided:
        return {}
    rows = torch.tensor([row for row, _ in guided], device=times.device)
    hints = torch.cat([control.hint for _, control in guided])
    samples = controlnet(
        [pictures[row] for row, _ in guided],
        times[rows],
        [captions[row] for row, _ in guided],
        hints,
        conditioning_scale=_scales(guided, like=hints[:, 0, 0]),
    )
    length = max(
        _padded(picture.shape[-2] // 2 * (picture.shape[-1] // 2)) + _padded(len(caption))
        for picture, caption in zip(pictures, captions, strict=True)
    )
    filled = {
        layer: torch.nn.functional.pad(sample, (0, 0, 0, length - sample.shape[1])) for layer, sample in samples.items()
    }
    return {
        "controlnet_block_samples": {layer: _spread(sample, rows, len(controls)) for layer, sample in filled.items()}
    }


def _padded(tokens: int) -> int:
    """Tokens of a picture or caption with those that fill it up."""
    unit: int = SEQ_MULTI_OF
    return -(-tokens // unit) * unit


def _guided(controls: Sequence[ControlNetInput | None]) -> list[tuple[int, ControlNetInput]]:
    return [(row, control) for row, control in enumerate(controls) if control is not None]


def _scales(guided: Sequence[tuple[int, ControlNetInput]], like: torch.Tensor) -> torch.Tensor:
    """One factor a row, shaped to multiply tensors of as many dimensions as `like`."""
    scales = torch.tensor([control.scale for _, control in guided], device=like.device, dtype=like.dtype)
    return scales.reshape(-1, *[1] * (like.ndim - 1))


def _spread(residual: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """`residual` at its rows in a tensor of `count` rows; the other rows are zero."""
    if len(rows) == count:
        return residual
    return residual.new_zeros(count, *residual.shape[1:]).index_copy_(0, rows, residual)
