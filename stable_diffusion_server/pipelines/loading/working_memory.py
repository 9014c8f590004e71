"""What a request needs in memory beside the weights: counted once for each architecture, then a linear function."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from stable_diffusion_server.pipelines.loading.counted_work import DENOISERS, counter_of, estimate_work
from stable_diffusion_server.pipelines.loading.packed_weights import is_packed
from stable_diffusion_server.pipelines.loading.placement import CONTROL

# Counts of the architectures that are known: `python -m scripts.count_memory` writes it.
TABLE = Path(__file__).parent / "configs" / "working_memory.json"
# Sides in pixels of the two images that are counted; all of these networks are linear in the pixels.
_SIDES = 512, 1024
_META = torch.device("meta")
# Of networks that do not say it.
_PAELLA_SCALE, _USUAL_SCALE, _USUAL_BLOCKS = 4, 8, (128, 256, 512, 512)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkingBytes:
    """Bytes at the worst moment of one part's work: `fixed` for each row of a batch, `per_pixel` for each pixel.

    `estimated` by the widths of its layers, where its class cannot be counted.
    """

    fixed: int
    per_pixel: float
    estimated: bool = False

    def of(self, pixels: int, rows: int = 1) -> int:
        """Bytes for `rows` rows that have `pixels` pixels together."""
        return int(rows * self.fixed + self.per_pixel * pixels)

    def pixels_within(self, size: int) -> int:
        """The most pixels of a row that need at most `size` bytes."""
        return max(0, int((size - self.fixed) / self.per_pixel))


@dataclass(frozen=True)
class Architecture:
    """The networks of a model on the meta device, and what decides the sizes of their tensors.

    `parts` are named as the pipeline's components, with `control` for a ControlNet. `dtypes` are those of the loaded
    parts, `text_tokens` the length of a prompt, `references` the most reference images of a request.
    """

    parts: Mapping[str, torch.nn.Module]
    dtypes: Mapping[str, torch.dtype]
    text_tokens: int
    references: int = 0

    @functools.cached_property
    def working_bytes(self) -> dict[str, WorkingBytes]:
        """What each part needs for its work, by its name: from the table, otherwise counted, which takes seconds.

        The denoiser's includes the ControlNet's. Its rows are images, or their halves with and without the prompt.
        """
        return {name: self._known_or_counted(name) for name, part in self.parts.items() if counter_of(name, part)}

    @functools.cached_property
    def bytes(self) -> dict[str, int]:
        """Bytes of the weights of each part; whole numbers, such as packed weights, keep their size."""
        return {name: self._size(name, part.parameters()) for name, part in self.parts.items()}

    @functools.cached_property
    def largest_layer(self) -> int:
        """Bytes of the weights of the largest module without those below it."""
        modules = ((name, module) for name, part in self.parts.items() for module in part.modules())
        return max((self._size(name, module.parameters(recurse=False)) for name, module in modules), default=0)

    @functools.cached_property
    def packed(self) -> frozenset[str]:
        """The parts with packed weights."""
        return frozenset(name for name, part in self.parts.items() if is_packed(part))

    def _size(self, name: str, weights: Iterable[torch.Tensor]) -> int:
        size = self.dtypes[name].itemsize
        return sum(weight.numel() * (size if weight.is_floating_point() else weight.itemsize) for weight in weights)

    def key(self, name: str) -> str:
        """Identifies what is counted of a part: names and shapes of weights, bytes of a number, sizes of inputs."""
        used = [name, CONTROL] if CONTROL in self.parts and name in DENOISERS else [name]
        shapes = [
            [type(part).__name__, sorted((weight, tuple(tensor.shape)) for weight, tensor in part.named_parameters())]
            for part in map(self.plain, used)
        ]
        sizes: tuple[object, ...] = (self.dtypes[name].itemsize,)
        sizes = (*sizes, "" if name == "vae" else (self.text_tokens, self.pixels_per_latent))
        sizes = (*sizes, self.references) if self.references and name in DENOISERS else sizes
        return f"{name} {hashlib.sha256(repr((shapes, sizes)).encode()).hexdigest()[:16]}"

    def count(self, name: str) -> WorkingBytes:
        """Count what a part needs: the linear function through two sizes. A part that cannot be run is estimated."""
        counter = counter_of(name, self.parts[name])
        if counter is None:
            raise ValueError(f"{type(self.parts[name]).__name__} is not counted")
        estimated = counter is estimate_work
        try:
            small, large = (counter(self, name, side) for side in _SIDES)
        except Exception as error:  # a class may need other inputs, or numbers, which the meta device has not
            _log.info("a part is estimated", part=name, kind=type(self.parts[name]).__name__, why=str(error)[:200])
            estimated = True
            small, large = (estimate_work(self, name, side) for side in _SIDES)
        per_pixel = (large - small) / (_SIDES[1] ** 2 - _SIDES[0] ** 2)
        return WorkingBytes(max(0, round(small - per_pixel * _SIDES[0] ** 2)), per_pixel, estimated)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of a side the VAE makes of one of the latents."""
        if "vqgan" in self.parts:
            return _PAELLA_SCALE
        return pixels_per_latent(self.parts["vae"]) if "vae" in self.parts else _USUAL_SCALE

    def plain(self, name: str) -> Any:
        """A part in its dtype; without packed weights, which are unpacked one by one while it computes."""
        part: Any = self.parts[name]
        if name in self.packed:
            with _META:
                kind: Any = type(part)
                part = kind.from_config(part.config) if hasattr(kind, "from_config") else kind(part.config)
        return torch.nn.Module.to(part, self.dtypes[name])

    def empty(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in the dtype of a part."""
        return torch.empty(*shape, device=_META, dtype=self.dtypes[name])

    def _known_or_counted(self, name: str) -> WorkingBytes:
        key = self.key(name)
        if key not in _known():
            _known()[key] = self.count(name)
        return _known()[key]


def pixels_per_latent(vae: Any) -> int:
    """How many pixels of a side a VAE makes of one of the latents."""
    for name in ("spatial_scale_factor", "spatial_compression_ratio"):
        if isinstance(known := getattr(vae, name, None), int):
            return known
    blocks: Sequence[int] = vae.config.get("block_out_channels") or _USUAL_BLOCKS
    return 1 << (len(blocks) - 1)


@functools.cache
def _known() -> dict[str, WorkingBytes]:
    """The stored counts, and those of this process: checkpoints of one architecture share them."""
    return {
        key: WorkingBytes(int(fixed), per_pixel) for key, (fixed, per_pixel) in json.loads(TABLE.read_text()).items()
    }
