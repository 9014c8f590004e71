"""Checks that a LoRA's tensors are finite and fit a pipeline; attaches LoRAs and removes them completely."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import structlog
import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
    delete_adapter_layers,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraFile, denoisers_of

Tensors = dict[str, torch.Tensor]

_NOTES = "lora_adapter_metadata"
_MOST_TENSORS, _LONGEST_NAME, _MOST_SIDES = 8192, 300, 8
# The libraries' conversions loop over block numbers and take quadratic time, so large numbers are refused.
_LARGE_NUMBER = re.compile(r"\d{4}")
_ENDING = re.compile(
    r"(lora_(down|up|A|B)\.(weight|bias)|\b(down|up)\.weight|\balpha|lora_magnitude_vector(\.weight)?)$"
)
_LAYER = re.compile(r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?P<what>\.weight|\.bias)?")
# PEFT reads names as regular expressions, so only plain ones pass; options that change base weights do not.
_PLAIN = re.compile(r"[\w.]+")
_TAKEN = frozenset("r lora_alpha rank_pattern alpha_pattern target_modules use_rslora use_dora lora_bias".split())
_OF_TRAINING = frozenset(
    "lora_dropout inference_mode task_type peft_type auto_mapping base_model_name_or_path revision peft_version "
    "megatron_core exclude_modules runtime_config qalora_group_size".split()
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FittedLora:
    """A LoRA that fits a pipeline: `tensors` in diffusers' format, `layers` the layer names by component.

    `alphas` and `notes` hold the scaling of tensors that are not scaled already.
    """

    tensors: Tensors
    layers: Mapping[str, frozenset[str]]
    alphas: Mapping[str, float] | None
    notes: Mapping[str, Any] | None


class LoraMismatch(ValueError):
    """Why a LoRA cannot be used, as the end of a sentence."""


def fit_lora(file: LoraFile, pipeline: Any) -> FittedLora:
    """Convert a LoRA for a pipeline. Raises `InvalidInput` with the reason unless all of it fits."""
    try:
        _check_family(file, pipeline)
        tensors = _tensors_of(file)
        state, alphas = _converted(tensors, pipeline)
        parts = _by_part(state, pipeline)
        _check_none_is_lost(tensors, parts)
        layers = {part: _checked_layers(found, getattr(pipeline, part)) for part, found in parts.items()}
        return FittedLora(state, layers, alphas, _notes_of(file, parts))
    except LoraMismatch as error:
        raise InvalidInput(f"{file.name} {error}.", field="lora") from error


def attach(fitting: FittedLora, pipeline: Any, key: str, name: str) -> None:
    """Load a LoRA under `key` and activate it. If that fails, removes it completely and raises `InvalidInput`."""
    try:
        for part in fitting.layers:
            _load(fitting, pipeline, part, key)
        _check_loaded(fitting, pipeline, key)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        detach(pipeline, key)
        raise
    except Exception as error:  # the file is input, and the libraries raise many types
        detach(pipeline, key)
        _log.warning("an adapter cannot be loaded", file=name, exc_info=error)
        raise InvalidInput(f"{name} cannot be loaded as an adapter of this model.", field="lora") from error


def detach(pipeline: Any, key: str) -> None:
    """Remove a LoRA completely, even if it was attached only in part."""
    for part in _parts_of(pipeline):
        module = getattr(pipeline, part)
        delete_adapter_layers(module, key)
        configurations = getattr(module, "peft_config", None)
        if configurations is not None:
            configurations.pop(key, None)
            if not configurations:  # the library does the same
                del module.peft_config
                module._hf_peft_config_loaded = None


def _check_family(file: LoraFile, pipeline: Any) -> None:
    if not any(hasattr(pipeline, denoiser) for denoiser in denoisers_of(file.header)):
        raise LoraMismatch("is for models of another family")


def _parts_of(pipeline: Any) -> tuple[str, ...]:
    """The pipeline components that a LoRA may change."""
    return tuple(part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None) is not None)


def _tensors_of(file: LoraFile) -> Tensors:
    """The file's tensors, in their own memory. Raises `LoraMismatch` for tensors that do not belong in a LoRA."""
    names = file.header.tensors
    if len(names) > _MOST_TENSORS:
        raise LoraMismatch(f"holds {len(names)} tensors, and {_MOST_TENSORS} are taken")
    if odd := [name for name in names if len(name) > _LONGEST_NAME or _LARGE_NUMBER.search(name)]:
        raise LoraMismatch(f"holds {_shown(odd[0])}, which is for no layer of a model")
    if odd := [name for name in names if not _ENDING.search(name)]:
        raise LoraMismatch(f"holds {_shown(odd[0])}, which is no part of a LoRA and would be left out")
    try:
        tensors = safetensors.torch.load(file.data)
    except Exception as error:  # safetensors raises its own errors and those of torch and Python
        raise LoraMismatch("cannot be read as safetensors") from error
    for name, tensor in tensors.items():
        if tensor.ndim > _MOST_SIDES:  # PyTorch does not support more than 64
            raise LoraMismatch(f"holds a tensor of {tensor.ndim} dimensions ({_shown(name)})")
        _check_numbers(name, tensor)
    return {name: _computable(tensor) for name, tensor in tensors.items()}


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    if name.endswith("alpha"):
        if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor.reshape(()).item().real)) or alpha < 0:
            raise LoraMismatch(f"holds a scale that is none ({_shown(name)})")
    elif not tensor.is_floating_point() or not tensor.numel():
        raise LoraMismatch(
            f"holds a tensor of {str(tensor.dtype).removeprefix('torch.')}, {list(tensor.shape)} ({_shown(name)})"
        )
    elif not torch.isfinite(_computable(tensor)).all():
        raise LoraMismatch(f"holds numbers that are not finite ({_shown(name)}); it may have been trained too fast")


