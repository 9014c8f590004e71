"""Applies diffusers' offloading, and moves weights back when a forward pass is interrupted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import torch

from stable_diffusion_server.pipelines.loading.placement import Residency

_log = structlog.get_logger(__name__)

_CPU = torch.device("cpu")
# The name diffusers registers its hooks of group offloading under.
_GROUP = "group_offloading"


def apply_residency(pipeline: Any, controlnet: Any, device: torch.device, residency: Residency) -> None:
    """Apply a residency with diffusers' own hooks. LoRAs must be loaded before."""
    match residency:
        case Residency.RESIDENT:
            pipeline.to(device)
        case Residency.MODEL:
            pipeline.enable_model_cpu_offload(device=device)
        case Residency.GROUP:
            offload = {
                "onload_device": device,
                "offload_device": torch.device("cpu"),
                "offload_type": "leaf_level",
                "use_stream": device.type == "cuda",
            }
            pipeline.enable_group_offload(**offload)
            if controlnet is not None:
                controlnet.enable_group_offload(**offload)
        case Residency.SEQUENTIAL:
            pipeline.enable_sequential_cpu_offload(device=device)
    if controlnet is not None and residency is not Residency.GROUP:
        controlnet.to(device)  # not a component of the pipeline, so its hooks do not move it; it is small


class OffloadedModel:
    """A model whose weights move between memory and device: keeps only the components in use on the device.

    diffusers' hooks load a component when it is called and unload the one before it in the order of a whole pipeline
    call. A request that ends early (cancelled, failed) would leave its component on the device beside the next one.
    """

    def __init__(self, pipeline: Any, controlnet: Any, residency: Residency) -> None:
        self._pipeline = pipeline
        self._controlnet = controlnet
        self._residency = residency

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Run a block that uses these components. All others leave the device first; if the block fails, all do."""
        if self._residency is Residency.MODEL:
            self._offload_components(set(names))
        try:
            yield
        except BaseException:
            try:
                self.release()
            except RuntimeError as error:  # a lost device, which the block's own exception reports
                _log.warning("weights could not leave the device", exc_info=error)
            raise

    def release(self) -> None:
        """Move all offloaded weights off the device."""
        match self._residency:
            case Residency.RESIDENT:
                return
            case Residency.MODEL:
                self._offload_components(set())
            case Residency.GROUP:
                self._end_groups()
            case Residency.SEQUENTIAL:
                self._end_layers()

    def _offload_components(self, kept: set[str]) -> None:
        for name, part in _networks(self._pipeline):
            if name not in kept and device_of(part) != _CPU:
                part.to(_CPU)

    def _end_groups(self) -> None:
        """Offload the groups that an interrupted forward pass left on the device."""
        parts = [part for _, part in _networks(self._pipeline)]
        for part in [*parts, *([] if self._controlnet is None else [self._controlnet])]:
            for module in part.modules():
                registry = getattr(module, "_diffusers_hook", None)
                hook = None if registry is None else registry.get_hook(_GROUP)
                if hook is not None and any(
                    tensor.device != hook.group.offload_device for tensor in _tensors_of(hook.group)
                ):
                    hook.group.offload_()

    def _end_layers(self) -> None:
        """Move layers off the device likewise.

        accelerate's hooks hold the weights and put them back on the meta device.
        """
        for _, part in _networks(self._pipeline):
            for module in part.modules():
                whole = getattr(module, "_hf_hook", None)
                for hook in getattr(whole, "hooks", [whole]):
                    if getattr(hook, "offload", False) is True and any(
                        not parameter.is_meta for parameter in module.parameters(recurse=hook.place_submodules)
                    ):
                        hook.post_forward(module, None)


def copy_out_of_files(modules: Iterable[torch.nn.Module]) -> None:
    """Copy memory-mapped weights into memory.

    Weights that were neither converted nor moved stay mapped: overwriting the file would change them, and truncating it
    would kill the process (SIGBUS).
    """
    copies: dict[tuple[int, tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            if type(tensor.data) is not torch.Tensor or tensor.device != _CPU:
                continue  # quantized and on-device tensors are copies already
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if key not in copies:
                copies[key] = tensor.data.clone()
            tensor.data = copies[key]


def device_of(part: torch.nn.Module) -> torch.device:
    """The device of a component, by its first parameter."""
    first = next(part.parameters(), None)
    return _CPU if first is None else first.device


def _networks(pipeline: Any) -> list[tuple[str, torch.nn.Module]]:
    return [(name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]


def _tensors_of(group: Any) -> Iterator[torch.Tensor]:
    for module in group.modules:
        yield from module.parameters()
        yield from module.buffers()
    yield from group.parameters
    yield from group.buffers
