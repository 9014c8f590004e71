"""Finds the layers of a pipeline that trainers' names stand for, also where one of theirs is several of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from stable_diffusion_server.pipelines.adapters.lora_deltas import weight_shape
from stable_diffusion_server.pipelines.adapters.lora_layer_names import aliases_of
from stable_diffusion_server.pipelines.adapters.lora_names import CLIP_G, DENOISER, T5

# In the original models this layer gives the shift before the scale, in ours the scale before the shift.
_SWAPPED = "AdaLayerNormContinuous"
# Beginnings of the class names of encoders that files name by what they are.
_CLASSES = {CLIP_G: "CLIP", T5: "T5"}
COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Target(NamedTuple):
    """A layer of ours, and the rows (from, to) of the trainer's weight that it has, in order; none for all."""

    component: str
    path: str
    rows: tuple[tuple[int, int], ...] = ()


class LayerTable:
    """The layers of a pipeline by the names that trainers give them, with underscores for dots."""

    def __init__(self, pipeline: Any) -> None:
        self.denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
        there = {name: getattr(pipeline, name, None) for name in (self.denoiser, *COMPONENTS)}
        self.parts = {name: part for name, part in there.items() if isinstance(part, torch.nn.Module)}
        self._named = {name: _table(name, part) for name, part in self.parts.items()}
        denoiser = self.parts.get(self.denoiser)
        # A pipeline with another kind of denoiser, such as Stable Cascade's, takes no LoRAs.
        for theirs, ours in aliases_of(denoiser) if denoiser is not None else ():
            self._add(theirs, ours)

    def component(self, meant: str) -> str:
        """The component of this pipeline that a file means; it may be one that this pipeline lacks."""
        if meant in ("", DENOISER):
            return self.denoiser
        if meant not in _CLASSES:
            return meant
        there = (name for name, part in self.parts.items() if type(part).__name__.startswith(_CLASSES[meant]))
        return next((name for name in there if name != "text_encoder"), meant)

    def find(self, component: str, layer: str) -> tuple[Target, ...]:
        """The layers that one of the trainer's stands for; empty if there is none."""
        return self._named.get(component, {}).get(layer, ())

    def layer(self, target: Target) -> Any:
        """The module of a target."""
        return self.parts[target.component].get_submodule(target.path)

    def _add(self, theirs: str, ours: tuple[str, ...]) -> None:
        denoiser, ends, targets = self.parts[self.denoiser], 0, []
        for path in ours:
            layer = _layer(denoiser, path)
            if layer is None:
                return
            rows: tuple[tuple[int, int], ...] = ((ends, ends + weight_shape(layer)[0]),)
            ends, half = rows[0][1], ends + weight_shape(layer)[0] // 2
            if type(denoiser.get_submodule(path.rpartition(".")[0])).__name__ == _SWAPPED:
                rows = ((half, ends), (0, half))
            elif len(ours) == 1:
                rows = ()
            targets.append(Target(self.denoiser, path, rows))
        self._named[self.denoiser][_flat(theirs)] = tuple(targets)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _layer(module: torch.nn.Module, path: str) -> Any:
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, torch.nn.Linear | torch.nn.Conv2d) else None


def _table(component: str, part: torch.nn.Module) -> dict[str, tuple[Target, ...]]:
    named: dict[str, tuple[Target, ...]] = {}
    for path, _ in part.named_modules():
        if path:
            named[_flat(path)] = (Target(component, path),)
            if component in COMPONENTS:  # transformers had `text_model` before all names, and left it out later
                other = path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}"
                named.setdefault(_flat(other), (Target(component, path),))
    return named
