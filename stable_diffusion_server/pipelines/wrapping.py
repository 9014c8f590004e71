"""Seamless pictures: convolutions that wrap around opposite borders, for the passes of one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stable_diffusion_server.pipelines.adapters.image_attention import attended_images
from stable_diffusion_server.pipelines.adapters.lora_hooks import current_plan
from stable_diffusion_server.types import Tiling

_pass = threading.local()


class _WrappingConvolutions(TorchFunctionMode):  # type: ignore[misc]  # torch is read without its types
    """Pads convolutions from the opposite border instead of with zeros, as `padding_mode="circular"` does.

    torch keeps its modes by thread, and no module is changed: requests on other threads are padded with zeros.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tiling = current_tiling()
        if tiling is not None and func is functional.conv2d:
            return _wrapped_convolution(tiling, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def wrapping(tiling: Tiling | None) -> Iterator[None]:
    """Run the convolutions of a block, on this thread, so that these borders meet; `None`: padded as usual."""
    before = current_tiling()
    _pass.tiling = tiling
    try:
        with _WrappingConvolutions() if tiling is not None and before is None else nullcontext():
            yield
    finally:
        _pass.tiling = before


def current_tiling() -> Tiling | None:
    """The borders that meet in the pass that this thread runs; `None` in usual passes."""
    return getattr(_pass, "tiling", None)


def is_altered() -> bool:
    """Whether adapters, image prompts or wrapping change the pass that this thread runs.

    What was recorded, traced or compiled knows nothing of them: its owner runs the module itself then.
    """
    return current_plan() is not None or attended_images() is not None or current_tiling() is not None


def wrapped(tensor: torch.Tensor, tiling: Tiling, height: int, width: int) -> torch.Tensor:
    """The tensor (rows × channels × h × w) with `height` and `width` more on each side, on the axes that wrap.

    Both must not be more than h and w.
    """
    down, across = height * tiling.wraps_y, width * tiling.wraps_x
    made = functional.pad(tensor, (across, across, down, down), mode="circular")
    if tensor.is_contiguous(memory_format=torch.channels_last):
        made = made.contiguous(memory_format=torch.channels_last)
    return made


def _wrapped_convolution(
    tiling: Tiling,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    height, width = (padding, padding) if isinstance(padding, int) else padding
    if height or width:
        input = wrapped(input, tiling, height, width)
    left = (0 if tiling.wraps_y else height, 0 if tiling.wraps_x else width)
    made: torch.Tensor = functional.conv2d(input, weight, bias, stride, left, dilation, groups)
    return made
