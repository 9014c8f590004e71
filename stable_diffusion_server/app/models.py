"""Builds what draws: the engine over the models, the observers of its events, and the bounds of an order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import Any, Protocol

import structlog

from stable_diffusion_server.app.warmup import warm_up
from stable_diffusion_server.engine import Denoiser, DenoiserCapabilities, Engine
from stable_diffusion_server.errors import ModelLoadError, NotReady
from stable_diffusion_server.generation import GenerationOptions, RequestLimits
from stable_diffusion_server.imaging import DEFAULT_FORMATS, DecoderPool
from stable_diffusion_server.net import AllowedTarget, FetchLimits, ImageFetcher
from stable_diffusion_server.observability import ConsoleProgress, Metrics, ProgressHeartbeat, broadcast
from stable_diffusion_server.pipelines import (
    MODELS,
    REAL_MODELS,
    LoraFolder,
    ModelSpec,
    WeightDigests,
    choose_models,
    with_lcm,
    with_quantization,
    without_identity,
)
from stable_diffusion_server.settings import Settings, SettingsError, set_compiler_cache

_log = structlog.get_logger(__name__)


class ModelBackend(Denoiser[Any, Any], Protocol):
    """What draws, and what counts a prompt's tokens as the model reads them."""

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Safe from any thread."""


@dataclass(slots=True)
class ModelState:
    """The models that draw: what is known of them before, and they themselves once the engine's thread has them.

    `facts` are those of the models the settings ask for (`asked`) until those that were loaded take their places, with
    the revision their files have; `unusable` says why others were not. `fault` says why there can be no model at all,
    `usual` which model draws what names none, `progress` how far a download is, `loras` the folder of
    adapters.
    """

    facts: dict[str, ModelSpec]
    fault: ModelLoadError | None = None
    usual: str = next(iter(MODELS))
    asked: Mapping[str, ModelSpec] = field(default_factory=dict)
    models: ModelBackend | None = None
    unusable: dict[str, str] = field(default_factory=dict)
    progress: Callable[[], str] = str
    loras: LoraFolder = field(default_factory=lambda: LoraFolder(None))

    @classmethod
    def of(cls, settings: Settings) -> ModelState:
        """What the settings ask for, by what lies in the models' folder."""
        check_model_names(settings)
        folders = {facts.folder for candidates in REAL_MODELS.values() for facts in candidates}
        places = {folder: settings.models_dir / folder for folder in folders}
        # A link that leads nowhere is a model too: it is told of, and not passed over.
        present = [folder for folder, place in places.items() if place.is_dir() or place.is_symlink()]
        wanted = settings.hub_models or (settings.text_to_image_model,)
        try:
            chosen = choose_models(settings.models, present, wanted)
        except ModelLoadError as error:
            return cls(dict(MODELS), error, settings.text_to_image_model, loras=_loras_of(settings))
        lcm = with_lcm if settings.load_lcm_lora else lambda facts: facts
        asked = {name: with_quantization(lcm(facts), settings.quantize) for name, facts in chosen.items()}
        unread = {name: without_identity(facts) for name, facts in asked.items()}
        return cls(unread, usual=settings.text_to_image_model, asked=asked, loras=_loras_of(settings))

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Raises `NotReady` until the models are loaded."""
        if self.models is None:
            raise NotReady("The models are loading.", retry_after=5)
        return self.models.count_tokens(model, prompt)

    def describe(self) -> list[dict[str, object]]:
        """What is loaded, for people: name, folder, revision, device, placement, bytes and adapters of each model.

        And what it does where an order leaves it open: whether it is taken, its steps, guidance and native pixels.
        Reads the folder of adapters: those are told that can be used now, and why the others cannot.
        """
        usual = self.usual if self.usual in self.facts else next(iter(self.facts), "")
        return [
            {
                **asdict(model),
                "usual": model.name == usual,
                **_habits(self.facts[model.name]),
                **self._adapters_told(self.facts[model.name]),
            }
            for model in getattr(self.models, "loaded", ())
        ]

    def offered_loras(self) -> Mapping[str, str]:
        """The adapters that a model here can be drawn with, each with its digest, which is read when looked up."""
        return self.loras.available({facts.denoiser_part for facts in self.facts.values()})

    def _adapters_told(self, facts: ModelSpec) -> dict[str, object]:
        return {
            "loras": self.loras.names({facts.denoiser_part}),
            "unusable_loras": list(self.loras.faults().values()),
        }

    def missing(self) -> list[str]:
        """What is not as it was asked for, in sentences, though others draw: the model that draws what names none."""
        return [self.unusable[self.usual]] if self.usual in self.unusable else []

    def remarks(self) -> list[str]:
        """What the models that draw do without, and which other one cannot draw, in sentences."""
        told = [remark for model in getattr(self.models, "loaded", ()) for remark in model.remarks]
        return [*told, *(why for name, why in self.unusable.items() if name != self.usual)]

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes of memory by device and kind; nothing before the models are loaded."""
        read: Callable[[], Mapping[str, Mapping[str, int]]] = getattr(self.models, "memory", dict)
        return read()

    def prompt_caches(self) -> Mapping[str, int]:
        """Bytes of encoded prompts that are kept, by model."""
        read: Callable[[], Mapping[str, int]] = getattr(self.models, "prompt_caches", dict)
        return read()


