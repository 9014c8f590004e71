"""What a request needs in memory beside the weights: counted once for each architecture, then a linear function."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stable_diffusion_server.pipelines.conditioning.controlnet import (
    ControlNetInput,
    transformer_residuals,
    unet_residuals,
)
from stable_diffusion_server.pipelines.loading.live_bytes import peak_bytes
from stable_diffusion_server.pipelines.loading.packed_weights import is_packed
from stable_diffusion_server.pipelines.loading.placement import CONTROL

# Counts of the architectures that are known: `python -m scripts.count_memory` writes it.
TABLE = Path(__file__).parent / "configs" / "working_memory.json"
# Sides in pixels of the two images that are counted; all of these networks are linear in the pixels.
_SIDES = 512, 1024
_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class WorkingBytes:
    """Bytes at the worst moment of one part's work: `fixed` for each row of a batch, `per_pixel` for each pixel."""

    fixed: int
    per_pixel: float

    def of(self, pixels: int, rows: int = 1) -> int:
        """Bytes for `rows` rows that have `pixels` pixels together."""
        return int(rows * self.fixed + self.per_pixel * pixels)

    def pixels_within(self, size: int) -> int:
        """The most pixels of a row that need at most `size` bytes."""
        return max(0, int((size - self.fixed) / self.per_pixel))


@dataclass(frozen=True)
class Architecture:
    """The networks of a model on the meta device, and what decides the sizes of their tensors.

    `parts` are named as the pipeline's components, with `control` for a ControlNet. `dtypes` are those of the loaded
    parts, `text_tokens` the length of a prompt.
    """

    parts: Mapping[str, torch.nn.Module]
    dtypes: Mapping[str, torch.dtype]
    text_tokens: int

    @functools.cached_property
    def working_bytes(self) -> dict[str, WorkingBytes]:
        """What each part needs for its work, by its name: from the table, otherwise counted, which takes seconds.

        The denoiser's includes the ControlNet's. Its rows are images, or their halves with and without the prompt.
        """
        return {name: self._known_or_counted(name) for name in self.parts if name in _COUNTS}

    @functools.cached_property
    def bytes(self) -> dict[str, int]:
        """Bytes of the weights of each part; whole numbers, such as packed weights, keep their size."""
        return {name: self._size(name, part.parameters()) for name, part in self.parts.items()}

    @functools.cached_property
    def largest_layer(self) -> int:
        """Bytes of the weights of the largest module without those below it."""
        modules = ((name, module) for name, part in self.parts.items() for module in part.modules())
        return max((self._size(name, module.parameters(recurse=False)) for name, module in modules), default=0)

    @functools.cached_property
    def packed(self) -> frozenset[str]:
        """The parts with packed weights."""
        return frozenset(name for name, part in self.parts.items() if is_packed(part))

    def _size(self, name: str, weights: Iterable[torch.Tensor]) -> int:
        size = self.dtypes[name].itemsize
        return sum(weight.numel() * (size if weight.is_floating_point() else weight.itemsize) for weight in weights)

    def key(self, name: str) -> str:
        """Identifies what is counted of a part: names and shapes of weights, bytes of a number, sizes of inputs."""
        used = [name, CONTROL] if CONTROL in self.parts and name in _DENOISERS else [name]
        shapes = [
            [type(part).__name__, sorted((weight, tuple(tensor.shape)) for weight, tensor in part.named_parameters())]
            for part in map(self.plain, used)
        ]
        sizes = (self.dtypes[name].itemsize, "" if name == "vae" else (self.text_tokens, self.pixels_per_latent))
        return f"{name} {hashlib.sha256(repr((shapes, sizes)).encode()).hexdigest()[:16]}"

    def count(self, name: str) -> WorkingBytes:
        """Count what a part needs: the linear function through two sizes."""
        small, large = (_COUNTS[name](self, name, side) for side in _SIDES)
        per_pixel = (large - small) / (_SIDES[1] ** 2 - _SIDES[0] ** 2)
        return WorkingBytes(max(0, round(small - per_pixel * _SIDES[0] ** 2)), per_pixel)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of a side the VAE makes of one of the latents."""
        return pixels_per_latent(self.parts["vae"])

    def plain(self, name: str) -> Any:
        """A part in its dtype; without packed weights, which are unpacked one by one while it computes."""
        part: Any = self.parts[name]
        if name in self.packed:
            with _META:
                kind: Any = type(part)
                part = kind.from_config(part.config) if hasattr(kind, "from_config") else kind(part.config)
        return torch.nn.Module.to(part, self.dtypes[name])

    def empty(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in the dtype of a part."""
        return torch.empty(*shape, device=_META, dtype=self.dtypes[name])

    def _known_or_counted(self, name: str) -> WorkingBytes:
        key = self.key(name)
        if key not in _known():
            _known()[key] = self.count(name)
        return _known()[key]


