"""Builds the engine with the models: what is loaded, how, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from types import MappingProxyType
from typing import Any, Protocol

import structlog

from stable_diffusion_server.app.lifecycle import ProcessHooks
from stable_diffusion_server.app.model_choice import folder_with_models
from stable_diffusion_server.app.model_state import ModelBackend, ModelState
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.app.warmup import warm_up
from stable_diffusion_server.engine import Denoiser, Engine
from stable_diffusion_server.generation import (
    NO_CONTROLNETS,
    DecodedPixels,
    GenerationOptions,
    PromptExpander,
    PromptFiles,
    RequestLimits,
    load_stop_words,
)
from stable_diffusion_server.observability import ConsoleProgress, DeviceRecord, Metrics, ProgressHeartbeat, broadcast
from stable_diffusion_server.pipelines import WeightDigests
from stable_diffusion_server.settings import Settings, SettingsError, set_compiler_cache

_log = structlog.get_logger(__name__)


class ReadinessCheck(Protocol):
    """Reports why the server cannot generate images."""

    def missing(self) -> list[str]:
        """Return the reasons as sentences; empty when the server is ready."""


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
    shares = loaded.shares(settings)
    options = registry.LoadOptions(
        models=loaded.in_order(settings),
        hub=hub,
        digests=WeightDigests(settings.data_dir / "weights.json"),
        cpu_dtypes=registry.CpuDtypes(settings.data_dir / "cpu-dtypes.json", settings.cpu_dtype),
        mapped=settings.mmap_weights,
        loras=loaded.loras,
        embeddings=loaded.embeddings,
        image_prompts=loaded.image_prompts,
        controlnets=loaded.controlnets,
        controlnet_lora=settings.controlnet_lora,
        dfloat11=settings.df11_model_path,
        offload=settings.offload,
        quantize=settings.quantize,
        performance=settings.performance,
        attention_slicing=settings.attention_slicing,
        vae_slicing=settings.vae_slicing,
        vae_tiling=settings.vae_tiling,
        prompt_cache_bytes=settings.prompt_cache_bytes,
        on_demand=loaded.on_demand,
        pinned=frozenset(name for name, facts in loaded.asked.items() if facts.pinned),
        memory=None if settings.model_memory == "auto" else settings.model_memory,
        largest_pixels=settings.max_side**2,
        max_batch=settings.max_batch,
        shares={name: share for name, share in shares.items() if share is not None},
        on_loaded=loaded.loaded,
        on_failed=loaded.failed,
    )
    for note in loaded.notes:
        _log.warning("a remark on the models", why=note)
    for name, why in loaded.unusable.items():
        _log.error("a file in MODELS_DIR cannot be used", model=name, why=why)
    models = registry.load(folder_with_models(settings), settings.device, settings.cpu_threads, options)
    loaded.started(models.models, models.unusable)
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
        there = {name: facts for name, facts in loaded.facts.items() if models.is_loaded(name)}
        warm_up(models, there, settings.warmup_sizes_in_pixels(), pairs=pairs)
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
        switch_patience=settings.model_switch_patience,
    )
    return engine


def generation_options(settings: Settings, loaded: ModelState, stores: StorageStack) -> GenerationOptions:
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
        max_references=settings.max_references,
        max_controls=settings.max_controls,
        max_image_prompts=settings.max_image_prompts,
        max_upscaled_side=settings.max_upscaled_side,
        max_upscaled_pixels=settings.max_upscaled_pixels,
    )
    return GenerationOptions(
        limits,
        settings.text_to_image_model,
        settings.bucket_path,
        settings.embed_metadata,
        None if settings.bumpy_retries == "auto" else int(settings.bumpy_retries),
        MappingProxyType(loaded.facts),
        loaded.offered_loras,
        ownership=stores.ownership,
        credentials=stores.credentials.signer,
        unusable=MappingProxyType(loaded.unusable),
        stop_words=stop_words,
        embeddings=loaded.embeddings,
        controlnets=loaded.controlnets or NO_CONTROLNETS,
        image_prompts=loaded.image_prompts,
    )


def prompt_expander(settings: Settings) -> PromptExpander:
    """Return what expands styles and wildcards; reads no file yet."""
    files = PromptFiles(settings.styles_file, settings.wildcards_dir)
    return PromptExpander(files, settings.max_prompt_characters, settings.expand_wildcards)
