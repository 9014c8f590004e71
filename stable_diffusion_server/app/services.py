"""Builds the use cases: the generation service, the readers of input images, and the job manager."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Self

from stable_diffusion_server.api import job_body, webhook_message
from stable_diffusion_server.app.detectors import Detectors
from stable_diffusion_server.app.key_callers import callers_of_keys
from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.app.preprocessors import Preprocessors
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.engine import Engine
from stable_diffusion_server.generation import DecodedPixels, GenerationOptions, GenerationService, PromptExpander
from stable_diffusion_server.imaging import DEFAULT_FORMATS, DecoderPool
from stable_diffusion_server.jobs import JobManager, JobPolicy, JobRecord, JobStatus, SqliteJobStore
from stable_diffusion_server.net import AllowedTarget, FetchLimits, ImageFetcher, WebhookClient
from stable_diffusion_server.observability import DeviceRecord, Tracing, UsageMetrics
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.pipelines import PictureModelFiles, VisionWorker
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import Caller

# Threads of the process for models, at most half of the cores: the engine needs the others.
_VISION_THREADS = 4


@dataclass(frozen=True, slots=True)
class ImageReaders:
    """Download images from URLs, and decode them to pixels. Nothing starts before the first image."""

    fetcher: ImageFetcher
    decoder: DecoderPool

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Build the readers with the limits of the settings."""
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
        return cls(fetcher, decoder)

    async def close(self) -> None:
        """Close connections and stop processes."""
        self.fetcher.close()
        await self.decoder.close()


@dataclass(frozen=True, slots=True)
class PictureVision:
    """The models that look at pictures, and the process that runs them, which starts with the first use."""

    files: PictureModelFiles
    worker: VisionWorker

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Build both from the settings; reads and starts nothing."""
        files = PictureModelFiles(settings.models_dir, settings.data_dir / "picture-models.json")
        threads = max(1, min(_VISION_THREADS, (os.cpu_count() or 2) // 2))
        worker = VisionWorker(memory=settings.vision_memory, seconds=settings.vision_timeout, threads=threads)
        return cls(files, worker)

    def offered(self, options: GenerationOptions) -> GenerationOptions:
        """Return the options with what these models offer to requests: preprocessors and detectors."""
        found = self.files, self.worker
        return replace(options, preprocessor=Preprocessors(*found), detector=Detectors(*found))


def build_service(
    settings: Settings,
    engine: Engine[DecodedPixels],
    models: ModelState,
    options: GenerationOptions,
    stores: StorageStack,
    readers: ImageReaders,
    usage: UsageMetrics,
    tracing: Tracing,
    expander: PromptExpander,
) -> GenerationService:
    """Build the generation service; opens and starts nothing."""
    if stores.credentials.signer is not None:
        stores.credentials.signer.sandbox = readers.decoder.handle_credentials
    return GenerationService(
        stores.bucket,
        engine,
        models.count_tokens,
        options,
        usage,
        fetch=readers.fetcher.fetch,
        decode=readers.decoder.decode,
        known=stores.known,
        record=stores.history.record,
        tracing=tracing,
        log_prompts=settings.log_prompts,
        expander=expander,
    )


def build_jobs(
    settings: Settings, service: GenerationService, stores: StorageStack, record: DeviceRecord
) -> JobManager:
    """Build the job manager for a generation service; opens and starts nothing."""

    def describe(job: JobRecord) -> str | None:
        def url(key: str) -> str:
            return stores.url_at(job.base_url, key)

        return webhook_message(job, url) if job.form else dumps(job_body(JobStatus.from_record(job), url))

    policy = JobPolicy(
        max_queued=settings.jobs_max_queued,
        store_bytes=settings.job_store_bytes,
        concurrency=settings.jobs_concurrency,
        retention_hours=settings.job_retention_hours,
        idempotency_hours=settings.idempotency_hours,
        id_prefix=settings.job_id_prefix,
        max_seconds=settings.max_timeout,
        webhook_secret=settings.webhook_secret.get_secret_value(),
    )
    store = SqliteJobStore(settings.data_dir / "journal.db", settings.job_store_bytes)
    transport = WebhookClient(settings.fetch_timeout, [AllowedTarget.parse(entry) for entry in settings.fetch_allow])
    callers = callers_of_keys(settings)

    def refresh(caller: Caller) -> Caller:
        return callers.get(caller.name, caller)

    return JobManager(service, store, policy, describe, transport, record, refresh)
