"""The ControlNets that a model's requests name: loaded at first use, kept while there is room for them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
import torch

from stable_diffusion_server.errors import InvalidInput, ModelLoadError, OutOfMemory
from stable_diffusion_server.pipelines.conditioning.control_groups import ControlNetInput
from stable_diffusion_server.pipelines.conditioning.control_kinds import union_index
from stable_diffusion_server.pipelines.conditioning.controlnet import check_grid
from stable_diffusion_server.pipelines.conditioning.controlnet_folder import ControlNetFolder
from stable_diffusion_server.pipelines.loading.compatibility import check_controlnet
from stable_diffusion_server.pipelines.loading.components import control_network
from stable_diffusion_server.pipelines.loading.footprint import bytes_of, dtype_of
from stable_diffusion_server.pipelines.loading.model_files import translate_load_errors
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import ControlImage, ControlKind, ImageArray

# The diffusers classes that guide each kind of denoiser.
_OF_UNET = ("ControlNetModel", "ControlNetUnionModel")
_OF_FLUX, _OF_Z_IMAGE, _OF_SD3 = ("FluxControlNetModel",), ("ZImageControlNetModel",), ("SD3ControlNetModel",)
# Networks that stay loaded beside the ones in use, and the share of the device's memory that they may take.
_MOST, _SHARE = 4, 0.125
_ALWAYS = 2 * 2**30

_log = structlog.get_logger(__name__)

# Makes what a network takes of a control image; the mask is what an inpainting network repaints.
MakeHint = Callable[[Any, ImageArray, ImageArray | None], torch.Tensor]


class ControlNetCache:
    """ControlNets by name and content. Used on the thread that draws.

    `adapt` fits a network to the model, as Z-Image's, which compute with its layers.
    """

    def __init__(
        self,
        folder: ControlNetFolder | None,
        spec: ModelSpec,
        pipeline: Any,
        device: torch.device,
        adapt: Callable[[Any], None] = lambda network: None,
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._pipeline = pipeline
        self._device = device
        self._adapt = adapt
        self._loaded: dict[tuple[str, str], Any] = {}

    @property
    def networks(self) -> Sequence[Any]:
        """Those that are loaded, the one used last at the end."""
        return [*self._loaded.values()]

    def use(self, unit: ControlImage) -> Any:
        """The network of a unit, on the device.

        Raises `InvalidInput` for one that does not fit the model or changed since the request was accepted, and
        `OutOfMemory`.
        """
        key = (unit.network, unit.revision)
        network = self._loaded.pop(key, None)
        if network is None:
            network = self._load(unit)
        self._loaded[key] = network
        self._make_room(keep=key)
        return network

    def _load(self, unit: ControlImage) -> Any:
        if self._folder is None:
            sentence = f"{self._spec.name} follows no ControlNets by name while its weights wait outside the device."
            raise InvalidInput(sentence, field="controls")
        facts = self._folder.find(unit.network, unit.kind, self._spec)
        if facts.digest != unit.revision:
            raise InvalidInput(f"{facts.name} was changed since the request was accepted; ask again.", field="controls")
        try:
            with translate_load_errors(facts.name, facts.place):
                network = self._read(facts.name, facts.place)
                check_controlnet(facts.name, self._pipeline, network)
                if hasattr(self._pipeline, "unet"):
                    check_grid(network, self._pipeline.vae_scale_factor)
                self._adapt(network)
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field="controls") from error
        _log.info("a ControlNet was loaded", model=self._spec.name, name=facts.name, bytes=bytes_of(network))
        return network

    def _read(self, name: str, place: Path) -> Any:
        classes: Sequence[str] = _OF_UNET
        if not hasattr(self._pipeline, "unet"):
            config = self._pipeline.transformer.config
            classes = _OF_Z_IMAGE if "dim" in config else _OF_SD3 if "caption_projection_dim" in config else _OF_FLUX
        network = control_network(name, place, classes, dtype_of(self._spec, self._device))
        try:
            return network.to(self._device)
        except torch.OutOfMemoryError as error:
            if not self._loaded:
                raise OutOfMemory(f"The device has no memory left for {name}.") from error
        self._forget(tuple(self._loaded))
        try:
            return network.to(self._device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"The device has no memory left for {name}.") from error

    def _make_room(self, keep: tuple[str, str]) -> None:
        """Unload those used longest ago, which running requests may still hold, while there are too many."""
        room = _ALWAYS
        if self._device.type == "cuda":
            room = max(room, int(_SHARE * torch.cuda.get_device_properties(self._device).total_memory))
        for key in [other for other in self._loaded if other != keep]:
            if len(self._loaded) <= _MOST and bytes_of(*self._loaded.values()) <= room:
                return
            self._forget((key,))

    def _forget(self, keys: Iterable[tuple[str, str]]) -> None:
        for key in keys:
            self._loaded.pop(key, None)
        gc.collect()
        with suppress(RuntimeError, AssertionError):
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def named_controls(
    units: Sequence[ControlImage], cache: ControlNetCache, make_hint: MakeHint, device: torch.device, scale: int
) -> list[ControlNetInput]:
    """What control units give the networks of `cache`. `scale` is how many pixels one of the latents has.

    Raises `InvalidInput` for a unit that its network does not follow.
    """
    inputs = []
    for number, unit in enumerate(units):
        network = cache.use(unit)
        inpaints = unit.kind is ControlKind.INPAINT
        hint = make_hint(network, unit.image, unit.mask if inpaints else None)
        mask = None
        if unit.mask is not None and not inpaints:
            levels = torch.from_numpy(unit.mask.pixels.copy()).to(device).float()[None, None] / 255
            mask = torch.nn.functional.avg_pool2d(levels, scale)
        inputs.append(
            ControlNetInput(
                network=network,
                hint=hint.to(network.dtype),
                scale=unit.weight,
                kind=_index(network, unit, f"controls[{number}].kind"),
                start=unit.start,
                end=unit.end,
                mask=mask,
                mode=unit.mode,
            )
        )
    return inputs


def _index(network: Any, unit: ControlImage, field: str) -> int | None:
    """The number that a union is told; `None` for other networks."""
    flux = network.config.get("num_mode")
    kinds = flux or network.config.get("num_control_type")
    if not kinds:
        return None
    index = union_index(unit.kind, flux=bool(flux))
    if index is None or index >= kinds:
        raise InvalidInput(f"{unit.network} does not follow {unit.kind.value}.", field=field)
    return index
