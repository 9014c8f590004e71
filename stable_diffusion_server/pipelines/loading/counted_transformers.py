"""Inputs of the transformers that stock pipelines run, by class, to count the memory of their work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

_REFERENCE_SIDE = 1024


class CountedPart(Protocol):
    """What the inputs of a transformer depend on."""

    @property
    def text_tokens(self) -> int:
        """The length of a prompt."""

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of a side the VAE makes of one of the latents."""

    @property
    def references(self) -> int:
        """The most reference images of a request."""

    def empty(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in the dtype of a part."""


# (model, name of the part, its configuration, side of the latents) → arguments of a forward pass of one row.
Inputs = Callable[[CountedPart, str, Any, int], dict[str, Any]]


def _plain(model: CountedPart, name: str, config: Any, side: int, width: int) -> dict[str, Any]:
    """Latents, a prompt of `width` channels, a timestep."""
    return {
        "hidden_states": model.empty(name, 1, config.in_channels, side, side),
        "encoder_hidden_states": model.empty(name, 1, model.text_tokens, width),
        "timestep": model.empty(name, 1),
    }


def _sd3(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    given = _plain(model, name, config, side, config.joint_attention_dim)
    # CLIP's 77 tokens come before T5's.
    given["encoder_hidden_states"] = model.empty(name, 1, 77 + model.text_tokens, config.joint_attention_dim)
    return {**given, "pooled_projections": model.empty(name, 1, config.pooled_projection_dim)}


def _aura_flow(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    return _plain(model, name, config, side, config.joint_attention_dim)


def _captioned(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    return _plain(model, name, config, side, config.caption_channels)


def _pixart(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    sizes = {"resolution": model.empty(name, 1, 2), "aspect_ratio": model.empty(name, 1, 1)}
    return {**_captioned(model, name, config, side), "added_cond_kwargs": sizes}


def _packed(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    """Patches of 2 × 2 latent pixels in a row."""
    return {
        "hidden_states": model.empty(name, 1, (side // 2) ** 2, config.in_channels),
        "encoder_hidden_states": model.empty(name, 1, model.text_tokens, config.joint_attention_dim),
        "timestep": model.empty(name, 1),
    }


def _chroma(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    places = {
        "img_ids": model.empty(name, (side // 2) ** 2, 3),
        "txt_ids": model.empty(name, model.text_tokens, 3),
    }
    return {**_packed(model, name, config, side), **places}


def _qwen_image(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    """The picture's patches and those of all references that a request may have, each of 1024 × 1024 pixels."""
    seen = _REFERENCE_SIDE // (2 * model.pixels_per_latent)
    patches = (side // 2) ** 2 + model.references * seen**2
    return {
        **_packed(model, name, config, side),
        "hidden_states": model.empty(name, 1, patches, config.in_channels),
        "img_shapes": [[(1, side // 2, side // 2), *[(1, seen, seen)] * model.references]],
    }


def _cogview4(model: CountedPart, name: str, config: Any, side: int) -> dict[str, Any]:
    names = ("original_size", "target_size", "crop_coords")
    return {
        **_plain(model, name, config, side, config.text_embed_dim),
        **{size: model.empty(name, 1, 2) for size in names},
    }


TRANSFORMER_INPUTS: Mapping[str, Inputs] = {
    "SD3Transformer2DModel": _sd3,
    "ChromaTransformer2DModel": _chroma,
    "SanaTransformer2DModel": _captioned,
    "AuraFlowTransformer2DModel": _aura_flow,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwen_image,
    "CogView4Transformer2DModel": _cogview4,
}
