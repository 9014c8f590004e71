"""Where weights are between drawings, by diffusers' own hooks, and how they get back there whatever happens."""

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
    """Put the weights where they live between drawings, by diffusers' own hooks. Adapters come before."""
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
        controlnet.to(device)  # no part of the pipeline, so its hooks pass it by; it is small


class OffloadedModel:
    """The parts of one model whose weights travel: which of them may be on the device, and that they leave it.

    diffusers' hooks bring a part when it is called, and send away the one that stands before it in the order of a
    whole drawing. A drawing that ends elsewhere (its caller has hung up, it failed) would leave its part where it is,
    and the next one's would come beside it.
    """

    def __init__(self, pipeline: Any, controlnet: Any, residency: Residency) -> None:
        self._pipeline = pipeline
        self._controlnet = controlnet
        self._residency = residency

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Run a block that uses these parts: all others leave the device before, and all of them when it fails."""
        if self._residency is Residency.MODEL:
            self._send_away(set(names))
        try:
            yield
        except BaseException:
            try:
                self.release()
            except RuntimeError as error:  # of a device that is lost; what the block raised says so
                _log.warning("weights could not leave the device", exc_info=error)
            raise

    def release(self) -> None:
        """Let all weights that travel leave the device."""
        match self._residency:
            case Residency.RESIDENT:
                return
            case Residency.MODEL:
                self._send_away(set())
            case Residency.GROUP:
                self._end_groups()
            case Residency.SEQUENTIAL:
                self._end_layers()

    def _send_away(self, kept: set[str]) -> None:
        for name, part in _networks(self._pipeline):
            if name not in kept and device_of(part) != _CPU:
                part.to(_CPU)

    def _end_groups(self) -> None:
        """What a forward pass that was left in the middle would have done at its end, group by group."""
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
        """The same, layer by layer: accelerate's hooks hold the weights, and put them back on the meta device."""
        for _, part in _networks(self._pipeline):
            for module in part.modules():
                whole = getattr(module, "_hf_hook", None)
                for hook in getattr(whole, "hooks", [whole]):
                    if getattr(hook, "offload", False) is True and any(
                        not parameter.is_meta for parameter in module.parameters(recurse=hook.place_submodules)
                    ):
                        hook.post_forward(module, None)


def copy_out_of_files(modules: Iterable[torch.nn.Module]) -> None:
    """Give weights memory of their own.

    What the libraries load stays a map of its file while nothing converts or moves it: a file written over in place
    would change the weights, and one cut short would end the process (SIGBUS).
    """
    copies: dict[tuple[int, tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            if type(tensor.data) is not torch.Tensor or tensor.device != _CPU:
                continue  # quantized ones were made here, and those of a device are copies
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if key not in copies:
                copies[key] = tensor.data.clone()
            tensor.data = copies[key]


def device_of(part: torch.nn.Module) -> torch.device:
    """Where a part's weights are, by its first one."""
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
