"""Turns a LoRA file into changes of a pipeline's layers, or says why it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.adapters.lora_changes import change_of
from stable_diffusion_server.pipelines.adapters.lora_deltas import LayerChange, LoraMismatch
from stable_diffusion_server.pipelines.adapters.lora_names import parse
from stable_diffusion_server.pipelines.adapters.lora_rows import Layer
from stable_diffusion_server.pipelines.adapters.lora_targets import LayerTable
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraFile, denoisers_of
from stable_diffusion_server.pipelines.conditioning.lora_notes import notes_of, scale_of
from stable_diffusion_server.pipelines.conditioning.lora_tensors import Tensors, shown, tensors_of


@dataclass(frozen=True, slots=True)
class FittedLora:
    """A LoRA that fits a pipeline: its `changes` by layer, and sentences on what of the file is not used."""

    changes: Mapping[Layer, LayerChange]
    remarks: tuple[str, ...]


def fit_lora(file: LoraFile, table: LayerTable) -> FittedLora:
    """What a LoRA changes in a pipeline. Raises `InvalidInput` with the reason unless its layers are there and fit."""
    try:
        _check_family(file, table)
        layers, unused = _layers_of(tensors_of(file))
        changes = _changes(layers, unused, notes_of(file, table), table)
    except LoraMismatch as error:
        raise InvalidInput(f"{file.name} {error}.", field="lora") from error
    return FittedLora(changes, _remarks(file.name, unused))


def _check_family(file: LoraFile, table: LayerTable) -> None:
    if table.denoiser not in denoisers_of(file.header):
        raise LoraMismatch("is for models of another family")


def _changes(
    layers: Mapping[Layer, Tensors], unused: list[str], notes: Mapping[str, Any], table: LayerTable
) -> dict[Layer, LayerChange]:
    """The changes of all layers; names of those that cannot be used are added to `unused`."""
    changes: dict[Layer, LayerChange] = {}
    missing, there = [], 0
    for (meant, layer), tensors in layers.items():
        component = table.component(meant)
        targets = table.find(component, layer)
        if component not in table.parts or (not targets and not _is_factored(tensors)):
            unused.append(layer)
        elif not targets:
            missing.append(layer)
        elif not all(isinstance(table.layer(target), torch.nn.Linear | torch.nn.Conv2d) for target in targets):
            if _is_factored(tensors):
                raise LoraMismatch(f"changes {shown(layer)}, which takes no LoRA")
            unused.append(layer)
        else:
            there += 1
            whole = sum(last - first for target in targets for first, last in target.rows)
            for target in targets:
                scale = scale_of(notes, target.component, target.path)
                change = change_of(tensors, table.layer(target), layer, target.rows, whole, scale)
                changes[target.component, target.path] = change
    if missing:
        how = "fits this model in part" if there else "is for another model"
        of = f"{len(missing)} of its {len(missing) + there} layers are not there ({shown(missing[0])})"
        raise LoraMismatch(f"{how}: {of}")
    if not changes:
        raise LoraMismatch(f"holds nothing for this model; its tensors are named like {shown(unused[0])}")
    return changes


def _is_factored(tensors: Tensors) -> bool:
    """Whether these are factors, not the difference itself, which some trainers keep of norms and positions too."""
    return bool(tensors.keys() - {"alpha", "scalar", "diff", "diff_b"})


def _remarks(name: str, unused: list[str]) -> tuple[str, ...]:
    if not unused:
        return ()
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return (f"{name}: {shown(unused[0])}{more} in it cannot be used here.",)


def _layers_of(tensors: Tensors) -> tuple[dict[Layer, Tensors], list[str]]:
    """The tensors by layer and kind, and the names that are of no layer."""
    layers: dict[Layer, Tensors] = {}
    unused = []
    for name, tensor in tensors.items():
        parsed = parse(name)
        if parsed is None:
            unused.append(name)
            continue
        kinds = layers.setdefault((parsed.component, parsed.layer), {})
        if parsed.kind in kinds:
            raise LoraMismatch(f"holds {shown(name)} in two ways of writing")
        kinds[parsed.kind] = tensor
    return layers, unused
