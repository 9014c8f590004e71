"""Builds the engine with the models, and holds the state of the models before and after loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import Any, Protocol

import structlog

from stable_diffusion_server.app.lifecycle import ProcessHooks
from stable_diffusion_server.app.model_choice import check_model_names, choose_from_folder, folder_with_models
from stable_diffusion_server.app.warmup import warm_up
from stable_diffusion_server.engine import Denoiser, Engine
from stable_diffusion_server.errors import ModelLoadError, NotReady
from stable_diffusion_server.generation import DecodedPixels, GenerationOptions, RequestLimits, load_stop_words
from stable_diffusion_server.observability import ConsoleProgress, DeviceRecord, Metrics, ProgressHeartbeat, broadcast
from stable_diffusion_server.pipelines import (
    MODELS,
    LoraFolder,
    ModelSpec,
    ModelTable,
    WeightDigests,
    with_lcm,
    with_quantization,
    without_identity,
)
from stable_diffusion_server.settings import Settings, SettingsError, set_compiler_cache

_log = structlog.get_logger(__name__)


class ModelBackend(Denoiser[Any, DecodedPixels], Protocol):
    """A denoiser that also counts the tokens of a prompt."""

    def count_tokens(self, model: str, prompt: str) -> int:
        """Return the number of tokens of a prompt for a model. Thread-safe."""


class ReadinessCheck(Protocol):
    """Reports why the server cannot generate images."""

    def missing(self) -> list[str]:
        """Return the reasons as sentences; empty when the server is ready."""


@dataclass(slots=True)
class ModelState:
    """The models: their specs before they are loaded, the backend afterwards.

    `facts` holds the specs of the configured models (`asked`); loading replaces them by specs with the revision of the
    files. `unusable` maps models that could not be loaded to the reason. `fault` is the reason if no model can be
    loaded, `default_model` is for requests that name no model, `progress` returns the state of a download as a text,
    `loras` is the folder of LoRAs, `notes` are remarks on the files in MODELS_DIR.
    """

    facts: dict[str, ModelSpec]
    fault: ModelLoadError | None = None
    default_model: str = next(iter(MODELS))
    asked: Mapping[str, ModelSpec] = field(default_factory=dict)
    models: ModelBackend | None = None
    unusable: dict[str, str] = field(default_factory=dict)
    progress: Callable[[], str] = str
    loras: LoraFolder = field(default_factory=lambda: LoraFolder(None))
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> ModelState:
        """Choose the models by the settings and by the files in MODELS_DIR. Raises `SettingsError`."""
        loras, default = _loras_of(settings), settings.text_to_image_model
        try:
            chosen, refused, notes = choose_from_folder(settings)
        except ModelLoadError as error:
            check_model_names(settings, MODELS)
            return cls(dict(MODELS), error, default, loras=loras)
        check_model_names(settings, {*chosen, *chosen.aliases, *refused})
        lcm = with_lcm if settings.load_lcm_lora else lambda facts: facts
        asked = {
            name: with_quantization(lcm(facts), facts.quantize or settings.quantize) for name, facts in chosen.items()
        }
        unread = ModelTable({name: without_identity(facts) for name, facts in asked.items()}, chosen.aliases)
        return cls(unread, default_model=default, asked=asked, unusable=dict(refused), loras=loras, notes=notes)

    def count_tokens(self, model: str, prompt: str) -> int:
        """Return the number of tokens of a prompt for a model. Raises `NotReady` until the models are loaded."""
        if self.models is None:
            raise NotReady("The models are loading.", retry_after=5)
        return self.models.count_tokens(model, prompt)

    def describe(self) -> list[dict[str, object]]:
        """Describe each loaded model: name, folder, revision, device, placement, bytes, defaults and LoRAs.

        Reads the LoRA folder: lists the usable LoRAs, and for the others the reason.
        """
        default = self.default_model if self.default_model in self.facts else next(iter(self.facts), "")
        return [
            {
                **asdict(model),
                "usual": model.name == default,
                **_defaults_of(self.facts[model.name]),
                **self._adapters_of(self.facts[model.name]),
            }
            for model in getattr(self.models, "loaded", ())
        ]

    def offered_loras(self) -> Mapping[str, str]:
        """Return the LoRAs that fit a loaded model, with their digests, which are computed at lookup."""
        return self.loras.available({facts.denoiser_part for facts in self.facts.values()})

    def _adapters_of(self, facts: ModelSpec) -> dict[str, object]:
        return {
            "loras": self.loras.names({facts.denoiser_part}),
            "unusable_loras": list(self.loras.faults().values()),
        }

    def missing(self) -> list[str]:
        """Return why the default model could not be loaded; empty if it was loaded, even if other models were not."""
        return [self.unusable[self.default_model]] if self.default_model in self.unusable else []

    def remarks(self) -> list[str]:
        """Return limitations of the loaded models, and why other models could not be loaded, as sentences."""
        remarks = [remark for model in getattr(self.models, "loaded", ()) for remark in model.remarks]
        others = (why for name, why in self.unusable.items() if name != self.default_model)
        return [*dict.fromkeys([*self.notes, *remarks, *others])]

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Return the bytes of memory by device and kind; empty before the models are loaded."""
        read: Callable[[], Mapping[str, Mapping[str, int]]] = getattr(self.models, "memory", dict)
        return read()

    def prompt_caches(self) -> Mapping[str, int]:
        """Return the bytes of cached prompt embeddings by model."""
        read: Callable[[], Mapping[str, int]] = getattr(self.models, "prompt_caches", dict)
        return read()


