"""Registers the gauges of the engine, jobs, storage and models."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator

from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.app.models import ReadinessCheck
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.engine import Engine
from stable_diffusion_server.generation import DecodedPixels
from stable_diffusion_server.jobs import JobManager
from stable_diffusion_server.observability import Metrics, Sample

_MODEL = ("name", "folder", "revision", "device", "dtype", "residency", "quantization")


def register_metrics(
    metrics: Metrics,
    version: str,
    engine: Engine[DecodedPixels],
    jobs: JobManager,
    stores: StorageStack,
    loaded: ModelState,
    readiness: ReadinessCheck,
) -> None:
    """Register all gauges. Each scrape reads their current values."""
    metrics.register_info("sds_build_info", "What runs", {"version": version, "python": platform.python_version()})
    metrics.register_gauge("sds_ready", "1 while the server can draw", lambda: float(not readiness.missing()))
    _register_engine(metrics, engine)
    _register_stores(metrics, jobs, stores)
    _register_models(metrics, loaded)


def _register_engine(metrics: Metrics, engine: Engine[DecodedPixels]) -> None:
    def caps() -> Iterator[Sample]:
        for timings in engine.step_timings():
            yield (timings.label,), timings.cap

    def step_seconds() -> Iterator[Sample]:
        for timings in engine.step_timings():
            for size, seconds in timings.step_seconds.items():
                yield (timings.label, str(size)), seconds

    metrics.register_gauge("sds_queue_waiting", "Jobs waiting", lambda: float(engine.waiting))
    metrics.register_gauge("sds_queue_running", "Jobs on the device", lambda: float(engine.running))
    metrics.register_gauge("sds_batch_cap", "Most jobs of a shape that share a step", caps, ["shape"])
    metrics.register_gauge("sds_step_seconds", "Seconds of one step, measured", step_seconds, ["shape", "jobs"])


def _register_stores(metrics: Metrics, jobs: JobManager, stores: StorageStack) -> None:
    def accepted() -> Iterator[Sample]:
        yield ("waiting",), jobs.waiting
        yield ("running",), jobs.running

    metrics.register_gauge("sds_accepted_jobs", "Accepted jobs that have not ended", accepted, ["state"])
    metrics.register_gauge(
        "sds_journal_bytes", "Bytes on disk of the journal of jobs", lambda: float(jobs.store_bytes())
    )
    metrics.register_gauge("sds_journal_usable", "1 while jobs can be written down", lambda: float(jobs.usable))

    def waiting(name: str) -> Callable[[], float]:
        return lambda: float(stores.waiting().get(name, 0))

    metrics.register_gauge("sds_spool_pictures", "Pictures that wait for the storage", waiting("pictures"))
    metrics.register_gauge("sds_spool_bytes", "Bytes on disk of the pictures that wait", waiting("bytes"))
    metrics.register_gauge(
        "sds_spool_oldest_seconds", "Age of the oldest picture that waits", waiting("oldest_seconds")
    )
    metrics.register_gauge("sds_dead_letters", "Pictures that the storage refused for good", waiting("dead_letters"))
    metrics.register_gauge("sds_storage_failures", "Times the storage was found down", waiting("failures"), counts=True)


def _in_memory(loaded: ModelState) -> list[dict[str, object]]:
    return [model for model in loaded.describe() if model["device"]]


def _register_models(metrics: Metrics, loaded: ModelState) -> None:
    def models() -> Iterator[Sample]:
        for model in _in_memory(loaded):
            yield tuple(str(model[fact]) for fact in _MODEL), 1

    def sizes() -> Iterator[Sample]:
        for model in _in_memory(loaded):
            yield (str(model["name"]),), float(str(model["bytes"]))

    def memory() -> Iterator[Sample]:
        for device, kinds in loaded.memory().items():
            for kind, size in kinds.items():
                yield (device, kind), size

    metrics.register_gauge("sds_model_info", "The models that draw", models, _MODEL)
    metrics.register_gauge("sds_model_bytes", "Bytes of a model's weights", sizes, ["name"])

    def caches() -> Iterator[Sample]:
        for name, size in loaded.prompt_caches().items():
            yield (name,), size

    metrics.register_gauge("sds_prompt_cache_bytes", "Bytes of encoded prompts that are kept", caches, ["name"])
    metrics.register_gauge("sds_device_memory_bytes", "Memory of the devices that draw", memory, ["device", "kind"])
