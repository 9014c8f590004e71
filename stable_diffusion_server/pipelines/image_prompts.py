"""Reads the image prompts of requests: by IP-Adapters for a UNet, by FLUX.1 Redux for Flux."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

import torch
from PIL import Image

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.adapters.image_attention import let_attend
from stable_diffusion_server.pipelines.adapters.image_rows import ReadImage
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.loading.compatibility import check_redux
from stable_diffusion_server.pipelines.loading.image_adapter import ImageAdapter, read_image_adapter
from stable_diffusion_server.pipelines.loading.image_prompt_folder import (
    KEPT_ADAPTERS,
    ImagePromptFile,
    ImagePromptFolder,
)
from stable_diffusion_server.pipelines.loading.redux_encoder import load_redux
from stable_diffusion_server.pipelines.loading.vision_encoder import VisionEncoder, load_vision_encoder
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import DiffusionRequest, PromptImage


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedImageAdapter:
    """A loaded adapter by the digest of it and its encoder; it stays loaded while a reference to this exists."""

    file: ImagePromptFile
    adapter: ImageAdapter


class ImagePromptReader:
    """Reads image prompts for one model, whose UNet learns to attend to them at the first one. Thread-safe.

    Tokens are kept in `cache` by image, adapter, encoder and dtype.
    """

    def __init__(
        self, unet: Any, spec: ModelSpec, folder: ImagePromptFolder, cache: PromptCache, device: torch.device
    ) -> None:
        self._unet, self._spec, self._folder, self._cache, self._device = unet, spec, folder, cache, device
        self._lock = RLock()
        self._held: WeakValueDictionary[str, LoadedImageAdapter] = WeakValueDictionary()
        self._recent: OrderedDict[str, LoadedImageAdapter] = OrderedDict()
        self._encoder: tuple[object, VisionEncoder] | None = None

    def use(self, request: DiffusionRequest, dtype: torch.dtype, *, guided: bool) -> tuple[ReadImage, ...]:
        """The image prompts of a request; with a row for the negative prompt if it is `guided`.

        Raises `InvalidInput` with the reason for a file that does not fit the model, or was replaced.
        """
        read = []
        for number, prompt in enumerate(request.image_prompts):
            try:
                held = self._hold(prompt, dtype)
                seen, unseen = self._tokens(held, prompt, dtype)
            except (InvalidInput, ModelLoadError) as error:
                field = f"image_prompts[{number}].model"
                raise InvalidInput(f"{field}: {error.detail}", field=field) from error
            tokens = torch.cat([unseen, seen]) if guided else seen
            layers = held.adapter.layers
            read.append(ReadImage(layers, tokens, prompt.weight, prompt.start, prompt.end, held))
        return tuple(read)

    def _hold(self, prompt: PromptImage, dtype: torch.dtype) -> LoadedImageAdapter:
        with self._lock:
            key = f"{prompt.revision} {dtype}"
            held = self._held.get(key)
            if held is None:
                file = current_file(self._folder, prompt.name, prompt.revision, self._spec)
                let_attend(self._unet)
                adapter = read_image_adapter(file.path, self._unet, dtype, self._device)
                current_file(
                    self._folder, prompt.name, prompt.revision, self._spec
                )  # it may have been replaced while it was read
                held = self._held[key] = LoadedImageAdapter(file, adapter)
            self._recent[key] = held
            self._recent.move_to_end(key)
            if len(self._recent) > KEPT_ADAPTERS:
                self._recent.popitem(last=False)
            return held

    def _tokens(
        self, held: LoadedImageAdapter, prompt: PromptImage, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of an image and of none, each 1 × tokens × channels."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            with self._lock:
                encoder = self._encoder_of(held.file, dtype)
                features = encoder.read(prompt.image, pooled=held.adapter.pooled)
            seen, unseen = (held.adapter.projection(one.to(dtype)) for one in features)
            if not (torch.isfinite(seen).all() and torch.isfinite(unseen).all()):
                raise InvalidInput(f"{held.file.name} gives numbers that are not finite.")
            return seen, unseen

        return self._cache.get_or_create(("image prompt", prompt.image.digest, prompt.revision, dtype), make)

    def _encoder_of(self, file: ImagePromptFile, dtype: torch.dtype) -> VisionEncoder:
        """The encoder of an adapter; the last one used stays in the memory of the machine."""
        key = (file.encoder_digest, dtype)
        if self._encoder is None or self._encoder[0] != key:
            self._encoder = None
            encoder = load_vision_encoder(file.encoder, dtype, self._device)
            current_file(self._folder, file.name, file.digest, self._spec)
            self._encoder = key, encoder
        return self._encoder[1]


class ReduxReader:
    """Reads image prompts for a Flux by folders of FLUX.1 Redux, one at a time. Thread-safe.

    Its weights stay in the memory of the machine, and are on the device while it reads an image.
    """

    def __init__(
        self, pipeline: Any, spec: ModelSpec, folder: ImagePromptFolder, cache: PromptCache, device: torch.device
    ) -> None:
        self._pipeline, self._spec, self._folder, self._cache, self._device = pipeline, spec, folder, cache, device
        self._lock = RLock()
        self._loaded: tuple[object, Any] | None = None

    def use(self, request: DiffusionRequest, dtype: torch.dtype) -> torch.Tensor:
        """The tokens of a request's image prompts: images × tokens × channels.

        Raises `InvalidInput` with the reason for a folder that does not fit the model, or was replaced.
        """
        read: list[torch.Tensor] = []
        for number, prompt in enumerate(request.image_prompts):
            key = ("image prompt", prompt.image.digest, prompt.revision, dtype)
            try:
                read += self._cache.get_or_create(key, lambda prompt=prompt: (self._read(prompt, dtype),))  # type: ignore[misc]  # bound at once
            except (InvalidInput, ModelLoadError) as error:
                field = f"image_prompts[{number}].model"
                raise InvalidInput(f"{field}: {error.detail}", field=field) from error
        return torch.cat(read)

    def _read(self, prompt: PromptImage, dtype: torch.dtype) -> torch.Tensor:
        with self._lock:
            network = self._network(prompt, dtype)
            try:
                seen: torch.Tensor = network.to(self._device)([Image.fromarray(prompt.image.pixels)])
            finally:
                if self._device.type != "cpu":
                    network.to("cpu")
            return seen.to(dtype)

    def _network(self, prompt: PromptImage, dtype: torch.dtype) -> Any:
        key = (prompt.revision, dtype)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            file = current_file(self._folder, prompt.name, prompt.revision, self._spec)
            try:
                network = load_redux(file.path, file.name, dtype, self._spec.variant, meta=False)
            except ModelLoadError:
                raise
            except Exception as error:  # the folder is input, and the libraries raise many types
                raise ModelLoadError(f"{file.name} is no folder of FLUX.1 Redux that can be read.") from error
            check_redux(file.name, self._pipeline, network.image_embedder)
            current_file(self._folder, prompt.name, prompt.revision, self._spec)
            self._loaded = key, network
        return self._loaded[1]


def current_file(folder: ImagePromptFolder, name: str, revision: str, spec: ModelSpec) -> ImagePromptFile:
    """The file of a name, if it has this digest still. Raises `InvalidInput`."""
    file = folder.find(name, spec)
    if file.digest != revision:
        raise InvalidInput(f"{name} was replaced while the order waited; ask again.")
    return file