def _shown(name: str) -> str:
    """A name from a file, escaped and cut to 100 characters: files may hold any text."""
    return ascii(name[:100])


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """Convert one-byte floats to bf16: PyTorch cannot compute in them."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _converted(tensors: Tensors, pipeline: Any) -> tuple[Tensors, Mapping[str, float] | None]:
    """Convert the tensors with diffusers' own functions; returns them by diffusers' names, and the alphas."""
    given = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {"return_alphas": True}
    try:
        state, alphas = pipeline.lora_state_dict(dict(tensors), **given)[:2]
    except Exception as error:  # as in `attach`
        _log.info("an adapter cannot be converted", exc_info=error)
        raise LoraMismatch("is not an adapter for this model, or in a form that is not known") from error
    return state, alphas or None


def _by_part(state: Tensors, pipeline: Any) -> dict[str, Tensors]:
    """Group the tensors by component, named as in PEFT, with the conversions that diffusers uses for loading."""
    parts: dict[str, Tensors] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part not in _parts_of(pipeline):
            raise LoraMismatch(f"holds tensors for no part of this model ({_shown(name)})")
        parts.setdefault(part, {})[rest] = tensor
    try:
        return {part: _as_peft(found, getattr(pipeline, part), part) for part, found in parts.items()}
    except ValueError as error:
        raise LoraMismatch("is in a form that is not known") from error


def _as_peft(found: Tensors, module: Any, part: str) -> Tensors:
    if not part.startswith("text_encoder"):
        return found if "lora_A" in next(iter(found)) else convert_unet_state_dict_to_peft(found)
    named: Tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(found))
    if hasattr(module, "text_model"):
        return named
    return {name.removeprefix("text_model."): tensor for name, tensor in named.items()}


def _check_none_is_lost(tensors: Tensors, parts: Mapping[str, Tensors]) -> None:
    """Raise `LoraMismatch` when a conversion dropped tensors, which most of them do silently.

    A conversion may split one tensor into several copies or views, so distinct storages are counted.
    """
    given = sum("lora_A." in name or name.endswith("down.weight") for name in tensors)
    firsts = [tensor for found in parts.values() for name, tensor in found.items() if ".lora_A." in name]
    left = len({tensor.untyped_storage().data_ptr() for tensor in firsts})
    if not left:
        raise LoraMismatch("holds nothing for this model")
    if left < given:
        raise LoraMismatch(f"fits this model in part: {given - left} of its {given} layers are for none of the model's")


def _checked_layers(found: Tensors, part: Any) -> frozenset[str]:
    """Names of the layers that the tensors of a component change. Raises `LoraMismatch` unless every shape fits."""
    layers: dict[str, Tensors] = {}
    for name, tensor in found.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise LoraMismatch(f"holds {_shown(name)}, which is no part of a LoRA")
        layers.setdefault(match["layer"], {})[match["kind"] + (match["what"] or "")] = tensor
    bases = {name: _layer_of(part, name) for name in layers}
    if missing := [name for name, base in bases.items() if base is None]:
        how = "is for another model" if len(missing) == len(layers) else "fits this model in part"
        raise LoraMismatch(f"{how}: {len(missing)} of its {len(layers)} layers are not there ({_shown(missing[0])})")
    for name, base in bases.items():
        _check_shapes(name, layers[name], base)
    return frozenset(layers)


def _layer_of(part: Any, name: str) -> Any:
    """The layer of that name without its adapters; `None` if there is none."""
    if any(step == "base_layer" or step.startswith("lora_") for step in name.split(".")):
        return None
    try:
        layer = part.get_submodule(name)
    except AttributeError:
        return None
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _check_shapes(name: str, found: Tensors, base: Any) -> None:
    for kind in ("lora_A.weight", "lora_B.weight"):
        if kind not in found:
            raise LoraMismatch(f"lacks {_shown(f'{name}.{kind}')}")
    inner: tuple[int, ...]
    ones: tuple[int, ...] = ()
    if isinstance(base, torch.nn.Linear):
        inner, outer = (base.in_features,), base.out_features
    elif isinstance(base, torch.nn.Conv2d):
        inner, outer, ones = (base.in_channels // base.groups, *base.kernel_size), base.out_channels, (1, 1)
    else:
        raise LoraMismatch(f"changes {_shown(name)}, which takes no LoRA")
    rank = found["lora_A.weight"].shape[:1]
    wanted = {
        "lora_A.weight": (*rank, *inner),
        "lora_B.weight": (outer, *rank, *ones),
        "lora_B.bias": (outer,),
    }
    for kind, tensor in found.items():
        shape = tuple(tensor.shape)
        fits = tensor.numel() == outer if kind.startswith("lora_magnitude") else shape == wanted.get(kind)
        if not fits:
            raise LoraMismatch(
                f"is for another model: {_shown(f'{name}.{kind}')} is {list(shape)}, and the layer {outer} × {inner[0]}"
            )


def _notes_of(file: LoraFile, parts: Mapping[str, Tensors]) -> dict[str, Any] | None:
    """The LoRA configuration that diffusers' trainers store, without options that may change base weights."""
    written = file.header.notes.get(_NOTES)
    if written is None:
        return None
    try:
        notes = json.loads(written)
        split = [(name.partition("."), value) for name, value in notes.items()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraMismatch(f"has notes that are none ({_NOTES})") from error
    usual = asdict(LoraConfig())
    kept = {}
    for (part, _, name), value in split:
        if part in parts and name in _TAKEN and _is_plain(value):
            kept[f"{part}.{name}"] = value
        elif part in parts and not _has_no_effect(name, value, usual):
            raise LoraMismatch(f"was made with {_shown(f'{name}={value}')}, which is not taken here")
    return kept or None


def _has_no_effect(name: str, value: Any, usual: Mapping[str, Any]) -> bool:
    if name == "init_lora_weights":
        return value in (True, False, "gaussian")
    return name in _OF_TRAINING or not value or value == usual.get(name)


def _is_plain(value: Any) -> bool:
    """Whether a value holds only numbers and plain names; PEFT would treat other text as a regular expression."""
    if isinstance(value, bool | int | float):
        return 0 <= value <= 1e6
    if isinstance(value, dict):
        return all(_PLAIN.fullmatch(name) and isinstance(number, int | float) for name, number in value.items())
    return isinstance(value, list) and all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in value)


def _load(fitting: FittedLora, pipeline: Any, part: str, key: str) -> None:
    notes = {name: value for name, value in (fitting.notes or {}).items() if name.startswith(f"{part}.")}
    given = {
        "network_alphas": None if notes else fitting.alphas,
        "adapter_name": key,
        "metadata": notes or None,
        "_pipeline": pipeline,
        "low_cpu_mem_usage": True,
    }
    module = getattr(pipeline, part)
    if part.startswith("text_encoder"):
        pipeline.load_lora_into_text_encoder(fitting.tensors, text_encoder=module, prefix=part, **given)
    else:
        getattr(pipeline, f"load_lora_into_{part}")(fitting.tensors, **{part: module}, **given)


def _check_loaded(fitting: FittedLora, pipeline: Any, key: str) -> None:
    """Raise `LoraMismatch` unless exactly the expected layers have the adapter."""
    for part, wanted in fitting.layers.items():
        layers = getattr(pipeline, part).named_modules()
        found = {name for name, layer in layers if isinstance(layer, LoraLayer) and key in layer.lora_A}
        if found != wanted:
            raise LoraMismatch(f"came onto {len(found)} layers of {part}, and is for {len(wanted)}")