def _loras_of(settings: Settings) -> LoraFolder:
    return LoraFolder(settings.lora_dir, settings.max_lora_bytes)


def _defaults_of(facts: ModelSpec) -> dict[str, object]:
    return {
        "default_steps": facts.default_steps,
        "default_guidance": facts.default_guidance,
        "native_pixels": facts.native_pixels,
        "takes_negative_prompt": facts.takes_negative_prompt,
        "takes_guidance": facts.takes_guidance,
    }


def load_models(settings: Settings, loaded: ModelState) -> ModelBackend:
    """Load the models in the settings; takes seconds. Raises `ModelLoadError`."""
    if loaded.fault is not None:
        raise loaded.fault
    set_compiler_cache((settings.data_dir / "compiled").resolve())
    # Imported on the engine's thread: importing torch takes seconds, and the server should answer meanwhile.
    from stable_diffusion_server.pipelines import HubClient, registry

    hub = HubClient(settings.revisions(), settings.data_dir / "hub.json") if settings.models == "hub" else None
    if hub is not None:
        loaded.progress = lambda: hub.progress
    options = registry.LoadOptions(
        models=loaded.asked,
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
    for note in loaded.notes:
        _log.warning("a spec has keys without an effect", why=note)
    for name, why in loaded.unusable.items():
        _log.error("a file in MODELS_DIR cannot be used", model=name, why=why)
    models = registry.load(folder_with_models(settings), settings.device, settings.cpu_threads, options)
    loaded.unusable.update(models.unusable)
    loaded.unusable.update(
        (alias, models.unusable[name])
        for alias, name in getattr(loaded.facts, "aliases", {}).items()
        if name in models.unusable
    )
    for name in models.unusable:
        del loaded.facts[name]
    loaded.facts.update(models.models)
    return models


def build_engine(
    settings: Settings,
    loaded: ModelState,
    load: Callable[[Settings], ModelBackend] | None,
    metrics: Metrics,
    hooks: ProcessHooks,
    readiness: ReadinessCheck,
    record: DeviceRecord,
) -> Engine[DecodedPixels]:
    """Build the engine with the observers of its events; does not start it.

    The engine calls `hooks.ready` when the models are loaded and `readiness` has no reasons. `record` receives the ids
    of the jobs on the device.
    """

    def load_and_log() -> ModelBackend:
        started = perf_counter()
        loaded.models = load(settings) if load is not None else load_models(settings, loaded)
        _log.info("models loaded", seconds=round(perf_counter() - started, 1))
        return loaded.models

    def warm_up_all(models: Denoiser[Any, DecodedPixels]) -> None:
        pairs = settings.max_batch > 1
        warm_up(models, loaded.facts, settings.warmup_sizes_in_pixels(), pairs=pairs)
        hooks.libraries_loaded()

    def announce() -> None:
        if not readiness.missing():
            hooks.ready()

    observers = (
        metrics.observe,
        ConsoleProgress().observe,
        ProgressHeartbeat(settings.data_dir / "progress.txt").observe,
    )
    engine: Engine[DecodedPixels] = Engine(
        load_and_log,
        queue_limit=settings.queue_limit,
        max_batch=settings.max_batch,
        workers=settings.engine_workers,
        learn=True,
        observe=broadcast(observers),
        on_loaded=warm_up_all,
        on_ready=announce,
        on_device_lost=hooks.device_lost,
        on_occupancy=record.update,
    )
    return engine


def generation_options(settings: Settings, loaded: ModelState) -> GenerationOptions:
    """Return the limits and the defaults of requests. Raises `SettingsError` if the stop words cannot be loaded."""
    try:
        stop_words = load_stop_words(settings.stop_words)
    except LookupError as error:
        raise SettingsError(str(error)) from error
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
        stop_words=stop_words,
    )
