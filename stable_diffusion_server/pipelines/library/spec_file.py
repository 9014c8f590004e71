"""Reads the spec beside a model, `NAME.toml`: what its owner says about it. Every key is optional."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stable_diffusion_server.pipelines.library.file_headers import is_folder, is_there, opened_file, shown
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.library.shards import index_ending

SUFFIX = ".toml"
_MAX_BYTES, _MAX_TEXT, _MAX_LIST = 65_536, 4000, 64
_LIST = "a list of names"


@dataclass(frozen=True, slots=True)
class OwnerSpec:
    """What a spec says. `values` holds the keys that are valid, `faults` what is wrong, as sentences.

    Keys and types: `KEYS`. `loras` are (name, weight) pairs, `native_size` is (width, height) in pixels.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The title, or empty."""
        return str(self.values.get("title", ""))

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names of the model."""
        return tuple(self.values.get("aliases", ()))


class _Key(NamedTuple):
    """How a value is read, and what it must be. `read` raises `ValueError` or `TypeError` for others."""

    read: Callable[[Any], Any]
    meaning: str


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(value)
    return value


def _name(value: Any) -> str:
    if not _text(value).strip() or len(value) > 300 or not value.isprintable():
        raise ValueError(value)
    return str(value.strip())


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MAX_LIST:
        raise TypeError(value)
    return tuple(_name(item) for item in value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(value)
        return value

    return read


def _real(least: float, most: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(value)
        return float(value)

    return read


def _one_of(*choices: str) -> _Key:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return _Key(read, f"one of {', '.join(choices)}")


def _size(value: Any) -> tuple[int, int]:
    side = _whole(64, 8192)
    if isinstance(value, list) and len(value) == 2:
        return side(value[0]), side(value[1])
    return side(value), side(value)


def _digest(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value.lower()) - set("0123456789abcdef"):
        raise ValueError(value)
    return value.lower()


def _loras(value: Any) -> tuple[tuple[str, float], ...]:
    """`["name", "name:0.8"]`, as requests write them."""
    pairs = []
    for item in _names(value):
        name, colon, weight = item.rpartition(":")
        pairs.append((_name(name), _real(-8, 8)(float(weight))) if colon else (item, 1.0))
    return tuple(pairs)


KEYS: Mapping[str, _Key] = {
    "title": _Key(_name, "a text of up to 300 characters"),
    "aliases": _Key(_names, _LIST),
    "variant": _Key(_name, "a name, such as kontext, krea or klein-base, where the file does not say"),
    "steps": _Key(_whole(1, 1000), "a whole number from 1 to 1000"),
    "guidance": _Key(_real(0, 100), "a number from 0 to 100"),
    "guidance_rescale": _Key(_real(0, 1), "a number from 0 to 1"),
    "scheduler": _Key(_name, "a scheduler's name, such as euler_a"),
    "schedule": _one_of("automatic", "normal", "karras", "exponential", "beta", "sgm_uniform", "simple"),
    "negative_prompt": _Key(_text, f"a text of up to {_MAX_TEXT} characters"),
    "clip_skip": _Key(_whole(0, 12), "a whole number from 0 to 12"),
    "prediction_type": _one_of("epsilon", "v_prediction"),
    "zero_snr": _Key(_flag, "true or false"),
    "native_size": _Key(_size, "a side or [width, height] in pixels, from 64 to 8192"),
    "vae": _Key(_name, "the name of a VAE in MODELS_DIR"),
    "text_encoders": _Key(_names, _LIST),
    "controlnets": _Key(_names, _LIST),
    "loras": _Key(_loras, 'a list of names with weights from -8 to 8, such as ["detail:0.6"]'),
    "refiner": _Key(_name, "the name of an SDXL refiner in MODELS_DIR"),
    "image_prompt": _Key(_name, "the name of a folder of FLUX.1 Redux in MODELS_DIR"),
    "dtype": _one_of("float32", "float16", "bfloat16"),
    "quantization": _one_of("auto", "none", "int8", "float8", "torchao-int8", "torchao-float8"),
    "placement": _one_of("auto", "none", "model", "group", "sequential"),
    "preload": _Key(_flag, "true or false"),
    "pin": _Key(_flag, "true or false"),
    "licence": _Key(_text, f"a text of up to {_MAX_TEXT} characters"),
    "source": _Key(_name, "a text of up to 300 characters: the repository or address that the model is from"),
    "revision": _Key(_name, "a text of up to 300 characters: the commit of the repository"),
    "sha256": _Key(_digest, "64 hexadecimal digits"),
}


def spec_path(model: Path) -> Path | None:
    """The spec beside a model: `file.safetensors.toml`, or `file.toml`, or `folder.toml`; `None` without one."""
    stem = model.name.removesuffix(index_ending(model.name)) if index_ending(model.name) else model.stem
    names = [model.name + SUFFIX] if is_folder(model) else [model.name + SUFFIX, stem + SUFFIX]
    beside = (model.with_name(name) for name in names)
    return next((path for path in beside if is_there(path) and not is_folder(path)), None)


def read_spec(file: Path) -> OwnerSpec:
    """Read a spec. Never raises for its content: what is wrong is in `faults`, and the other keys count."""
    try:
        with opened_file(file) as (source, size):
            if size > _MAX_BYTES:
                return OwnerSpec(faults=(f"{file.name} has {size:,} bytes, and {_MAX_BYTES:,} are read.",))
            given = tomllib.loads(source.read(_MAX_BYTES + 1).decode())
    except UnreadableModel as error:
        return OwnerSpec() if "is empty" in str(error) else OwnerSpec(faults=(f"{file.name} {error}.",))
    except (ValueError, RecursionError) as error:
        return OwnerSpec(faults=(f"{file.name} is not TOML: {shown(str(error), 200)}.",))
    return _check(file.name, given)


def _check(file: str, given: Mapping[str, Any]) -> OwnerSpec:
    values: dict[str, Any] = {}
    faults = []
    for name, value in list(given.items())[:_MAX_LIST]:
        key = KEYS.get(name)
        if key is None:
            near = difflib.get_close_matches(name[:60], KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KEYS)}."
            faults.append(f"{file}: {shown(name, 60)} is not a key; {hint}")
            continue
        try:
            values[name] = key.read(value)
        except (TypeError, ValueError):
            faults.append(f"{file}: {name} must be {key.meaning}.")
    if len(given) > _MAX_LIST:
        faults.append(f"{file} has {len(given):,} keys; there are {len(KEYS)}.")
    return OwnerSpec(values, tuple(faults))