def pixels_per_latent(vae: Any) -> int:
    """How many pixels of a side a VAE makes of one of the latents."""
    scale: int = getattr(vae, "spatial_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1))
    return scale


@functools.cache
def _known() -> dict[str, WorkingBytes]:
    """The stored counts, and those of this process: checkpoints of one architecture share them."""
    return {
        key: WorkingBytes(int(fixed), per_pixel) for key, (fixed, per_pixel) in json.loads(TABLE.read_text()).items()
    }


def _count_vae(model: Architecture, name: str, side: int) -> int:
    vae, latents = model.plain(name), side // model.pixels_per_latent
    code = model.empty(name, 1, vae.config.latent_channels, latents, latents)
    image = model.empty(name, 1, vae.config.in_channels, side, side)
    decoded = peak_bytes(lambda: vae.decode(code, return_dict=False))
    return max(decoded, peak_bytes(lambda: vae.encode(image)))


def _count_text_encoder(model: Architecture, name: str, side: int) -> int:
    encoder = model.plain(name)
    tokens = min(model.text_tokens, getattr(encoder.config, "max_position_embeddings", model.text_tokens))
    ids = torch.empty(1, tokens, device=_META, dtype=torch.long)
    return peak_bytes(lambda: encoder(ids, output_hidden_states=True))


def _count_unet(model: Architecture, name: str, side: int) -> int:
    unet, latents = model.plain(name), side // model.pixels_per_latent
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs = {
        "sample": model.empty(name, 1, config.in_channels, latents, latents),
        "timestep": torch.empty(1, device=_META),
        "encoder_hidden_states": model.empty(name, 1, model.text_tokens, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": model.empty(name, 1, pooled), "time_ids": model.empty(name, 1, 6)},
    }

    def step() -> object:
        guide = [None if CONTROL not in model.parts else ControlNetInput(model.empty(name, 1, 3, side, side), 1.0)]
        network = model.plain(CONTROL) if CONTROL in model.parts else None
        return unet(**inputs, **unet_residuals(network, inputs, guide), return_dict=False)

    return peak_bytes(step)


def _count_transformer(model: Architecture, name: str, side: int) -> int:
    transformer = model.plain(name)
    config, patches = transformer.config, (side // (2 * model.pixels_per_latent)) ** 2
    inputs = {
        "hidden_states": model.empty(name, 1, patches, config.in_channels),
        "timestep": model.empty(name, 1),
        "pooled_projections": model.empty(name, 1, config.pooled_projection_dim),
        "encoder_hidden_states": model.empty(name, 1, model.text_tokens, config.joint_attention_dim),
        "txt_ids": model.empty(name, model.text_tokens, 3),
        "img_ids": model.empty(name, patches, 3),
    }
    guidance = torch.empty(1, device=_META)

    def step() -> object:
        network, guide = None, None
        if CONTROL in model.parts:
            network = model.plain(CONTROL)
            pixels = network.input_hint_block is not None
            hint = (1, 3, side, side) if pixels else (1, patches, network.config.in_channels)
            guide = ControlNetInput(model.empty(name, *hint), 1.0)
        return transformer(
            **inputs,
            **transformer_residuals(network, inputs, guidance, [guide]),
            guidance=guidance if config.guidance_embeds else None,
            return_dict=False,
        )

    return peak_bytes(step)


_DENOISERS = {"unet": _count_unet, "transformer": _count_transformer}
_COUNTS = {
    "vae": _count_vae,
    "text_encoder": _count_text_encoder,
    "text_encoder_2": _count_text_encoder,
    **_DENOISERS,
}
