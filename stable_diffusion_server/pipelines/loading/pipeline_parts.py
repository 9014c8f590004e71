"""Networks that diffusers keeps beside a pipeline class instead of among its models, and pipelines made of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from stable_diffusion_server.pipelines.loading.weight_files import WeightPart, index_of, parts_of, read_json

# Nothing else that an index names beside the libraries' models is used.
_KINDS = (PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior, StableUnCLIPImageNormalizer)
_PLAIN = (bool, int, float, str)


def pipeline_part(part: WeightPart) -> Any:
    """The class of a network beside a pipeline class; `None` for any other.

    Versions of diffusers name other libraries for it, which are not read.
    """
    return next((kind for kind in _KINDS if kind.__name__ == part.kind), None)


def has_pipeline_parts(folder: Path) -> bool:
    """Whether a folder lists such a network. The library's own loader looks for it at the place of an older version."""
    return any(pipeline_part(part) is not None for part in parts_of(folder))


def assembled_here(kind: Any, folder: Path, parts: Mapping[str, Any], unused: Mapping[str, Any]) -> Any:
    """The pipeline of a class over these parts and the plain values of its index; optional parts may lack."""
    index = read_json(index_of(folder))
    taken = inspect.signature(kind).parameters
    plain = {name: index[name] for name in taken if isinstance(index.get(name), _PLAIN)}
    none = {name: None for name in taken if name in kind._optional_components}
    return kind(**{**none, **plain, **unused, **parts})
