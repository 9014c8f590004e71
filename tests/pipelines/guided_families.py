"""Small families with ControlNets in a folder, the units of requests, and what the stock pipelines draw with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tiny_families
import torch
from checkpoint_stand_ins import sd15_pipeline, sdxl_pipeline
from drawing import Pixels, outline
from PIL import Image
from single_file_specs import sd15_spec, sdxl_spec
from tiny_drawing import tiny_row
from tiny_parts import SIDE

from stable_diffusion_server.pipelines.catalog import scheduler_of
from stable_diffusion_server.pipelines.conditioning.controlnet_folder import ControlNetFolder
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sd3 import StableDiffusion3
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.families.z_image import ZImage
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.types import ControlImage, ControlKind, DiffusionRequest, ImageArray

# Two control images: edges, and a picture of blocks.
EDGES = ImageArray(np.repeat(np.atleast_3d(outline(SIDE, SIDE).pixels), 3, axis=2))
BLOCKS = ImageArray(np.asarray(tiny_families.picture(seed=9)))

_HINTS = ("controlnet_cond_embedding.", "pos_embed_input.", "controlnet_x_embedder.", "control_all_x_embedder.")


def alive(network: Any, seed: int, std: float = 0.05) -> Any:
    """A network with weights everywhere, also where training starts from zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        # Wider where the control image comes in, so that another image is another picture.
        wide = 4 if name.startswith(_HINTS) else 1
        torch.nn.init.normal_(weight, std=wide * std, generator=generator)
    return network.eval().requires_grad_(False)


def _sd15() -> tuple[Any, dict[str, Any]]:
    pipeline = sd15_pipeline(width=768)
    networks = {name: diffusers.ControlNetModel.from_unet(pipeline.unet) for name in ("canny", "depth")}
    return Sd15(pipeline, sd15_spec(("denoiser", "model.safetensors"))), networks


def _sdxl() -> tuple[Any, dict[str, Any]]:
    pipeline = sdxl_pipeline()
    networks = {name: diffusers.ControlNetModel.from_unet(pipeline.unet) for name in ("canny", "depth")}
    union = {name: value for name, value in networks["canny"].config.items() if not name.startswith("_")}
    channels = pipeline.unet.config.block_out_channels[0]
    union |= {"num_control_type": 8, "num_trans_channel": channels, "num_proj_channel": channels}
    networks["promax"] = diffusers.ControlNetUnionModel.from_config(union)
    return Sdxl(pipeline, sdxl_spec(("denoiser", "model.safetensors"))), networks


def _flux() -> tuple[Any, dict[str, Any]]:
    pipeline = tiny_families.build("flux-dev")
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    config |= {"num_layers": 1, "num_single_layers": 1}
    names = {"canny": {}, "depth": {"num_single_layers": 0}, "union": {"num_mode": 7}}
    networks = {name: diffusers.FluxControlNetModel.from_config({**config, **own}) for name, own in names.items()}
    return Flux(pipeline, tiny_row("flux", "dev", text_tokens=77, cpu_dtype="float32")), networks


def _z_image() -> tuple[Any, dict[str, Any]]:
    networks = {"union": tiny_families.z_image_control(), "other": tiny_families.z_image_control()}
    return ZImage(tiny_families.build("z-image"), tiny_row("z-image", "base", cpu_dtype="float32")), networks


def _sd3() -> tuple[Any, dict[str, Any]]:
    pipeline = tiny_families.build("sd3")
    given = pipeline.transformer.config.items()
    config = {name: value for name, value in given if not name.startswith("_")} | {"extra_conditioning_channels": 0}
    names = {"canny": {}, "depth": {"force_zeros_for_pooled_projection": False, "num_layers": 1}}
    networks = {name: diffusers.SD3ControlNetModel.from_config({**config, **own}) for name, own in names.items()}
    return StableDiffusion3(pipeline, tiny_row("sd3", cpu_dtype="float32")), networks


_MAKERS = {"sd3": _sd3, "sd15": _sd15, "sdxl": _sdxl, "flux": _flux, "z-image": _z_image}


@dataclass(frozen=True)
class Guided:
    """A family whose ControlNets lie in a folder, and the networks themselves."""

    family: Any
    networks: Mapping[str, Any]
    folder: ControlNetFolder

    def unit(self, name: str, kind: ControlKind, image: ImageArray = EDGES, **changes: Any) -> ControlImage:
        """A unit of a network by name."""
        facts = self.folder.find(name, kind, self.family.spec)
        return ControlImage(facts.name, facts.digest, kind, image, **changes)

    def stock(self, request: DiffusionRequest, name: str, **arguments: Any) -> Pixels:
        """What a stock ControlNet pipeline draws over the same components; `controlnet` is an argument."""
        kind = getattr(diffusers, name)
        known = signature(kind).parameters
        parts = {name: part for name, part in self.family.pipeline.components.items() if name in known}
        scheduler = scheduler_of(self.family.spec, request.scheduler, request.num_inference_steps)
        parts["scheduler"] = make_scheduler(scheduler, like=self.family.pipeline.scheduler)
        parts["controlnet"] = arguments.pop("controlnet")
        parts |= {"requires_safety_checker": False} if "requires_safety_checker" in known else {}
        pipeline = kind(**parts)
        pipeline.set_progress_bar_config(disable=True)
        given = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "generator": torch.Generator().manual_seed(request.seed),
            "max_sequence_length": self.family.spec.text_tokens,
            "strength": request.strength,
            **arguments,
        }
        taken = signature(pipeline.__call__).parameters
        return np.asarray(pipeline(**{name: value for name, value in given.items() if name in taken}).images[0])


@cache
def guided(family: str, folder: Path) -> Guided:
    """A family with its networks saved below `folder`."""
    built, networks = _MAKERS[family]()
    for seed, (name, network) in enumerate(networks.items()):
        alive(network, seed).save_pretrained(folder / "controlnet" / f"{name}-{family}")
    found = ControlNetFolder([folder], WeightDigests())
    built.offer_controlnets(found)
    return Guided(built, {f"{name}-{family}": network for name, network in networks.items()}, found)


def pil(image: ImageArray | None) -> Any:
    """A picture as the stock pipelines take it."""
    return None if image is None else Image.fromarray(image.pixels)
