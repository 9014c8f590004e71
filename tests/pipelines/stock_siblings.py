"""Tiny pipelines of classes that share their components with another class, and of those that need few others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers as d
import tiny_families
import tiny_stock

# Class → the tiny pipeline whose components it takes.
_OF = {
    "AmusedImg2ImgPipeline": "amused",
    "AmusedInpaintPipeline": "amused",
    "ChromaImg2ImgPipeline": "chroma",
    "Flux2KleinInpaintPipeline": "flux2-klein",
    "Flux2KleinKVPipeline": "flux2-klein",
    "FluxFillPipeline": "flux-fill",
    "FluxImg2ImgPipeline": "flux-dev",
    "FluxInpaintPipeline": "flux-dev",
    "FluxKontextInpaintPipeline": "flux-kontext",
    "HunyuanDiTPAGPipeline": "hunyuan-dit",
    "IFImg2ImgPipeline": "deepfloyd-if",
    "IFInpaintingPipeline": "deepfloyd-if",
    "Kandinsky3Img2ImgPipeline": "kandinsky3",
    "KandinskyV22CombinedPipeline": "kandinsky22",
    "KandinskyV22Img2ImgCombinedPipeline": "kandinsky22",
    "LatentConsistencyModelImg2ImgPipeline": "lcm",
    "LatentConsistencyModelPipeline": "lcm",
    "PixArtSigmaPAGPipeline": "pixart-sigma",
    "QwenImageInpaintPipeline": "qwen-image",
    "SanaPAGPipeline": "sana",
    "SemanticStableDiffusionPipeline": "sd2-v",
    "StableDiffusion3PAGImg2ImgPipeline": "sd3",
    "StableDiffusion3PAGPipeline": "sd3",
    "StableDiffusionImg2ImgPipeline": "sd2-v",
    "StableDiffusionInpaintPipelineLegacy": "sd2-v",
    "StableDiffusionModelEditingPipeline": "sd2-v",
    "StableDiffusionPAGInpaintPipeline": "sd-pag",
    "StableDiffusionPanoramaPipeline": "sd2-v",
    "StableDiffusionPipelineSafe": "sd2-v",
    "StableDiffusionSAGPipeline": "sd2-v",
    "ZImageInpaintPipeline": "z-image",
}


def sibling(class_name: str, of: str, more: Mapping[str, Any] | None = None) -> Any:
    """The class over the components of a tiny pipeline, with `more` parts."""
    source = (tiny_stock.build if of in tiny_stock.FAMILIES else tiny_families.build)(of)
    kind = getattr(d, class_name)
    known = {**source.config, **source.components, **tiny_stock.NO_CHECKER, **(more or {})}
    made = kind(**{name: known[name] for name in inspect.signature(kind).parameters if name in known})
    made.set_progress_bar_config(disable=True)
    return made


SIBLINGS: dict[str, Callable[[], Any]] = {name: partial(sibling, name, of) for name, of in _OF.items()}
