"""Makes the networks of diffusers folders: with all of their weights, or without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.pipeline_parts import pipeline_part
from stable_diffusion_server.pipelines.loading.weight_files import INDEX, WeightFileError, WeightPart


def class_of(part: WeightPart) -> Any:
    """The class of a component. Raises `WeightFileError` unless it belongs to a library in use."""
    library = {"diffusers": diffusers, "transformers": transformers}.get(part.library)
    part_class = getattr(library, part.kind, None) or pipeline_part(part)
    if part_class is None:
        raise WeightFileError(
            f"{INDEX} lists {part.kind[:60]} of {part.library[:60]} as {part.name[:60]}, which is not known here"
        )
    if part.has_weights and not (isinstance(part_class, type) and issubclass(part_class, torch.nn.Module)):
        raise WeightFileError(f"{INDEX} lists {part.kind[:60]} as {part.name[:60]}, which is no network")
    return part_class


def load_complete(part_class: Any, folder: Path, name: str, dtype: torch.dtype, variant: str | None) -> Any:
    """A network from its folder, with all of its weights; the libraries would initialise missing ones at random.

    Raises `ModelLoadError` that names the folder by `name`.
    """
    given = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "variant": variant}
    if not issubclass(part_class, diffusers.ModelMixin):
        given["ignore_mismatched_sizes"] = True  # otherwise transformers prints the names and does not return them
    network, found = part_class.from_pretrained(folder, **given, output_loading_info=True)
    if lacking := sorted({*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])}):
        raise ModelLoadError(f"{name} lacks {len(lacking)} of its weights ({', '.join(lacking[:2])}).")
    empty = [parameter for parameter, tensor in network.named_parameters() if tensor.is_meta]
    if empty:
        raise ModelLoadError(f"{name} lacks {len(empty)} of its weights ({', '.join(empty[:2])}).")
    return network


def empty_network(part_class: Any, folder: Path) -> Any:
    """A network by the configuration in its folder, without weights: within `torch.device("meta")`."""
    if issubclass(part_class, diffusers.ModelMixin):
        return part_class.from_config(part_class.load_config(folder))
    return part_class(part_class.config_class.from_pretrained(folder))
