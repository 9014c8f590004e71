"""Shared code of the families that generate images with the components of a diffusers pipeline."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.pipelines.base import (
    DecodedImage,
    PipelineState,
    decode,
    translate_torch_errors,
)
from stable_diffusion_server.pipelines.conditioning.controlnet_folder import ControlNetFolder
from stable_diffusion_server.pipelines.conditioning.embedding_folder import EmbeddingFolder
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.conditioning.prompt_embeddings import EmbeddingReader, clips_of
from stable_diffusion_server.pipelines.controlnet_cache import ControlNetCache
from stable_diffusion_server.pipelines.enlarged_latents import kept_latents
from stable_diffusion_server.pipelines.family import Family, LoadedFamily, LoadedModelInfo
from stable_diffusion_server.pipelines.latent_preview import LatentPreviewer
from stable_diffusion_server.pipelines.loading.footprint import bytes_of, dtype_of
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFolder
from stable_diffusion_server.pipelines.loading.loader import LoadOptions, PlacedModel, place_model
from stable_diffusion_server.pipelines.loading.offload import OffloadedModel
from stable_diffusion_server.pipelines.loading.placement import CONTROL, Residency
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling, runs_in_tiles
from stable_diffusion_server.pipelines.wrapping import wrapped, wrapping
from stable_diffusion_server.types import Tiling

# Latents of the opposite side that tiles see beyond a border that wraps.
_MARGIN = 16


class DiffusersFamily(Family):
    """Generates images with the components of a loaded diffusers `pipeline`.

    `controlnet` may be `None`; requests with edges are then refused. `tiling` says which images its VAE encodes and
    decodes in tiles. Prompts may name embeddings once `offer_embeddings` was called.
    """

    embeddings = EmbeddingReader({}, None)
    _controlnet_folder: ControlNetFolder | None = None

    def __init__(
        self,
        pipeline: Any,
        spec: ModelSpec,
        controlnet: Any = None,
        loras: LoraManager | None = None,
        prompt_cache: PromptCache | None = None,
        tiling: VaeTiling = WHOLE,
    ) -> None:
        self.pipeline = pipeline
        self.spec = spec
        self.controlnet = controlnet
        self.loras = loras or LoraManager(pipeline)
        self.prompt_cache = PromptCache() if prompt_cache is None else prompt_cache
        self.tiling = tiling
        self._previewer = LatentPreviewer(pipeline.vae, self._vae_latents)
        self._adapt_controlnet()

    @classmethod
    def load(cls, spec: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> LoadedFamily:
        """Load the pipeline of `spec` and place it. Raises `ModelLoadError`, `ModelTooLarge` when it does not fit."""
        placed = place_model(spec, models_dir, device, options)
        prompt_cache = PromptCache(options.prompt_cache_bytes)
        family = cls(placed.pipeline, placed.spec, placed.controlnet, placed.loras, prompt_cache, placed.tiling)
        family.offer_embeddings(options.embeddings)
        family.offer_image_prompts(options.image_prompts)
        resident = placed.placement.residency is Residency.RESIDENT
        # A network that computes with layers of the denoiser needs them on the device.
        shares = placed.spec.control_shares_layers and not resident
        family.offer_controlnets(None if shares else options.controlnets)
        return LoadedFamily(
            family=family,
            spec=placed.spec,
            info=_info(placed, device, options, family.embeddings.widths),
            prompt_cache=prompt_cache,
            cuda_graphs=placed.cuda_graphs,
            offloaded=None
            if resident
            else OffloadedModel(placed.pipeline, placed.controlnet, placed.placement.residency),
            # The hooks of offloaded weights move them one by one, so that they cannot be shared.
            networks=_networks(placed),
            token_counter=family.token_counter(),
            placement=placed.placement,
        )

    def offer_embeddings(self, folder: EmbeddingFolder | None) -> None:
        """Let prompts name the embeddings of a folder, if the model reads them. Call it before the first request."""
        self.embeddings = EmbeddingReader(clips_of(self.pipeline) if self.spec.weighs_prompts else {}, folder)

    def offer_controlnets(self, folder: ControlNetFolder | None) -> None:
        """Let requests name the ControlNets of a folder. Call it before the first request."""
        self._controlnet_folder = folder

    @functools.cached_property
    def controlnets(self) -> ControlNetCache:
        """The ControlNets that requests named."""
        return ControlNetCache(self._controlnet_folder, self.spec, self.pipeline, self.device, self._adapt)

    def _adapt(self, network: Any) -> None:
        """Fit a ControlNet to the pipeline."""

    def offer_image_prompts(self, folder: ImagePromptFolder) -> None:
        """Let requests name what reads image prompts, if the model draws by them. Call it before the first request."""

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the pipeline. Cached, since diffusers walks every module to find it."""
        device: torch.device = self.pipeline._execution_device
        return device

    def finish(self, state: PipelineState[Any]) -> DecodedImage:
        """Decode the latents; before the last step, the prediction of the final ones. Raises `NotFinite`."""
        predicted = None if state.done else state.predicted_original
        with translate_torch_errors():
            latents = self._vae_latents(state, state.latents if predicted is None else predicted)
            if state.request.keeps_latents and state.done:
                kept = kept_latents(latents)
                return DecodedImage(self.preview(state), redecoded=False, warnings=state.warnings, latents=kept)
            tiling = state.tiling or self.tiling
            with tiling.applied(self.pipeline.vae, state.request.width * state.request.height):
                image = _decode(self.pipeline.vae, latents, state.request.tiling)
        return replace(image, tiled=state.tiling is not None, warnings=state.warnings)

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """A small image of the state, made without decoding: height × width × 3."""
        return self._previewer.preview(state)

    def shrink(self, state: PipelineState[Any]) -> bool:
        """Decode this request in tiles, or in smaller ones; false when they are as small as they can be."""
        smaller = (state.tiling or self.tiling).smaller()
        if smaller is not None:
            state.tiling = smaller
        return smaller is not None

    def _adapt_controlnet(self) -> None:
        """Fit the ControlNet, if there is one, to the pipeline. Raises `ModelLoadError` if it does not fit."""

    @abstractmethod
    def token_counter(self) -> Callable[[str], int]:
        """What `count_tokens` calls: a thread-safe function that holds the tokenizers only."""

    def count_tokens(self, prompt: str) -> int:
        """Length of the prompt in the encoder's tokens, special tokens included. Thread-safe."""
        return self.token_counter()(prompt)

    @abstractmethod
    def _vae_latents(self, state: PipelineState[Any], latents: torch.Tensor) -> torch.Tensor:
        """Latents of a state in the VAE's own scale and layout: 1 × channels × h × w."""


