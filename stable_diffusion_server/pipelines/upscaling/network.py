"""Reads upscaler networks from safetensors files: compact ones itself, all others with spandrel."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.library.file_headers import TensorHeader, read_safetensors, shown
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.upscaling.compact import CompactNetwork
from stable_diffusion_server.pipelines.upscaling.spandrel_import import import_spandrel
from stable_diffusion_server.pipelines.upscaling.tiles import OVERLAP

# The largest upscalers of today have 0.3 GB.
LARGEST_BYTES = 2**31
# Bytes of a network whose tensors all had the size of the file's largest. A file of many small tensors and one large
# could otherwise ask for a network that is thousands of times larger than itself.
_MOST_MEMORY = 2**33
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_SCALES = (1, 2, 3, 4, 8)
_COMPACT = re.compile(r"body\.(\d{1,3})\.(weight|bias)")
# Wrappers that trainers leave around the names.
_WRAPPERS = ("params_ema.", "params.", "module.", "netG.")
_PROBE_SIDE = 32


@dataclass(frozen=True, slots=True)
class UpscalerNetwork:
    """A network in memory.

    Attributes:
        scale: Factor of both sides.
        multiple: Offsets of its tiles must be multiples of this, in pixels of the input.
        overlap: Pixels of the input around a tile that its result depends on visibly.
        run: Enlarges an image, 1 × 3 × height × width with values 0…1; its result may exceed them slightly.
        bytes: Bytes of its weights.
    """

    scale: int
    multiple: int
    overlap: int
    run: Callable[[Tensor], Tensor]
    bytes: int


def load_network(file: Path, device: torch.device) -> UpscalerNetwork:
    """Read a network in fp32 onto a device.

    Raises `ModelLoadError` with what is wrong with the file. Reads nothing before the header is checked.
    """
    name = shown(file.name)
    try:
        _check_header(read_safetensors(file), file)
        tensors = {_without_wrapper(key): tensor.float() for key, tensor in load_file(file).items()}
        _check_finite(tensors)
        network = _compact(tensors, device) or _by_spandrel(tensors, device)
        _try_out(network, device)
    except (UnreadableModel, SafetensorError) as error:
        reason = str(error) if isinstance(error, UnreadableModel) else "cannot be read as safetensors"
        raise ModelLoadError(f"{name} {reason}.") from error
    return network


def _check_header(header: TensorHeader, file: Path) -> None:
    """Raise `UnreadableModel` unless these can be the tensors of an upscaler, of bounded size."""
    size = file.stat().st_size
    if size > LARGEST_BYTES:
        raise UnreadableModel(f"has {size:,} bytes, and an upscaler may have {LARGEST_BYTES:,}")
    if other := sorted(set(header.amounts) - {*_FLOATS, "I64", "I32", "BOOL"}):
        raise UnreadableModel(f"has weights of the type {', '.join(other)}; fp32, fp16 and bf16 are read")
    largest = max((math.prod(shape) for shape in header.shapes.values()), default=0)
    if 4 * largest * len(header.shapes) > _MOST_MEMORY:
        raise UnreadableModel("describes a network that would be too large")


def _check_finite(tensors: dict[str, Tensor]) -> None:
    broken = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise UnreadableModel(f"has numbers that are not finite at {shown(broken)}")


def _without_wrapper(key: str) -> str:
    return next((key.removeprefix(wrapper) for wrapper in _WRAPPERS if key.startswith(wrapper)), key)


def _compact(tensors: dict[str, Tensor], device: torch.device) -> UpscalerNetwork | None:
    """The network of a compact file; `None` for another. Raises `UnreadableModel` for wrong shapes."""
    numbers = [int(match[1]) for match in map(_COMPACT.fullmatch, tensors) if match]
    if len(numbers) != len(tensors) or "body.1.weight" not in tensors or tensors["body.1.weight"].ndim != 1:
        return None
    first, last = tensors.get("body.0.weight"), tensors.get(f"body.{max(numbers)}.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4 or max(numbers) % 2 or not last.shape[0]:
        raise UnreadableModel("has the names of a compact network and other shapes")
    scale = math.isqrt(last.shape[0] // 3)
    with torch.device(device):
        network = CompactNetwork(first.shape[0], (max(numbers) - 2) // 2, max(1, scale))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UnreadableModel("has the names of a compact network and other shapes") from error
    network.eval().requires_grad_(False)
    return UpscalerNetwork(scale, 1, network.reach, network, _bytes_of(tensors))


def _by_spandrel(tensors: dict[str, Tensor], device: torch.device) -> UpscalerNetwork:
    """The network of a file that spandrel knows. Raises `UnreadableModel`, and `ModelLoadError` without spandrel."""
    spandrel = import_spandrel()
    size = _bytes_of(tensors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = spandrel.MAIN_REGISTRY.load(tensors)
    except spandrel.UnsupportedModelError as error:
        raise UnreadableModel("is no network that spandrel knows") from error
    except Exception as error:  # spandrel guesses sizes from shapes; wrong ones fail in any way
        raise UnreadableModel("has tensors of wrong shapes, or lacks some of its network's") from error
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.purpose == "FaceSR":
        raise UnreadableModel(f"is a network for another task ({shown(str(found.architecture.id), 30)})")
    if (found.input_channels, found.output_channels) != (3, 3):
        raise UnreadableModel(f"takes images of {found.input_channels} channels, and not of 3")
    if found.tiling is spandrel.ModelTiling.DISCOURAGED:
        raise UnreadableModel("is a network whose result depends on the whole image, so that it cannot run in tiles")
    found.to(device).eval()
    found.model.requires_grad_(False)
    needs = found.size_requirements
    return UpscalerNetwork(found.scale, max(1, needs.multiple_of), OVERLAP, found, size)


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _try_out(network: UpscalerNetwork, device: torch.device) -> None:
    """Raise `UnreadableModel` unless the network enlarges a small image by its factor, to finite numbers."""
    if network.scale not in _SCALES:
        raise UnreadableModel(f"enlarges by {network.scale}, and 1, 2, 3, 4 and 8 are known")
    side = _PROBE_SIDE * network.multiple // math.gcd(_PROBE_SIDE, network.multiple)
    probe = torch.linspace(0, 1, 3 * side * side, device=device).reshape(1, 3, side, side)
    try:
        with torch.inference_mode():
            drawn = network.run(probe)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UnreadableModel("has tensors that do not fit one another") from error
    if drawn.shape != (1, 3, side * network.scale, side * network.scale) or not torch.isfinite(drawn).all():
        raise UnreadableModel("does not enlarge an image by its factor to finite numbers")
