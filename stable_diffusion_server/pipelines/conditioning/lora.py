"""Loads, activates and removes the LoRAs of one pipeline.

A LoRA has one scaling for the whole model, so rows with and without it cannot share a forward pass: requests are
grouped by their LoRAs (`DiffusionRequest.shape`), and `switch` changes over when the group changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog
from cachetools import LRUCache
from safetensors.torch import load

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.conditioning import lora_weights
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraFile, digest_of, read_header, read_lora
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder, find, names_in

__all__ = [
    "ActiveLoras",
    "LoadedLora",
    "LoraManager",
    "Loras",
    "add_to_controlnet",
    "digest_of",
    "digests_and_weights",
    "find",
    "names_in",
    "read_header",
]

Loras = Sequence[tuple[str, float]]

# LoRAs that stay loaded besides those in use; the least recently used is unloaded first.
MAX_IDLE = 8
_MAX_REFUSED = 1024

_log = structlog.get_logger(__name__)


class LoadedLora:
    """A loaded LoRA, by its digest; it stays loaded while a reference to this exists."""

    __slots__ = ("__weakref__", "digest")

    def __init__(self, digest: str) -> None:
        self.digest = digest


ActiveLoras = tuple[tuple[LoadedLora, float], ...]


def digests_and_weights(used: ActiveLoras) -> tuple[tuple[str, float], ...]:
    """The digest and the weight of each LoRA."""
    return tuple((held.digest, weight) for held, weight in used)


def add_to_controlnet(controlnet: Any, path: Path) -> None:
    """Add a LoRA to a ControlNet permanently. Raises `ModelLoadError` when it does not fit."""
    try:
        file = read_lora(path)
        first = next(iter(file.header.tensors), "").partition(".")[0]
        prefix = first if first in ("transformer", "controlnet", "unet") else None
        controlnet.load_lora_adapter(load(file.data), prefix=prefix, adapter_name="own")
    except ModelLoadError as error:
        raise ModelLoadError(f"CONTROLNET_LORA: {error.detail}") from error
    except Exception as error:  # the file is input, and the library raises many types
        raise ModelLoadError(f"CONTROLNET_LORA: {path.name} does not fit the ControlNet.") from error
    if "own" not in getattr(controlnet, "peft_config", {}):
        raise ModelLoadError(f"CONTROLNET_LORA: {path.name} holds nothing for the ControlNet.")


class LoraManager:
    """The LoRAs of one pipeline, loaded on first use and identified by content. For the engine's thread only.

    `always` are (file, weight) of the model's built-in LoRAs, loaded at once. `settle` applies the residency again when
    a failed load has moved weights.
    """

    def __init__(
        self,
        pipeline: Any,
        folder: LoraFolder | Path | None = None,
        always: Sequence[tuple[Path, float]] = (),
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self._pipeline = pipeline
        self._denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
        self._folder = folder if isinstance(folder, LoraFolder) else LoraFolder(folder)
        self._settle = settle
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._held: WeakValueDictionary[str, LoadedLora] = WeakValueDictionary()
        # Reasons of refusals by digest.
        self._refused: LRUCache[str, str] = LRUCache(_MAX_REFUSED)
        self._always: list[tuple[str, float]] = []
        self._active: list[tuple[str, float]] | None = None
        for number, (file, weight) in enumerate(always):
            key = f"always{number}"
            self._load(key, read_lora(file))
            self._always.append((key, weight))
        self.switch(())

    def use(self, loras: Loras, digests: Sequence[str] = ()) -> ActiveLoras:
        """Activate exactly these LoRAs, by name and weight, loading them if necessary.

        `digests`, one each, say which content is meant under a name; without them it is the present one. Raises
        `InvalidInput` with the reason for an unknown name, a file that does not fit, and one that was replaced.
        """
        wanted: list[tuple[LoadedLora, float]] = []
        for number, (name, weight) in enumerate(loras):
            digest = digests[number] if digests else self._folder.digest(name)
            wanted.append((self._hold(name, digest), weight))
        used = tuple(wanted)
        self.switch(used)
        self._unload_idle()
        return used

    def switch(self, used: ActiveLoras) -> None:
        """Activate exactly what `use` returned."""
        weights: dict[str, float] = {}
        for held, weight in used:
            key = _key(held.digest)
            weights[key] = weights.get(key, 0.0) + weight  # the library takes one weight per LoRA
        on = [*weights.items(), *self._always]
        if on == self._active:
            return
        self._active = None  # unknown until the call succeeds
        if on:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters([key for key, _ in on], [weight for _, weight in on])
        elif self._loaded:
            self._pipeline.disable_lora()
        self._active = on

    def _hold(self, name: str, digest: str) -> LoadedLora:
        """The loaded LoRA of that digest."""
        if digest not in self._loaded:
            if digest in self._refused:
                raise InvalidInput(f"{name}{self._refused[digest]}", field="lora")
            file = self._folder.read(name)
            if file.digest != digest:
                raise InvalidInput(f"{file.name} was replaced while the order waited; ask again.", field="lora")
            self._load(_key(digest), file)
            self._loaded[digest] = None
        self._loaded.move_to_end(digest)
        held = self._held.get(digest) or LoadedLora(digest)
        self._held[digest] = held
        return held

    def _load(self, key: str, file: LoraFile) -> None:
        try:
            fitting = lora_weights.fit_lora(file, self._pipeline)
        except InvalidInput as error:
            self._refuse(file, error.detail)
            raise
        self._active = None  # loading a LoRA activates it
        hooked = _hooked(self._pipeline)
        try:
            lora_weights.attach(fitting, self._pipeline, key, file.name)
        except BaseException:
            if _hooked(self._pipeline) != hooked:
                self._settle()
            raise

    def _refuse(self, file: LoraFile, why: str) -> None:
        """Remember why this content does not fit, so that it is not loaded again."""
        # The same content may have another file name.
        self._refused[file.digest] = why.removeprefix(Path(file.name).stem)
        _log.warning("an adapter is refused", file=file.name, why=why)
        self._folder.refuse(file, self._denoiser, why)

    def _unload_idle(self) -> None:
        """Unload the least recently used LoRAs, except those a running request uses."""
        idle = [digest for digest in self._loaded if digest not in self._held]
        for digest in idle[: max(0, len(self._loaded) - MAX_IDLE)]:
            lora_weights.detach(self._pipeline, _key(digest))
            del self._loaded[digest]


def _hooked(pipeline: Any) -> list[bool]:
    """Which components have offloading hooks."""
    return [hasattr(part, "_hf_hook") for part in pipeline.components.values()]


def _key(digest: str) -> str:
    """The LoRA's adapter name inside the pipeline."""
    return f"lora{digest}"