def _decode(vae: Any, latents: torch.Tensor, tiling: Tiling | None) -> DecodedImage:
    """Decode unscaled latents so that these borders meet.

    Tiles must not wrap: they get `_MARGIN` latents of the opposite side around the image, which are cut off again.
    """
    if tiling is None or not runs_in_tiles(vae, latents.shape[-2:], "latent"):
        with wrapping(tiling):
            return decode(vae, latents)
    height, width = (min(_MARGIN, side) for side in latents.shape[-2:])
    image = decode(vae, wrapped(latents, tiling, height, width))
    scale = image.pixels.shape[0] // (latents.shape[-2] + 2 * height * tiling.wraps_y)
    top, left = height * scale * tiling.wraps_y, width * scale * tiling.wraps_x
    bottom, right = top + latents.shape[-2] * scale, left + latents.shape[-1] * scale
    return replace(image, pixels=image.pixels[top:bottom, left:right])


def _networks(placed: PlacedModel) -> dict[str, torch.nn.Module]:
    parts = {**placed.pipeline.components, CONTROL: placed.controlnet}
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def _info(
    placed: PlacedModel, device: torch.device, options: LoadOptions, clip_widths: Mapping[str, int]
) -> LoadedModelInfo:
    spec = placed.spec
    return LoadedModelInfo(
        name=spec.name,
        folder=spec.folder,
        revision=spec.revision,
        device=str(device),
        dtype=str(dtype_of(spec, device)).removeprefix("torch."),
        residency=placed.placement.residency,
        quantization=placed.placement.quantization,
        bytes=bytes_of(*_networks(placed).values()),
        follows_edges=placed.controlnet is not None,
        loras=options.lora_folder.names({spec.denoiser_part}),
        commit=placed.commit,
        remarks=tuple(placed.remarks),
        clip_widths=clip_widths,
    )
