"""Reads what PEFT's trainers note in a LoRA file about its scale."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from peft import LoraConfig

from stable_diffusion_server.pipelines.adapters.lora_deltas import LoraMismatch
from stable_diffusion_server.pipelines.adapters.lora_targets import LayerTable
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraFile
from stable_diffusion_server.pipelines.conditioning.lora_tensors import shown

_NOTES = "lora_adapter_metadata"
_PLAIN = re.compile(r"[\w.]+")
_TAKEN = frozenset("r lora_alpha rank_pattern alpha_pattern target_modules use_rslora use_dora lora_bias".split())
_OF_TRAINING = frozenset(
    "lora_dropout inference_mode task_type peft_type auto_mapping base_model_name_or_path revision peft_version "
    "megatron_core exclude_modules runtime_config qalora_group_size".split()
)


def scale_of(notes: Mapping[str, Any], component: str, path: str) -> dict[str, Any] | None:
    """What the trainer's notes say of the scale of a layer; `None` without notes."""
    own = {name.partition(".")[2]: value for name, value in notes.items() if name.partition(".")[0] == component}
    if not own:
        return None
    by_layer = {
        key: next((number for name, number in own.get(pattern, {}).items() if f".{path}".endswith(f".{name}")), None)
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    }
    return {**own, **{key: number for key, number in by_layer.items() if number is not None}}


def notes_of(file: LoraFile, table: LayerTable) -> dict[str, Any]:
    """The LoRA configuration that diffusers' trainers store, without options that would change base weights."""
    written = file.header.notes.get(_NOTES)
    if written is None:
        return {}
    try:
        notes = json.loads(written)
        split = [(name.partition("."), value) for name, value in notes.items()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraMismatch(f"has notes that are none ({_NOTES})") from error
    usual = asdict(LoraConfig())
    kept = {}
    for (part, _, name), value in split:
        if part in table.parts and name in _TAKEN and _is_plain(value):
            kept[f"{part}.{name}"] = value
        elif part in table.parts and not _has_no_effect(name, value, usual):
            raise LoraMismatch(f"was made with {shown(f'{name}={value}')}, which is not taken here")
    return kept


def _has_no_effect(name: str, value: Any, usual: Mapping[str, Any]) -> bool:
    if name == "init_lora_weights":
        return value in (True, False, "gaussian")
    return name in _OF_TRAINING or not value or value == usual.get(name)


def _is_plain(value: Any) -> bool:
    """Whether a value holds only numbers and plain names."""
    if isinstance(value, bool | int | float):
        return 0 <= value <= 1e6
    if isinstance(value, dict):
        return all(_PLAIN.fullmatch(name) and isinstance(number, int | float) for name, number in value.items())
    return isinstance(value, list) and all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in value)
