"""Networks that diffusers keeps beside a pipeline class instead of among its models, and pipelines made of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.loading.weight_files import WeightPart, index_of, parts_of, read_json

# Class → its module below `diffusers.pipelines`. Nothing that an index names is imported but these.
_MODULES = {
    "PaellaVQModel": "deprecated.wuerstchen.modeling_paella_vq_model",
    "WuerstchenPrior": "deprecated.wuerstchen.modeling_wuerstchen_prior",
    "WuerstchenDiffNeXt": "deprecated.wuerstchen.modeling_wuerstchen_diffnext",
    "StableUnCLIPImageNormalizer": "stable_diffusion.stable_unclip_image_normalizer",
}
_PLAIN = (bool, int, float, str)


def pipeline_part(part: WeightPart) -> Any:
    """The class of a network beside a pipeline class; `None` for any other.

    Versions of diffusers name other libraries for it, which are not read.
    """
    module = _MODULES.get(part.kind)
    if module is None:
        return None
    return getattr(importlib.import_module(f"diffusers.pipelines.{module}"), part.kind)


def has_pipeline_parts(folder: Path) -> bool:
    """Whether a folder lists such a network. The library's own loader looks for it at the place of an older version."""
    return any(part.kind in _MODULES for part in parts_of(folder))


def assembled_here(kind: Any, folder: Path, parts: Mapping[str, Any], unused: Mapping[str, Any]) -> Any:
    """The pipeline of a class over these parts and the plain values of its index; optional parts may lack."""
    index = read_json(index_of(folder))
    taken = inspect.signature(kind).parameters
    plain = {name: index[name] for name in taken if isinstance(index.get(name), _PLAIN)}
    none = {name: None for name in taken if name in kind._optional_components}
    return kind(**{**none, **plain, **unused, **parts})
