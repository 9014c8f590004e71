"""Images as prompts: SigLIP and FLUX.1 Redux as one network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.complete_networks import empty_network, load_complete
from stable_diffusion_server.pipelines.loading.weight_files import DIFFUSERS, TRANSFORMERS, check_part

# What it is made of: (folder, beginning of its weight files' names).
REDUX = (("image_encoder", TRANSFORMERS), ("image_embedder", DIFFUSERS))


class ReduxEncoder(torch.nn.Module):  # type: ignore[misc]  # torch is read without types
    """Makes the embeddings of a prompt of images: SigLIP, then Redux, in the transformer's width."""

    def __init__(self, image_encoder: Any, image_embedder: Any, processor: Any) -> None:
        super().__init__()
        self.image_encoder, self.image_embedder, self.processor = image_encoder, image_embedder, processor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        dtype: torch.dtype = self.image_encoder.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        device: torch.device = self.image_encoder.device
        return device

    def forward(self, images: list[Image.Image]) -> torch.Tensor:
        """Images → images × tokens × channels."""
        pixels = self.processor.preprocess(images=images, do_resize=True, do_convert_rgb=True, return_tensors="pt")
        seen = self.image_encoder(pixel_values=pixels["pixel_values"].to(self.device, self.dtype)).last_hidden_state
        embeds: torch.Tensor = self.image_embedder(seen).image_embeds
        return embeds


def load_redux(folder: Path, name: str, dtype: torch.dtype, variant: str | None, *, meta: bool) -> ReduxEncoder:
    """The encoder of a diffusers folder of FLUX.1 Redux, with `meta` without weights; errors name the folder `name`.

    Raises `ModelLoadError`.
    """
    if not (folder / "image_embedder").is_dir():
        raise ModelLoadError(f"{name} is not a folder of FLUX.1 Redux: it holds no image_embedder.")
    processor = transformers.SiglipImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
    classes = {"image_encoder": transformers.SiglipVisionModel, "image_embedder": ReduxImageEncoder}
    networks = {}
    for part, stem in REDUX:
        own = check_part(folder / part, stem, variant).variant
        if not meta:
            networks[part] = load_complete(classes[part], folder / part, f"{name}/{part}", dtype, own)
            continue
        with torch.device("meta"):
            networks[part] = empty_network(classes[part], folder / part)
    encoder = ReduxEncoder(**networks, processor=processor)
    encoder.requires_grad_(False).eval()
    return encoder