def check_model_names(settings: Settings) -> None:
    """Raise `SettingsError` for a model that TEXT_TO_IMAGE_MODEL or MODEL_ALIASES names and the catalogue lacks."""
    names = sorted({*MODELS, *REAL_MODELS})
    known = ", ".join(names)
    if settings.text_to_image_model not in names:
        raise SettingsError(f"TEXT_TO_IMAGE_MODEL {settings.text_to_image_model!r} is not one of {known}.")
    for alias in settings.model_aliases:
        if "=" in alias and alias.partition("=")[2] not in names:
            raise SettingsError(f"MODEL_ALIASES {alias!r} names a model other than {known}.")


def _loras_of(settings: Settings) -> LoraFolder:
    return LoraFolder(settings.lora_dir, settings.max_lora_bytes)


def _habits(facts: ModelSpec) -> dict[str, object]:
    return {
        "default_steps": facts.default_steps,
        "default_guidance": facts.default_guidance,
        "native_pixels": facts.native_pixels,
        "takes_negative_prompt": facts.takes_negative_prompt,
        "takes_guidance": facts.takes_guidance,
    }


def load_models(settings: Settings, loaded: ModelState) -> ModelBackend:
    """The models of the settings, loaded. Takes seconds. Raises `ModelLoadError`."""
    if loaded.fault is not None:
        raise loaded.fault
    set_compiler_cache((settings.data_dir / "compiled").resolve())
    # Imported here, on the engine's thread: torch takes seconds, and the port should answer meanwhile.
    from stable_diffusion_server.pipelines import HubClient, registry

    hub = HubClient(settings.revisions(), settings.data_dir / "hub.json") if settings.models == "hub" else None
    if hub is not None:
        loaded.progress = lambda: hub.progress
    options = registry.LoadOptions(
        models=loaded.asked,
        fallbacks=MODELS if settings.models == "auto" else {},
        hub=hub,
        digests=WeightDigests(settings.data_dir / "weights.json"),
        mapped=settings.mmap_weights,
        loras=loaded.loras,
        controlnet_lora=settings.controlnet_lora,
        dfloat11=settings.df11_model_path,
        offload=settings.offload,
        quantize=settings.quantize,
        performance=settings.performance,
        attention_slicing=settings.attention_slicing,
        vae_slicing=settings.vae_slicing,
        vae_tiling=settings.vae_tiling,
        prompt_cache_bytes=settings.prompt_cache_bytes,
    )
    models = registry.load(settings.models_dir, settings.device, settings.cpu_threads, options)
    loaded.unusable.update(models.unusable)
    for name in models.unusable:
        del loaded.facts[name]
    loaded.facts.update(models.models)
    return models


def build_engine(
    settings: Settings,
    loaded: ModelState,
    load: Callable[[Settings], ModelBackend] | None,
    metrics: Metrics,
    settle: Callable[[], object],
    ready: Callable[[], object],
    poisoned: Callable[[], object],
    occupied: Callable[[list[str], bool], object],
) -> Engine[Any, Any]:
    """The engine with the observers of its events, not started."""

    def load_and_tell() -> ModelBackend:
        started = perf_counter()
        loaded.models = load(settings) if load is not None else load_models(settings, loaded)
        _log.info("models loaded", seconds=round(perf_counter() - started, 1))
        return loaded.models

    def begin(models: Denoiser[Any, Any], abilities: DenoiserCapabilities) -> None:
        together = settings.max_batch > 1
        warm_up(models, abilities, loaded.facts, settings.warmup_sizes_in_pixels(), together=together)
        settle()

    observers = (
        metrics.observe,
        ConsoleProgress().observe,
        ProgressHeartbeat(settings.data_dir / "progress.txt").observe,
    )
    engine: Engine[Any, Any] = Engine(
        load_and_tell,
        queue_limit=settings.queue_limit,
        max_batch=settings.max_batch,
        workers=settings.engine_workers,
        learn=True,
        observe=broadcast(observers),
        on_loaded=begin,
        on_ready=ready,
        on_device_lost=poisoned,
        on_occupancy=occupied,
    )
    return engine


def generation_options(settings: Settings, loaded: ModelState) -> GenerationOptions:
    """What an order may ask for, and what is taken where it asks for nothing."""
    limits = RequestLimits(
        min_side=settings.min_side,
        max_side=settings.max_side,
        max_steps=settings.max_steps,
        max_guidance=settings.max_guidance,
        max_prompt_characters=settings.max_prompt_characters,
        max_timeout=settings.max_timeout,
    )
    return GenerationOptions(
        limits,
        settings.text_to_image_model,
        settings.bucket_path,
        settings.embed_metadata,
        None if settings.bumpy_retries == "auto" else int(settings.bumpy_retries),
        MappingProxyType(loaded.facts),
        loaded.offered_loras,
        unusable=MappingProxyType(loaded.unusable),
    )


def build_readers(settings: Settings) -> tuple[ImageFetcher, DecoderPool]:
    """What turns URLs into bytes, and bytes into pixels; nothing is started before the first picture."""
    formats = (*DEFAULT_FORMATS, *(name.upper() for name in settings.extra_image_formats))
    fetcher = ImageFetcher(
        FetchLimits(max_bytes=settings.max_image_bytes, total=settings.fetch_timeout),
        [AllowedTarget.parse(entry) for entry in settings.fetch_allow],
        formats=formats,
    )
    decoder = DecoderPool(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        max_side=settings.max_image_side,
        processes=settings.decode_processes,
        seconds=settings.decode_timeout,
        formats=formats,
    )
    return fetcher, decoder
