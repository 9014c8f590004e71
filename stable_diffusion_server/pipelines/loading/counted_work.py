"""Runs each part of a model without numbers, to count the bytes that its work needs at its worst moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from stable_diffusion_server.pipelines.conditioning.control_groups import ControlNetInput
from stable_diffusion_server.pipelines.conditioning.controlnet import (
    layer_residuals,
    transformer_residuals,
    unet_residuals,
)
from stable_diffusion_server.pipelines.loading.counted_transformers import TRANSFORMER_INPUTS
from stable_diffusion_server.pipelines.loading.live_bytes import peak_bytes
from stable_diffusion_server.pipelines.loading.placement import CONTROL
from stable_diffusion_server.pipelines.model_spec import REFINER

META = torch.device("meta")
# Components that predict the noise.
DENOISERS = ("unet", "transformer", "decoder", "image_unet")
# Pixels of the largest reference image; larger ones are shrunk to this.
REFERENCE_PIXELS = 1024 * 1024
# Tensors that a transformer keeps at its worst moment, of the width of its widest layer; channels of a VAE's pixels.
_WIDE_TENSORS, _PIXEL_CHANNELS = 6, 2048


class CountedModel(Protocol):
    """What counting needs of an `Architecture`."""

    @property
    def parts(self) -> Mapping[str, torch.nn.Module]:
        """The networks on the meta device."""

    @property
    def text_tokens(self) -> int:
        """The length of a prompt."""

    @property
    def references(self) -> int:
        """The most reference images that a request may have."""

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of a side the VAE makes of one of the latents."""

    def plain(self, name: str) -> Any:
        """A part in its dtype, without packed weights."""

    def empty(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in the dtype of a part."""


# (model, name of the part, side of the image in pixels) → bytes.
Counter = Callable[[CountedModel, str, int], int]


def counter_of(name: str, part: torch.nn.Module) -> Counter | None:
    """How the work of a part is counted: by its class, else by its name; `None` for what is not counted."""
    return _BY_CLASS.get(type(part).__name__) or next(
        (counter for start, counter in _BY_NAME.items() if name.startswith(start)), None
    )


def _count_vae(model: CountedModel, name: str, side: int) -> int:
    vae, latents = model.plain(name), side // model.pixels_per_latent
    frames = (1,) if "z_dim" in vae.config else ()  # of a VAE for videos
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    code = model.empty(name, 1, channels, *frames, latents, latents)
    image = model.empty(name, 1, vae.config.get("in_channels", 3), *frames, side, side)
    decoded = peak_bytes(lambda: vae.decode(code, return_dict=False))
    return max(decoded, peak_bytes(lambda: vae.encode(image)))


def _count_text_encoder(model: CountedModel, name: str, side: int) -> int:
    encoder = model.plain(name)
    tokens = min(model.text_tokens, getattr(encoder.config, "max_position_embeddings", model.text_tokens))
    ids = torch.empty(1, tokens, device=META, dtype=torch.long)
    return peak_bytes(lambda: encoder(ids, output_hidden_states=True))


def _count_unet(model: CountedModel, name: str, side: int) -> int:
    unet, latents = model.plain(name), side // model.pixels_per_latent
    config = unet.config
    added: dict[str, torch.Tensor] = {}
    if config.addition_embed_type == "text_time":
        numbers = 5 if name == REFINER else 6  # a score in place of a size
        pooled = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
        added = {"text_embeds": model.empty(name, 1, pooled), "time_ids": model.empty(name, 1, numbers)}
    inputs = {
        "sample": model.empty(name, 1, config.in_channels, latents, latents),
        "timestep": torch.empty(1, device=META),
        "encoder_hidden_states": model.empty(name, 1, model.text_tokens, config.cross_attention_dim),
        "added_cond_kwargs": added,
    }

    def step() -> object:
        guide = []
        if CONTROL in model.parts and name in DENOISERS:
            guide.append(ControlNetInput(model.plain(CONTROL), model.empty(name, 1, 3, side, side), 1.0))
        return unet(**inputs, **unet_residuals(inputs, [guide]), return_dict=False)

    return peak_bytes(step)


def _count_transformer(model: CountedModel, name: str, side: int) -> int:
    transformer = model.plain(name)
    patch = 2 * model.pixels_per_latent
    config, patches = transformer.config, (side // patch) ** 2 + model.references * (REFERENCE_PIXELS // patch**2)
    inputs = {
        "hidden_states": model.empty(name, 1, patches, config.in_channels),
        "timestep": model.empty(name, 1),
        "pooled_projections": model.empty(name, 1, config.pooled_projection_dim),
        "encoder_hidden_states": model.empty(name, 1, model.text_tokens, config.joint_attention_dim),
        "txt_ids": model.empty(name, model.text_tokens, 3),
        "img_ids": model.empty(name, patches, 3),
    }
    guidance = torch.empty(1, device=META)

    def step() -> object:
        guide = []
        if CONTROL in model.parts:
            network = model.plain(CONTROL)
            pixels = network.input_hint_block is not None
            hint = (1, 3, side, side) if pixels else (1, patches, network.config.in_channels)
            guide.append(ControlNetInput(network, model.empty(name, *hint), 1.0))
        return transformer(
            **inputs,
            **transformer_residuals(inputs, guidance, [guide]),
            guidance=guidance if config.guidance_embeds else None,
            return_dict=False,
        )

    return peak_bytes(step)


def _count_flux2(model: CountedModel, name: str, side: int) -> int:
    """The picture's patches, those of an input image of its size, and of all references that a request may have."""
    transformer = model.plain(name)
    own = (side // (2 * model.pixels_per_latent)) ** 2
    reference = REFERENCE_PIXELS // (2 * model.pixels_per_latent) ** 2
    patches = 2 * own + model.references * reference
    embeds = model.empty(name, 1, model.text_tokens, transformer.config.joint_attention_dim)
    inputs = {
        "timestep": model.empty(name, 1),
        "encoder_hidden_states": embeds,
        "txt_ids": torch.empty(1, model.text_tokens, 4, device=META),
        "img_ids": torch.empty(1, patches, 4, device=META),
    }

    def step() -> object:
        latents = model.empty(name, 1, patches, transformer.config.in_channels)
        return transformer(hidden_states=latents, **inputs, guidance=None, return_dict=False)[0][:, :own]

    return peak_bytes(step)


def _count_z_image(model: CountedModel, name: str, side: int) -> int:
    transformer, latents = model.plain(name), side // model.pixels_per_latent
    caption = model.empty(name, model.text_tokens, transformer.config.cap_feat_dim)
    network = model.plain(CONTROL) if CONTROL in model.parts else None
    if network is not None:
        type(network).from_transformer(network, transformer)

    def step() -> object:
        pictures, levels = [model.empty(name, transformer.config.in_channels, 1, latents, latents)], torch.empty(1)
        guide = []
        if network is not None:
            hint = model.empty(name, 1, network.config.control_in_dim, 1, latents, latents)
            guide.append(ControlNetInput(network, hint, 1.0))
        residuals = layer_residuals(pictures, levels.to(META), [caption], [guide])
        return transformer(pictures, levels.to(META), [caption], return_dict=False, **residuals)

    return peak_bytes(step)


def _count_by_inputs(model: CountedModel, name: str, side: int) -> int:
    transformer = model.plain(name)
    inputs = TRANSFORMER_INPUTS[type(transformer).__name__]
    given = inputs(model, name, transformer.config, side // model.pixels_per_latent)
    return peak_bytes(lambda: transformer(**given, return_dict=False))


def estimate_work(model: CountedModel, name: str, side: int) -> int:
    """Bytes of the work of a part that is not counted, by its widest layer; more than those that are counted need."""
    part = model.parts[name]
    size: int = model.empty(name, 1).itemsize
    if name.startswith("vae"):
        return _PIXEL_CHANNELS * side * side * size
    widths: list[int] = [
        weight.shape[0] for weight in part.parameters() if weight.ndim > 1 and weight.shape[0] < 100_000
    ]
    sizes: Any = getattr(part.config, "patch_size", 2)
    patch: int = sizes if isinstance(sizes, int) else sizes[-1]
    tokens = model.text_tokens + (0 if name not in DENOISERS else (side // (model.pixels_per_latent * patch)) ** 2)
    return _WIDE_TENSORS * max(widths, default=1) * tokens * size


# Denoisers, and other parts that are called in a way of their own.
_BY_CLASS: Mapping[str, Counter] = {
    "UNet2DConditionModel": _count_unet,
    "FluxTransformer2DModel": _count_transformer,
    "Flux2Transformer2DModel": _count_flux2,
    "ZImageTransformer2DModel": _count_z_image,
    **dict.fromkeys(TRANSFORMER_INPUTS, _count_by_inputs),
}
# Beginnings of the names of parts.
_BY_NAME: Mapping[str, Counter] = {
    "vae": _count_vae,
    "text_encoder": _count_text_encoder,
    **dict.fromkeys(DENOISERS, estimate_work),
}
