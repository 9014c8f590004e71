"""Assembles a modular pipeline of diffusers from a folder, of the blocks that its class has in diffusers.

Not by the library's own loader: it reads parts from the places that the index names, the hub among them, and takes
blocks, and code where it is trusted, from the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.complete_networks import class_of
from stable_diffusion_server.pipelines.loading.weight_files import index_of, parts_of, read_json

_PLAIN = (bool, int, float, str)
_LONGEST = 200


def blocks_pipeline(kind: Any, folder: Path, networks: Mapping[str, Any]) -> Any:
    """The pipeline of a class over `networks` and the tokenizers and schedulers of the folder.

    Raises `ModelLoadError` when a part that every request needs is not in the folder.
    """
    blocks = getattr(diffusers, kind.default_blocks_name)()
    pipeline = kind(blocks=blocks)
    others = {
        part.name: class_of(part).from_pretrained(folder / part.name, local_files_only=True, **_without_code(part.kind))
        for part in parts_of(folder)
        if part.name not in networks
    }
    index = read_json(index_of(folder))
    settings = {name: index[name] for name in pipeline._config_specs if _is_plain(index.get(name))}
    pipeline.update_components(**networks, **others, **settings)
    lacking = [name for name in _needed(pipeline) if getattr(pipeline, name, None) is None]
    if lacking:
        raise ModelLoadError(
            f"{folder.name} lacks the part {lacking[0]}: all parts of a modular pipeline must be in its folder."
        )
    return pipeline


def _needed(pipeline: Any) -> list[str]:
    """The parts of a picture from text."""
    blocks = pipeline.blocks
    workflows = blocks.available_workflows if getattr(blocks, "_workflow_map", None) else []
    used = blocks.get_workflow("text2image") if "text2image" in workflows else blocks
    return [spec.name for spec in used.expected_components]


def _without_code(kind: str) -> dict[str, bool]:
    """The libraries' Auto classes would ask at the terminal whether to run the code that a configuration names."""
    return {"trust_remote_code": False} if kind.startswith("Auto") else {}


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) and (not isinstance(value, str) or len(value) <= _LONGEST)
