"""Chooses a model's dtype on the CPU by the speed of its own products, and remembers the choice."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from torch.nn import functional

from stable_diffusion_server.pipelines.acceleration.onednn import linear
from stable_diffusion_server.pipelines.catalog import with_cpu_dtype
from stable_diffusion_server.pipelines.loading.host_memory import total_host_memory
from stable_diffusion_server.pipelines.loading.placement import USABLE
from stable_diffusion_server.pipelines.model_spec import ModelSpec

_log = structlog.get_logger(__name__)

FLOAT32, BFLOAT16 = "float32", "bfloat16"
# bf16 has to be so much faster, since it is less exact, and so that chance decides nothing. Without units for it a
# convolution takes ten times as long as in fp32, so linear layers are measured first, and alone where bf16 is slow.
WORTHWHILE = 1.3
# Weights in the largest layer below which a model is small enough for its usual dtype: the time would be all overhead.
_SMALL = 1_000_000
_ROWS, _SIDE, _RUNS, _KEPT = 64, 8, 3, 256
_KINDS = ("linear", "convolution")

# Layer kind, in features or channels, out features or channels, kernel side.
Layer = tuple[str, int, int, int]


class CpuDtypes:
    """Chooses float32 or bfloat16 for models on the CPU whose spec says `measured_dtype`.

    `wanted` is one of both, `auto` for the faster one, or empty for that of the catalogue. What was measured is kept in
    `file`, by layers, processor and PyTorch, so that a restart cannot choose otherwise: the dtype is part of a model's
    revision. Not thread-safe.
    """

    def __init__(
        self,
        file: Path | None = None,
        wanted: str = "",
        measure: Callable[[Layer, str], float] | None = None,
        total_memory: int | None = None,
    ) -> None:
        self._file = file
        self._wanted = wanted
        self._measure = measure or seconds_of
        self._memory = total_host_memory() if total_memory is None else total_memory
        self._known = _read(file)

    def choose(self, spec: ModelSpec, parts: Mapping[str, torch.nn.Module]) -> ModelSpec:
        """The spec with the dtype for the CPU; `parts` are its components, which need no weights."""
        if not spec.measured_dtype or not self._wanted:
            return spec
        if self._wanted != "auto":
            return with_cpu_dtype(spec, self._wanted)
        layers = _largest_layers(parts[spec.denoiser_part])
        if not layers or max(inside * outside for _, inside, outside, _ in layers) < _SMALL:
            return spec
        if _bytes_in_float32(parts.values()) > USABLE * self._memory:
            return with_cpu_dtype(spec, BFLOAT16)
        return with_cpu_dtype(spec, self._faster(layers))

    def _faster(self, layers: list[Layer]) -> str:
        key = f"{layers} {torch.backends.cpu.get_cpu_capability()} {torch.__version__}"
        if key not in self._known:
            self._known[key] = BFLOAT16 if all(map(self._gains, layers)) else FLOAT32
            self._keep()
        return self._known[key]

    def _gains(self, layer: Layer) -> bool:
        exact, rough = self._measure(layer, FLOAT32), self._measure(layer, BFLOAT16)
        _log.info("float32 and bfloat16 were measured on this CPU", layer=layer, seconds=(exact, rough))
        return WORTHWHILE * rough < exact

    def _keep(self) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(dict([*self._known.items()][-_KEPT:]), indent=0))
            os.replace(new, self._file)
        except OSError as error:
            _log.warning("the dtype cannot be kept; the next start measures again", why=str(error))


def seconds_of(layer: Layer, dtype: str) -> float:
    """The least seconds of a few products of a layer in a dtype, as the models compute them on the CPU."""
    kind, inside, outside, side = layer
    given: tuple[Any, ...]
    exact, data = dtype == FLOAT32, {"dtype": getattr(torch, dtype)}
    compute: Any
    if kind == "linear":
        inputs, weight = torch.ones(_ROWS, inside, **data), torch.ones(outside, inside, **data)
        compute = linear if exact and torch.backends.mkldnn.is_available() else functional.linear
        given = (inputs, weight, None)
    else:
        inputs, weight = torch.ones(1, inside, _SIDE, _SIDE, **data), torch.ones(outside, inside, side, side, **data)
        compute, given = functional.conv2d, (inputs, weight, None, 1, side // 2)
    times = []
    with torch.inference_mode():
        for _ in range(1 + _RUNS):  # the first one includes warm-up
            began = time.perf_counter()
            compute(*given)
            times.append(time.perf_counter() - began)
    return min(times[1:])


def _bytes_in_float32(networks: Iterable[torch.nn.Module]) -> int:
    """Bytes of weights that are loaded as float32; packed ones keep their size."""
    weights = [weight for network in networks for weight in network.parameters()]
    size = torch.float32.itemsize
    return sum(weight.numel() * (size if weight.is_floating_point() else weight.itemsize) for weight in weights)


def _largest_layers(network: torch.nn.Module) -> list[Layer]:
    """The linear layer and the convolution whose kinds hold most of the weights."""
    weights: Counter[Layer] = Counter()
    for part in network.modules():
        if isinstance(part, torch.nn.Linear):
            weights["linear", part.in_features, part.out_features, 1] += part.in_features * part.out_features
        elif isinstance(part, torch.nn.Conv2d) and part.groups == 1 and part.kernel_size[0] == part.kernel_size[1]:
            side = part.kernel_size[0]
            weights["convolution", part.in_channels, part.out_channels, side] += (
                part.in_channels * part.out_channels * side**2
            )
    found = (next((layer for layer, _ in weights.most_common() if layer[0] == kind), None) for kind in _KINDS)
    return [layer for layer in found if layer is not None]


def _read(file: Path | None) -> dict[str, str]:
    if file is None or not file.exists():
        return {}
    try:
        read = json.loads(file.read_text())
        return {str(key): str(dtype) for key, dtype in read.items() if dtype in (FLOAT32, BFLOAT16)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        _log.warning("the remembered dtypes cannot be read; they are measured again", why=str(error))
        return {}
