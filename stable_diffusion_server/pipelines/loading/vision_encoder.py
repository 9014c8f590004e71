"""The encoder of IP-Adapters: a CLIP that sees, from a folder or from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.checkpoint_tensors import read_tensors
from stable_diffusion_server.pipelines.loading.complete_networks import load_complete
from stable_diffusion_server.pipelines.loading.weight_files import TRANSFORMERS, WeightFileError, check_part
from stable_diffusion_server.types import ImageArray

_VISION = "vision_model."
_HEADS = 16
# Activations of the published CLIPs by their width: ViT-L of OpenAI, ViT-H and ViT-bigG of OpenCLIP, 16 heads each.
_ACTIVATIONS = {1024: "quick_gelu", 1280: "gelu", 1664: "gelu"}


class VisionEncoder:
    """Reads images. Its weights stay in the memory of the machine, and are on `device` while it reads one."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network, self.device = network, device
        side = network.config.image_size
        self._processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)

    def read(self, image: ImageArray, *, pooled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of an image and of none: the embedding (1 × width), or the last hidden states but one.

        Those are 1 × patches × width. None is zeros as the embedding, and black as an image.
        """
        pixels = self._processor(Image.fromarray(image.pixels), return_tensors="pt").pixel_values
        try:
            self.network.to(self.device)
            pixels = pixels.to(self.device, self.network.dtype)
            if pooled:
                seen = self.network(pixels).image_embeds
                return seen, torch.zeros_like(seen)
            both = (self.network(each, output_hidden_states=True) for each in (pixels, torch.zeros_like(pixels)))
            seen, unseen = (found.hidden_states[-2] for found in both)
            return seen, unseen
        finally:
            if self.device.type != "cpu":
                self.network.to("cpu")


def load_vision_encoder(place: Path, dtype: torch.dtype, device: torch.device) -> VisionEncoder:
    """The encoder in a folder or a file, in `dtype`. Raises `ModelLoadError`."""
    try:
        if place.is_dir():
            variant = check_part(place, TRANSFORMERS, None).variant
            network = load_complete(transformers.CLIPVisionModelWithProjection, place, place.name, dtype, variant)
        else:
            network = _from_file(place)
    except WeightFileError as error:
        raise ModelLoadError(f"{error}.") from error
    except ModelLoadError:
        raise
    except Exception as error:  # the folder is input, and the libraries raise many types
        raise ModelLoadError(f"{place.name} holds no CLIP that sees, or its configuration does not fit.") from error
    network.requires_grad_(False).eval().to(dtype)
    return VisionEncoder(network, device)


def _from_file(file: Path) -> Any:
    tensors = read_tensors(file)
    config = _config_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, file.name)
    with torch.device("meta"):
        network = transformers.CLIPVisionModelWithProjection(config)
    wanted = network.state_dict()
    named = {name: tensors[name] for name in wanted if name in tensors}
    if lacking := sorted(wanted.keys() - named.keys()):
        raise ModelLoadError(f"{file.name} lacks {len(lacking)} of its weights ({', '.join(lacking[:2])}).")
    network.load_state_dict(named, strict=True, assign=True)
    for part in network.modules():  # numbers of places, which no file holds
        if getattr(part, "position_ids", None) is not None:
            part.position_ids = torch.arange(part.position_ids.shape[-1]).expand(1, -1)
    return network


def _config_of(shapes: dict[str, tuple[int, ...]], name: str) -> Any:
    """The configuration of a published CLIP by the shapes of its tensors."""
    width = shapes[f"{_VISION}embeddings.class_embedding"][0]
    patch = shapes[f"{_VISION}embeddings.patch_embedding.weight"][-1]
    places = shapes[f"{_VISION}embeddings.position_embedding.weight"][0]
    if width not in _ACTIVATIONS:
        known = ", ".join(map(str, _ACTIVATIONS))
        raise ModelLoadError(f"{name} is {width} wide; as a file, encoders {known} wide are read, others as a folder.")
    layers = {key.split(".")[3] for key in shapes if key.startswith(f"{_VISION}encoder.layers.")}
    return transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{_VISION}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=_HEADS,
        patch_size=patch,
        image_size=patch * round((places - 1) ** 0.5),
        projection_dim=shapes["visual_projection.weight"][0],
        hidden_act=_ACTIVATIONS[width],
    )
