"""Loads, activates and removes the LoRAs of one pipeline.

An adapter has one scaling for the whole model, so rows with and without it cannot share a forward pass: requests are
grouped by their adapters (`DiffusionRequest.shape`), and `switch` changes over when the group changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog
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

# Adapters kept in memory beside those in use; the one used longest ago goes first.
KEPT = 8
_MOST_REFUSED = 1024

_log = structlog.get_logger(__name__)


class LoadedLora:
    """An adapter that is loaded, by its digest, and stays so for as long as someone has this."""

    __slots__ = ("__weakref__", "digest")

    def __init__(self, digest: str) -> None:
        self.digest = digest


ActiveLoras = tuple[tuple[LoadedLora, float], ...]


def digests_and_weights(used: ActiveLoras) -> tuple[tuple[str, float], ...]:
    """What adapters in use are: the digest of each and its weight."""
    return tuple((held.digest, weight) for held, weight in used)


def add_to_controlnet(controlnet: Any, path: Path) -> None:
    """Put a LoRA on a ControlNet for good. Raises `ModelLoadError` for one of another kind."""
    try:
        file = read_lora(path)
        first = next(iter(file.header.tensors), "").partition(".")[0]
        prefix = first if first in ("transformer", "controlnet", "unet") else None
        controlnet.load_lora_adapter(load(file.data), prefix=prefix, adapter_name="own")
    except ModelLoadError as error:
        raise ModelLoadError(f"CONTROLNET_LORA: {error.detail}") from error
    except Exception as error:  # a file is input, and the library raises whatever it stumbles over
        raise ModelLoadError(f"CONTROLNET_LORA: {path.name} does not fit the ControlNet.") from error
    if "own" not in getattr(controlnet, "peft_config", {}):
        raise ModelLoadError(f"CONTROLNET_LORA: {path.name} holds nothing for the ControlNet.")


class LoraManager:
    """The adapters of one pipeline, loaded when first asked for, by what their files hold. For the device thread alone.

    `always` are (file, weight) of those that belong to the model whatever a request asks for; they are loaded at once.
    `settle` puts the weights where they live between drawings, should a load that failed have left them elsewhere.
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
        # Why a content was refused, which stays so: it is not read through again.
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._always: list[tuple[str, float]] = []
        self._active: list[tuple[str, float]] | None = None
        for number, (file, weight) in enumerate(always):
            key = f"always{number}"
            self._load(key, read_lora(file))
            self._always.append((key, weight))
        self.switch(())

    def use(self, loras: Loras, digests: Sequence[str] = ()) -> ActiveLoras:
        """Turn exactly these adapters on, by name and weight, loading what is not loaded.

        `digests`, one each, say which content is meant under a name; without them it is the present one. Raises
        `InvalidInput` with the reason for an unknown name, a file that does not fit, and one that was replaced.
        """
        wanted: list[tuple[LoadedLora, float]] = []
        for number, (name, weight) in enumerate(loras):
            digest = digests[number] if digests else self._folder.digest(name)
            wanted.append((self._hold(name, digest), weight))
        used = tuple(wanted)
        self.switch(used)
        self._forget()
        return used

    def switch(self, used: ActiveLoras) -> None:
        """Turn on exactly what `use` gave."""
        weights: dict[str, float] = {}
        for held, weight in used:
            key = _key(held.digest)
            weights[key] = weights.get(key, 0.0) + weight  # the library takes one weight of an adapter
        on = [*weights.items(), *self._always]
        if on == self._active:
            return
        self._active = None  # until it has worked
        if on:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters([key for key, _ in on], [weight for _, weight in on])
        elif self._loaded:
            self._pipeline.disable_lora()
        self._active = on

    def _hold(self, name: str, digest: str) -> LoadedLora:
        """The adapter of that digest, loaded."""
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
        self._active = None  # loading one turns it on
        hooked = _hooked(self._pipeline)
        try:
            lora_weights.attach(fitting, self._pipeline, key, file.name)
        except BaseException:
            if _hooked(self._pipeline) != hooked:
                self._settle()
            raise

    def _refuse(self, file: LoraFile, why: str) -> None:
        """Take note of why a content does not fit, which another try will not change."""
        # The same content may lie there under another name.
        self._refused[file.digest] = why.removeprefix(Path(file.name).stem)
        if len(self._refused) > _MOST_REFUSED:
            self._refused.popitem(last=False)
        _log.warning("an adapter is refused", file=file.name, why=why)
        self._folder.refuse(file, self._denoiser, why)

    def _forget(self) -> None:
        """Take off those used longest ago, but none that someone holds."""
        idle = [digest for digest in self._loaded if digest not in self._held]
        for digest in idle[: max(0, len(self._loaded) - KEPT)]:
            lora_weights.detach(self._pipeline, _key(digest))
            del self._loaded[digest]


def _hooked(pipeline: Any) -> list[bool]:
    """Which parts have hooks that move their weights."""
    return [hasattr(part, "_hf_hook") for part in pipeline.components.values()]


def _key(digest: str) -> str:
    """The adapter's name inside the pipeline."""
    return f"lora{digest}"
